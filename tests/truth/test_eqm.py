"""Equilibrium matching: the field of Gaussian data by quadrature, the energy of a mixture, and descent."""

from itertools import pairwise

import pytest
import torch
from draws import awake, batch, fitted, flat, noise
from scipy.stats import spearmanr
from torch import nn

from gzcli.core.types import DataInfo
from gzcli.models.energy.eqm import EqM

INFO = DataInfo((1, 4, 4), 256, ("a", "b"))
SMALL = {"channels": 8, "mult": (1,), "attention": (4,)}
MEANS = torch.tensor([[0.5] * 16, [-0.5] * 8 + [0.5] * 8])  # of a mixture of two Gaussians
GAMMA = (torch.arange(200) + 0.5)[:, None, None] / 200  # of the quadrature


def field(z: torch.Tensor, means: torch.Tensor, std: float) -> torch.Tensor:
    """E[c(γ) (ε − x) | x_γ = z], [B, D], over uniform γ and data N(mean, std²) of equally many means [K, D].

    ε − x = (z − x) / (1 − γ),   x_γ ~ N(γ mean, v),   v = γ² std² + (1 − γ)²
    E[x | z, γ, mean] = mean + γ std² / v (z − γ mean)
    """
    gap = z - GAMMA[..., None] * means[:, None]  # [γ, K, B, D]
    v = GAMMA**2 * std**2 + (1 - GAMMA) ** 2
    log_p = -0.5 * gap.square().sum(-1) / v - 0.5 * z.shape[1] * v.log()  # [γ, K, B]
    x = means[:, None] + (GAMMA * std**2 / v)[..., None] * gap
    c = 4 * ((1 - GAMMA) / 0.2).clamp(max=1)
    slopes = (c / (1 - GAMMA))[..., None] * (z - x)
    return (log_p.flatten(0, 1).softmax(0)[..., None] * slopes.flatten(0, 1)).sum(0)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        layers = [part for a, b in pairwise((dim, 64, 64, dim)) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x, t, y=None, drop=None):
        return self.layers(x.flatten(1)).view_as(x)


class Exact(nn.Module):
    def __init__(self, means: torch.Tensor, std: float):
        super().__init__()
        self.means, self.std, self.calls = nn.Parameter(means), std, 0

    def forward(self, x, t, y=None, drop=None):
        self.calls += 1
        return field(x.flatten(1), self.means, self.std).view_as(x)


def trained(shape: tuple[int, ...], means: torch.Tensor, std: float, steps: int) -> EqM:
    """The energy of an MLP, trained on a mixture."""
    torch.manual_seed(0)
    model = EqM.of(DataInfo(shape), **SMALL, energy="dot")
    model.net = MLP(means.shape[1])

    def draw(step: int):
        k = torch.arange(1024) % len(means)
        z = torch.randn(1024, means.shape[1], generator=torch.Generator().manual_seed(step))
        return batch((means[k] + std * z).view(-1, *shape), step)

    for lr in (6e-3, 1e-3):
        fitted(model, draw, steps, lr)
    return model.eval().requires_grad_(False)


def test_training_finds_the_field_of_gaussian_data():
    """In one dimension every field is the gradient of an energy."""
    mean = torch.tensor([[0.4]])
    model, z = trained((1, 1, 1), mean, 0.3, 120), torch.linspace(-1, 1.2, 23)[:, None]
    with torch.no_grad():
        learned = model.gradient(None)(z.view(-1, 1, 1, 1)).flatten(1)
    exact = field(z, mean, 0.3)
    assert exact.abs().max() > 7
    torch.testing.assert_close(learned, exact, atol=0.5, rtol=0)


def test_the_energy_ranks_the_densities_of_a_mixture():
    model, g = trained(INFO.shape, MEANS, 0.2, 120), torch.Generator().manual_seed(1)
    k, spread = torch.arange(120) % 2, 4 * torch.rand(120, 1, generator=g)
    x = MEANS[k] + 0.2 * spread * torch.randn(120, 16, generator=g)
    x = torch.cat([x, torch.lerp(MEANS[0], MEANS[1], torch.linspace(0, 1, 21)[:, None])])
    minus_log_p = -torch.logsumexp(-torch.cdist(x, MEANS).square() / (2 * 0.2**2), 1)
    with torch.no_grad():
        scores = [
            f(x.view(-1, *INFO.shape), noise=noise(141)) for f in (model.score_energy, model.score_gradient)
        ]
    assert all(spearmanr(score, minus_log_p).statistic > 0.85 for score in scores)


@pytest.mark.usefixtures("fp64")
def test_the_gradient_is_that_of_the_guided_energy():
    model = EqM.of(INFO, **SMALL, energy="dot", conditional=True).eval()
    awake(model.net)
    x, y = torch.rand(3, *INFO.shape), torch.tensor([0, 1, 1])
    with torch.inference_mode():  # as samples are drawn
        slope = model.gradient(y + 0, 3.0)(x + 0)
    v = torch.randn_like(x)
    guided = lambda x: model.energy(x) + 3 * (model.energy(x, y) - model.energy(x))  # noqa: E731
    rise = (guided(x + 1e-5 * v) - guided(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close((slope * v).flatten(1).sum(1), rise.detach(), rtol=1e-6, atol=1e-6)


def test_an_implicit_energy_is_the_integral_of_its_gradient():
    model = EqM.of(DataInfo((1, 1, 1)), **SMALL).eval()
    model.net = Exact(torch.tensor([[-0.5], [0.5]]), 0.3)
    x = torch.linspace(-1, 1, 401).view(-1, 1, 1, 1)
    with torch.no_grad():
        energy, slope = model.score_energy(x, noise=noise(401)), model.gradient(None)(x).flatten()
    rise = torch.cumulative_trapezoid(slope, x.flatten(), dim=0)
    torch.testing.assert_close(energy[1:] - energy[0], rise, atol=5e-3, rtol=0)


def test_descent_reaches_the_data_of_an_exact_field_each_image_by_itself():
    model = EqM.of(INFO, **SMALL).eval()
    model.net = Exact(MEANS, 0.01)
    x = flat(model.sample)(64, noise=noise(64), steps=60, stop=0.0)
    assert model.net.calls == 60
    distance = torch.cdist(x.flatten(1), MEANS)
    assert distance.amin(1).max() < 0.1
    assert 0.3 < distance.argmin(1).float().mean() < 0.7
    model.net.calls = 0
    stopped = flat(model.sample)(64, noise=noise(64), steps=60, stop=0.1)
    assert model.net.calls < 60
    torch.testing.assert_close(stopped, x, atol=0.1, rtol=0)
    torch.testing.assert_close(flat(model.sample)(2, noise=noise(2), steps=60, stop=0.1), stopped[:2])


def test_ten_steps_reach_the_data_if_the_last_one_goes_all_the_way():
    model, few = EqM.of(INFO, **SMALL).eval(), {"steps": 10, "step": 0.025, "momentum": 0.0, "stop": 0.0}
    model.net = Exact(MEANS, 0.01)
    left = []
    for last in (None, 0.05):
        x = flat(model.sample)(64, noise=noise(64), last_step=last, **few)
        left.append(torch.cdist(x.flatten(1), MEANS).amin(1).mean())
    assert model.net.calls == 20
    assert left[1] < 0.1 < 3 * left[1] < left[0]
