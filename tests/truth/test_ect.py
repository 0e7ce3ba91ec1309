"""The consistency function of a Gaussian, which is known: f(x, σ) = x s / √(s² + σ²) for images N(0, s²)."""

import pytest
import torch
from draws import batch, flat, noise
from refused import refused
from torch import nn

from gzcli.core.types import DataInfo
from gzcli.models import catalog
from gzcli.models.denoising.samplers import Estimate

INFO = DataInfo((1, 4, 4), None, ("a", "b"), n=64, steps=90)
STD = 0.3
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}
TEACHERS = {
    "fm": {},
    "ddpm": {"prediction": "v"},
    "ddpm eps": {"prediction": "eps", "schedule": "linear"},
    "sgm": {},
    "sgm ve": {"process": "ve"},
    "edm": {"sigma_data": 0.5},
}


class Exact(nn.Module):
    """The output from which a teacher's estimate of x_0 is f, or the posterior mean, off by a factor."""

    def __init__(self, model, teacher, consistent: bool):
        super().__init__()
        self.off = nn.Parameter(torch.zeros(()))
        self.consistent, self.__dict__["model"], self.__dict__["teacher"] = consistent, model, teacher

    def forward(self, x, t, y=None, drop=None):
        level, z = self.model.seen
        ratio = level.sigma / level.alpha
        pull = STD / (STD**2 + ratio**2).sqrt() if self.consistent else STD**2 / (STD**2 + ratio**2)
        x0 = (1 + self.off) * pull * z / level.alpha
        eps = (z - level.alpha * x0) / level.sigma
        expected = self.teacher.inputs(z, level)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(t, self.teacher.time_input(level.t))
        return self.teacher.target(x0, eps, level)


def exact(name: str = "fm", consistent: bool = True, **tuning):
    """An ECT, and its teacher, whose nets are told the level and the image that they see."""
    teacher = catalog.load(name.split()[0]).of(INFO, **SMALL, **TEACHERS[name]).double().eval()
    model = catalog.load("ect").of(INFO, teacher=teacher, **tuning).double()
    estimate = model.estimate

    def watched(x, level, y=None):
        model.seen = level, x
        return estimate(x, level, y)

    model.estimate, model.net = watched, Exact(model, teacher, consistent)
    return model, teacher


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", TEACHERS)
def test_one_call_is_exact_and_so_are_four(name):
    model, _ = exact(name)
    top, n = model.sigma_max, 3000
    assert top == pytest.approx(50 if name == "sgm ve" else 80, rel=0.02)
    one = flat(model.sample)(n, noise=noise(n), steps=1)
    z = noise(n).randn(n, *INFO.shape)
    torch.testing.assert_close(one, z * top * STD / (STD**2 + top**2) ** 0.5, rtol=1e-3, atol=1e-4)
    for steps in (2, 4):
        x = flat(model.sample)(n, noise=noise(n), steps=steps, sigma_last=STD)
        assert float(x.std()) == pytest.approx(STD, rel=0.02), steps


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", TEACHERS)
def test_the_student_starts_with_the_estimate_of_its_teacher(name):
    """At the teacher's own levels, from an awake net."""
    teacher = catalog.load(name.split()[0]).of(INFO, **SMALL, **TEACHERS[name]).double().eval()
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.1)
    model = catalog.load("ect").of(INFO, teacher=teacher).double().eval()
    for sigma in (0.05, 0.8, 20.0):
        level = teacher.process.ratio_level(sigma)
        x = noise(4).randn(4, *INFO.shape)
        batched = level._replace(t=torch.full((4,), level.t))
        expected: Estimate = teacher.estimate(level.alpha * x, batched)
        ours = model.consistent(x, torch.full((4,), level.sigma / level.alpha), None)
        torch.testing.assert_close(ours, expected.x0, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("fp64")
def test_the_true_function_is_where_the_loss_pulls_and_the_posterior_mean_is_not():
    """The gradient of the factor of f over f's own scale, as r comes near t."""
    x = STD * torch.randn(4000, *INFO.shape, generator=torch.Generator().manual_seed(1))
    pulls = []
    for consistent in (True, False):
        model, _ = exact(consistent=consistent, q=2.0, stages=6)
        model.train().on_step(89)
        model.loss(batch(x))["loss"].backward()
        pulls.append(abs(float(model.net.off.grad)))
    assert pulls[0] < 0.1 * pulls[1]


@pytest.mark.usefixtures("fp64")
def test_the_loss_vanishes_along_the_exact_path():
    """Where the noise of x_r is the mean that the path has, f(x_t, t) = f(x_r, r) to first order in t − r."""
    losses = []
    x = STD * torch.randn(1000, *INFO.shape, generator=torch.Generator().manual_seed(1))
    for stages in (4, 7):
        model, _ = exact(q=2.0, stages=stages)
        model.guided = lambda eps, x_t, t, y: x_t * (t / (STD**2 + t**2))[:, None, None, None]
        model.on_step(89)
        losses.append(float(model.loss(batch(x))["loss"].detach()))
    plain, _ = exact(q=2.0, stages=7)
    plain.on_step(89)
    assert losses[1] < 0.2 * losses[0]
    assert losses[1] < 0.1 * float(plain.loss(batch(x))["loss"].detach())


def test_stages_halve_the_step_and_a_teacher_is_a_denoiser_conditioned_alike():
    model, teacher = exact(q=2.0, stages=3)
    gaps = []
    for step in (-1, 28, 29, 59, 89, 1000):
        model.on_step(step)
        gaps.append(model.gap)
    assert gaps == [1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 8, 1 / 8]
    ect = catalog.load("ect")
    refused("is false, but the student's is not", ect.of, INFO, teacher=teacher, conditional=True)
    refused("not a denoiser", ect.of, INFO, teacher=nn.Identity())
