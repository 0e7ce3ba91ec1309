"""Estimates of the image that are held within [-1, 1], by every prediction of a network."""

from __future__ import annotations

import pytest
import torch
from draws import noise
from torch import nn

from gzcli.core.types import Batch, DataInfo
from gzcli.models.denoising.samplers import with_divergence
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.models.flow_matching.fm import FM
from gzcli.models.score.edm import EDM
from gzcli.models.score.sgm import SGM

INFO = DataInfo((1, 4, 4), 256, ())
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4, "bounded": True}
MODELS = [
    (FM, {}),
    (FM, {"prediction": "x0"}),
    (DDPM, {"prediction": "eps"}),
    (DDPM, {"prediction": "v"}),
    (SGM, {"process": "ve"}),
    (EDM, {}),
]


class Field(nn.Module):
    """Outputs whose estimates leave the range in some pixels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x, t, y, drop=None):
        return self.scale * torch.sin(3 * x + torch.arange(16.0).view(1, 1, 4, 4))


def model_of(kind, options):
    model = kind.of(INFO, **SMALL, **options).double().eval()
    model.net = Field().double()
    return model


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("kind", "options"), MODELS)
def test_estimates_are_clamped_and_explain_the_noised_image(kind, options):
    model, x = model_of(kind, options), torch.randn(8, 1, 4, 4)
    level = model.process.level_at(0.4)
    x0, eps, _ = model.estimate(x, level)
    model.bounded = False
    free = model.estimate(x, level).x0
    assert (free.abs() > 1).any() and (free.abs() < 1).any()
    torch.testing.assert_close(x0, free.clamp(-1, 1))
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("kind", "options"), MODELS)
def test_errors_beyond_the_bound_cost_nothing_and_others_come_back(kind, options):
    """The gradient at an output is that of a squared error whose estimate is clamped."""
    model, x = model_of(kind, options).train(), torch.randn(8, 1, 4, 4)
    level = model.process.levels_at(model.draw_times(noise(8), 8))
    out = (5 * torch.randn_like(x)).requires_grad_(True)
    image = torch.where(torch.rand_like(x) < 0.5, -1.0, 0.3)
    held = model.within(out, x, level)
    target = model.target(image, (x - level.alpha * image) / level.sigma, level)
    (held - target).square().sum().backward()
    torch.testing.assert_close(out.grad, 2 * (held - target).detach())
    free = model.to_estimate(out, x, level).x0
    on_bound = (free < -1) & (image == -1)
    assert on_bound.any() and (free > 1).any()
    torch.testing.assert_close(out.grad[on_bound], torch.zeros_like(out.grad[on_bound]), atol=1e-9, rtol=0)
    assert (out.grad[free > 1] != 0).all()


@pytest.mark.usefixtures("fp64")
def test_the_divergence_of_a_bounded_velocity_is_its_own():
    """Against differences: the gradient of training must not reach the likelihood."""
    model, t = model_of(FM, {}), torch.full((1,), 0.6)
    x, f, h = torch.randn(1, 1, 4, 4), model.velocity(), 1e-6
    assert (model.estimate(x, model.process.levels_at(t)).x0.abs() == 1).any()
    axes, state = torch.eye(16).view(16, 1, 1, 4, 4), torch.cat([x.flatten(1), torch.zeros(1, 1)], 1)
    differences = (float(((f(x + h * e, t) - f(x - h * e, t)) * e).sum()) / (2 * h) for e in axes)
    traces = (-16 * float(with_divergence(f, INFO.shape, e.view(1, 16))(state, t)[0, -1]) for e in axes)
    assert sum(traces) == pytest.approx(sum(differences), rel=1e-5)


@pytest.mark.usefixtures("fp64")
def test_the_loss_is_that_of_the_clamped_estimate():
    model = model_of(FM, {"prediction": "x0"})
    batch = Batch(torch.full((8, 1, 4, 4), -1.0), None, torch.arange(8), noise(8))
    model.net.scale.fill_(0.0)
    assert float(model.loss(batch)["loss"]) > 0
    model.net.forward = lambda x, t, y, drop=None: torch.full_like(x, -3.0)
    assert float(model.loss(batch)["loss"]) == 0
