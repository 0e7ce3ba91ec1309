"""Noise schedules of the variance-preserving process x_t = α_t x_0 + σ_t ε, α² + σ² = 1 (Ho 2020, eq. 4).

Times are t = 0 … T − 1 from least to most noise, as in diffusers (t − 1 of the paper); real times lie
between. Tables are float64 numpy: differences such as 1 − ᾱ_t/ᾱ_{t−1} ≈ 1e-4 do not survive float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from gzcli.core.errors import UsageError

ScheduleName = Literal["linear", "cosine"]
Spacing = Literal["trailing", "leading", "linspace", "karras", "logsnr"]

Shift = float | Literal["auto"]

UNSHIFTED = 64.0  # the side up to which noise is not shifted
SIGMA_MAX = 80.0  # the noise-to-signal ratio σ/α at which EDM starts (Karras 2022, table 1)


class Level(NamedTuple):
    """A noise level on a sampler's path: x = alpha x_0 + sigma ε at time t."""

    t: float
    alpha: float
    sigma: float


def clean(t: float) -> Level:
    """The end of a path, the image without noise, at the time t that a family of models gives it."""
    return Level(t, 1.0, 0.0)


def shift_of(shift: Shift, shape: Sequence[int]) -> float:
    """The factor s of the noise-to-signal ratio σ/α for images, or latents, of a shape [C, H, W]: log SNR
    falls by 2 log s.

    `auto` is side / 64, and 1 for smaller sides, as neighbouring pixels of larger images say the same more
    often (Hoogeboom 2023, arXiv:2301.11093, eq. 3; Esser 2024, arXiv:2403.03206, eq. 23). Raises UsageError
    for a factor that is not above 0.
    """
    if shift == "auto":
        return max(1.0, math.sqrt(shape[1] * shape[2]) / UNSHIFTED)
    if not shift > 0:
        raise UsageError(
            f"noise shifted by a factor of {shift:g}", hint="set `model.shift` above 0, or `auto`"
        )
    return float(shift)


class Schedule:
    """The tables alpha and sigma, float64 [T]. Raises UsageError for fewer than two timesteps.

    shift: factor of σ/α, as `shift_of` finds it.
    """

    def __init__(self, name: ScheduleName, timesteps: int, *, zero_snr: bool = False, shift: float = 1.0):
        if timesteps < 2:
            raise UsageError(f"a diffusion of {timesteps} timesteps: at least 2 are needed")
        alpha_bar = np.cumprod(1 - BETAS[name](timesteps))
        self.alpha = rescale_zero_snr(np.sqrt(alpha_bar)) if zero_snr else np.sqrt(alpha_bar)
        self.sigma = np.sqrt(1 - self.alpha**2)
        if shift != 1:
            norm = np.hypot(self.alpha, shift * self.sigma)
            self.alpha, self.sigma = self.alpha / norm, shift * self.sigma / norm
        self.timesteps = timesteps

    @property
    def snr(self) -> np.ndarray:
        """α²/σ² [T]."""
        return self.alpha**2 / self.sigma**2

    def kl(self, variance: str) -> tuple[np.ndarray, np.ndarray]:
        """a, b [T] of KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) = a_t (x_0 − x̂_0)² + b_t a pixel, for t ≥
        1.

        Means by Ho 2020, eq. 7; p of the "small" variance β̃, where a is half the fall of the SNR (Kingma
        2021, eq. 14) and b = 0, or the "large" β.
        """
        alpha, sigma = np.append(1.0, self.alpha[:-1]), np.append(0.0, self.sigma[:-1])  # at t − 1
        beta = self.sigma**2 - (self.alpha / alpha * sigma) ** 2
        ratio = (sigma / self.sigma) ** 2  # β̃ / β
        pull = (alpha * beta / self.sigma**2) ** 2  # the squared factor of x_0 in the mean
        with np.errstate(divide="ignore", invalid="ignore"):  # t = 0 has no such term
            if variance == "small":
                return pull / (2 * beta * ratio), np.zeros_like(beta)
            return pull / (2 * beta), 0.5 * (ratio - 1 - np.log(ratio))

    def level(self, t: float) -> Level:
        """The level of a real time: α and σ on the chord between their neighbours in the table, scaled so
        that α² + σ² = 1."""
        alpha, sigma = (np.interp(t, np.arange(self.timesteps), a) for a in (self.alpha, self.sigma))
        norm = np.hypot(alpha, sigma)
        return Level(float(t), float(alpha / norm), float(sigma / norm))

    def at_ratio(self, ratio: float) -> Level:
        """The level whose noise-to-signal ratio σ/α is `ratio`, or the nearest finite one."""
        with np.errstate(divide="ignore"):
            known = np.log(self.sigma) - np.log(self.alpha)
        finite = np.isfinite(known)
        return self.level(float(np.interp(math.log(ratio), known[finite], np.arange(self.timesteps)[finite])))

    def path(self, times: Sequence[float]) -> list[Level]:
        """A sampler's path: the levels of falling times, then the clean image."""
        return [*(self.level(t) for t in times), clean(-1.0)]

    def spaced(self, steps: int, spacing: Spacing = "trailing", start: float = 1.0) -> list[Level]:
        """A path of `steps` steps from the noise level at the fraction `start` of T, any number up to its
        timesteps.

        Raises UsageError for no steps, or for more steps than timesteps.

        spacing: where the levels lie: trailing: every T/steps-th from the noisiest on; leading: from the
          cleanest on; linspace: between both (Lin 2023, table 2); karras: even in the 7th root of σ/α (Karras
          2022, eq. 5); logsnr: even in its logarithm.
        """
        top = max(1, round(start * self.timesteps))  # times 0 … top − 1
        if not 1 <= steps <= top:
            raise UsageError(f"{steps} sampling steps over {top} timesteps", hint=f"set `steps` to 1 … {top}")
        if spacing == "trailing":
            times = np.round(top - np.arange(steps) * (top / steps)) - 1
        elif spacing == "leading":
            times = (np.arange(steps) * (top // steps))[::-1]
        elif spacing == "linspace":
            times = np.round(np.linspace(top - 1, 0, steps)) if steps > 1 else np.array([top - 1])
        else:
            with np.errstate(divide="ignore"):
                log_ratio = np.log(self.sigma) - np.log(self.alpha)  # of σ/α, +inf at zero SNR
            last = int(np.searchsorted(log_ratio, np.log(SIGMA_MAX), side="right")) - 1
            high, low = log_ratio[max(0, min(last, top - 1))], log_ratio[0]
            ramp = np.linspace(0, 1, steps)
            if spacing == "karras":
                a, b = np.exp(high / 7), np.exp(low / 7)
                target = 7 * np.log(a + ramp * (b - a))
            else:
                target = high + ramp * (low - high)
            finite = np.isfinite(log_ratio)
            times = np.interp(target, log_ratio[finite], np.arange(self.timesteps)[finite]).clip(max=top - 1)
        return self.path(times.tolist())


def linear_betas(timesteps: int) -> np.ndarray:
    """β from 1e-4 to .02 at T = 1000 (Ho 2020, section 4), scaled so that other T end at the same noise."""
    return np.linspace(1e-4, 0.02, timesteps).clip(max=0.999 * timesteps / 1000) * (1000 / timesteps)


def cosine_betas(timesteps: int) -> np.ndarray:
    """ᾱ(t) = cos² of a ramp with offset .008, β at most .999 (Nichol 2021, eq. 17)."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def rescale_zero_snr(alpha: np.ndarray) -> np.ndarray:
    """α shifted and scaled so that the last is exactly 0 and the first stays (Lin 2023, algorithm 1)."""
    return (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
