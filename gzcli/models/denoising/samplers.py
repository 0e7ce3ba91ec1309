"""From noise to images: samplers along a path of noise levels, and solvers of an ODE.

A sampler moves noise x at path[0] along the levels of `path` to the clean image at its end:

    denoise(x, t)        the estimates of x_0 and ε, each [B, C, H, W], at one time t for the whole batch
    randn()              standard normal noise of x's shape; deterministic samplers draw none
    progress(i, n, x)    is called after each step (one call of `denoise`, two in Heun's method)

A solver integrates dx/dt = f(x, t), where f(x [B, …], t [B]) → [B, …]. Every image has its own time and, in
the adaptive solver, its own steps, so that its solution does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from gzcli.core.errors import DivergedError
from gzcli.core.types import Progress, no_progress
from gzcli.models.denoising.process import SIGMA_MAX, Level, Process


class Estimate(NamedTuple):
    """A network's estimates from a noised image. `share` interpolates the log variance of a step between that
    of β̃ (0) and that of β (1) (Nichol 2021, arXiv:2102.09672, eq. 15)."""

    x0: Tensor
    eps: Tensor
    share: Tensor | float = 0.0


Denoise = Callable[[Tensor, float], Estimate]
Randn = Callable[[], Tensor]
Path = Sequence[Level]
Steps = Iterator[Tensor]  # the image after each step
Sampler = Callable[..., Tensor]


def sampler(steps: Callable[..., Steps]) -> Sampler:
    """Decorates a generator of steps into a sampler, which passes all keywords except `progress` to the
    generator."""

    @wraps(steps)
    def run(
        denoise: Denoise, x: Tensor, path: Path, *, progress: Progress = no_progress, **options: Any
    ) -> Tensor:
        for i, image in enumerate(steps(denoise, x, path, **{"randn": None} | options)):
            progress(i + 1, len(path) - 1, image)
        return image

    return run


@sampler
def ancestral(denoise: Denoise, x: Tensor, path: Path, randn: Randn, share: float | None = None) -> Steps:
    """Ancestral sampling (Ho 2020, algorithm 2) for steps of any length, with the variance β̃^(1 − share)
    β^share. For None, the share is the network's."""
    for s, u in pairwise(path):
        estimate = denoise(x, s.t)
        x, small = posterior(estimate.x0, x, s, u)
        if u.sigma > 0:
            power = 0.5 * (estimate.share if share is None else share)
            x = x + math.sqrt(small) * (transition(s, u)[1] / small) ** power * randn()
        yield x


@sampler
def ddim(denoise: Denoise, x: Tensor, path: Path, randn: Randn, eta: float = 0.0) -> Steps:
    """DDIM (Song 2021, eq. 12): eta = 0 is deterministic, eta = 1 is ancestral sampling with the small
    variance."""
    for s, u in pairwise(path):
        x0, eps, _ = denoise(x, s.t)
        var = eta**2 * transition(s, u)[1] * (u.sigma / s.sigma) ** 2  # eq. 16
        x = u.alpha * x0 + math.sqrt(max(u.sigma**2 - var, 0)) * eps
        if var > 0:
            x = x + math.sqrt(var) * randn()
        yield x


@sampler
def renoise(denoise: Denoise, x: Tensor, path: Path, randn: Randn) -> Steps:
    """Song 2023, arXiv:2303.01469, algorithm 1: each estimate of x_0 gets new noise. For a consistency
    function that is the identity at the last noise level of the path."""
    least = path[-2].sigma if len(path) > 2 else 0.0
    for s, u in pairwise(path):
        x = u.alpha * denoise(x, s.t).x0
        if u.sigma > least:
            x = x + math.sqrt(u.sigma**2 - least**2) * randn()
        yield x


@sampler
def ddim_inverse(denoise: Denoise, x: Tensor, path: Path, randn: Randn) -> Steps:
    """The noise at path[0] from which DDIM along `path` generates x (Preechakul 2022, eq. 8).

    It takes DDIM's steps backwards. Each step uses the ε at its start instead of its end, which is an error
    of first order in the step length.
    """
    for u, s in pairwise(reversed(path)):
        # the clean image has no time, so it takes the time of least noise
        x0, eps, _ = denoise(x, max(u.t, 0.0))
        x = s.alpha * x0 + s.sigma * eps
        yield x


@sampler
def dpmpp(denoise: Denoise, x: Tensor, path: Path, randn: Randn, noisy: bool = False) -> Steps:
    """DPM-Solver++(2M) (Lu 2022b, algorithm 2): of second order in λ = log α/σ, using the previous x_0.
    noisy: for the reverse SDE, SDE-DPM-Solver++(2M) (eq. 19)."""
    before, h_before = None, 0.0
    for s, u in pairwise(path):
        x0 = denoise(x, s.t).x0
        shrink = ratio_decay(s, u)
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
        yield x


@sampler
def unipc(denoise: Denoise, x: Tensor, path: Path, randn: Randn) -> Steps:
    """UniPC of second order, with B(h) = e^h − 1 (Zhao 2023, arXiv:2302.04867, algorithms 5 and 6, of x_0):
    DPM-Solver++(2M), with each step corrected by the network call of the next one."""
    calls: list[tuple[Level, Tensor]] = []  # the last two levels of a network call, with its x_0
    start = x
    for s, u in pairwise(path):
        x0 = denoise(x, s.t).x0
        if calls:
            x = _unic_step(start, calls, s, x0)
        calls = [*calls[-1:], (s, x0)]
        start, x = x, _ddim_step(x, s, u, x0)
        if len(calls) == 2 and u.sigma > 0:
            (r, before), h = calls[0], _lambda(u) - _lambda(s)
            slope = (x0 - before) * h / (_lambda(s) - _lambda(r))
            x = x + u.alpha * (1 - ratio_decay(s, u)) * 0.5 * slope
        yield x


def _ddim_step(x: Tensor, s: Level, u: Level, x0: Tensor) -> Tensor:
    """DDIM's step, written in λ."""
    return (u.sigma / s.sigma) * x + u.alpha * (1 - ratio_decay(s, u)) * x0


def _unic_step(x: Tensor, calls: list[tuple[Level, Tensor]], u: Level, x0: Tensor) -> Tensor:
    """The step from x at calls[-1] to u, corrected by the network's estimate x0 at u (UniC)."""
    s, m = calls[-1]
    minus_h = _lambda(s) - _lambda(u)  # −h
    phi_1 = math.expm1(minus_h)
    base, ahead = _ddim_step(x, s, u, m), x0 - m
    if len(calls) == 1:
        return base - u.alpha * phi_1 * 0.5 * ahead
    r = (_lambda(calls[0][0]) - _lambda(s)) / -minus_h
    phi_2 = phi_1 / minus_h - 1
    phi_3 = phi_2 / minus_h - 0.5
    # Σ ρ = φ_2 / B and Σ ρ r = 2 φ_3 / B, over the points r < 0 and 1
    sum_rho, sum_rho_r = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho = (sum_rho - sum_rho_r) / (1 - r)
    return base - u.alpha * phi_1 * (rho * (calls[0][1] - m) / r + (sum_rho - rho) * ahead)


def _lambda(level: Level) -> float:
    return math.log(level.alpha) - math.log(level.sigma) if level.alpha > 0 else -math.inf


def ratio_decay(s: Level, u: Level) -> float:
    """The ratio of σ/α at u to that at s, e^−h; 0 if u is clean or s has zero SNR."""
    return s.alpha * u.sigma / (s.sigma * u.alpha)


@sampler
def heun(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    randn: Randn,
    churn: float = 0.0,
    level: Callable[[float], Level] | None = None,
) -> Steps:
    """Karras 2022, algorithm 1 and 2: trapezoidal steps of d(x/α)/d(σ/α) = ε; at most 2 N − 1 calls.

    Steps from above σ/α = 80, EDM's start, are Euler steps, because ε hardly changes there, but σ/α may fall
    by thousands. S_churn first raises the noise by the factor 1 + churn / N, at most √2. `level` returns the
    level for a value of σ/α.
    """
    growth = min(churn / (len(path) - 1), math.sqrt(2) - 1)
    for s, u in pairwise(path):
        if level is not None and growth and s.sigma <= SIGMA_MAX * s.alpha:
            ratio, r = s.sigma / s.alpha, level((1 + growth) * s.sigma / s.alpha)
            extra = math.sqrt(max((r.sigma / r.alpha) ** 2 - ratio**2, 0.0))
            x, s = r.alpha * (x / s.alpha + extra * randn()), r
        x0, eps, _ = denoise(x, s.t)
        x = u.alpha * x0 + u.sigma * eps  # Euler's step, exactly DDIM's
        if u.sigma > 0 and s.sigma <= SIGMA_MAX * s.alpha:
            ahead = denoise(x, u.t).eps
            x = x + 0.5 * (u.sigma - u.alpha * s.sigma / s.alpha) * (ahead - eps)
        yield x


@sampler
def euler_maruyama(denoise: Denoise, x: Tensor, path: Path, randn: Randn, sde: Process) -> Steps:
    """The reverse-time SDE dx = (f x − g² score) dt + g dw (Song 2021, eq. 6)."""
    for s, u in pairwise(path):
        x0, eps, _ = denoise(x, s.t)
        if u.sigma > 0:
            f, g2 = (float(rate) for rate in sde.rates(torch.tensor(s.t, dtype=torch.float64)))
            h = s.t - u.t
            x = x - h * (f * x + (g2 / s.sigma) * eps) + math.sqrt(g2 * h) * randn()
        else:
            x = x0
        yield x


@sampler
def predictor_corrector(
    denoise: Denoise, x: Tensor, path: Path, randn: Randn, corrector: int, snr: float
) -> Steps:
    """Song 2021, algorithm 1: the reverse diffusion predictor (eq. 46), then `corrector` Langevin steps at
    the new level. Their length is that of algorithms 4 and 5 with ‖z‖/‖score‖ = σ, as for pure noise. With
    the norms of the actual draws, an image would depend on its batch."""
    for s, u in pairwise(path):
        x0, eps, _ = denoise(x, s.t)
        if u.sigma > 0:
            scale, beta = transition(s, u)
            x = (2 - scale) * x - (beta / s.sigma) * eps + math.sqrt(beta) * randn()
            step = 2 * (scale * snr * u.sigma) ** 2
            for _ in range(corrector):
                x = x - (step / u.sigma) * denoise(x, u.t).eps + math.sqrt(2 * step) * randn()
        else:
            x = x0
        yield x


@sampler
def annealed_langevin(
    denoise: Denoise, x: Tensor, path: Path, randn: Randn, repeats: int, step: float
) -> Steps:
    """Song & Ermon 2020, algorithm 1: `repeats` Langevin steps of length step · σ² at every level σ, and a
    denoising call at the end of the path."""
    for s, u in pairwise(path):
        for _ in range(repeats):
            eps = denoise(x, s.t).eps
            x = x - step * s.sigma * eps + math.sqrt(2 * step) * s.sigma * randn()
        yield x if u.sigma > 0 else denoise(x, s.t).x0


@sampler
def repaint(denoise: Denoise, x: Tensor, path: Path, randn: Randn, image: Tensor, mask: Tensor) -> Steps:
    """Inpainting by RePaint (Lugmayr 2022, algorithm 1): at each level the known pixels of `image` [B, C, H,
    W], where mask [B, 1, H, W] is 1, replace the generated ones, with noise of that level. If the path
    returns to more noise (`repeat_stretches`), the forward process adds noise to x."""
    for s, u in pairwise(path):
        if u.sigma > s.sigma:
            scale, var = transition(u, s)
            x = scale * x + math.sqrt(var) * randn()
        else:
            mean, var = posterior(denoise(x, s.t).x0, x, s, u)
            unknown = mean + math.sqrt(var) * randn()
            x = mask * (u.alpha * image + u.sigma * randn()) + (1 - mask) * unknown
        yield x


def repeat_stretches(path: Path, resample: int, jump: int) -> list[Level]:
    """The path that repeats each segment of `jump` steps `resample` times, so that known and generated pixels
    become consistent."""
    walk = [path[0]]
    for start in range(0, len(path) - 1, jump):
        stretch = path[start + 1 : start + jump + 1]
        walk += [*stretch, *(resample - 1) * [path[start], *stretch]]
    return walk


def transition(s: Level, u: Level) -> tuple[float, float]:
    """α_{s|u} and the variance β of q(x_s | x_u), where u is less noisy than s, or clean."""
    scale = s.alpha / u.alpha
    return scale, s.sigma**2 - (scale * u.sigma) ** 2


def posterior(x0: Tensor, x: Tensor, s: Level, u: Level) -> tuple[Tensor, float]:
    """Mean and variance of q(x_u | x_s, x_0) (Ho 2020, eq. 7)."""
    scale, beta = transition(s, u)
    mean = (u.alpha * beta / s.sigma**2) * x0 + (scale * u.sigma**2 / s.sigma**2) * x
    return mean, beta * (u.sigma / s.sigma) ** 2


# samplers of every process, by their options
SOLVERS: dict[str, Callable[[Any, Process], Sampler]] = {
    "dpmpp": lambda *_: dpmpp,
    "dpmpp_sde": lambda *_: partial(dpmpp, noisy=True),
    "unipc": lambda *_: unipc,
    "heun": lambda options, process: partial(heun, churn=options.churn, level=process.ratio_level),
}


# ---------------------------------------------------------------------------- ODE

Velocity = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]  # [B, …] → [B]

# Butcher tableaux: the times c, rows of a, and the weights b of the stages
TABLEAUX = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
Solver = Annotated[str, TABLEAUX, "adams", "adaptive"]

# Dormand & Prince 1980, RK5(4)7M, whose seventh stage is the first of the next step
DOPRI_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# the weights of the fifth order minus those of the fourth, for the error
DOPRI_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MAX_ADAPTIVE_STEPS = 1000  # most adaptive steps


def root_mean_square(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()


def solve(
    f: Velocity,
    x: Tensor,
    times: Sequence[float],
    solver: Solver,
    *,
    tolerance: float = 1e-4,
    norm: Norm = root_mean_square,
    progress: Progress = no_progress,
) -> Tensor:
    """The solution at the last time, from x at times[0]. The solver takes one step between neighbouring
    times. The adaptive one chooses its own times, so that the norm of errors over 1 + |x| is below
    `tolerance`."""
    if solver == "adaptive":
        return solve_adaptive(f, x, times[0], times[-1], tolerance, norm, progress)
    if solver == "adams":
        return solve_adams(f, x, times, progress)
    c, a, b = TABLEAUX[solver]
    for i, (start, end) in enumerate(pairwise(times)):
        h = end - start
        stages: list[Tensor] = []
        for node, row in zip(c, a, strict=True):
            t = x.new_full((len(x),), start + node * h)
            stages.append(f(_advance(x, h, row, stages), t))
        x = _advance(x, h, b, stages)
        progress(i + 1, len(times) - 1, x)
    return x


def solve_adams(f: Velocity, x: Tensor, times: Sequence[float], progress: Progress) -> Tensor:
    """The solution by Adams–Bashforth steps of second order, with one call each. The velocity is extrapolated
    linearly through its last two values (Hairer, Nørsett & Wanner 1993, III.1 and III.5). The first step is
    Euler's, whose error is of the same order."""
    before, h_before = None, 1.0
    for i, (start, end) in enumerate(pairwise(times)):
        h, v = end - start, f(x, x.new_full((len(x),), start))
        x = x + h * (v if before is None else v + (0.5 * h / h_before) * (v - before))
        before, h_before = v, h
        progress(i + 1, len(times) - 1, x)
    return x


def solve_adaptive(
    f: Velocity, x: Tensor, start: float, end: float, tolerance: float, norm: Norm, progress: Progress
) -> Tensor:
    """The solution at `end` from x at `start` by the Dormand–Prince pair (Hairer, Nørsett & Wanner 1993,
    II.4). Raises DivergedError if `LIMIT` steps do not reach the end."""
    sign = 1.0 if end > start else -1.0
    t = x.new_full((len(x),), start)
    slope = f(x, t)
    h = _first_step(f, x, t, slope, end - start, tolerance, norm)
    for _ in range(MAX_ADAPTIVE_STEPS):
        step = torch.minimum(h, (end - t).abs())  # 0 for images that have arrived
        signed, stages = _per_row(sign * step, x), [slope]
        for node, row in zip(DOPRI_C[1:], DOPRI_A[1:], strict=True):
            new = _advance(x, signed, row, stages)
            stages.append(f(new, t + sign * node * step))
        error = _advance(torch.zeros_like(x), signed, DOPRI_E, stages)
        size = norm(error / (tolerance + tolerance * torch.maximum(x.abs(), new.abs())))
        accepted = size <= 1  # a NaN counts as refused, so the step is shortened
        x, slope = (
            torch.where(_per_row(accepted, x), new, x),
            torch.where(_per_row(accepted, x), stages[-1], slope),
        )
        t = torch.where(accepted, t + sign * step, t)
        factor = (0.9 * size.clamp(min=1e-10) ** -0.2).nan_to_num(0.2).clamp(0.2, 10)
        h = step * torch.where(accepted, factor, factor.clamp(max=1))
        remaining = (end - t).abs() / abs(end - start)
        t = torch.where(remaining <= 1e-6, end, t)
        progress(float(1 - remaining.mean()), 1.0, x)
        if remaining.max() <= 1e-6:
            return x
    hint = "use a larger `tolerance`, or a solver with fixed steps"
    raise DivergedError(f"the ODE took more than {MAX_ADAPTIVE_STEPS} steps", hint=hint)


def _first_step(
    f: Velocity, x: Tensor, t: Tensor, first: Tensor, span: float, tolerance: float, norm: Norm
) -> Tensor:
    """The length [B] of the first step, after Hairer, Nørsett & Wanner 1993, II.4, p. 169. first: f(x, t).
    span: end − start, beyond which f may not be defined."""
    scale, sign = tolerance + tolerance * x.abs(), math.copysign(1.0, span)
    d0, d1 = norm(x / scale), norm(first / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(span))
    ahead = f(x + _per_row(sign * h0, x) * first, t + sign * h0)
    d2 = norm((ahead - first) / scale) / h0
    top = torch.maximum(d1, d2)
    h1 = torch.where(top <= 1e-15, torch.maximum(h0 * 1e-3, torch.full_like(h0, 1e-6)), (0.01 / top) ** 0.2)
    return torch.minimum(100 * h0, h1)


def _advance(x: Tensor, h: float | Tensor, weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """x + h Σ w k."""
    terms = [w * k for w, k in zip(weights, stages, strict=False) if w]
    return x + h * sum(terms) if terms else x


def _per_row(t: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to multiply x [B, …]."""
    return t.view(-1, *[1] * (x.ndim - 1))


# ---------------------------------------------------------------------------- density


def with_divergence(f: Velocity, shape: Sequence[int], probe: Tensor) -> Velocity:
    """The equation of states [x, ℓ], [B, D + 1], of images x [B, *shape] with D elements.

    With v the probe, −vᵀ (∂f/∂x) v estimates d log p / dt without bias (Grathwohl 2019, FFJORD,
    arXiv:1810.01367, eq. 7). ℓ is log p divided by D, which has the magnitude of x, so that one tolerance
    fits both.
    """

    def g(state: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x, v = state[:, :-1].detach().clone().requires_grad_(), probe.clone()
            out = f(x.view(-1, *shape), t.clone()).flatten(1)  # a clone is not an inference tensor
            (row,) = torch.autograd.grad(out, x, v)
        return torch.cat([out.detach(), -(row * v).sum(1, keepdim=True) / x.shape[1]], 1)

    return g


def density_norm(error: Tensor) -> Tensor:
    """The norm [B] of errors of states [x, ℓ]: the larger of the two norms. In a mean over all elements, ℓ
    would count as much as one pixel."""
    return torch.maximum(root_mean_square(error[:, :-1]), error[:, -1].abs())
