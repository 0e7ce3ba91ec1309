"""The energy-based model: its chains, gradient and training against closed forms of a Gaussian."""

import math

import pytest
import torch
from draws import batch, fitted, flat, noise
from refused import refused
from torch import nn

from gzcli.core.types import DataInfo
from gzcli.models.energy.ebm import EBM

INFO = DataInfo((1, 4, 4), 256, ("a", "b", "c"))


class Gaussian(nn.Module):
    """−E(x) = −½ ‖x − mean‖² / variance + label."""

    def __init__(self, mean: float, variance: float):
        super().__init__()
        self.mean, self.log_variance = (nn.Parameter(torch.tensor(v)) for v in (mean, math.log(variance)))

    def forward(self, x, y=None):
        label = 0 if y is None else y.to(x)
        return label - 0.5 * ((x - self.mean) ** 2).flatten(1).sum(1) / self.log_variance.exp()


def build(**options) -> EBM:
    torch.manual_seed(0)
    return EBM.of(INFO, **{"width": 8, "chains": 64, "chain_steps": 10, **options})


def test_chains_of_a_gaussian_have_the_mean_and_variance_of_langevins_steps():
    """x' = m + a (x + σ ε − m) with a = 1 − η / v: of variance a² σ² / (1 − a²) in the end."""
    model, a = build(step=2.0, noise=0.02).eval(), 1 - 2 / 100
    model.net = Gaussian(0.3, 100.0)
    x = flat(model.sample)(500, noise=noise(500), steps=400)
    assert float(x.mean()) == pytest.approx(0.3, abs=4e-3)
    assert float(x.std()) == pytest.approx(a * 0.02 / math.sqrt(1 - a**2), rel=0.03)


def test_the_gradient_is_that_of_contrastive_divergence():
    model = build(alpha=0.0, noise=0.0)
    model.net = Gaussian(0.1, 2.0)
    data, ends = torch.rand(6, *INFO.shape) - 0.5, torch.rand(6, *INFO.shape)
    model.loss(batch(data, ends=ends))["loss"].backward()
    slopes = [-((x - 0.1) / 2.0).flatten(1).sum(1).mean() for x in (data, ends)]
    torch.testing.assert_close(model.net.mean.grad, slopes[0] - slopes[1])


def test_the_energy_without_labels_is_that_of_the_sum_over_labels():
    model = build(conditional=True)
    model.net, x = Gaussian(0.1, 2.0), torch.rand(4, *INFO.shape)
    each = torch.stack([(-model.energy(x, torch.full((4,), k))).exp() for k in range(3)])
    torch.testing.assert_close(model.energy(x), -each.sum(0).log())


def test_chains_go_on_where_they_ended_and_keep_their_labels():
    model, x, y = build(conditional=True, restart=0.0), torch.zeros(32, *INFO.shape), torch.zeros(32).long()
    first, second, third = (model.on_batch(batch(x, step, y)) for step in range(3))
    assert torch.equal(first["end_labels"], torch.arange(32) % 3)
    assert torch.equal(second["end_labels"], torch.arange(32, 64) % 3)
    moved = model.langevin(first["ends"], first["end_labels"], 10, after_starts(batch(x, 2, y).noise))
    torch.testing.assert_close(third["ends"], moved)
    anew = build(conditional=True, restart=1.0, step=0.0, noise=0.0)  # chains stay where they start
    anew.load_state_dict(model.state_dict())
    started = 2 * batch(x, 3, y).noise.rand(*x.shape) - 1
    torch.testing.assert_close(anew.on_batch(batch(x, 3, y))["ends"], started)
    refused(
        "`model.chains` is 64, but a batch of 65 needs at least as many",
        model.on_batch,
        batch(torch.zeros(65, *INFO.shape)),
    )


def after_starts(draws):
    """The noise after the two draws of starts."""
    draws.rand(32, *INFO.shape), draws.rand(32)
    return draws


def test_training_finds_the_gaussian_whose_chains_are_the_data():
    """a² (v + σ²) = v, where v is the variance of the data with their noise σ²."""
    model = build(chains=256, step=3.0, noise=0.15, chain_steps=20, restart=0.0, alpha=0.0)
    model.net = Gaussian(0.0, 15.0)

    def draw(step: int):
        z = torch.randn(128, *INFO.shape, generator=torch.Generator().manual_seed(step))
        made = batch(0.2 + 0.3 * z, step)
        made.extra |= model.on_batch(made)
        return made

    for lr in (0.1, 0.02):
        fitted(model, draw, 40, lr)
    v = 0.3**2 + 0.15**2
    assert float(model.net.mean.detach()) == pytest.approx(0.2, abs=0.05)
    exact = 3 / (1 - math.sqrt(v / (v + 0.15**2)))
    assert float(model.net.log_variance.exp().detach()) == pytest.approx(exact, rel=0.1)
