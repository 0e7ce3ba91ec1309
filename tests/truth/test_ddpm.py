"""Diffusion: schedules and samplers against diffusers and closed forms, the bound, guidance, uses."""

import math
from types import SimpleNamespace

import draws
import numpy as np
import pytest
import torch
from draws import fitted, flat, noise
from gaussian import GaussianField, check_moments
from refused import refused
from torch import Tensor, nn

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.engine.trained import with_zero_inputs
from gzcli.export.export import to_diffusers
from gzcli.models.denoising import samplers
from gzcli.models.denoising.applications import downscale
from gzcli.models.denoising.denoiser import UNCLIPPED, WalkOptions
from gzcli.models.denoising.process import DiscreteVP, Level, shift_of
from gzcli.models.diffusion.ddpm import DDPM, discretised_gaussian, strata

INFO = DataInfo((1, 8, 8), levels=17, classes=("a", "b", "c"), n=100)
SMALL = {"channels": 8, "mult": (1, 2), "layers": 1, "attention": (4,)}
BETAS = pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
SPACINGS = ("trailing", "leading", "linspace", "karras", "logsnr")
SHARE = 0.3  # of log β/β̃ in variances that are learned


def build(info=INFO, seed=0, **kw) -> DDPM:
    """A small untrained model off its zero start."""
    torch.manual_seed(seed)
    model = DDPM.of(info, **{**SMALL, **kw}).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def batch_of(n=8, seed=0, info=INFO) -> Batch:
    return draws.batch(draws.images(n, info.shape, seed), y=torch.arange(n) % 3)


def estimate(model: DDPM, x: Tensor, t: Tensor) -> Tensor:
    """x_0 from noised images at integer times [B]."""
    return model.into_range(model.estimate(x, model.process.levels_at(t)).x0)


class Mixture:
    """The exact denoiser of data drawn from a mixture of isotropic Gaussians, at any level of a schedule."""

    def __init__(self, schedule: DiscreteVP, means: torch.Tensor, std: float, weights: torch.Tensor):
        self.schedule, self.means, self.std, self.weights, self.calls = schedule, means, std, weights, 0

    def __call__(self, x, t):
        self.calls += 1
        _, a, s = self.schedule.level(t)
        var = a**2 * self.std**2 + s**2
        d = x[:, None] - a * self.means  # [B, K, ...]
        p = (self.weights.log() - d.flatten(2).square().sum(2) / (2 * var)).softmax(1)
        p = p[(..., *(None,) * (x.ndim - 1))]
        x0 = (p * (self.means + a * self.std**2 / var * d)).sum(1)
        return samplers.Estimate(x0, (x - a * x0) / s, SHARE)


def gaussian(schedule, mean=0.3, std=0.5) -> Mixture:
    return Mixture(schedule, torch.full((1, 1, 1, 1), mean), std, torch.ones(1))


@BETAS
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_agree_with_diffusers(name, theirs, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule=theirs, rescale_betas_zero_snr=zero_snr)
    ours = DiscreteVP(name, 1000, zero_snr=zero_snr)
    np.testing.assert_allclose(ours.alpha**2, scheduler.alphas_cumprod.numpy(), atol=2e-6)
    np.testing.assert_allclose(ours.alpha**2 + ours.sigma**2, 1, rtol=1e-12)
    assert (np.diff(ours.alpha) < 0).all()
    assert (ours.alpha[-1] == 0) == zero_snr
    for timesteps in (2, 10, 100, 4000):
        schedule = DiscreteVP(name, timesteps)
        assert 0 < schedule.alpha[-1] < 0.1 and schedule.alpha[0] > 0.8 - 0.8 * (timesteps < 10), timesteps
        assert (np.diff(schedule.alpha) < 0).all(), timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_paths_fall_to_the_clean_image(spacing, zero_snr):
    schedule = DiscreteVP("cosine", 1000, zero_snr=zero_snr)
    for steps in (1, 2, 7, 299, 1000):  # 7 and 299 do not divide 1000
        path = schedule.path(steps, spacing)
        sigma = np.array([level.sigma for level in path])
        assert len(path) == steps + 1 and path[-1] == (-1, 1, 0)
        assert (np.diff(sigma) < 1e-9).all() and np.isfinite(sigma).all()
        assert all(abs(math.hypot(a, s) - 1) < 1e-12 and 0 <= t <= 999 for t, a, s in path[:-1])
    half = schedule.path(10, spacing, start=0.5)
    assert half[0].t <= 499
    refused("1001 sampling steps do not fit 1000 timesteps", schedule.path, 1001, spacing)


def exact_start():
    """Noise [16, 1, 2, 2] that samplers begin with."""
    return torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def along_with_diffusers(sampler, scheduler, step, **options) -> list[Level]:
    """Checks a sampler along the times of a diffusers scheduler, by the same noises and the exact ε."""
    schedule = DiscreteVP("linear", 1000)
    target, x, g = gaussian(schedule), exact_start(), torch.Generator().manual_seed(1)
    path, want = schedule.path_over(scheduler.timesteps.tolist()), x
    got = sampler(target, x, path, randn=lambda: torch.randn(x.shape, generator=g), **options)
    step["generator"] = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        eps = target(want, float(t)).eps
        if scheduler.config.get("variance_type") == "learned_range":  # the share follows the prediction
            eps = torch.cat([eps, torch.full_like(eps, 2 * SHARE - 1)], 1)
        want = scheduler.step(eps, t, want, **step).prev_sample
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    return path


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_and_ancestral_agree_with_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    for eta in (0.0, 0.6, 1.0):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
        scheduler.set_timesteps(20)
        path = along_with_diffusers(samplers.ddim, scheduler, {"eta": eta}, eta=eta)
        assert path == DiscreteVP("linear", 1000).path(20, spacing)
    times = list(range(999, -1, -1)) if spacing == "trailing" else [999, 700, 444, 90, 17, 0]
    for variance, share in (("fixed_small", 0.0), ("fixed_large", 1.0), ("learned_range", None)):
        scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance)
        scheduler.set_timesteps(timesteps=times)
        along_with_diffusers(samplers.ancestral, scheduler, {}, share=share)


@BETAS
@pytest.mark.parametrize("steps", [3, 20, 37])
def test_multistep_samplers_agree_with_diffusers(name, theirs, steps):
    """DPM-Solver++ of the ODE and, by the same noises, of the SDE, and UniPC."""
    diffusers = pytest.importorskip("diffusers")
    schedule = DiscreteVP(name, 1000)
    target, x = gaussian(schedule), exact_start()
    noises = torch.randn(steps, *x.shape, generator=torch.Generator().manual_seed(1))
    for sampler, scheduler, noisy in (
        (samplers.dpmpp, diffusers.DPMSolverMultistepScheduler, False),
        (samplers.dpmpp, diffusers.DPMSolverMultistepScheduler, True),
        (samplers.unipc, diffusers.UniPCMultistepScheduler, False),
    ):
        algorithm = {"algorithm_type": "sde-dpmsolver++"} if noisy else {}
        peer = scheduler(beta_schedule=theirs, prediction_type="sample", **algorithm)
        peer.set_timesteps(steps)
        want = x
        for t, eps in zip(peer.timesteps, noises, strict=True):
            drawn = {"variance_noise": eps} if noisy else {}
            want = peer.step(target(want, float(t))[0], t, want, **drawn).prev_sample
        how = {"noisy": True, "randn": iter(noises).__next__} if noisy else {}
        got = sampler(target, x, schedule.path_over(peer.timesteps.tolist()), **how)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=f"{scheduler.__name__} {noisy}")


def test_clipping_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = build(prediction="eps", schedule="linear")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 9e9}
    for ours, theirs in (({}, {"clip_sample": True}), ({"dynamic": 0.9}, dynamic)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", **theirs)
        scheduler.set_timesteps(10)
        with torch.no_grad():
            got = samplers.ddim(model.denoiser(None, WalkOptions(1.0, **ours)), x, model.process.path(10))
            want = x
            for t in scheduler.timesteps:
                out = model.net(want, t.expand(4))
                want = scheduler.step(out, t, want, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def errors_on_gaussian(sampler, steps):
    """Largest error against the exact solution of the ODE, for which (x − α μ)/std(x) is constant."""
    schedule = DiscreteVP("cosine", 1000)
    x = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target, path = gaussian(schedule), schedule.path(steps, "logsnr")
    _, a, s = path[0]
    want = 0.3 + 0.5 * (x - a * 0.3) / math.sqrt(a**2 * 0.25 + s**2)
    return float((sampler(target, x, path) - want).abs().max()), target.calls


def test_orders_and_network_calls():
    table = {samplers.ddim: (1, 20), samplers.dpmpp: (2, 20), samplers.unipc: (3, 20), samplers.heun: (2, 39)}
    for sampler, (order, calls) in table.items():
        (coarse, n), (fine, _) = errors_on_gaussian(sampler, 20), errors_on_gaussian(sampler, 40)
        assert n == calls
        assert 1.6**order < coarse / fine < 2.6**order, (sampler.__name__, coarse, fine)
        assert fine < (0.1 if order == 1 else 0.02)


MIXTURE = {  # sampler, steps, options; those with options draw noise
    "ancestral": (samplers.ancestral, 250, {"share": 0.0}),
    "ddim": (samplers.ddim, 200, {}),
    "ddim-1": (samplers.ddim, 250, {"eta": 1.0}),
    "dpmpp": (samplers.dpmpp, 100, {}),
    "dpmpp-sde": (samplers.dpmpp, 250, {"noisy": True}),
    "unipc": (samplers.unipc, 100, {}),
    "heun": (samplers.heun, 100, {}),
    "heun-churn": (samplers.heun, 200, {"churn": 20}),
}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", MIXTURE)
def test_samplers_recover_a_mixture(name, zero_snr):
    schedule = DiscreteVP("cosine", 1000, zero_snr=zero_snr)
    means = torch.tensor([[-0.8, 0.5], [0.8, -0.5], [0.6, 0.9]])[:, None, None]  # [K, 1, 1, 2]
    target = Mixture(schedule, means, 0.1, torch.tensor([0.5, 0.3, 0.2]))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, 2, generator=g)
    sampler, steps, options = MIXTURE[name]
    if options:
        options = options | {"randn": lambda: torch.randn(x.shape, generator=g)}
    if "churn" in options:
        options["level"] = schedule.ratio_level
    y = sampler(target, x, schedule.path(steps), **options)
    distance = (y[:, None] - means).flatten(2).norm(dim=2)  # [B, K]
    mode = distance.argmin(1)
    share = mode.bincount(minlength=3) / len(y)
    assert (share - target.weights).abs().max() < 0.03
    assert distance.min(1).values.max() < 0.6
    for k in range(3):
        inside = y[mode == k].flatten(1)
        assert (inside.mean(0) - means[k].flatten()).abs().max() < 0.02
        assert (inside.std(0) - 0.1).abs().max() < 0.015


def test_the_three_predictions_are_one_and_times_have_their_law():
    """Of a network that always predicts the image `guess`, in the model's own parametrisation."""
    batch, guess = batch_of(), torch.zeros(8, 1, 8, 8) + 0.1

    def knowing(**options) -> DDPM:
        model = build(**options)

        def predict(x, t, y=None, drop=None):
            _, a, s = model.process.levels_at(t)
            eps = (x - a * guess) / s
            return {"eps": eps, "x0": guess, "v": a * eps - s * guess}[model.prediction]

        model.net.forward = predict
        return model

    for prediction in ("eps", "x0", "v"):
        model = knowing(prediction=prediction, min_snr=5.0)
        x0 = estimate(model, batch.x, torch.arange(8) * 100)
        torch.testing.assert_close(x0, guess, atol=2e-3, rtol=0)
        loss = model.loss(Batch(batch.x, None, batch.index, BatchNoise(3, total=8)))["loss"]
        t = model.draw_times(BatchNoise(3, total=8), 8)
        weight = model.process.snrs[t].clamp(max=5)  # of the error of x_0, whatever is predicted (Hang 2023)
        want = (weight * (batch.x - guess).square().flatten(1).mean(1)).mean()
        torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)
    for loss_type in ("l2", "l1", "huber"):  # the error of an image is that of v, but for the least noise
        batches = (Batch(batch.x, None, batch.index, BatchNoise(9, total=8)) for _ in range(2))
        models = [knowing(prediction=prediction, loss_type=loss_type) for prediction in ("x0", "v")]
        assert float(models[0].process.level(50).sigma) > 0.05
        for model in models:
            model.draw_times = lambda noise, n: torch.arange(50, 1000, 120)
        losses = [model.loss(b)["loss"] for model, b in zip(models, batches, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0, msg=loss_type)
    model = build()
    whole = model.draw_times(BatchNoise(0, total=50), 50)
    assert (whole // 20 == torch.arange(50)).all()  # 1000 / 50: one in each share
    rows = [model.draw_times(BatchNoise(0, total=50, start=s), 25) for s in (0, 25)]
    assert torch.equal(torch.cat(rows), whole)
    model.time_sampling = "uniform"
    t = model.draw_times(BatchNoise(0, total=20_000), 20_000)
    assert t.min() == 0 and t.max() == 999 and abs(t.double().mean() - 499.5) < 5 * 289 / math.sqrt(20_000)
    model = build(timesteps=1000, time_sampling="logit_normal")
    t = model.draw_times(BatchNoise(0, 0, "main", total=4000), 4000).double()
    logits = torch.logit((t + 0.5) / 1000)
    assert float(logits.mean()) == pytest.approx(0, abs=0.01)
    assert float(logits.std()) == pytest.approx(1, abs=0.01)


def test_guidance_doubles_the_batch_only_where_it_acts():
    model, rows = build(conditional=True), []
    model.net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    y, x = torch.tensor([0, 1, 2, 0]), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = {w: model.denoiser(y, WalkOptions(w, clip=False))(x, 500.0)[1] for w in (0.0, 1.0, 3.0)}
        unknown = model.denoiser(None, UNCLIPPED)(x, 500.0)[1]
    assert rows == [4, 4, 8, 4]
    torch.testing.assert_close(eps[0.0], unknown)
    torch.testing.assert_close(eps[3.0], eps[0.0] + 3 * (eps[1.0] - eps[0.0]), atol=1e-5, rtol=1e-5)
    options = {
        "sampler": "ddim",
        "steps": 10,
        "spacing": "trailing",
        "guidance": 2.0,
    }
    flat(model.sample)(4, noise=noise(4), interval=(0.25, 0.75), **options)
    assert rows[4:] == [4, 4, 4, 8, 8, 8, 8, 8, 4, 4]


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sigma", [0.003, 0.2, 2.0])
def test_discretised_gaussian_is_a_distribution(levels, sigma):
    scipy = pytest.importorskip("scipy.stats")
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    mean = torch.tensor([-1.0, -0.31, 0.0, 0.99], dtype=torch.float64).requires_grad_()
    logp = discretised_gaussian(x, mean, sigma, levels)  # [levels, 4]
    torch.testing.assert_close(logp.exp().sum(0), torch.ones(4).double())
    edges = np.concatenate([[-np.inf], (x[:-1, 0].numpy() + 1 / (levels - 1)), [np.inf]])
    want = np.diff(scipy.norm.cdf(edges[:, None], mean.detach().numpy(), sigma), axis=0)
    np.testing.assert_allclose(logp.exp().detach().numpy(), want, atol=1e-9)
    narrow = discretised_gaussian(x.float(), mean.float(), sigma, levels)
    narrow.sum().backward()
    assert torch.isfinite(narrow).all() and torch.isfinite(mean.grad).all()


def exact_model(info, mean, std, **kw) -> DDPM:
    """A model whose network is the exact denoiser of N(mean, std²) pixels."""
    model = build(info, **kw)

    def velocity(x, t, y=None, drop=None):
        _, a, s = model.process.levels_at(t.long())
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        v = a * (x - a * x0) / s - s * x0
        return torch.cat([v, torch.full_like(v, 2 * SHARE - 1)], 1) if model.learned_variance else v

    model.net.forward = velocity
    return model


def test_the_bound_is_tight_on_gaussian_data_and_few_terms_are_unbiased():
    """With the exact denoiser it nears the true log-likelihood as T grows, with a shifted noise too."""
    draws = torch.randn(128, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    x = ((draws + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    true = discretised_gaussian(x, torch.tensor(0.1), 0.2, 256).flatten(1).sum(1)

    def gap(variance="large", **options) -> tuple[float, float]:
        """Nats a pixel, and its standard error."""
        model = exact_model(DataInfo((1, 4, 4), 256), 0.1, 0.2, schedule="cosine", **options)
        terms = 400 if "shift" in options else model.process.timesteps
        off = (true - model.log_prob(x, noise=noise(128), terms=terms, variance=variance)) / 16
        return float(off.mean()), float(off.std()) / math.sqrt(128)

    (ten, _), (hundred, _), (thousand, error) = (gap(timesteps=n) for n in (10, 100, 1000))
    assert ten > hundred > thousand > -4 * error and thousand < 0.02
    assert gap("small", timesteps=1000)[0] > thousand  # a bound as well, and here a looser one
    shifted, error = gap(timesteps=1000, shift=2.0)
    assert -4 * error < shifted < 0.02 + 4 * error and error < 0.03
    info = DataInfo((1, 4, 4), levels=17)
    model, x = exact_model(info, 0.0, 0.5, timesteps=60), torch.zeros(2000, 1, 4, 4) + 0.25
    whole = model.log_prob(x, noise=noise(2000), terms=59)
    few = model.log_prob(x, noise=ImageNoise(1, range(2000)), terms=5)
    error = math.sqrt((whole.var() + few.var()) / 2000)
    assert abs(whole.mean() - few.mean()) < 4 * error
    for terms in (1, 5, 50, 59, 1000):
        edges = strata(60, terms)
        assert (edges[0], edges[-1], len(edges)) == (1, 60, min(terms, 59) + 1)
        assert (np.diff(edges) >= 1).all()


def test_learned_variances_are_those_of_the_reverse_process():
    """For Gaussian data it is Gaussian, and the bound is tight at its variance, β̃ and that of x_0's mean."""
    process, std = DiscreteVP("linear", 30), 0.5
    t = torch.arange(1, 30)
    levels = [process.level(i) for i in range(30)]
    posterior = [std**2 * b.sigma**2 / (b.alpha**2 * std**2 + b.sigma**2) for b in levels]  # of x_0 given x_t
    share = []
    for s, u, error in zip(levels[1:], levels, posterior[1:], strict=False):
        var = samplers.posterior(0.0, 0.0, s, u)[1]
        pull = samplers.posterior(1.0, 0.0, s, u)[0]
        large = samplers.transition(s, u)[1]
        share.append(math.log((var + pull**2 * error) / var) / math.log(large / var))
    share = torch.tensor(share)[:, None, None, None].requires_grad_()
    assert share.min() > 0 and share.max() < 1
    process.kl(t, torch.tensor(posterior[1:])[:, None, None, None], share).sum().backward()
    torch.testing.assert_close(share.grad, torch.zeros_like(share), atol=1e-5, rtol=0)


def test_the_bound_trains_variances_and_nothing_else():
    """Its gradient reaches no prediction, and the loss is the plain one and λ T times the mean KL."""
    info = DataInfo((1, 4, 4), levels=17)
    plain, model = (build(info, learned_variance=learned) for learned in (False, True))
    level = model.process.levels_at(torch.tensor([0, 7, 500, 999]))
    target, out = (torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    shares = torch.full_like(out, 0.3).requires_grad_()
    out.requires_grad_()
    losses = model.objective(torch.cat([out, shares], 1), target, level)
    error = (level.sigma * (out - target)).detach().square()  # of x_0, by v
    kl = model.process.kl(level.t, error, 0.65)
    torch.testing.assert_close(losses["bound"], 1000 * kl.mean())
    expected = plain.objective(out, target, level)["loss"]
    torch.testing.assert_close(losses["loss"], expected + losses["bound"] / 1000)
    got = torch.autograd.grad(losses["loss"], [out, shares])
    torch.testing.assert_close(got[0], torch.autograd.grad(expected, out)[0])
    assert (got[1][1:] != 0).all() and (got[1][0] == 0).all()


@pytest.mark.parametrize("variance", ["small", "large", None])
def test_the_bound_is_the_sum_of_its_kls(variance):
    """T = 4 by hand: each term is a KL between the Gaussians of Ho 2020, eq. 5."""
    from torch.distributions import Normal, kl_divergence

    info = DataInfo((1, 4, 4), levels=17)
    model, n = exact_model(info, 0.0, 0.5, timesteps=4, schedule="linear", learned_variance=True), 6
    x = (batch_of(n, info=info).x * 8).round() / 8
    again = noise(n)
    got = model.log_prob(x, noise=noise(n), terms=3, variance=variance)
    levels = [model.process.level(t) for t in range(4)]
    a, s = levels[3].alpha, levels[3].sigma
    want = -kl_divergence(Normal(a * x, s), Normal(torch.zeros(()), torch.ones(()))).flatten(1).sum(1)
    for t in range(4):
        if t == 1:
            again.rand(n, 3)
        x_t = levels[t].alpha * x + levels[t].sigma * again.randn(*x.shape)
        guess = estimate(model, x_t, torch.full((n,), t))
        if t == 0:
            want = want + discretised_gaussian(x, guess, levels[0].sigma, 17).flatten(1).sum(1)
        else:
            q, var = samplers.posterior(x, x_t, levels[t], levels[t - 1])
            p, _ = samplers.posterior(guess, x_t, levels[t], levels[t - 1])
            large = samplers.transition(levels[t], levels[t - 1])[1]
            share = {"small": 0.0, "large": 1.0, None: SHARE}[variance]
            wide = var ** (1 - share) * large**share
            kl = kl_divergence(Normal(q, math.sqrt(var)), Normal(p, math.sqrt(wide)))
            want = want - kl.flatten(1).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_inpainting_finds_the_conditional():
    """Two correlated Gaussian pixels, one of them given: resampling brings their regression back."""
    schedule, rho = DiscreteVP("cosine", 1000), 0.8
    cov = torch.tensor([[0.25, 0.25 * rho], [0.25 * rho, 0.25]])

    def denoise(x, t):
        _, a, s = schedule.level(t)
        gain = a * cov @ torch.linalg.inv(a**2 * cov + s**2 * torch.eye(2))
        x0 = x @ gain.T
        return samplers.Estimate(x0, (x - a * x0) / s)

    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(3000, 1, 1, 2, generator=g) * 0.5
    randn = lambda: torch.randn(pixels.shape, generator=g)  # noqa: E731
    slopes = []
    for resample in (1, 10):
        mask = torch.tensor([1.0, 0.0]).expand(3000, 1, 1, 2)
        path = samplers.repeat_stretches(schedule.path(50), resample, 5)
        y = samplers.repaint(denoise, randn(), path, image=pixels, mask=mask, randn=randn)
        assert torch.equal(y[..., 0], pixels[..., 0])
        slopes.append(float((y[..., 1] * pixels[..., 0]).mean() / pixels[..., 0].square().mean()))
    assert abs(slopes[1] - rho) < 0.08
    assert abs(slopes[0] - rho) > abs(slopes[1] - rho)
    assert samplers.repeat_stretches(range(5), 2, 2) == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    field, n = GaussianField(), 2000
    small = {"channels": 8, "mult": (1,), "attention": (), "prediction": "x0", "timesteps": 1000}
    model = DDPM.of(DataInfo((1, 4, 4), None), **small).double().eval()
    model.net.forward = lambda x, t, *_: field.denoised(x, *model.process.level(float(t[0]))[1:])
    x, mask, mean, covariance = field.halved()
    out = model.inpaint(x.expand(n, 1, 4, 4), mask=mask.expand(n, 1, 4, 4), noise=noise(n)).images
    check_moments(out[:, :, 2:].flatten(1).double(), mean, covariance)


def test_larger_and_edited_images_and_ways_between_them():
    model = exact_model(DataInfo((1, 8, 8)), 0.0, 0.2)
    small = batch_of(3, info=DataInfo((1, 4, 4))).x * 0.2
    big = model.upscale(small, noise=noise(3), steps=20).images
    assert big.shape == (3, 1, 8, 8)
    torch.testing.assert_close(nn.functional.avg_pool2d(big, 2), small, atol=1e-4, rtol=0)
    full = nn.functional.interpolate(small, scale_factor=2)
    torch.testing.assert_close(model.upscale(full, noise=noise(3), steps=20).images, big)
    refused(
        "do not fit a whole number of times", model.upscale, torch.zeros(1, 1, 3, 3), noise=ImageNoise(0, [0])
    )
    refused("images of 5×3 pixels .* into 12×8", downscale, torch.zeros(1, 1, 3, 5), 2, (8, 12))
    refused("`factor` 3 does not divide images of 12×8", downscale, torch.zeros(1, 1, 8, 12), 3, (8, 12))
    model, x = exact_model(DataInfo((1, 8, 8)), 0.0, 0.5), batch_of(4).x * 0.5
    edit = lambda s: model.edit(x, noise=noise(4), strength=s, steps=10).images  # noqa: E731
    moved = [float((edit(s) - x).square().mean()) for s in (0.05, 0.4, 1.0)]
    assert moved[0] < 0.02 and moved[0] < moved[1] < moved[2]
    assert torch.equal(model.reconstruct(x, noise=noise(4), strength=0.4, steps=10).images, edit(0.4))
    refused("strength", edit, 1.5)
    x = batch_of(5).x * 0.5
    way = model.interpolate(x, noise=noise(5), frames=3, strength=0.3, steps=5).images
    ends = model.reconstruct(x, noise=noise(5), strength=0.3, steps=5).images
    assert way.shape == (6, 1, 8, 8)
    torch.testing.assert_close(way[[0, 2, 3, 5]], ends[:4], atol=1e-5, rtol=0)


def test_reconstructions_take_two_steps_from_each_of_four_levels(monkeypatch):
    model, calls = exact_model(DataInfo((1, 8, 8)), 0.0, 0.2), []
    output = model.output
    monkeypatch.setattr(model, "output", lambda x, *args: calls.append(len(x)) or output(x, *args))
    model.score_recon(batch_of(3).x, noise=noise(3))
    model.map_recon(batch_of(3).x, noise=noise(3))
    assert calls == [3] * 16


def test_scores_tell_noise_from_data_by_mean_z_scores():
    info = DataInfo((1, 8, 8))
    model = exact_model(info, 0.0, 0.2)  # knows smooth grey; white noise of the full range is foreign to it
    g = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(2, 40, 1, 8, 8, generator=g).mul(0.2).clamp(-1, 1), batch_of(20).x
    held, test = inside
    parts = zip(held.split(20), torch.arange(40).split(20), strict=True)
    model.fit_recon([Batch(h, None, i, ImageNoise(0, i)) for h, i in parts])
    for name in ("recon", "denoise"):
        score = getattr(model, f"score_{name}")
        a, b = score(test, noise=noise(40)), score(outside, noise=noise(20))
        assert a.shape == (40,) and b.min() > a.max(), name
    assert abs(float(model.score_recon(test, noise=noise(40)).mean())) < 1  # z-scored
    assert not any("recon" in key for key in model.state_dict())
    # of a model that gives back zero, by hand
    model = exact_model(DataInfo((1, 4, 4)), 0.0, 1e-4)
    x = torch.randn(2, 12, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 4
    batch = Batch(x[0], None, torch.arange(12), noise(12))
    model.perceptual = lambda a, b: (a - b).flatten(1).sum(1)
    model.fit_recon([batch], starts=2, steps=2)
    square, total = x.square().flatten(2).mean(2).double(), x.flatten(2).sum(2).double()
    z = [(e[1] - e[0].mean()) / e[0].std() for e in (square, total)]
    score = model.score_recon(x[1], noise=noise(12), starts=2, steps=2)
    torch.testing.assert_close(score.double(), (z[0] + z[1]) / 2, atol=2e-3, rtol=0)
    refused("fitted with 4 errors", model.score_recon, x[1], noise=noise(12), starts=2, steps=2, pixels=True)
    model.fit_recon([batch], starts=2, steps=2, pixels=True)
    alone = model.score_recon(x[1], noise=noise(12), starts=2, steps=2, pixels=True)
    torch.testing.assert_close(alone.double(), z[0], atol=2e-3, rtol=0)


def test_an_image_is_the_same_alone_and_in_a_batch():
    model = build()
    for sampler, spacing in zip(("ancestral", "ddim", "dpmpp", "unipc", "heun"), SPACINGS, strict=True):
        seen, options = [], {"sampler": sampler, "spacing": spacing, "steps": 7, "eta": 0.5}
        how = {"progress": lambda i, n, x=None, seen=seen: seen.append((i, n))}
        x = flat(model.sample)(3, noise=noise(3), **how, **options)
        assert x.shape == (3, 1, 8, 8) and x.isfinite().all() and x.abs().max() <= 1, sampler
        assert seen == [(i + 1, 7) for i in range(7)], sampler
        alone = flat(model.sample)(1, noise=ImageNoise(0, [1]), **options)
        torch.testing.assert_close(alone[0], x[1], atol=2e-3, rtol=0, msg=sampler)


@pytest.mark.parametrize(("prediction", "zero_snr"), [("eps", False), ("v", False), ("v", True)])
def test_an_exported_model_makes_the_same_pictures(prediction, zero_snr, tmp_path, monkeypatch):
    """By diffusers' own call, of a network whose estimates leave the range of images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"timesteps": 50, "prediction": prediction, "zero_snr": zero_snr, "attention": (8,)}
    options["learned_variance"] = prediction == "v"
    model = DDPM.of(DataInfo((1, 16, 16)), **SMALL | options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.to_diffusers().save_pretrained(tmp_path)
    x = noise(4).randn(4, 1, 16, 16)
    for module in ("ddpm.pipeline_ddpm", "ddim.pipeline_ddim"):
        monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", lambda *args, **kwargs: x)

    def draw(sampler: str, **how) -> Tensor:
        how |= {"noise": noise(4), "steps": 10, "spacing": "trailing"}
        return flat(model.sample)(4, sampler=sampler, **how)

    assert (draw("dpmpp") - draw("dpmpp", clip=False)).abs().max() > 0.05
    close = 4e-3 if zero_snr else 1e-3  # half a grey level; diffusers takes an SNR of 2⁻²⁴ for zero
    for pipeline, sampler, how in (
        (diffusers.DiffusionPipeline, "dpmpp", {}),
        (diffusers.DDIMPipeline, "ddim", {"use_clipped_model_output": True}),
    ):
        call = pipeline.from_pretrained(tmp_path)
        theirs = call(batch_size=4, num_inference_steps=10, output_type="np", **how).images
        theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1
        torch.testing.assert_close(theirs, draw(sampler), atol=close, rtol=0)


def test_no_pipeline_draws_clusters():
    model = DDPM.of(DataInfo((1, 16, 16)), **SMALL, clusters=3)
    trained = SimpleNamespace(model=model, name="ddpm", title="ddpm")
    refused("no pipeline", to_diffusers, trained, "", None, hint="model.clusters=0")


ENLARGES = {"channels": 8, "mult": (1, 2), "attention": (), "timesteps": 100}


def test_a_model_with_a_factor_starts_as_the_weights_without_and_says_what_it_cannot():
    info, keys = DataInfo((1, 8, 8)), ENLARGES
    plain, torch_seed = DDPM.of(info, **keys), torch.manual_seed(0)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch_seed)
    model = DDPM.of(info, **keys, factor=2)
    weights, names = with_zero_inputs(plain.state_dict(), model.state_dict())
    assert names == ["net.conv_in.weight"]
    model.load_state_dict(weights)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([5, 50, 90])
    small = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        guided = model.net(model.inputs(x, model.process.levels_at(t), small), t)
        torch.testing.assert_close(guided, plain.net(x, t))
    uneven = DDPM.of(DataInfo((1, 14, 14)), **keys | {"mult": (1, 1, 1)})
    for message, call in {
        "trained to enlarge images 2 times": lambda: model.upscale(x, noise=noise(3), factor=4),
        "cannot be reduced 3 times": lambda: DDPM.of(info, **keys, factor=3),
        "no pipeline": model.to_diffusers,
        "cannot halve 14×14 images 2 times": uneven.to_diffusers,
    }.items():
        refused(message, call)


@pytest.mark.slow
def test_a_model_with_a_factor_learns_to_enlarge():
    """Only one told of the small image can know these."""
    pattern = torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).repeat(4, 4)

    def draw(seed: int) -> Tensor:
        low = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.5
        wide = nn.functional.interpolate(low, scale_factor=2)
        return wide + pattern * wide.sign()

    torch.manual_seed(0)
    model = DDPM.of(DataInfo((1, 8, 8)), **ENLARGES, factor=2)
    at = lambda step: Batch(draw(step), None, torch.arange(32), BatchNoise(0, step, total=32))  # noqa: E731
    fitted(model, at, 250, 3e-3)
    held = draw(-1)
    small = nn.functional.avg_pool2d(held, 2)
    bicubic = nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
    mine = model.eval().upscale(held, noise=noise(32)).images
    inside = nn.functional.max_pool2d(mine.abs(), 2) < 1  # a block with a clipped pixel has another mean
    assert inside.float().mean() > 0.99
    torch.testing.assert_close(nn.functional.avg_pool2d(mine, 2)[inside], small[inside], atol=1e-3, rtol=0)
    assert (mine - held).square().mean() < 0.25 * (bicubic - held).square().mean()
    assert flat(model.sample)(2, noise=noise(2), steps=3).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_shift_moves_the_log_snr_of_each_level(name, zero_snr):
    """By 2 log(64 / side), Hoogeboom 2023, eq. 3."""
    plain = DiscreteVP(name, 200, zero_snr=zero_snr)
    moved = DiscreteVP(name, 200, zero_snr=zero_snr, shift=shift_of("auto", (3, 256, 256)))
    with np.errstate(divide="ignore"):
        before, after = (2 * np.log(s.alpha / s.sigma) for s in (plain, moved))
        np.testing.assert_allclose(after, before + 2 * np.log(64 / 256), atol=1e-9)
    np.testing.assert_allclose(moved.alpha**2 + moved.sigma**2, 1)
    assert DiscreteVP(name, 200, zero_snr=zero_snr, shift=1.0).alpha.tolist() == plain.alpha.tolist()
    shapes = {(3, 64, 64): 1, (1, 28, 28): 1, (3, 128, 128): 2, (3, 256, 64): 2, (4, 32, 32): 1}
    assert {shape: shift_of("auto", shape) for shape in shapes} == shapes
    assert shift_of(1.5, (3, 256, 256)) == 1.5
    refused("cannot be shifted by a factor of 0", shift_of, 0, (3, 8, 8))
    with torch.device("meta"):
        model = DDPM.of(DataInfo((3, 128, 128)), channels=8, shift="auto")
    shifted, level = model.process.level(500), DiscreteVP("cosine", 1000).level(500)
    assert shifted.sigma / shifted.alpha == pytest.approx(2 * level.sigma / level.alpha, rel=1e-4)
