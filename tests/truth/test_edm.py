"""EDM against closed forms of Gaussians and of a mixture, and against diffusers' schedulers."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from draws import batch, flat, images, noise
from gaussian import check_likelihood
from torch import nn

from gzcli.core.errors import UsageError
from gzcli.core.types import BatchNoise, DataInfo
from gzcli.models.denoising import samplers
from gzcli.models.denoising.denoiser import UNCLIPPED
from gzcli.models.score.edm import EDM

INFO = DataInfo((1, 4, 4), 256, ("a", "b", "c"), n=64, steps=100)
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}
STD, DATA = 0.3, 0.5  # of each part of the mixture, and of the preconditioning
SIGMAS = (0.01, 0.1, 0.5, 3.0, 80.0)


class Exact(nn.Module):
    """F of the posterior mean of a mixture, of equal parts, of N(mean, STD²) and N(−mean, STD²), or of the
    first part."""

    def __init__(self, model: EDM, mixture: bool, bias: float):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.mean = nn.Parameter(0.2 * torch.randn(INFO.shape, generator=draw).double())
        self.mixture, self.bias, self.calls, self.__dict__["model"] = mixture, bias, 0, model

    def denoised(self, x, sigma):
        sign, variance = 1.0, STD**2 + sigma**2
        if self.mixture:
            sign = (self.mean * x / variance).flatten(1).sum(1).tanh()[:, None, None, None]
        return sign * self.mean + STD**2 / variance * (x - sign * self.mean)

    def forward(self, x, t, y=None, drop=None):
        self.calls += 1
        sigma = self.model.process.levels_at(t / 1000).sigma
        variance = sigma**2 + DATA**2
        x = x * variance.sqrt()
        skipped = DATA**2 / variance * x
        return (self.denoised(x, sigma) + self.bias * sigma - skipped) / (sigma * DATA / variance.sqrt())


def exact(mixture: bool = False, bias: float = 0.0, **options) -> EDM:
    model = EDM.of(INFO, **SMALL, **{"sigma_data": DATA, **options}).double().eval()
    model.net = Exact(model, mixture, bias)
    return model


@pytest.mark.usefixtures("fp64")
def test_the_preconditioning_is_that_of_diffusers_and_keeps_unit_variance():
    model, scheduler = exact(), EDMEulerScheduler(sigma_data=DATA)
    x0, eps = DATA * noise(2000).randn(2000, *INFO.shape), noise(2000, 1).randn(2000, *INFO.shape)
    t = torch.linspace(0, 1, 5)
    affine = torch.stack([t, torch.ones(5)], 1)
    c_noise = scheduler.precondition_noise(model.process.levels_at(t).sigma.flatten())
    fit = affine @ torch.linalg.lstsq(affine, c_noise[:, None]).solution
    torch.testing.assert_close(fit[:, 0], c_noise)
    for sigma in SIGMAS:
        level = model.process.ratio_level(sigma)
        assert level.sigma == pytest.approx(sigma)
        x, target = x0 + level.sigma * eps, model.target(x0, eps, level)
        inputs = model.inputs(x, level)
        assert float(inputs.std()) == pytest.approx(1, abs=0.02)
        assert float(target.std()) == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(inputs, scheduler.precondition_inputs(x, level.sigma))
        out = images(2000, INFO.shape).double()
        torch.testing.assert_close(
            model.to_estimate(out, x, level).x0, scheduler.precondition_outputs(x, out, level.sigma)
        )
        torch.testing.assert_close(model.to_estimate(target, x, level), samplers.Estimate(x0, eps))


@pytest.mark.usefixtures("fp64")
def test_a_weaker_model_whose_error_is_known_guides_to_the_exact_estimate_and_beyond():
    """D_weak + w (D − D_weak) of errors b and 3 b, times σ, has the error (3 − 2 w) b: none at w = 1.5."""
    model, right = exact(mixture=True, bias=0.1), exact(mixture=True)
    x, level = images(50, INFO.shape).double(), model.process.ratio_level(0.5)
    truth = right.estimate(x, level).x0
    with model.guided_away_from(exact(mixture=True, bias=0.3)):
        for scale in (1.0, 1.5, 4.0):
            x0 = model.to_estimate(model.output(x, level, None, scale), x, level).x0
            torch.testing.assert_close(x0 - truth, torch.full_like(x0, (3 - 2 * scale) * 0.1 * 0.5))
        assert (model.guidance_scale(None), right.guidance_scale(None)) == (1.3, 1.0)
        with ThreadPoolExecutor(1) as pool:  # another thread draws from the model as it is
            assert pool.submit(model.guidance_scale, None).result() == 1.0
    assert model.guidance_scale(None) == 1.0
    other_images = model.guided_away_from(EDM.of(DataInfo((1, 4, 5)), **SMALL))
    with pytest.raises(UsageError, match="`weak` has different images"), other_images:
        pass


@pytest.mark.usefixtures("fp64")
def test_the_exact_network_gives_the_posterior_mean_and_the_score():
    model = exact(mixture=True)
    for sigma in SIGMAS:
        x = (model.net.mean + 2 * sigma * noise(8).randn(8, *INFO.shape)).detach().requires_grad_()
        x0, eps, _ = model.denoiser(None, UNCLIPPED)(x, model.process.ratio_level(sigma).t)
        log_p = [
            -((x - sign * model.net.mean) ** 2).flatten(1).sum(1) / 2 / (STD**2 + sigma**2)
            for sign in (1, -1)
        ]
        (score,) = torch.autograd.grad(torch.logaddexp(*log_p).sum(), x)
        torch.testing.assert_close(-eps / sigma, score, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x0, model.net.denoised(x, sigma), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("fp64")
def test_the_least_loss_is_the_analytic_one_and_noise_is_log_normal():
    """λ times the posterior variance, over ln σ ~ N(−1.2, 1.2²)."""
    x = STD * torch.randn(4000, *INFO.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for bias in (0.0, 0.1):
        model = exact(bias=bias)
        losses.append(float(model.loss(batch((model.net.mean + x).detach()))["loss"].detach()))
    z, weights = np.polynomial.hermite_e.hermegauss(60)
    variance = np.exp(2 * (-1.2 + 1.2 * z))
    least = (variance + DATA**2) / DATA**2 * STD**2 / (variance + STD**2)
    assert losses[0] == pytest.approx(float(weights @ least / weights.sum()), rel=0.02)
    assert losses[1] > losses[0] + 0.005
    log_sigma = model.process.levels_at(model.draw_times(BatchNoise(0, total=4000), 4000)).sigma.log()
    assert (float(log_sigma.mean()), float(log_sigma.std())) == pytest.approx((-1.2, 1.2), abs=0.02)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_reaches_the_mixture(churn):
    model, n = exact(mixture=True), 2000
    x = flat(model.sample)(n, noise=noise(n), sampler="heun", steps=30, churn=churn, clip=False)
    mean = model.net.mean.detach()
    place = (x * mean).flatten(1).sum(1) / mean.square().sum()  # ±1 with deviation STD / ‖mean‖
    assert abs(float((place > 0).double().mean()) - 0.5) < 0.05
    spread = math.sqrt(1 + STD**2 / float(mean.square().sum()))
    assert float(place.std()) == pytest.approx(spread, rel=0.06)
    away = x - place[:, None, None, None] * mean
    assert float(away.square().sum() / n / 15) ** 0.5 == pytest.approx(STD, rel=0.06)
    assert model.net.calls <= 59


@pytest.mark.usefixtures("fp64")
def test_multistep_samples_are_those_of_diffusers():
    model, z = exact(mixture=True), 80 * noise(4).randn(4, *INFO.shape)
    path = model.process.path(20)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=path[-2].sigma, sigma_data=DATA)
    scheduler.set_timesteps(20)
    np.testing.assert_allclose([level.sigma for level in path], scheduler.sigmas, rtol=1e-5)
    ours, x = samplers.dpmpp(model.denoiser(None, UNCLIPPED), z, path), z
    for t, level in zip(scheduler.timesteps, path, strict=False):
        inputs = scheduler.scale_model_input(x, t)
        times = torch.full((4,), 1000 * level.t)
        x = scheduler.step(model.net(inputs, times), t, x).prev_sample
    torch.testing.assert_close(ours, x.to(ours), atol=1e-4, rtol=1e-4)


def test_the_likelihood_of_a_gaussian_is_true_by_default():
    model = exact()
    check_likelihood(model, model.net.mean.detach(), STD, n=32)


def test_a_warm_up_bounds_the_weight_and_the_deviation_is_that_of_the_training_images():
    model = EDM.of(INFO, **SMALL, weight_warmup=0.5).train()
    x = images(64, INFO.shape)
    model.fit([batch(x)])
    deviation = float(model.sigma_data)
    assert deviation == pytest.approx(float(x.std())) and deviation != 0.5
    level = model.process.levels_at(torch.tensor([0.0, 0.5, 1.0]))
    sigma = level.sigma.flatten()
    plain = (sigma**2 + deviation**2) / (sigma * deviation) ** 2
    ones, zeros = torch.ones(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    for step, bound in ((-1, 5.0), (24, 50.0), (49, math.inf)):
        model.on_step(step)
        loss = model.objective(ones, zeros, level)["loss"]
        torch.testing.assert_close(loss, (plain.clamp(max=bound) / plain).mean())
    model.on_step(0)
    assert model.eval().objective(ones, zeros, level)["loss"] == 1  # losses of validation are comparable
