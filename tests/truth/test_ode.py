"""The solvers on equations whose solutions are known."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from gzcli.core.errors import DivergedError
from gzcli.core.types import Batch, DataInfo, ImageNoise
from gzcli.judge.likelihood import solver_gap
from gzcli.models.denoising import samplers
from gzcli.models.denoising.samplers import TABLEAUX, density_norm, solve, with_divergence
from gzcli.models.flow_matching.fm import FM

ORDER = {"euler": 1, "adams": 2, "midpoint": 2, "heun": 2, "rk4": 4}


def pendulum(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Driven and damped: neither linear nor autonomous."""
    return torch.stack([x[:, 1], -x[:, 0].sin() - 0.3 * x[:, 1] + (2 * t).cos()], 1)


def exact(x: torch.Tensor, end: float) -> torch.Tensor:
    from scipy.integrate import solve_ivp

    f = lambda t, y: pendulum(torch.tensor(y)[None], torch.tensor([t]).double())[0].numpy()  # noqa: E731
    ends = [solve_ivp(f, (0, end), row.numpy(), rtol=1e-12, atol=1e-12).y[:, -1] for row in x]
    return torch.stack([torch.tensor(end) for end in ends])


def adaptive(f, x: torch.Tensor, start: float, end: float, **options) -> torch.Tensor:
    return solve(f, x, (start, end), "adaptive", **{"tolerance": 1e-5} | options)


STARTS = torch.tensor([[1.0, 0.0], [-2.0, 0.5], [0.1, 3.0]], dtype=torch.float64)


def mixture(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity E[x_1 − x_0 | x_t] of straight paths from N(0, I) to a mixture of two Gaussians."""
    t, means, stds = t[:, None, None], torch.tensor([[1.0, -0.5], [-0.8, 0.6]]).double(), (0.2, 0.4)
    std = torch.tensor(stds).double()[None, :, None]
    variance = (1 - t) ** 2 + (t * std) ** 2  # [B, 2, 1]
    gap = x[:, None] - t * means
    log_p = (-0.5 * gap.square() / variance - 0.5 * variance.log()).sum(2)
    velocity = means + (t * std**2 - (1 - t)) / variance * gap
    return (log_p.softmax(1)[:, :, None] * velocity).sum(1)


def test_the_multistep_solver_is_of_second_order_on_a_gaussian_mixture():
    """Also on times that lie unevenly."""
    x = ImageNoise(3, range(200)).randn(200, 2).double()
    reference = adaptive(mixture, x, 0.0, 1.0, tolerance=1e-10)
    for power in (1, 1.5):
        errors = []
        for steps in (40, 80, 160):
            times = (torch.linspace(0, 1, steps + 1).double() ** power).tolist()
            error = solve(mixture, x, times, "adams") - reference
            errors.append(error.square().mean().sqrt().item())
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("method", ORDER)
def test_errors_fall_at_the_order_of_the_method(method):
    true, errors, calls = exact(STARTS, 2.0), [], 0

    def f(x, t):
        nonlocal calls
        calls += 1
        return pendulum(x, t)

    for steps in (20, 40, 80):
        times = torch.linspace(0, 2, steps + 1).tolist()
        errors.append((solve(f, STARTS, times, method) - true).abs().max().item())
    assert calls == (1 if method == "adams" else len(TABLEAUX[method][2])) * 140
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDER[method], abs=0.35)


def test_stages_are_consistent_and_steps_end_in_the_interval(monkeypatch):
    for c, row in zip(samplers.DOPRI_C, samplers.DOPRI_A, strict=True):
        assert sum(row) == pytest.approx(c)
    monkeypatch.setattr(samplers, "MAX_ADAPTIVE_STEPS", 20)
    with pytest.raises(DivergedError, match="more than 20 steps"):
        adaptive(lambda x, t: x**2, torch.ones(1, 1), 0.0, 2.0)
    # an equation that hardly moves at its start would be tried far beyond its end
    seen = []

    def f(x, t):
        seen.append(t)
        return torch.where(t[:, None] <= 1, 1e-3 * t[:, None] * torch.ones_like(x), torch.nan)

    x = torch.tensor([[1000.0, -1000.0], [1.0, 0.1]])
    out = adaptive(f, x, 0.0, 1.0)
    assert float(torch.cat(seen).max()) <= 1
    torch.testing.assert_close(out, x + 5e-4)
    ones = lambda x, t: torch.where(t[:, None] >= 0, torch.ones_like(x), torch.nan)  # noqa: E731
    torch.testing.assert_close(adaptive(ones, 1e4 * x, 1.0, 0.0), 1e4 * x - 1)


def test_the_adaptive_solver_keeps_its_tolerance_whatever_the_batch():
    together = adaptive(pendulum, STARTS, 0.0, 5.0)
    alone = torch.cat([adaptive(pendulum, start[None], 0.0, 5.0) for start in STARTS])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    true = exact(STARTS, 5.0)
    for tolerance in (1e-4, 1e-7):
        end = adaptive(pendulum, STARTS, 0.0, 5.0, tolerance=tolerance)
        assert (end - true).abs().max() < 50 * tolerance
        back = adaptive(pendulum, end, 5.0, 0.0, tolerance=tolerance)
        assert (back - STARTS).abs().max() < 500 * tolerance
    # x is smooth and the density turns fast: an error in 1 element of 201, which a mean hides
    size, speed = 200, 40.0

    def g(state, t):  # dℓ/dt = 40 cos 40 t
        out = torch.zeros_like(state)
        out[:, -1] = speed * (speed * t).cos()
        return out

    state = torch.zeros(3, size + 1, dtype=torch.float64)
    errors = []
    for norm in (samplers.root_mean_square, density_norm):
        out = adaptive(g, state, 0.0, 1.0, tolerance=1e-3, norm=norm)
        errors.append(float((out[:, -1] - math.sin(speed)).abs().max()))
    assert errors[1] < 5e-3 < errors[0]


@pytest.mark.parametrize("solver", ["rk4", "adaptive"])
def test_the_density_of_a_linear_flow_is_exact_on_average(solver):
    """dx/dt = A x: log p falls by tr A · t; the estimate's mean over Rademacher probes is that trace."""
    a = 0.3 * torch.randn(4, 4).double()
    f = lambda x, t: (x.flatten(1) @ a.T).view_as(x)  # noqa: E731
    x = torch.randn(4000, 1, 2, 2).double()
    v = torch.randint(2, (4000, 4)).double() * 2 - 1
    state, g = torch.cat([x.flatten(1), torch.zeros(4000, 1)], 1), with_divergence(f, (1, 2, 2), v)
    times = torch.linspace(0, 1, 21).tolist()
    out = solve(g, state, times, solver, tolerance=1e-5)
    torch.testing.assert_close(out[:, :4], x.flatten(1) @ torch.matrix_exp(a).T, rtol=1e-3, atol=1e-4)
    gained = 4 * out[:, 4]
    error = gained.std() / 4000**0.5
    assert gained.mean() == pytest.approx(-a.trace().item(), abs=4 * error.item())


def test_the_gap_to_twice_the_steps_is_told():
    """Of an exact net it is nil; of a field that no such steps resolve it is said to be too large."""
    model = FM.of(DataInfo((1, 2, 2), 256), channels=8, mult=(1,), attention=(), groups=4).eval()
    x, index = torch.rand(12, 1, 2, 2) * 2 - 1, torch.arange(12)
    batch = Batch(x, None, index, ImageNoise(0, range(12)))
    trained = SimpleNamespace(model=model, has_levels=True, device="cpu")
    gaps = []
    for speed in (0.0, 300.0):  # turns a unit of log σ/α
        turn = lambda t, speed=speed: (speed * (1 - t).clamp(min=1e-6).log()).sin()  # noqa: E731
        model.velocity = lambda y, turn=turn: lambda x, t: turn(t).view(-1, 1, 1, 1) * x
        gaps.append(solver_gap(trained, batch))
    still, wild = gaps
    assert still.n == 8 and still.steps == 24 and still.worst < 1e-5 and "too few" not in str(still)
    assert wild.worst > 0.01 and "too few steps" in str(wild)
    model.likelihood = "exact"
    assert solver_gap(trained, batch) is None
