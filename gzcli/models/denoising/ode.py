"""Solvers of dx/dt = f(x, t) as pure functions, and the change of density along the flow of the equation.

f(x [B, …], t [B]) → [B, …]. Every image has its own time, and in the adaptive solver its own steps, so that
its solution does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from gzcli.core.errors import DivergedError, UsageError
from gzcli.core.types import Noise, Progress, no_progress
from gzcli.models.nn import double

Solver = Literal["euler", "midpoint", "heun", "rk4", "adaptive"]  # a name of `TABLEAUX`, or adaptive
Velocity = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]  # [B, …] → [B]

# Butcher tableaux: the times c, rows of a, and the weights b of the stages
TABLEAUX = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}

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


def solve(
    f: Velocity, x: Tensor, times: Sequence[float], method: str, progress: Progress = no_progress
) -> Tensor:
    """The solution at the last time from x at times[0], by one step of `method` between neighbouring times.

    method: a name of `TABLEAUX`.
    """
    c, a, b = TABLEAUX[method]
    for i, (start, end) in enumerate(pairwise(times)):
        h = end - start
        stages: list[Tensor] = []
        for node, row in zip(c, a, strict=True):
            t = x.new_full((len(x),), start + node * h)
            stages.append(f(_moved(x, h, row, stages), t))
        x = _moved(x, h, b, stages)
        progress(i + 1, len(times) - 1, x)
    return x


def solve_adaptive(
    f: Velocity,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    limit: int = 1000,
    norm: Norm | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """The solution at `end` from x at `start`, by the Dormand–Prince pair (Hairer, Nørsett & Wanner 1993,
    II.4).

    An image's step is chosen so that the norm of its error over atol + rtol·|x| stays below 1. Raises
    DivergedError where `limit` steps do not reach the end.

    rtol: tolerance relative to |x|.
    atol: absolute tolerance.
    limit: largest number of steps.
    norm: of the errors [B, …] of the images, [B]; None: the root mean square.
    """
    sign, norm = 1.0 if end > start else -1.0, norm or _rms
    t = x.new_full((len(x),), start)
    slope = f(x, t)
    h = _first_step(f, x, t, slope, end - start, atol, rtol, norm)
    for _ in range(limit):
        step = torch.minimum(h, (end - t).abs())  # 0 for images that have arrived
        signed, stages = _as(sign * step, x), [slope]
        for node, row in zip(DOPRI_C[1:], DOPRI_A[1:], strict=True):
            new = _moved(x, signed, row, stages)
            stages.append(f(new, t + sign * node * step))
        error = _moved(torch.zeros_like(x), signed, DOPRI_E, stages)
        size = norm(error / (atol + rtol * torch.maximum(x.abs(), new.abs())))
        taken = size <= 1  # a NaN is refused, and its step shortened
        x, slope = torch.where(_as(taken, x), new, x), torch.where(_as(taken, x), stages[-1], slope)
        t = torch.where(taken, t + sign * step, t)
        factor = (0.9 * size.clamp(min=1e-10) ** -0.2).nan_to_num(0.2).clamp(0.2, 10)
        h = step * torch.where(taken, factor, factor.clamp(max=1))
        left = (end - t).abs() / abs(end - start)
        t = torch.where(left <= 1e-6, end, t)
        progress(float(1 - left.mean()), 1.0, x)
        if left.max() <= 1e-6:
            return x
    raise DivergedError(
        f"the ODE took more than {limit} steps", hint="a larger `tolerance`, or a solver of fixed steps"
    )


def solve_by(
    solver: Solver,
    f: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    tolerance: float = 1e-4,
    norm: Norm | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """The solution at the last time from x at times[0].

    solver: a method that takes one step between neighbouring times, or the adaptive solver, which chooses its
      own times.
    tolerance: relative and absolute tolerance of the adaptive solver.
    norm: of the errors in the adaptive solver, as in `solve_adaptive`.
    """
    if solver == "adaptive":
        return solve_adaptive(
            f, x, times[0], times[-1], rtol=tolerance, atol=tolerance, norm=norm, progress=progress
        )
    return solve(f, x, times, solver, progress)


def with_divergence(f: Velocity, shape: Sequence[int]) -> Velocity:
    """The equation of states [x, v, ℓ], [B, 2 D + 1], of images x with D elements.

    The probe v is constant, and dℓ/dt = −vᵀ (∂f/∂x) v estimates d log p / dt without bias (Grathwohl 2019,
    FFJORD, arXiv:1810.01367, eq. 7).

    shape: of an image x.
    """

    def g(state: Tensor, t: Tensor) -> Tensor:
        size = state.shape[1] // 2
        with torch.inference_mode(False), torch.enable_grad():
            x, v = (part.detach().clone() for part in state[:, :-1].split(size, 1))
            out = f(x.requires_grad_().view(-1, *shape), t).flatten(1)
            (row,) = torch.autograd.grad(out, x, v)
        return torch.cat([out.detach(), torch.zeros_like(v), -(row * v).sum(1, keepdim=True)], 1)

    return g


def density_norm(error: Tensor) -> Tensor:
    """The norm [B] of errors of states [x, v, ℓ]: the larger one of the errors of x and of ℓ.

    In one mean over all elements ℓ would count as one pixel of many, and the probes, which are exact, as half
    of the pixels.
    """
    return torch.maximum(_rms(error[:, : error.shape[1] // 2]), error[:, -1].abs())


@dataclass(frozen=True)
class LikelihoodOptions:
    """The solution of the ODE from data to noise that gives a likelihood.

    solver: of the ODE: with steps of one network call and gradient (euler), two (midpoint, heun) or four
      (rk4), or with steps of six that fit the image (adaptive).
    steps: of the solvers with fixed steps, even in log σ/α, as the details of data are spread over its noise
      levels.
    tolerance: largest error of an adaptive step, of x and of the nats a dimension.
    probes: Rademacher vectors that estimate the divergence.
    """

    solver: Solver = "rk4"
    steps: int = 24
    tolerance: float = 1e-4
    probes: int = 1


def grey_levels(levels: int | None) -> int:
    """The number of grey levels. Raises UsageError for latents, which have none."""
    if levels is None:
        raise UsageError("latents have no grey levels, so no likelihood of the discrete image")
    return levels


def dequantised(levels: int) -> float:
    """The standard deviation of the noise that dequantises grey levels uniformly, for images in [-1, 1]."""
    return 1 / (levels - 1) / math.sqrt(3)


def log_density(
    f: Velocity,
    x: Tensor,
    times: Sequence[float],
    options: LikelihoodOptions,
    *,
    levels: int,
    alpha: float,
    noise: Noise,
    std: float = 1.0,
) -> Tensor:
    """log p(x) [B], in nats, of discrete images by the change of density along the flow of f to N(0, std²)
    (Song 2021, arXiv:2011.13456, eq. 39).

    Grey levels are dequantised uniformly, which makes the value a bound. The dequantised images replace the
    noised images α x + σ ε at the first time, where σ/α should be the deviation `dequantised`, or as near as
    the model comes. With less noise a model with spikes at the grey levels underestimates the likelihood;
    more noise hides how flat a flat part is. The divergence is Hutchinson's estimate, which is unbiased.

    times: from data to noise, for solvers with fixed steps.
    alpha: α at the first time.
    std: standard deviation of the noise.
    """
    n, size, width = len(x), x[0].numel(), 2 / (levels - 1)  # of a grey level
    whole = with_divergence(f, x.shape[1:])

    def g(state: Tensor, t: Tensor) -> Tensor:
        """ℓ in nats a dimension, of the size of x, so that one tolerance fits both."""
        out = whole(state, t)
        return torch.cat([out[:, :-1], out[:, -1:] / size], 1)

    x = alpha * (x + width * (noise.rand(*x.shape) - 0.5))
    total = x.new_zeros(())
    for _ in range(options.probes):
        v = 2 * noise.randint(2, n, size).to(x.dtype) - 1
        state = torch.cat([x.flatten(1), v, x.new_zeros(n, 1)], 1)
        state = solve_by(options.solver, g, state, times, tolerance=options.tolerance, norm=density_norm)
        z, gained = double(state[:, :size]) / std, size * double(state[:, -1])
        # from data to noise log p changes by `gained`, to the log density of the noise
        total = total - 0.5 * z.square().sum(1) - size * math.log(std * math.sqrt(2 * math.pi)) - gained
    return (total / options.probes + size * math.log(alpha * width)).to(x)


def _moved(x: Tensor, h: float | Tensor, weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """x + h Σ w k."""
    terms = [w * k for w, k in zip(weights, stages, strict=False) if w]
    return x + h * sum(terms) if terms else x


def _as(t: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to multiply x [B, …]."""
    return t.view(-1, *[1] * (x.ndim - 1))


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()


def _first_step(
    f: Velocity, x: Tensor, t: Tensor, first: Tensor, span: float, atol: float, rtol: float, norm: Norm
) -> Tensor:
    """The length [B] of the first step, after Hairer, Nørsett & Wanner 1993, II.4, p. 169.

    It is at most |span|, as f may not be defined beyond the end.

    first: f(x, t).
    span: end − start.
    """
    scale, sign = atol + rtol * x.abs(), math.copysign(1.0, span)
    d0, d1 = norm(x / scale), norm(first / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(span))
    ahead = f(x + _as(sign * h0, x) * first, t + sign * h0)
    d2 = norm((ahead - first) / scale) / h0
    top = torch.maximum(d1, d2)
    h1 = torch.where(top <= 1e-15, torch.maximum(h0 * 1e-3, torch.full_like(h0, 1e-6)), (0.01 / top) ** 0.2)
    return torch.minimum(100 * h0, h1)
