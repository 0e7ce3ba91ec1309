"""Stochastic differential equations dx = f(t) x dt + g(t) dw that turn data at t = 0 into noise at t = 1
(Song 2021, 3.4).

The conditional law is known, x_t = α(t) x_0 + σ(t) ε, and so the score of x_t given x_0, −ε/σ (eq. 29).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.models.denoising.schedule import Level, Shift
from gzcli.models.nn import at_least

Spacing = Literal["uniform", "karras", "logsnr"]

BETA_MAX = 20.0  # β at t = 1, of vp and subvp (Song 2021, appendix C)
STOP = 1e-3  # the time at which samplers stop; Tweedie's formula removes the remaining noise (appendix C)


@dataclass(frozen=True)
class SDEOptions:
    """The stochastic differential equation.

    sde: variance preserving (vp), sub-VP (subvp) or variance exploding (ve).
    beta_min: β at t = 0, of vp and subvp; above 0.
    shift: factor of the noise-to-signal ratio √(1 − α²)/α, of vp and subvp; auto: side / 64, at least 1
      (Hoogeboom 2023, arXiv:2301.11093).
    sigma_min: σ at t = 0, of ve, for images in [-1, 1]; above 0.
    sigma_max: σ at t = 1.
    t_min: the least time of training and of likelihoods, 0 … 1. The noise at that time limits the likelihood
      of a constant pixel: with 256 levels σ = .01 costs 1.2 nats, .002 costs .2.
    """

    sde: Literal["vp", "subvp", "ve"] = "vp"
    beta_min: float = 0.1
    shift: Shift = 1.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5


class SDE:
    """An SDE whose conditional law is known. Raises UsageError for a least time outside 0 … 1.

    start: the least time of training; at t = 0 the score has no limit.
    """

    def __init__(self, start: float):
        if not 0 < start < 1:
            raise UsageError(
                f"the least time is in 0 … 1, not {start:g}", hint="set `model.t_min`, such as 1e-5"
            )
        self.start, self.stop = start, max(start, STOP)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times t of any shape."""
        raise NotImplementedError

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and g² at times t of any shape."""
        raise NotImplementedError

    def level(self, t: float) -> Level:
        alpha, sigma = self.marginal(torch.tensor(t, dtype=torch.float64, device="cpu"))
        return Level(t, float(alpha), float(sigma))

    def times(self, log_ratio: np.ndarray) -> np.ndarray:
        """The times at which log σ/α has these values, clamped to the range of times."""
        t = np.geomspace(self.start, 1, 4001)
        alpha, sigma = self.marginal(torch.from_numpy(t))
        return np.interp(log_ratio, (sigma / alpha).log().numpy(), t)

    def spaced(self, steps: int, spacing: Spacing = "karras", strength: float = 1.0) -> list[Level]:
        """`steps` levels from the time `strength` down to the time at which samplers stop. Raises UsageError
        for no steps.

        spacing: uniform: even in t; karras: in the 7th root of σ/α (Karras 2022, eq. 5); logsnr: in its
          logarithm.
        """
        at_least(1, steps=steps)
        ramp, top = np.linspace(0, 1, steps), max(strength, self.stop)
        if spacing == "uniform":
            times = top + ramp * (self.stop - top)
        else:
            high, low = self.log_ratio_at(top), self.log_ratio_at(self.stop)
            if spacing == "karras":
                a, b = math.exp(high / 7), math.exp(low / 7)
                times = self.times(7 * np.log(a + ramp * (b - a)))
            else:
                times = self.times(high + ramp * (low - high))
            times[0] = top
        return [self.level(float(t)) for t in times]

    def rising(self, ratio: float, steps: int) -> list[Level]:
        """The levels of `steps` steps, equal in log σ/α, up to t = 1. Raises UsageError for no steps.

        ratio: σ/α of the first level, which is not below that of the least time.
        """
        at_least(1, steps=steps)
        low, high = max(math.log(ratio), self.log_ratio_at(self.start)), self.log_ratio_at(1.0)
        return [self.level(float(t)) for t in self.times(np.linspace(low, high, steps + 1))]

    def log_ratio_at(self, t: float) -> float:
        """log σ/α."""
        level = self.level(t)
        return math.log(level.sigma / level.alpha)


class VE(SDE):
    """Variance exploding: α = 1, σ grows geometrically from sigma_min to sigma_max (eq. 30)."""

    def __init__(self, start: float, sigma_min: float, sigma_max: float):
        super().__init__(start)
        if not 0 < sigma_min < sigma_max:
            raise UsageError(
                f"noise that grows from {sigma_min:g} to {sigma_max:g}",
                hint="set `model.sigma_min` above 0 and `model.sigma_max` above it",
            )
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.log_ratio * t).exp()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), 2 * self.log_ratio * self.marginal(t)[1] ** 2


class VP(SDE):
    """Variance preserving: β grows linearly, α² + σ² = 1 (eq. 32, 33); DDPM's chain in continuous time.

    shift: s, the factor of √(1 − α²)/α, which is that of another β: s² β / (α² + s² (1 − α²)).
    """

    def __init__(self, start: float, beta_min: float, shift: float = 1.0):
        super().__init__(start)
        if not 0 < beta_min <= BETA_MAX:
            raise UsageError(
                f"a noise rate that grows from {beta_min:g} to {BETA_MAX:g}",
                hint=f"set `model.beta_min` above 0 and to {BETA_MAX:g} at most",
            )
        self.beta_min, self.gain = beta_min, shift**2

    def beta(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (BETA_MAX - self.beta_min) * t
        if self.gain == 1:
            return beta
        kept = self.unshifted(t).exp()
        return self.gain * beta / (kept + self.gain * (1 - kept))

    def decay(self, t: Tensor) -> Tensor:
        """−∫β from 0 to t, which is log α²."""
        decay = self.unshifted(t)
        return decay if self.gain == 1 else -torch.log1p(self.gain * torch.expm1(-decay))

    def unshifted(self, t: Tensor) -> Tensor:
        """log α² without a shift."""
        return -(0.5 * (BETA_MAX - self.beta_min) * t + self.beta_min) * t

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (0.5 * self.decay(t)).exp(), (-torch.expm1(self.decay(t))).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * self.beta(t), self.beta(t)


class SubVP(VP):
    """Less noise than VP at every time, with the same mean: σ = 1 − α² (appendix B, eq. 29)."""

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (0.5 * self.decay(t)).exp(), -torch.expm1(self.decay(t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * self.beta(t), -self.beta(t) * torch.expm1(2 * self.decay(t))


SDES: dict[str, Callable[[SDEOptions, float], SDE]] = {
    "vp": lambda options, shift: VP(options.t_min, options.beta_min, shift),
    "subvp": lambda options, shift: SubVP(options.t_min, options.beta_min, shift),
    "ve": lambda options, _: VE(options.t_min, options.sigma_min, options.sigma_max),
}
