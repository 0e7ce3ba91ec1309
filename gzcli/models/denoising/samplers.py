"""Samplers as pure functions: from noise x at path[0] along the levels of `path` to the clean image at its
end.

    denoise(x, t)        the estimates of x_0 and ε, each [B, C, H, W], at one time t for the whole batch
    randn()              standard normal noise of x's shape; deterministic samplers draw none
    progress(i, n, x)    is called after each step

A step takes one call of `denoise`, and two in Heun's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gzcli.core.types import Noise, Progress, no_progress
from gzcli.models.denoising.process import SDE, SIGMA_MAX, Level


class Estimate(NamedTuple):
    """What a network says of a noised image."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, float], Estimate]
Randn = Callable[[], Tensor]


class Sampler(Protocol):
    """The arguments of every sampler, beside options of its own."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        path: Sequence[Level],
        *,
        randn: Randn,
        progress: Progress = no_progress,
    ) -> Tensor: ...


def draws_like(noise: Noise, x: Tensor) -> Randn:
    """A function that draws standard normal numbers of x's shape from `noise`."""
    return lambda: noise.randn(*x.shape)


def none_drawn() -> Tensor:
    """The default `randn` of samplers that are deterministic unless asked otherwise."""
    raise ValueError("a sampler that draws noise needs `randn`")


def ancestral(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    randn: Randn,
    variance: str = "small",
    progress: Progress = no_progress,
) -> Tensor:
    """Ho 2020, algorithm 2, for steps of any length; variance "small" is β̃_t, "large" is β_t (section
    3.2)."""
    for i, (s, u) in enumerate(pairwise(path)):
        x0, _ = denoise(x, s.t)
        mean, var = posterior(x0, x, s, u)
        if u.sigma > 0:
            x = mean + math.sqrt(var if variance == "small" else transition(s, u)[1]) * randn()
        else:
            x = mean
        progress(i + 1, len(path) - 1, x)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    randn: Randn = none_drawn,
    eta: float = 0.0,
    progress: Progress = no_progress,
) -> Tensor:
    """Song 2021, eq. 12: eta = 0 is deterministic, eta = 1 is ancestral with the small variance."""
    for i, (s, u) in enumerate(pairwise(path)):
        x0, eps = denoise(x, s.t)
        var = eta**2 * transition(s, u)[1] * (u.sigma / s.sigma) ** 2  # eq. 16
        x = u.alpha * x0 + math.sqrt(max(u.sigma**2 - var, 0)) * eps
        if var > 0:
            x = x + math.sqrt(var) * randn()
        progress(i + 1, len(path) - 1, x)
    return x


def ddim_inverse(
    denoise: Denoise, x: Tensor, path: Sequence[Level], *, progress: Progress = no_progress
) -> Tensor:
    """The noise at path[0] from which DDIM along `path` generates x (Preechakul 2022, eq. 8).

    It takes DDIM's steps backwards, each with the ε at its start in place of its end, an error of first order
    in the length of the step.
    """
    back = list(pairwise(reversed(path)))
    for i, (u, s) in enumerate(back):
        x0, eps = denoise(x, max(u.t, 0.0))  # the clean image has no time and takes that of least noise
        x = s.alpha * x0 + s.sigma * eps
        progress(i + 1, len(back), x)
    return x


def dpmpp(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    randn: Randn = none_drawn,
    noisy: bool = False,
    progress: Progress = no_progress,
) -> Tensor:
    """DPM-Solver++(2M) (Lu 2022b, algorithm 2): of second order in λ = log α/σ, by the x_0 of the step
    before.

    noisy: solve the reverse SDE in place of the ODE: SDE-DPM-Solver++(2M) (ibid., eq. 19).
    """
    before: Tensor | None = None
    h_before = 0.0
    for i, (s, u) in enumerate(pairwise(path)):
        x0, _ = denoise(x, s.t)
        shrink = falls_by(s, u)
        h = -math.log(shrink) if shrink > 0 else math.inf
        d = x0
        if before is not None and u.sigma > 0:  # the last step is of first order: to x_0 itself
            d = x0 + (h / (2 * h_before)) * (x0 - before)
        if noisy:
            x = (u.sigma / s.sigma * shrink) * x + u.alpha * (1 - shrink**2) * d
            x = x + u.sigma * math.sqrt(1 - shrink**2) * randn() if u.sigma > 0 else x
        else:
            x = (u.sigma / s.sigma) * x + u.alpha * (1 - shrink) * d
        before, h_before = x0, h
        progress(i + 1, len(path) - 1, x)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    randn: Randn = none_drawn,
    progress: Progress = no_progress,
) -> Tensor:
    """UniPC of second order, with B(h) = e^h − 1 (Zhao 2023, arXiv:2302.04867, algorithms 5 and 6, of x_0):
    DPM-Solver++(2M), with each step corrected by the network call of the next one."""
    calls: list[tuple[Level, Tensor]] = []  # the last two levels of a network call, with its x_0
    start = x
    for i, (s, u) in enumerate(pairwise(path)):
        x0, _ = denoise(x, s.t)
        if calls:
            x = _corrected(start, calls, s, x0)
        calls = [*calls[-1:], (s, x0)]
        start, last = x, u.sigma == 0
        x = _euler(x, s, u, x0)
        if len(calls) == 2 and not last:
            (r, before), h = calls[0], _lambda(u) - _lambda(s)
            slope = (x0 - before) * h / (_lambda(s) - _lambda(r))
            x = x + u.alpha * (1 - falls_by(s, u)) * 0.5 * slope
        progress(i + 1, len(path) - 1, x)
    return x


def _euler(x: Tensor, s: Level, u: Level, x0: Tensor) -> Tensor:
    """DDIM's step, written in λ."""
    return (u.sigma / s.sigma) * x + u.alpha * (1 - falls_by(s, u)) * x0


def _corrected(x: Tensor, calls: list[tuple[Level, Tensor]], u: Level, x0: Tensor) -> Tensor:
    """The step from x at calls[-1] to u, corrected by the network's estimate x0 at u (UniC)."""
    s, m = calls[-1]
    hh = _lambda(s) - _lambda(u)  # −h
    phi_1 = math.expm1(hh)
    base, ahead = _euler(x, s, u, m), x0 - m
    if len(calls) == 1:
        return base - u.alpha * phi_1 * 0.5 * ahead
    r = (_lambda(calls[0][0]) - _lambda(s)) / -hh
    phi_2 = phi_1 / hh - 1
    phi_3 = phi_2 / hh - 0.5
    # Σ ρ = φ_2 / B and Σ ρ r = 2 φ_3 / B, over the points r < 0 and 1
    one, two = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho = (one - two) / (1 - r)
    return base - u.alpha * phi_1 * (rho * (calls[0][1] - m) / r + (one - rho) * ahead)


def _lambda(level: Level) -> float:
    return math.log(level.alpha) - math.log(level.sigma) if level.alpha > 0 else -math.inf


def falls_by(s: Level, u: Level) -> float:
    """The ratio of σ/α at u to that at s, e^−h; 0 if u is clean, or s is of zero SNR."""
    return s.alpha * u.sigma / (s.sigma * u.alpha)


def heun(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    randn: Randn = none_drawn,
    churn: float = 0.0,
    level: Callable[[float], Level] | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Karras 2022, algorithm 1 and 2: trapezoidal steps of d(x/α)/d(σ/α) = ε; at most 2 N − 1 calls.

    Steps from above σ/α = 80, where EDM starts, are Euler's: there ε hardly changes, but σ/α may fall by
    thousands.

    churn: S_churn; before each of N steps noise grows by the factor 1 + churn / N, at most by √2.
    level: the level at which σ/α has a given value, for churn. Raises ValueError for churn without it.
    """
    if churn and level is None:
        raise ValueError("churn needs `level`")
    more = min(churn / (len(path) - 1), math.sqrt(2) - 1)
    for i, (s, u) in enumerate(pairwise(path)):
        if level is not None and more and s.sigma <= SIGMA_MAX * s.alpha:
            ratio, r = s.sigma / s.alpha, level((1 + more) * s.sigma / s.alpha)
            extra = math.sqrt(max((r.sigma / r.alpha) ** 2 - ratio**2, 0.0))
            x, s = r.alpha * (x / s.alpha + extra * randn()), r
        x0, eps = denoise(x, s.t)
        x = u.alpha * x0 + u.sigma * eps  # Euler's step, exactly DDIM's
        if u.sigma > 0 and s.sigma <= SIGMA_MAX * s.alpha:
            _, ahead = denoise(x, u.t)
            x = x + 0.5 * (u.sigma - u.alpha * s.sigma / s.alpha) * (ahead - eps)
        progress(i + 1, len(path) - 1, x)
    return x


def euler_maruyama(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    sde: SDE,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """The reverse-time SDE dx = (f x − g² score) dt + g dw (Song 2021, eq. 6)."""
    for i, (s, u) in enumerate(pairwise(path)):
        x0, eps = denoise(x, s.t)
        if u.sigma > 0:
            f, g2 = (float(rate) for rate in sde.rates(torch.tensor(s.t, dtype=torch.float64)))
            h = s.t - u.t
            x = x - h * (f * x + (g2 / s.sigma) * eps) + math.sqrt(g2 * h) * randn()
        else:
            x = x0
        progress(i + 1, len(path) - 1, x)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    corrector: int,
    snr: float,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """Song 2021, algorithm 1: the reverse diffusion predictor (eq. 46), then `corrector` Langevin steps at
    the new level.

    Their length is that of algorithms 4 and 5 with ‖z‖/‖score‖ = σ, the value for pure noise. With the norms
    of the actual draws an image would depend on its batch; with norms of each image, images with a long score
    would get short steps.
    """
    for i, (s, u) in enumerate(pairwise(path)):
        x0, eps = denoise(x, s.t)
        if u.sigma > 0:
            scale, beta = transition(s, u)
            x = (2 - scale) * x - (beta / s.sigma) * eps + math.sqrt(beta) * randn()
            step = 2 * (scale * snr * u.sigma) ** 2
            for _ in range(corrector):
                x = x - (step / u.sigma) * denoise(x, u.t)[1] + math.sqrt(2 * step) * randn()
        else:
            x = x0
        progress(i + 1, len(path) - 1, x)
    return x


def annealed_langevin(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    repeats: int,
    step: float,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """Song & Ermon 2020, algorithm 1: at every level σ `repeats` Langevin steps of length step · σ², then one
    that denoises: repeats · levels + 1 network calls."""
    for i, level in enumerate(levels):
        for _ in range(repeats):
            _, eps = denoise(x, level.t)
            x = x - step * level.sigma * eps + math.sqrt(2 * step) * level.sigma * randn()
        progress(i + 1, len(levels), x)
    return denoise(x, levels[-1].t)[0]


def repaint(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    known: Tensor,
    mask: Tensor,
    randn: Randn,
    resample: int = 5,
    jump: int = 5,
    progress: Progress = no_progress,
) -> Tensor:
    """Inpainting by RePaint (Lugmayr 2022, algorithm 1): at each level the known pixels of `known` replace
    the generated ones, with noise of that level.

    So that both agree, the sampler goes over each stretch of `jump` levels `resample` times; the forward
    process takes it back to the start of the stretch.

    known: images [B, C, H, W].
    mask: [B, 1, H, W], 1 where a pixel is known.
    """
    walk = list(pairwise(repaint_walk(len(path) - 1, resample, jump)))
    for i, (a, b) in enumerate(walk):
        s, u = path[a], path[b]
        if b > a:
            x0, _ = denoise(x, s.t)
            mean, var = posterior(x0, x, s, u)
            unknown = mean + math.sqrt(var) * randn()
            x = mask * (u.alpha * known + u.sigma * randn()) + (1 - mask) * unknown
        else:
            scale, var = transition(u, s)
            x = scale * x + math.sqrt(var) * randn()
        progress(i + 1, len(walk), x)
    return x


def repaint_walk(steps: int, resample: int, jump: int) -> list[int]:
    """Positions on the path 0 … steps: over each stretch of `jump` steps `resample` times, back in
    between."""
    walk = [0]
    for start in range(0, steps, jump):
        stretch = list(range(start + 1, min(start + jump, steps) + 1))
        walk += stretch + (resample - 1) * [start, *stretch]
    return walk


def transition(s: Level, u: Level) -> tuple[float, float]:
    """α_{s|u} and the variance β of q(x_s | x_u), where u is less noisy than s; for the clean level u it is
    q(x_s | x_0)."""
    scale = s.alpha / u.alpha
    return scale, s.sigma**2 - (scale * u.sigma) ** 2


def posterior(x0: Tensor, x: Tensor, s: Level, u: Level) -> tuple[Tensor, float]:
    """Mean and variance of q(x_u | x_s, x_0) (Ho 2020, eq. 7)."""
    scale, beta = transition(s, u)
    mean = (u.alpha * beta / s.sigma**2) * x0 + (scale * u.sigma**2 / s.sigma**2) * x
    return mean, beta * (u.sigma / s.sigma) ** 2
