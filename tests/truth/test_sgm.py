"""Score models against simulation of their SDEs and the exact scores of a Gaussian and of a mixture."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from draws import batch, flat, images, noise
from gaussian import GaussianField, check_likelihood, check_moments
from torch import nn

from gzcli.core.types import BatchNoise, DataInfo, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.denoiser import LikelihoodOptions
from gzcli.models.denoising.process import VE, VP, Level, SubVP
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.score.sgm import SGM

SCALE = VP.scale
INFO = DataInfo((1, 4, 4), 256, ("a", "b", "c"), n=64, steps=100)
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}
SDES = {"vp": VP(1e-3, 0.1), "subvp": SubVP(1e-3, 0.1), "ve": VE(1e-3, 0.01, 50.0)}
SHIFTED = {"vp shifted": VP(1e-3, 0.1, 2.5), "subvp shifted": SubVP(1e-3, 0.1, 2.5)}
ALL = SDES | SHIFTED


class Exact(nn.Module):
    """What a model is to predict of a mixture, of equal parts, of N(mean, std²) and N(−mean, std²)."""

    def __init__(self, model: SGM, mean: torch.Tensor, std: float, mixture: bool = False, bias: float = 0.0):
        super().__init__()
        self.mean, self.std, self.mixture, self.bias = nn.Parameter(mean), std, mixture, bias
        self.__dict__["model"], self.calls = model, 0

    def forward(self, x, t, y=None, drop=None):
        self.calls += 1
        at = self.model.process.levels_at(t / SCALE)
        alpha, sigma, r = at.alpha, at.sigma, self.model.process.norm(at)
        x, variance = (x * r if self.model.rescale else x), (alpha * self.std) ** 2 + sigma**2
        sign = 1.0
        if self.mixture:  # the posterior mean of the sign of the part
            sign = (alpha * self.mean * x / variance).flatten(1).sum(1).tanh()[:, None, None, None]
        x0 = sign * self.mean + alpha * self.std**2 / variance * (x - alpha * sign * self.mean) + self.bias
        eps = (x - alpha * x0) / sigma
        return eps if self.model.prediction == "eps" else (alpha * eps - sigma * x0) / r


def exact(std: float = 0.3, mixture: bool = False, bias: float = 0.0, **options) -> SGM:
    model = SGM.of(INFO, **SMALL, **options).double().eval()
    mean = 0.2 * torch.randn(INFO.shape, generator=torch.Generator().manual_seed(2)).double()
    model.net = Exact(model, mean, std, mixture, bias)
    return model


def test_a_shift_multiplies_the_noise_to_signal_ratio():
    """Of every level of vp: the logarithm of the SNR falls by 2 log s, where a side of 256 has s = 4."""
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    (alpha, sigma), (alpha4, sigma4) = (VP(1e-3, 0.1, s).marginal(t) for s in (1.0, 4.0))
    torch.testing.assert_close(2 * (alpha4 / sigma4).log(), 2 * (alpha / sigma).log() - 2 * math.log(4))
    torch.testing.assert_close(alpha4**2 + sigma4**2, torch.ones_like(t))
    with torch.device("meta"):
        plain, auto = (SGM.of(DataInfo((3, 256, 256)), channels=8, shift=s) for s in (1.0, "auto"))
    one, second = plain.process.level(0.4), auto.process.level(0.4)
    assert second.sigma / second.alpha == pytest.approx(4 * one.sigma / one.alpha)


@pytest.mark.parametrize("name", ALL)
def test_the_marginals_are_those_of_the_simulated_sde_and_times_have_their_ratio(name):
    sde = ALL[name]
    path = sde.path(9, "logsnr")[:-1]
    ratios = np.diff([math.log(level.sigma / level.alpha) for level in path])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert path[0].t == 1 and path[-1].t == pytest.approx(sde.clean, rel=1e-3)
    half = sde.path(5, start=0.5)[:-1]
    assert half[0].sigma == pytest.approx(half[0].alpha, rel=1e-3) and all(
        a.t > b.t for a, b in pairwise(half)
    )
    # euler–Maruyama forward from the least time, 2,000 steps
    sde, draw = ALL[name], torch.Generator().manual_seed(0)
    times = np.geomspace(sde.clean, 1, 2001)
    first = sde.level(sde.clean)
    x = first.alpha * 1.5 + first.sigma * torch.randn(20000, generator=draw).double()
    f, g2 = sde.rates(torch.from_numpy(times[:-1]))
    h = torch.from_numpy(np.diff(times))
    for i, (drift, diffusion) in enumerate(zip(1 + h * f, (g2 * h).sqrt(), strict=True)):
        x = drift * x + diffusion * torch.randn(len(x), generator=draw)
        if i in (1000, 1500, 1999):
            level = sde.level(times[i + 1])
            assert float(x.std()) == pytest.approx(level.sigma, rel=0.02)
            error = 4 * level.sigma / math.sqrt(len(x))
            assert float(x.mean()) == pytest.approx(1.5 * level.alpha, abs=error)


CALLS = {"heun": lambda n: 2 * n - 1, "pc": lambda n: 3 * n - 2}
CALLS |= dict.fromkeys(("dpmpp", "dpmpp_sde", "em"), lambda n: n)


def pairs_of_sampler_and_sde():
    """Each of the two that take 300 steps is quick with one SDE."""
    for sampler, name in product((*CALLS, "ode"), SDES):
        slow = sampler in ("em", "pc") and name != "ve"
        yield pytest.param(sampler, name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("sampler", "name"), pairs_of_sampler_and_sde())
def test_samplers_recover_a_mixture_at_the_cost_that_they_state(name, sampler):
    """Variance along and across the line of the parts and their share; those of the SDE with many steps."""
    model = exact(mixture=True, process=name)
    how = {"steps": 300, "spacing": "uniform", "corrector": 2} if sampler in ("em", "pc") else {"steps": 50}
    steps, draw = how["steps"], BatchNoise(0, total=2000)
    x = flat(model.sample)(2000, noise=draw, progress=no_progress, sampler=sampler, clip=False, **how)
    mean = model.net.mean.detach()
    place = (x * mean).flatten(1).sum(1) / mean.square().sum()  # ±1 with deviation .3 / ‖mean‖
    spread = math.sqrt(1 + 0.3**2 / float(mean.square().sum()))
    assert abs(float((place > 0).double().mean()) - 0.5) < 0.05
    assert float(place.std()) == pytest.approx(spread, rel=0.06)
    away = x - place[:, None, None, None] * mean
    assert float(away.square().sum(0).sum() / len(x) / 15) ** 0.5 == pytest.approx(0.3, rel=0.08)
    if sampler == "heun":  # it takes single steps above σ/α = 80
        assert model.net.calls <= CALLS["heun"](steps)
    elif sampler != "ode":
        assert model.net.calls == CALLS[sampler](steps)


@pytest.mark.parametrize("corrector", [1, 500])
def test_the_langevin_step_of_the_corrector_is_that_of_the_paper(corrector):
    """Song 2021, algorithm 5: ε = 2 α (r σ)². One coordinate for each draw of noise, so that the squared
    coefficients sum to the exact variance. Each step maps the variance of a Gaussian of score −x/τ² to
    (1 − ε/τ²)² v + 2 ε, whose fixed point is τ² / (1 − ε / 2τ²)."""
    s, u, snr, std = Level(0.9, 0.4, math.sqrt(1 - 0.16)), Level(0.6, 0.5, math.sqrt(1 - 0.25)), 0.3, 0.8
    variance = {level.t: (level.alpha * std) ** 2 + level.sigma**2 for level in (s, u)}
    sigma = {level.t: level.sigma for level in (s, u)}
    draws = iter(torch.eye(corrector + 2, dtype=torch.float64))

    def denoise(x, t):
        return Estimate(torch.zeros_like(x), sigma[t] * x / variance[t])

    x = samplers.predictor_corrector(
        denoise, s.sigma * next(draws), [s, u], randn=lambda: next(draws), corrector=corrector, snr=snr
    )
    alpha = (s.alpha / u.alpha) ** 2
    beta, step, target = 1 - alpha, 2 * alpha * (snr * u.sigma) ** 2, variance[u.t]
    expected = s.sigma**2 * (2 - math.sqrt(alpha) - beta / variance[s.t]) ** 2 + beta
    for _ in range(corrector):
        expected = (1 - step / target) ** 2 * expected + 2 * step
    assert float(x.square().sum()) == pytest.approx(expected, rel=1e-9)
    if corrector > 1:
        assert expected == pytest.approx(target / (1 - step / (2 * target)), rel=1e-9)


def carried(model: SGM, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a Gaussian's ODE carries noise at the least time, and by Tweedie the clean image there."""
    first, top = model.process.level(model.process.stop), model.process.level(1.0)
    mean, std = model.net.mean.detach(), lambda e: math.hypot(0.3 * e.alpha, e.sigma)
    off = std(first) / std(top) * (top.sigma * z - top.alpha * mean)
    return first.alpha * mean + off, mean + first.alpha * 0.3**2 / std(first) ** 2 * off


# how much of the error twice the steps leave at most, and the network calls of a step of a solver
SHRINK = {
    "dpmpp": 0.4,
    "unipc": 0.4,
    "heun": 0.4,
    "euler": 0.7,
    "midpoint": 0.35,
    "ode heun": 0.35,
    "rk4": 0.0875,
}
EVALUATIONS = {"euler": 1, "midpoint": 2, "ode heun": 2, "rk4": 4}


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", SHRINK)
def test_the_error_falls_at_the_order_of_the_sampler(name):
    model, errors, solver = exact(), [], name in EVALUATIONS
    solution = carried(model, noise(100).randn(100, *INFO.shape))[0 if solver else 1]
    how = {"sampler": "ode", "solver": name.removeprefix("ode ")} if solver else {"sampler": name}
    for steps in (41, 81) if solver else (20, 40, 80):
        model.net.calls = 0
        x = flat(model.sample)(100, noise=noise(100), steps=steps, spacing="logsnr", clip=False, **how)
        assert not solver or model.net.calls == EVALUATIONS[name] * (steps - 1)
        errors.append(float((x - solution.clamp(-1, 1)).square().mean().sqrt()))
    assert all(fine < SHRINK[name] * coarse for coarse, fine in pairwise(errors))


@pytest.mark.usefixtures("fp64")
def test_the_error_of_the_sde_falls_with_its_steps():
    model, errors = exact(), []
    for steps in (20, 80):
        how = {"sampler": "em", "steps": steps, "spacing": "uniform", "clip": False}
        x = flat(model.sample)(4000, noise=BatchNoise(0, total=4000), progress=no_progress, **how)
        errors.append(abs(float((x - model.net.mean).std()) - 0.3))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("name", "solver", "shift"),
    [*((name, solver, 1.0) for name in SDES for solver in ("rk4", "adaptive")), ("vp", "rk4", 2.0)],
)
def test_the_likelihood_of_a_gaussian_is_exact(name, solver, shift):
    """A diagonal Jacobian, for which Rademacher probes are exact; σ/α is dequantisation's, or the least."""
    model, x = exact(0.5, process=name, shift=shift), images(16, INFO.shape).double()
    first, last = model.process.likelihood_path(1 / 255 / 3**0.5, 1)
    least = max(1 / 255 / 3**0.5, 0.01 if name == "ve" else 0)
    assert first.sigma / first.alpha == pytest.approx(least, rel=1e-3)
    value = model.log_prob(x, noise=noise(16), ode=LikelihoodOptions(solver, 60, 1e-7))
    width = 2 / 255
    y = first.alpha * (x + width * (noise(16).rand(16, *INFO.shape) - 0.5))
    mean, std = model.net.mean, lambda e: math.hypot(e.alpha * 0.5, e.sigma)
    # the ODE ends at the marginal of t = 1, N(α μ, ·), where the model has N(0, σ²)
    z = last.alpha * mean + std(last) / std(first) * (y - first.alpha * mean)
    prior = torch.distributions.Normal(torch.zeros_like(z), last.sigma).log_prob(z)
    expected = (prior + math.log(std(last) / std(first) * width * first.alpha)).flatten(1).sum(1)
    torch.testing.assert_close(value, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"solver": "adaptive"}])
def test_the_likelihood_is_true_by_default(options):
    """Of broad and of narrow Gaussians; VE's narrowest is its own least noise."""
    for name, std in product(SDES, (0.5, 0.05, 0.02)):
        model = exact(std, process=name, sigma_min=0.002)
        check_likelihood(model, model.net.mean.detach(), std, n=32, **options)
        assert options or model.net.calls == 96


def test_a_flat_pixel_costs_little():
    """Of one image, a grey level of 256 is known but for its dequantisation (Song 2021 starts at 1e-5)."""
    for name in ("vp", "subvp"):
        model = exact(1e-6, process=name)
        value = model.log_prob(model.net.mean.detach().expand(16, *INFO.shape), noise=noise(16))
        assert -0.25 < float(value.mean()) / 16 < 0


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(
    "options",
    [{}, {"weighting": "score"}, {"weighting": "likelihood"}, {"prediction": "eps", "process": "ve"}],
)
def test_the_true_score_has_the_least_loss(options):
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(4000, *INFO.shape, generator=draw)
    losses = []
    for bias in (0.0, 0.05, -0.05):
        model = exact(bias=bias, **options)
        losses.append(float(model.loss(batch((model.net.mean + 0.3 * z).detach()))["loss"]))
    assert losses[0] < min(losses[1:])


@pytest.mark.usefixtures("fp64")
def test_weightings_say_the_same_of_either_prediction_and_cosine_times_are_uniform():
    """λ = σ² is the error of ε, and g² weighs it by g²/σ², whatever the network predicts."""
    for name, weighting in product(SDES, ("score", "likelihood")):
        v, eps = (exact(bias=0.1, process=name, weighting=weighting, prediction=p) for p in ("v", "eps"))
        of_v, of_eps = (m.loss(batch(images(8, INFO.shape).double()))["loss"] for m in (v, eps))
        torch.testing.assert_close(of_v, of_eps, msg=f"{name} {weighting}")
    for name in SDES:
        model = SGM.of(INFO, **SMALL, process=name)
        _, alpha, sigma = model.process.levels_at(model.draw_times(BatchNoise(0, total=4000), 4000))
        angle = torch.atan2(sigma, alpha).flatten()
        spread = (angle - angle.min()) / (angle.max() - angle.min())
        moments = float(spread.mean()), float(spread.std())
        assert moments == pytest.approx((0.5, 12**-0.5), abs=0.01), name


def test_inpainting_keeps_what_is_known_and_follows_it():
    """With the parts ±mean of a mixture, what is hidden has the sign of what is seen."""
    model = exact(0.02, mixture=True)
    mean = model.net.mean.detach()
    x = torch.stack([mean, -mean] * 4)
    mask = torch.zeros(8, 1, 4, 4)
    mask[:, :, :2] = 1
    for how in ({}, {"method": "repaint", "steps": 30, "resample": 3, "jump": 3}):
        out = flat(model.inpaint)(x, mask=mask, noise=noise(8), **how).images
        assert torch.equal(out[:, :, :2], x[:, :, :2])
        torch.testing.assert_close(out, x, atol=0.12, rtol=0)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_inpainting_draws_from_what_images_may_be(name):
    field, n = GaussianField(), 3000
    model = SGM.of(DataInfo((1, 4, 4), None), **SMALL, process=name).eval()

    def split(out, x, at):
        _, alpha, sigma = model.process.level(float(at.t[0]))
        x0 = field.denoised(x, alpha, sigma)
        return Estimate(x0, (x - alpha * x0) / sigma)

    model.net.forward, model.to_estimate = lambda x, *_: x, split
    x, mask, mean, covariance = field.halved()
    out = model.inpaint(x.expand(n, 1, 4, 4), mask=mask.expand(n, 1, 4, 4), noise=noise(n)).images
    check_moments(out[:, :, 2:].flatten(1), mean, covariance)
