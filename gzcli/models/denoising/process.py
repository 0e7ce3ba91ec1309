"""Gaussian processes x_t = α(t) x_0 + σ(t) ε between data and noise, on which all denoisers are trained.

DiscreteVP: times 0 … T − 1 from the least to the most noise, α² + σ² = 1 (Ho 2020, arXiv:2006.11239), as in
  diffusers, t − 1 of the paper; real times are in between. Its tables are float64 numpy, because differences
  such as 1 − ᾱ_t/ᾱ_{t−1} ≈ 1e-4 do not survive float32.
VP, SubVP, VE: times from data at 0 to noise at 1, by an SDE dx = f x dt + g dw (Song 2021, arXiv:2011.13456).
CondOT: times from noise at 0 to data at 1, on straight lines (Lipman 2022, arXiv:2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from gzcli.core.errors import UsageError
from gzcli.core.types import Noise
from gzcli.models.nn import at_least

Shift = float | Literal["auto"]
TimesT = TypeVar("TimesT", float, Tensor)

UNSHIFTED = 64.0  # the side up to which noise is not shifted
SIGMA_MAX = 80.0  # the noise-to-signal ratio σ/α at which EDM starts (Karras 2022, table 1)
BETA_MAX = 20.0  # β at t = 1, of VP and SubVP (Song 2021, appendix C)
STOP_TIME = 1e-3  # the time at which samplers of an SDE stop (appendix C); Tweedie's formula removes the rest
# σ/α at the ends of a CondOT path: nearly pure noise, and invisible noise
START_RATIO, END_RATIO = 80.0, 0.02
LIKELIHOOD_RATIO = 20.0  # σ/α from which a likelihood takes one step to pure noise, where σ/α is infinite
HALVINGS = 64  # number of bisections that find a time in its range
ERROR_STEPS = 200  # steps in log σ/α to which noise levels for errors of an SDE are rounded


def at_one(function: Callable[[Tensor], Iterable[Tensor]], t: float) -> list[float]:
    """The values of a function at one time, in float64, even while nets are built without values. In that
    mode, constants of torch 2.13 corrupted memory, and the process was killed by a signal later."""
    with unset_fake_temporarily():
        return [float(value) for value in function(torch.tensor(t, dtype=torch.float64, device="cpu"))]


class Level(NamedTuple):
    """The noise of x = alpha x_0 + sigma ε at time t. On a sampler's path the values are numbers. For a batch
    they are tensors: t [B], the others [B, 1, 1, 1]."""

    t: Any
    alpha: Any
    sigma: Any


class Process(nn.Module):
    """A path from data to noise. Its `marginal` defines it: α(t) and σ(t), with σ/α rising from `clean` to
    `noisy`. Everything else follows by autograd and bisection; closed forms may override it.

    Times are numbers, [B], or of any shape that broadcasts with images. Values at times [B] are [B, 1, 1, 1].
    A share of the way from data to noise is 2/π · arctan(σ/α), on any path: .5 is as much noise as image.

    scale: the factor of times t as the network's input; most networks are designed for 0 … 1000.
    clean: the time of data.
    noisy: the time of noise.
    least_alpha: smallest α, if a network's output is divided by it.
    least_sigma: smallest σ, if a network's output is divided by it.
    clock: quantity that a share measures: the noise, or the process's own `time`, as in runs of format 1.
    """

    scale: ClassVar[float] = 1000
    clean: float = 0.0
    noisy: float = 1.0
    least_alpha: float = 0.0
    least_sigma: float = 0.0
    clock: Literal["noise", "time"] = "noise"

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times of any shape."""
        raise NotImplementedError

    # ---- at one time

    def level(self, t: float) -> Level:
        """The level at one time, in float64."""
        return Level(t, *at_one(lambda time: self.levels_at(time)[1:], t))

    def levels_at(self, t: Tensor) -> Level:
        """The levels at times t."""
        alpha, sigma = self.marginal(per_image(t))
        return Level(t, alpha.clamp(min=self.least_alpha), sigma.clamp(min=self.least_sigma))

    def derivatives(self, t: Any) -> tuple[Any, Any]:
        """α′ and σ′ at times."""
        if not isinstance(t, Tensor):
            d_alpha, d_sigma = at_one(self.derivatives, t)
            return d_alpha, d_sigma
        with torch.inference_mode(False), torch.enable_grad():
            t = per_image(t).detach().clone().requires_grad_()
            # a constant has no graph
            values = [(value + 0 * t).sum() for value in self.marginal(t)]
            d_alpha, d_sigma = (torch.autograd.grad(v, t, retain_graph=True)[0] for v in values)
        return d_alpha, d_sigma

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and g² of the SDE dx = f x dt + g dw of these marginals (Song 2021, eq. 5; Kingma 2021, eq. 15);
        g² is negative, like dt, if time runs from noise to data."""
        _, alpha, sigma = self.levels_at(t)
        d_alpha, d_sigma = self.derivatives(t)
        f = d_alpha / alpha
        return f, 2 * sigma * (d_sigma - f * sigma)

    def norm(self, level: Level) -> Any:
        """√(α² + σ²)."""
        return (level.alpha**2 + level.sigma**2) ** 0.5

    def velocity(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE at x = α x_0 + σ ε and times t [B]."""
        d_alpha, d_sigma = self.derivatives(t)
        return d_alpha * x0 + d_sigma * eps

    def batch_level(self, x: Tensor, t: float) -> Level:
        """The level at one time, as tensors for the batch x, from which estimates are computed."""
        return self.level(t)

    @property
    def prior_std(self) -> float:
        """The standard deviation of noise at the start of a path."""
        return self.level(self.noisy).sigma

    def times(self, u: Tensor) -> Tensor:
        """Training times from uniform draws u [B] in [0, 1)."""
        return self.clean + (self.noisy - self.clean) * u

    def nearest(self, t: Tensor) -> Tensor:
        """The nearest times of training."""
        return t

    def snr(self, level: Level) -> Tensor:
        """α²/σ² of the levels of a batch, [B]."""
        return (level.alpha / level.sigma).view(-1) ** 2

    # ---- the noise-to-signal ratio

    def ratio(self, t: float) -> float:
        """σ/α at a time; infinite if α is 0."""
        level = self.level(t)
        return level.sigma / level.alpha if level.alpha else math.inf

    def log_ratio_at(self, t: float) -> float:
        ratio = self.ratio(t)
        return math.log(ratio) if ratio else -math.inf

    def times_at(self, log_ratio: np.ndarray) -> np.ndarray:
        """The times at which log σ/α has these values, or the nearest ends of the path, found by
        bisection."""
        target = torch.from_numpy(np.asarray(log_ratio, dtype=np.float64))
        low, high = torch.full_like(target, self.clean), torch.full_like(target, self.noisy)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            alpha, sigma = self.marginal(middle)
            noisier = sigma.log() - alpha.log() > target
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return ((low + high) / 2).numpy()

    def ratio_level(self, ratio: float) -> Level:
        """The level with this noise-to-signal ratio σ/α, or the nearest one of the path."""
        log_ratio = math.log(ratio) if ratio else -math.inf
        return self.level(float(self.times_at(np.array([log_ratio]))[0]))

    # ---- shares of the way from data to noise

    def share(self, t: Any) -> Any:
        """The share of the way to noise at times."""
        if self.clock == "time":
            return self.time_share(t)
        if isinstance(t, Tensor):
            _, alpha, sigma = self.levels_at(t)
            return torch.atan2(sigma, alpha).view_as(t) * (2 / math.pi)
        level = self.level(t)
        return math.atan2(level.sigma, level.alpha) * (2 / math.pi)

    def time_share(self, t: Any) -> Any:
        """The share measured by time."""
        return t

    def at_share(self, share: float) -> float:
        """The time at a share of the way to noise, or the nearest end."""
        if share >= 1:
            return self.noisy
        return self.ratio_level(math.tan(share * math.pi / 2)).t

    def level_at(self, share: float) -> Level:
        """The level for comparing errors at a share of the way from data to noise."""
        return self.level(share) if self.clock == "time" else self.level(self.at_share(share))

    def error_levels(self, n: int) -> list[Level]:
        """n levels for comparing errors, spaced evenly from data to noise."""
        return [self.level_at((i + 0.5) / n) for i in range(n)]

    # ---- paths

    def most_steps(self, start: float = 1.0) -> Any:
        """The maximum number of steps of a path that begins at this share of the way to noise."""
        return math.inf

    def path(self, steps: int, spacing: str = "logsnr", start: float = 1.0) -> list[Level]:
        """A sampler's path: `steps` levels from the share `start` of the way to noise, then the clean image.
        uniform: evenly spaced in t. Other spacings are those of `spaced_log_ratios`."""
        at_least(1, steps=steps)
        least, most = math.log(END_RATIO), math.log(START_RATIO)
        high = min(self.log_ratio_at(self.at_share(start)), most)
        low = min(max(self.log_ratio_at(self.clean), least), high)
        if spacing == "uniform":
            first, last = self.times_at(np.array([high, low]))
            times = np.linspace(first, last, steps)
        else:
            times = self.times_at(spaced_log_ratios(high, low, steps, spacing))
        return [*map(self.level, times.tolist()), Level(self.clean, 1.0, 0.0)]

    def ode_times(self, steps: int, start: float = 1.0) -> list[float]:
        """Times of the given number of equal solver steps, from a share `start` of the way to noise down to
        data."""
        at_least(1, steps=steps)
        first = self.at_share(start)
        return [first + (self.clean - first) * i / steps for i in range(steps + 1)]

    def likelihood_path(self, ratio: float, steps: int) -> list[Level]:
        """Levels evenly spaced in log σ/α, from about the ratio of data to noise. The last step leads to
        noise beyond `LIKELIHOOD_RATIO`."""
        at_least(1, steps=steps)
        low, high = max(math.log(ratio), self.log_ratio_at(self.clean)), self.log_ratio_at(self.noisy)
        count = steps + (high <= math.log(LIKELIHOOD_RATIO))
        times = self.times_at(np.linspace(low, min(high, math.log(LIKELIHOOD_RATIO)), count)).tolist()
        return [*map(self.level, times[:steps]), self.level(self.noisy)]


def stratified(u: Tensor, noise: Noise) -> Tensor:
    """Uniform draws u [B], stratified so that each equal part of [0, 1) has one image of the global batch
    (Kingma 2021, arXiv:2107.00630, appendix I.1). Unchanged for a `noise` without a global batch."""
    total, start = getattr(noise, "total", None), getattr(noise, "start", 0)
    return (u + (start + torch.arange(len(u), device=u.device))) / total if total else u


def normal_draws(u: Tensor) -> Tensor:
    """Standard normal draws from uniform draws in [0, 1)."""
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def shift_of(shift: Shift, shape: Sequence[int]) -> float:
    """The factor of the noise-to-signal ratio σ/α for images of a shape. auto: side / 64 and at least 1,
    because neighbouring pixels of larger images are more alike (Hoogeboom 2023, arXiv:2301.11093, eq. 3;
    Esser 2024, arXiv:2403.03206, eq. 23)."""
    if shift == "auto":
        return max(1.0, math.sqrt(shape[1] * shape[2]) / UNSHIFTED)
    if not shift > 0:
        hint = "set `model.shift` to a positive number or to `auto`"
        raise UsageError(f"the noise cannot be shifted by a factor of {shift:g}", hint=hint)
    return float(shift)


def per_image(t: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]; numbers, and tensors that broadcast with images, are unchanged."""
    return t[:, None, None, None] if t.ndim in (1, 2) else t


def spaced_log_ratios(high: float, low: float, steps: int, spacing: str) -> np.ndarray:
    """log σ/α from `high` to `low`: even (logsnr), or in the 7th root of σ/α (karras; Karras 2022, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        a, b = np.exp(high / 7), np.exp(low / 7)
        return 7 * np.log(a + ramp * (b - a))
    return high + ramp * (low - high)


# ---------------------------------------------------------------------------- discrete times


class DiscreteVP(Process):
    """A process by the tables alpha and sigma, float64 [T]. shift: factor of σ/α."""

    scale = 1
    prior_std = 1.0
    alphas: Tensor  # α, σ and α²/σ² in float32
    sigmas: Tensor
    snrs: Tensor
    falls: Tensor  # of α²/σ² from t − 1 to t, 0 at t = 0
    growths: Tensor  # of log σ² from t − 1 to t, which is log β/β̃, 0 at t = 0
    d_alphas: Tensor  # α′ and σ′ with respect to a time in 0 … T
    d_sigmas: Tensor

    def __init__(self, name: ScheduleName, timesteps: int, *, zero_snr: bool = False, shift: float = 1.0):
        super().__init__()
        if timesteps < 2:
            raise UsageError(f"a diffusion needs at least 2 timesteps, not {timesteps}")
        self.alpha = np.sqrt(np.cumprod(1 - BETAS[name](timesteps)))
        if zero_snr:  # the last becomes exactly 0 and the first is unchanged (Lin 2023, algorithm 1)
            first, last = self.alpha[0], self.alpha[-1]
            self.alpha = (self.alpha - last) * (first / (first - last))
        self.sigma = np.sqrt(1 - self.alpha**2)
        if shift != 1:
            norm = np.hypot(self.alpha, shift * self.sigma)
            self.alpha, self.sigma = self.alpha / norm, shift * self.sigma / norm
        self.timesteps, self.noisy = timesteps, timesteps - 1.0
        snr, log_var = self.alpha**2 / self.sigma**2, 2 * np.log(self.sigma)
        tables = {
            "alphas": self.alpha,
            "sigmas": self.sigma,
            "snrs": snr,
            "falls": -np.diff(snr, prepend=snr[0]),
            "growths": np.diff(log_var, prepend=log_var[0]),
            "d_alphas": np.gradient(self.alpha) * timesteps,
            "d_sigmas": np.gradient(self.sigma) * timesteps,
        }
        for key, table in tables.items():
            self.register_buffer(key, torch.as_tensor(table, dtype=torch.float32), persistent=False)

    def kl(self, t: Tensor, error: Tensor, share: Tensor | float) -> Tensor:
        """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) of each element, given the squared errors of x_0 [B,
        C, H, W] at times t [B]; 0 at t = 0. The variance of p is β̃^(1 − share) β^share. The means are those
        of Ho 2020, eq. 7. Their squared distance over β̃ is the squared error of x_0 times the decrease of
        the SNR (Kingma 2021, eq. 14)."""
        wider = share * per_image(self.growths[t])  # log of the variance over β̃
        return 0.5 * (per_image(self.falls[t]) * error * (-wider).exp() + wider + (-wider).expm1())

    def level(self, t: float) -> Level:
        """α and σ on the chord between their neighbours in the tables, scaled so that α² + σ² = 1."""
        alpha, sigma = (np.interp(t, np.arange(self.timesteps), a) for a in (self.alpha, self.sigma))
        norm = np.hypot(alpha, sigma)
        return Level(float(t), float(alpha / norm), float(sigma / norm))

    def levels_at(self, t: Tensor) -> Level:
        alpha, sigma = self.marginal(t)
        return Level(t, per_image(alpha), per_image(sigma))

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at integer times."""
        return self.alphas[t], self.sigmas[t]

    def derivatives(self, t: Any) -> tuple[Any, Any]:
        """α′ and σ′ at integer times, or at a real one between them."""
        if isinstance(t, Tensor):
            return per_image(self.d_alphas[t]), per_image(self.d_sigmas[t])
        tables = (self.d_alphas, self.d_sigmas)
        d_alpha, d_sigma = (np.interp(t, np.arange(self.timesteps), table.tolist()) for table in tables)
        return float(d_alpha), float(d_sigma)

    def norm(self, level: Level) -> float:
        return 1.0

    def times(self, u: Tensor) -> Tensor:
        return (u * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def nearest(self, t: Tensor) -> Tensor:
        return t.round().long()

    def snr(self, level: Level) -> Tensor:
        return self.snrs[level.t]

    def time_share(self, t: Any) -> Any:
        return t / self.timesteps

    def level_at(self, share: float) -> Level:
        """The level at an integer time."""
        return self.level(
            int(share * self.timesteps) if self.clock == "time" else round(self.at_share(share))
        )

    def log_ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """log σ/α at the times at which it is finite, and these times."""
        with np.errstate(divide="ignore"):  # +inf at zero SNR
            log_ratio = np.log(self.sigma) - np.log(self.alpha)
        finite = np.isfinite(log_ratio)
        return log_ratio[finite], np.arange(self.timesteps)[finite]

    def times_at(self, log_ratio: np.ndarray) -> np.ndarray:
        return np.interp(log_ratio, *self.log_ratios())

    def most_steps(self, start: float = 1.0) -> int:
        if self.clock == "time":
            return max(1, round(start * self.timesteps))
        return 1 + round(self.at_share(start))

    def path_over(self, times: Sequence[float]) -> list[Level]:
        """A sampler's path: the levels at decreasing times, then the clean image."""
        return [*(self.level(t) for t in times), Level(-1.0, 1.0, 0.0)]

    def path(self, steps: int, spacing: str = "trailing", start: float = 1.0) -> list[Level]:
        """A path of 1 … T steps (Lin 2023, table 2). trailing: every T/steps-th time, counted from the
        noisiest. leading: counted from the cleanest. linspace: including both ends. Other spacings are those
        of `spaced_log_ratios`."""
        top = self.most_steps(start)  # times 0 … top − 1
        if not 1 <= steps <= top:
            raise UsageError(
                f"{steps} sampling steps do not fit {top} timesteps", hint=f"set `steps` to 1 … {top}"
            )
        if spacing == "trailing":
            times = np.round(top - np.arange(steps) * (top / steps)) - 1
        elif spacing == "leading":
            times = (np.arange(steps) * (top // steps))[::-1]
        elif spacing == "linspace":
            times = np.round(np.linspace(top - 1, 0, steps)) if steps > 1 else np.array([top - 1])
        else:
            log_ratio, _ = self.log_ratios()
            last = int(np.searchsorted(log_ratio, np.log(SIGMA_MAX), side="right")) - 1
            target = spaced_log_ratios(log_ratio[max(0, min(last, top - 1))], log_ratio[0], steps, spacing)
            times = self.times_at(target).clip(max=top - 1)
        return self.path_over(times.tolist())


def linear_betas(timesteps: int) -> np.ndarray:
    """β from 1e-4 to .02 at T = 1000 (Ho 2020, section 4), scaled so that other T end at the same noise."""
    return np.linspace(1e-4, 0.02, timesteps).clip(max=0.999 * timesteps / 1000) * (1000 / timesteps)


def cosine_betas(timesteps: int) -> np.ndarray:
    """ᾱ(t) = cos² of a ramp with offset .008, β at most .999 (Nichol 2021, eq. 17)."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)


def straight_betas(timesteps: int) -> np.ndarray:
    """The β for which σ/α = t / (1 − t), as on straight lines; the last is at most .999."""
    t = np.arange(timesteps + 1) / timesteps
    alpha_bar = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas, "straight": straight_betas}
ScheduleName = Annotated[str, BETAS]


# ---------------------------------------------------------------------------- SDEs


class SDE(Process):
    """The SDE dx = f(t) x dt + g(t) dw. start: first time of training, because the score diverges at t = 0.
    Raises UsageError for a time outside 0 … 1."""

    def __init__(self, start: float):
        super().__init__()
        if not 0 < start < 1:
            hint = "set `model.t_min` to a small number such as 1e-5"
            raise UsageError(f"the lowest time must be in 0 … 1, not {start:g}", hint=hint)
        self.clean, self.stop = start, max(start, STOP_TIME)

    def batch_level(self, x: Tensor, t: float) -> Level:
        return self.levels_at(x.new_full((len(x),), t))

    def derivatives(self, t: Any) -> tuple[Any, Any]:
        """α′ = f α and σ′ = f σ + g² / 2σ (eq. 30 – 33), because f and g are known."""
        if not isinstance(t, Tensor) or type(self).rates is Process.rates:
            return super().derivatives(t)
        f, g2 = self.rates(per_image(t))
        _, alpha, sigma = self.levels_at(t)
        return f * alpha, f * sigma + 0.5 * g2 / sigma

    def velocity(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """f x − ½ g² score (eq. 13)."""
        drift, g2 = self.rates(per_image(t))
        return drift * x + 0.5 * g2 / self.levels_at(t).sigma * eps

    def times_at(self, log_ratio: np.ndarray) -> np.ndarray:
        t = np.geomspace(self.clean, 1, 4001)
        alpha, sigma = self.marginal(torch.from_numpy(t))
        return np.interp(log_ratio, (sigma / alpha).log().numpy(), t)

    def path(self, steps: int, spacing: str = "karras", start: float = 1.0) -> list[Level]:
        """The path from the unmodified α and σ at t = 1 to the time at which samplers stop."""
        at_least(1, steps=steps)
        top = max(start if self.clock == "time" else self.at_share(start), self.stop)
        if spacing == "uniform":
            times = top + np.linspace(0, 1, steps) * (self.stop - top)
        else:
            high, low = self.log_ratio_at(top), self.log_ratio_at(self.stop)
            times = self.times_at(spaced_log_ratios(high, low, steps, spacing))
            times[0] = top
        return [*map(self.level, times.tolist()), Level(0.0, 1.0, 0.0)]

    def ode_times(self, steps: int, start: float = 1.0) -> list[float]:
        """Times spaced evenly in the 7th root of σ/α, to the time at which samplers stop."""
        return [level.t for level in self.path(steps + 1, start=start)[:-1]]

    def likelihood_path(self, ratio: float, steps: int) -> list[Level]:
        """The path that ends at the unmodified α and σ at t = 1."""
        at_least(1, steps=steps)
        low, high = max(math.log(ratio), self.log_ratio_at(self.clean)), self.log_ratio_at(1.0)
        return [*map(self.level, self.times_at(np.linspace(low, high, steps + 1)).tolist())]

    def level_at(self, share: float) -> Level:
        if self.clock == "noise":
            return super().level_at(share)
        return self.path(ERROR_STEPS + 1, "logsnr")[ERROR_STEPS - round(share * ERROR_STEPS)]

    def error_levels(self, n: int) -> list[Level]:
        return super().error_levels(n) if self.clock == "noise" else self.path(n + 2, "logsnr")[1:-2]


class VE(SDE):
    """Variance exploding: α = 1, σ grows geometrically from sigma_min to sigma_max (eq. 30)."""

    def __init__(self, start: float, sigma_min: float, sigma_max: float):
        super().__init__(start)
        if not 0 < sigma_min < sigma_max:
            hint = "set `model.sigma_min` above 0 and `model.sigma_max` above it"
            raise UsageError(f"the noise level cannot grow from {sigma_min:g} to {sigma_max:g}", hint=hint)
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.log_ratio * t).exp()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), 2 * self.log_ratio * self.marginal(t)[1] ** 2


class VP(SDE):
    """Variance preserving: β grows linearly, α² + σ² = 1 (eq. 32, 33); DDPM's chain in continuous time. A
    shift s, the factor of √(1 − α²)/α, replaces β by s² β / (α² + s² (1 − α²))."""

    def __init__(self, start: float, beta_min: float, shift: float = 1.0):
        super().__init__(start)
        if not 0 < beta_min <= BETA_MAX:
            hint = f"set `model.beta_min` above 0 and to at most {BETA_MAX:g}"
            raise UsageError(f"the noise rate cannot grow from {beta_min:g} to {BETA_MAX:g}", hint=hint)
        self.beta_min, self.gain = beta_min, shift**2

    def beta(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (BETA_MAX - self.beta_min) * t
        if self.gain == 1:
            return beta
        alpha2 = self.unshifted(t).exp()
        return self.gain * beta / (alpha2 + self.gain * (1 - alpha2))

    def decay(self, t: Tensor) -> Tensor:
        """−∫β from 0 to t, which is log α²."""
        decay = self.unshifted(t)
        return decay if self.gain == 1 else -torch.log1p(self.gain * torch.expm1(-decay))

    def unshifted(self, t: Tensor) -> Tensor:
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


# ---------------------------------------------------------------------------- straight lines


class CondOT(Process):
    """α = t, σ = 1 − (1 − σ_min) t, whose velocity is x_0 − (1 − σ_min) ε (Lipman 2022, eq. 22, 23); shift:
    factor of the noise-to-signal ratio at the times of training and solvers."""

    clean, noisy = 1.0, 0.0

    def __init__(self, sigma_min: float = 0.0, shift: float = 1.0):
        super().__init__()
        self.sigma_min, self.shift = sigma_min, shift

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, 1 - (1 - self.sigma_min) * t

    def derivatives(self, t: Tensor | float) -> tuple[float, float]:
        return 1.0, -(1 - self.sigma_min)

    def times(self, u: Tensor) -> Tensor:
        return shift_times(u, self.shift)

    def path(self, steps: int, spacing: str = "logsnr", start: float | None = None) -> list[Level]:
        """Levels evenly spaced in log σ/α from nearly pure noise, then the clean image. With a share `start`
        of the way to noise, the levels of `ode_times` from there."""
        if start is not None:
            return [*map(self.level, self.ode_times(steps, start))]
        ratios = np.geomspace(START_RATIO, max(END_RATIO, self.sigma_min), steps)
        return [*map(self.level, self._of(ratios).tolist()), Level(1.0, 1.0, 0.0)]

    def ode_times(self, steps: int, start: float = 1.0) -> list[float]:
        """Times from the share `start` of the way to noise up to 1, in steps that are equal before the
        shift."""
        at_least(1, steps=steps)
        first = 1 - start if self.clock == "time" else shift_times(self.at_share(start), 1 / self.shift)
        return [shift_times(first + (1 - first) * i / steps, self.shift) for i in range(steps + 1)]

    def likelihood_path(self, ratio: float, steps: int) -> list[Level]:
        at_least(1, steps=steps)
        lowest = max(ratio, self.sigma_min)
        ratios = lowest * (LIKELIHOOD_RATIO * self.shift / lowest) ** (np.arange(steps) / max(steps - 1, 1))
        return [*map(self.level, self._of(ratios).tolist()), self.level(0.0)]

    def ratio_level(self, ratio: float) -> Level:
        return self.level(self._of(ratio))

    def times_at(self, log_ratio: np.ndarray) -> np.ndarray:
        return self._of(np.exp(log_ratio)).clip(0, 1)

    def _of(self, ratio: Any) -> Any:
        """The time at which the noise-to-signal ratio has this value."""
        return 1 / (ratio + 1 - self.sigma_min)


class Cosine(Process):
    """α = cos(π t / 2), σ = sin(π t / 2): the continuous limit of the cosine schedule (Nichol 2021), and the
    path of trigonometric flows (Albergo 2023, arXiv:2303.08797). shift: factor of σ/α."""

    def __init__(self, shift: float = 1.0):
        super().__init__()
        self.shift = shift

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (t * math.pi / 2).cos(), self.shift * (t * math.pi / 2).sin()
        r = (alpha**2 + sigma**2).sqrt()
        return alpha / r, sigma / r

    def derivatives(self, t: Any) -> tuple[Any, Any]:
        """The angle of (α, σ), arctan of shift · tan(π t / 2), has the derivative `rate`."""
        if not isinstance(t, Tensor):
            return super().derivatives(t)
        t = per_image(t)
        alpha, sigma = self.marginal(t)
        r2 = (t * math.pi / 2).cos() ** 2 + (self.shift * (t * math.pi / 2).sin()) ** 2
        rate = self.shift * math.pi / 2 / r2
        return -sigma * rate, alpha * rate


def shift_times(t: TimesT, shift: float) -> TimesT:
    """The times at which the ratio (1 − t) / t is `shift` times that at t, in [0, 1] (Esser 2024, eq. 23)."""
    return t if shift == 1 else t / (t + shift * (1 - t))


@dataclass(frozen=True, kw_only=True)
class SDEOptions:
    """The constants of a stochastic differential equation.

    beta_min: β at t = 0, for vp and subvp.
    sigma_min: σ at t = 0, for ve and images in [-1, 1].
    sigma_max: σ at t = 1.
    t_min: smallest time of training and likelihoods, 0 … 1. Its noise limits the likelihood of a constant
      pixel: with 256 levels, σ = .01 costs 1.2 nats and .002 costs .2.
    """

    beta_min: float = 0.1
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5


# Processes of continuous times by their constants and shift
PATHS: dict[str, Callable[[SDEOptions, float], Process]] = {
    "straight": lambda _, shift: CondOT(shift=shift),
    "cosine": lambda _, shift: Cosine(shift),
    "vp": lambda sde, shift: VP(sde.t_min, sde.beta_min, shift),
    "subvp": lambda sde, shift: SubVP(sde.t_min, sde.beta_min, shift),
    "ve": lambda sde, shift: VE(sde.t_min, sde.sigma_min, sde.sigma_max * shift),
}
