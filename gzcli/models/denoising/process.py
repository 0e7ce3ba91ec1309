"""Gaussian processes x_t = α(t) x_0 + σ(t) ε between data and noise, on which all denoisers are trained.

DiscreteVP: times 0 … T − 1 from the least to the most noise, α² + σ² = 1 (Ho 2020, arXiv:2006.11239), as in
  diffusers, t − 1 of the paper; real times lie between. Its tables are float64 numpy, as differences such as
  1 − ᾱ_t/ᾱ_{t−1} ≈ 1e-4 do not survive float32.
VP, SubVP, VE: times from data at 0 to noise at 1, by an SDE dx = f x dt + g dw (Song 2021, arXiv:2011.13456).
CondOT: times from noise at 0 to data at 1, on straight lines (Lipman 2022, arXiv:2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Noise
from gzcli.models.nn import at_least

Shift = float | Literal["auto"]
TimeSampling = Literal["uniform", "stratified", "logit_normal"]
TimesT = TypeVar("TimesT", float, Tensor)

UNSHIFTED = 64.0  # the side up to which noise is not shifted
SIGMA_MAX = 80.0  # the noise-to-signal ratio σ/α at which EDM starts (Karras 2022, table 1)
BETA_MAX = 20.0  # β at t = 1, of VP and SubVP (Song 2021, appendix C)
STOP_TIME = 1e-3  # the time at which samplers of an SDE stop (appendix C); Tweedie's formula removes the rest
# σ/α at the ends of a CondOT path: nearly pure noise, and invisible noise
START_RATIO, END_RATIO = 80.0, 0.02
LIKELIHOOD_RATIO = 20.0  # σ/α from which a likelihood takes one step to pure noise, where σ/α is infinite
ERROR_STEPS = 200  # steps in log σ/α to which noise levels for errors of an SDE are rounded


class Level(NamedTuple):
    """The noise of x = alpha x_0 + sigma ε at time t: numbers on a sampler's path, and of a batch tensors, t
    [B] and the others [B, 1, 1, 1]."""

    t: Any
    alpha: Any
    sigma: Any


class Process(nn.Module):
    """α(t), σ(t), and functions of them. A process defines the methods that its models use.

    scale: the factor of times t as the network's input; most networks are designed for 0 … 1000.
    prior_std: the standard deviation of noise at the start of a path.
    longest: the last time; guidance acts in an interval of shares of it.
    """

    scale: ClassVar[float] = 1000
    prior_std: float = 1.0
    longest: float = 1.0

    if TYPE_CHECKING:
        marginal: Callable[[Tensor], tuple[Tensor, Tensor]]  # α and σ at times of any shape
        derivatives: Callable[[Any], tuple[Any, Any]]  # α′ and σ′ at times
        times: Callable[[Tensor], Tensor]  # times [B] of training, of uniform draws [B] in [0, 1)
        # path(steps, spacing, start): a sampler's path to the clean image, from a share of the way to noise
        path: Callable[..., list[Level]]
        ode_times: Callable[..., list[float]]  # of so many steps of a solver from noise to data
        # likelihood_path(ratio, steps): levels from about the ratio σ/α of data to noise
        likelihood_path: Callable[[float, int], list[Level]]
        # the level whose noise-to-signal ratio σ/α is this, or the nearest finite one
        ratio_level: Callable[[float], Level]

    def level(self, t: float) -> Level:
        """The level at one time, in float64."""
        return Level(t, *map(float, self.marginal(torch.tensor(t, dtype=torch.float64, device="cpu"))))

    def levels_at(self, t: Tensor) -> Level:
        """The levels at times t [B]."""
        return Level(t, *self.marginal(per_image(t)))

    def most_steps(self, start: float = 1.0) -> Any:
        """The most steps of a path from a share of the way to noise."""
        return math.inf

    def batch_level(self, x: Tensor, t: float) -> Level:
        """The level at one time for the batch x, from which estimates are computed."""
        return self.level(t)

    def norm(self, level: Level) -> Any:
        """√(α² + σ²)."""
        return (level.alpha**2 + level.sigma**2) ** 0.5

    def velocity(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE at x = α x_0 + σ ε and times t [B]."""
        d_alpha, d_sigma = self.derivatives(t)
        return d_alpha * x0 + d_sigma * eps

    def level_at(self, share: float) -> Level:
        """The level for comparing errors at a share of the way from data to noise."""
        return self.level(share)

    def error_levels(self, n: int) -> list[Level]:
        """n levels for comparing errors, spaced evenly from data to noise."""
        return [self.level_at((i + 0.5) / n) for i in range(n)]


def stratified(u: Tensor, noise: Noise) -> Tensor:
    """Uniform draws u [B], moved so that each equal share of [0, 1) has one image of the global batch (Kingma
    2021, arXiv:2107.00630, appendix I.1); unchanged for a `noise` without a global batch."""
    total, start = getattr(noise, "total", None), getattr(noise, "start", 0)
    return (u + (start + torch.arange(len(u), device=u.device))) / total if total else u


def normal_draws(u: Tensor) -> Tensor:
    """The standard normal draws of uniform ones in [0, 1)."""
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def shift_of(shift: Shift, shape: Sequence[int]) -> float:
    """The factor of the noise-to-signal ratio σ/α for images of a shape; auto: side / 64 and at least 1, as
    neighbouring pixels of larger images are more alike (Hoogeboom 2023, arXiv:2301.11093, eq. 3; Esser 2024,
    arXiv:2403.03206, eq. 23)."""
    if shift == "auto":
        return max(1.0, math.sqrt(shape[1] * shape[2]) / UNSHIFTED)
    if not shift > 0:
        hint = "set `model.shift` above 0, or `auto`"
        raise UsageError(f"noise shifted by a factor of {shift:g}", hint=hint)
    return float(shift)


def per_image(t: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return t[:, None, None, None]


def spaced_log_ratios(high: float, low: float, steps: int, spacing: str) -> np.ndarray:
    """log σ/α from `high` to `low`: even (logsnr), or in the 7th root of σ/α (karras; Karras 2022, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        a, b = np.exp(high / 7), np.exp(low / 7)
        return 7 * np.log(a + ramp * (b - a))
    return high + ramp * (low - high)


# ---------------------------------------------------------------------------- discrete times


class DiscreteVP(Process):
    """The tables alpha and sigma, float64 [T]; shift: the factor of σ/α."""

    scale = 1
    alphas: Tensor  # α, σ and α²/σ² in float32
    sigmas: Tensor
    snrs: Tensor
    falls: Tensor  # of α²/σ² from t − 1 to t, 0 at t = 0
    growths: Tensor  # of log σ² from t − 1 to t, which is log β/β̃, 0 at t = 0

    def __init__(self, name: ScheduleName, timesteps: int, *, zero_snr: bool = False, shift: float = 1.0):
        super().__init__()
        if timesteps < 2:
            raise UsageError(f"a diffusion of {timesteps} timesteps: at least 2 are needed")
        self.alpha = np.sqrt(np.cumprod(1 - BETAS[name](timesteps)))
        if zero_snr:  # the last exactly 0, and the first as it is (Lin 2023, algorithm 1)
            first, last = self.alpha[0], self.alpha[-1]
            self.alpha = (self.alpha - last) * (first / (first - last))
        self.sigma = np.sqrt(1 - self.alpha**2)
        if shift != 1:
            norm = np.hypot(self.alpha, shift * self.sigma)
            self.alpha, self.sigma = self.alpha / norm, shift * self.sigma / norm
        self.timesteps = self.longest = timesteps
        snr, log_var = self.alpha**2 / self.sigma**2, 2 * np.log(self.sigma)
        tables = {
            "alphas": self.alpha,
            "sigmas": self.sigma,
            "snrs": snr,
            "falls": -np.diff(snr, prepend=snr[0]),
            "growths": np.diff(log_var, prepend=log_var[0]),
        }
        for key, table in tables.items():
            self.register_buffer(key, torch.as_tensor(table, dtype=torch.float32), persistent=False)

    def kl(self, t: Tensor, error: Tensor, share: Tensor | float) -> Tensor:
        """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) of each element, given the squared errors of x_0
        [B, C, H, W] at times t [B]; 0 at t = 0. The variance of p is β̃^(1 − share) β^share. The means are
        those of Ho 2020, eq. 7: their squared distance over β̃ is that of x_0 times the fall of the SNR
        (Kingma 2021, eq. 14)."""
        wider = share * per_image(self.growths[t])  # log of the variance over β̃
        return 0.5 * (per_image(self.falls[t]) * error * (-wider).exp() + wider + (-wider).expm1())

    def level(self, t: float) -> Level:
        """α and σ on the chord between their neighbours in the tables, scaled so that α² + σ² = 1."""
        alpha, sigma = (np.interp(t, np.arange(self.timesteps), a) for a in (self.alpha, self.sigma))
        norm = np.hypot(alpha, sigma)
        return Level(float(t), float(alpha / norm), float(sigma / norm))

    def levels_at(self, t: Tensor) -> Level:
        """α and σ at integer times."""
        return Level(t, per_image(self.alphas[t]), per_image(self.sigmas[t]))

    def norm(self, level: Level) -> float:
        return 1.0

    def times(self, u: Tensor) -> Tensor:
        return (u * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def level_at(self, share: float) -> Level:
        return self.level(int(share * self.timesteps))

    def log_ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """log σ/α at the times where it is finite, and these times."""
        with np.errstate(divide="ignore"):  # +inf at zero SNR
            log_ratio = np.log(self.sigma) - np.log(self.alpha)
        finite = np.isfinite(log_ratio)
        return log_ratio[finite], np.arange(self.timesteps)[finite]

    def ratio_level(self, ratio: float) -> Level:
        return self.level(float(np.interp(math.log(ratio), *self.log_ratios())))

    def most_steps(self, start: float = 1.0) -> int:
        return max(1, round(start * self.timesteps))

    def path_over(self, times: Sequence[float]) -> list[Level]:
        """A sampler's path: the levels of falling times, then the clean image."""
        return [*(self.level(t) for t in times), Level(-1.0, 1.0, 0.0)]

    def path(self, steps: int, spacing: str = "trailing", start: float = 1.0) -> list[Level]:
        """A path of 1 … T steps; trailing: every T/steps-th time from the noisiest on; leading: from the
        cleanest on; linspace: both ends included (Lin 2023, table 2); others as in `spaced_log_ratios`."""
        top = self.most_steps(start)  # times 0 … top − 1
        if not 1 <= steps <= top:
            raise UsageError(f"{steps} sampling steps over {top} timesteps", hint=f"set `steps` to 1 … {top}")
        if spacing == "trailing":
            times = np.round(top - np.arange(steps) * (top / steps)) - 1
        elif spacing == "leading":
            times = (np.arange(steps) * (top // steps))[::-1]
        elif spacing == "linspace":
            times = np.round(np.linspace(top - 1, 0, steps)) if steps > 1 else np.array([top - 1])
        else:
            log_ratio, times_of_ratio = self.log_ratios()
            last = int(np.searchsorted(log_ratio, np.log(SIGMA_MAX), side="right")) - 1
            target = spaced_log_ratios(log_ratio[max(0, min(last, top - 1))], log_ratio[0], steps, spacing)
            times = np.interp(target, log_ratio, times_of_ratio).clip(max=top - 1)
        return self.path_over(times.tolist())


def linear_betas(timesteps: int) -> np.ndarray:
    """β from 1e-4 to .02 at T = 1000 (Ho 2020, section 4), scaled so that other T end at the same noise."""
    return np.linspace(1e-4, 0.02, timesteps).clip(max=0.999 * timesteps / 1000) * (1000 / timesteps)


def cosine_betas(timesteps: int) -> np.ndarray:
    """ᾱ(t) = cos² of a ramp with offset .008, β at most .999 (Nichol 2021, eq. 17)."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}
ScheduleName = Annotated[str, BETAS]


# ---------------------------------------------------------------------------- SDEs


class SDE(Process):
    """dx = f(t) x dt + g(t) dw; start: the first time of training, since at t = 0 the score diverges. Raises
    UsageError for a time outside 0 … 1."""

    if TYPE_CHECKING:
        rates: Callable[[Tensor], tuple[Tensor, Tensor]]  # f and g² at times of any shape

    def __init__(self, start: float):
        super().__init__()
        if not 0 < start < 1:
            hint = "set `model.t_min`, such as 1e-5"
            raise UsageError(f"the least time is in 0 … 1, not {start:g}", hint=hint)
        self.start, self.stop = start, max(start, STOP_TIME)

    @property
    def prior_std(self) -> float:  # type: ignore[override]
        return self.level(1.0).sigma

    def batch_level(self, x: Tensor, t: float) -> Level:
        return self.levels_at(x.new_full((len(x),), t))

    def velocity(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """f x − ½ g² score (eq. 13)."""
        drift, g2 = self.rates(per_image(t))
        return drift * x + 0.5 * g2 / self.levels_at(t).sigma * eps

    def log_ratio_at(self, t: float) -> float:
        level = self.level(t)
        return math.log(level.sigma / level.alpha)

    def times_at(self, log_ratio: np.ndarray) -> np.ndarray:
        """The times at which log σ/α has these values, clamped to the range of times."""
        t = np.geomspace(self.start, 1, 4001)
        alpha, sigma = self.marginal(torch.from_numpy(t))
        return np.interp(log_ratio, (sigma / alpha).log().numpy(), t)

    def ratio_level(self, ratio: float) -> Level:
        return self.level(float(self.times_at(np.log([ratio]))[0]))

    def path(self, steps: int, spacing: str = "karras", start: float = 1.0) -> list[Level]:
        """`steps` levels from the time `start` to that at which samplers stop, then the clean image; uniform:
        even in t; others as in `spaced_log_ratios`."""
        at_least(1, steps=steps)
        top = max(start, self.stop)
        if spacing == "uniform":
            times = top + np.linspace(0, 1, steps) * (self.stop - top)
        else:
            high, low = self.log_ratio_at(top), self.log_ratio_at(self.stop)
            times = self.times_at(spaced_log_ratios(high, low, steps, spacing))
            times[0] = top
        return [*map(self.level, times.tolist()), Level(0.0, 1.0, 0.0)]

    def ode_times(self, steps: int) -> list[float]:
        return [level.t for level in self.path(steps + 1)[:-1]]

    def likelihood_path(self, ratio: float, steps: int) -> list[Level]:
        at_least(1, steps=steps)
        low, high = max(math.log(ratio), self.log_ratio_at(self.start)), self.log_ratio_at(1.0)
        return [*map(self.level, self.times_at(np.linspace(low, high, steps + 1)).tolist())]

    def level_at(self, share: float) -> Level:
        return self.path(ERROR_STEPS + 1, "logsnr")[ERROR_STEPS - round(share * ERROR_STEPS)]

    def error_levels(self, n: int) -> list[Level]:
        return self.path(n + 2, "logsnr")[1:-2]


class VE(SDE):
    """Variance exploding: α = 1, σ grows geometrically from sigma_min to sigma_max (eq. 30)."""

    def __init__(self, start: float, sigma_min: float, sigma_max: float):
        super().__init__(start)
        if not 0 < sigma_min < sigma_max:
            hint = "set `model.sigma_min` above 0 and `model.sigma_max` above it"
            raise UsageError(f"noise that grows from {sigma_min:g} to {sigma_max:g}", hint=hint)
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
            hint = f"set `model.beta_min` above 0 and to {BETA_MAX:g} at most"
            raise UsageError(f"a noise rate that grows from {beta_min:g} to {BETA_MAX:g}", hint=hint)
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
    the factor of the noise-to-signal ratio at times of training and of solvers; least_sigma: σ at the end,
    for a network whose output is divided by it."""

    def __init__(self, sigma_min: float = 0.0, shift: float = 1.0, least_sigma: float = 0.0):
        super().__init__()
        self.sigma_min, self.shift, self.least_sigma = sigma_min, shift, least_sigma

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, (1 - (1 - self.sigma_min) * t).clamp(min=self.least_sigma)

    def derivatives(self, t: Tensor | float) -> tuple[float, float]:
        return 1.0, -(1 - self.sigma_min)

    def times(self, u: Tensor) -> Tensor:
        return shift_times(u, self.shift)

    def path(self, steps: int, spacing: str = "logsnr", start: float | None = None) -> list[Level]:
        """Levels even in log σ/α from nearly pure noise, then the clean image; or those of `ode_times` from a
        share `start` of the way to noise."""
        if start is not None:
            return [*map(self.level, self.ode_times(steps, 1 - start))]
        ratios = np.geomspace(START_RATIO, max(END_RATIO, self.sigma_min), steps)
        return [*map(self.level, self.times_at(ratios)), Level(1.0, 1.0, 0.0)]

    def ode_times(self, steps: int, start: float = 0.0) -> list[float]:
        """Times of `steps` steps from `start` to 1, both before the shift, where steps are equal."""
        at_least(1, steps=steps)
        return [shift_times(start + (1 - start) * i / steps, self.shift) for i in range(steps + 1)]

    def likelihood_path(self, ratio: float, steps: int) -> list[Level]:
        at_least(1, steps=steps)
        lowest = max(ratio, self.sigma_min)
        ratios = lowest * (LIKELIHOOD_RATIO * self.shift / lowest) ** (np.arange(steps) / max(steps - 1, 1))
        return [*map(self.level, self.times_at(ratios)), self.level(0.0)]

    def ratio_level(self, ratio: float) -> Level:
        return self.level(1 / (ratio + 1 - self.sigma_min))

    def times_at(self, ratios: np.ndarray) -> list[float]:
        return (1 / (ratios + 1 - self.sigma_min)).tolist()


def shift_times(t: TimesT, shift: float) -> TimesT:
    """The times at which the ratio (1 − t) / t is `shift` times that at t, in [0, 1] (Esser 2024, eq. 23)."""
    return t if shift == 1 else t / (t + shift * (1 - t))
