"""Averages of the weights after the fact: against quadrature, and against sums over a whole trajectory."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from gzcli.core.sections import TrainSection
from gzcli.engine.averages import Snapshots, average, fitted, product, snapshots_in
from gzcli.engine.ema import EMA, LENGTHS, exponent
from gzcli.store.runs import Run

FINE = 400_001


def profile(gamma: float, time: float, tau: np.ndarray) -> np.ndarray:
    return np.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0)


def test_exponents_and_products_are_those_of_quadrature():
    assert [exponent(length) for length in LENGTHS] == pytest.approx([16.97, 6.94], abs=0.005)
    tau = np.linspace(0, 3, FINE)
    for length in (0.01, 0.05, 0.2, 0.25):
        p = profile(exponent(length), 3, tau)
        mean = trapezoid(p * tau, tau)
        deviation = np.sqrt(trapezoid(p * (tau - mean) ** 2, tau))
        assert (trapezoid(p, tau), deviation) == pytest.approx((1, 3 * length), rel=1e-5)
    for t, gamma, s, delta in ((3, 7, 2, 17), (2, 7, 3, 17), (2.5, 4, 2.5, 9), (1, 0.5, 3, 17)):
        p, q = profile(gamma, t, tau), profile(delta, s, tau)
        assert product(t, gamma, s, delta) == pytest.approx(trapezoid(p * q, tau), rel=1e-4)


@pytest.mark.parametrize("snapshots", [10, 40])
def test_an_average_of_snapshots_is_that_of_the_whole_trajectory(snapshots, tmp_path, fp64):
    """Weights that wander, drift and swing, of which the true average is a sum over all steps; the error is
    within what the profiles miss (Cauchy-Schwarz)."""
    steps, generator = 1000, torch.Generator().manual_seed(0)
    steady = torch.linspace(0, 8, steps)[:, None] * torch.tensor([1, 0.3, 1])
    path = torch.randn(steps, 3, generator=generator).cumsum(0) * 0.1 + steady.sin() + steady
    model = torch.nn.Linear(3, 1, bias=False)
    ema, run = EMA(model, 0.99, lengths=LENGTHS), Run(tmp_path)
    files = Snapshots(run, ema, TrainSection(steps=steps, ema=0.99, ema_snapshots=snapshots))
    for step, weights in enumerate(path):
        model.weight.data.copy_(weights)
        ema.update()
        files.take(step + 1)
    assert len(list(run.snapshots_folder.iterdir())) == snapshots
    times = np.repeat(np.linspace(steps / snapshots, steps, snapshots), 2)
    for length in (0.04, 0.05, 0.06, 0.075, 0.1, 0.15, 0.2):
        gamma = exponent(length)
        share = (torch.arange(steps + 1) / steps) ** (gamma + 1)  # ∫₀^τ p: a step's weights count from τ - 1
        true = share.diff() @ path
        state, missed = average(snapshots_in(run.snapshots_folder), model.state_dict(), steps, length)
        norm = (product(steps, gamma, steps, gamma) * path.square().sum(0)).sqrt()
        error = (state["weight"].double()[0] - true).abs()
        assert (error <= missed * norm + 1e-6 * true.abs()).all(), length
        assert missed == fitted(times, np.tile(LENGTHS, snapshots), steps, length)[1]
        assert missed < (0.01 if length in LENGTHS else 0.08 if snapshots == 10 else 0.01)
        assert length in LENGTHS or missed > 1e-5
