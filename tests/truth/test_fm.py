"""Flow matching against an analytic Gaussian, brute force, and torchcfm on the same draws."""

import math
from itertools import permutations, product

import draws
import pytest
import torch
from draws import flat, noise
from gaussian import GaussianField, check_likelihood, check_moments
from helpers import recipe, trainer
from refused import refused
from torch import nn
from zoo import Case

from gzcli.core.sections import part_of
from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models import catalog
from gzcli.models.denoising.denoiser import LikelihoodOptions
from gzcli.models.denoising.process import CondOT, shift_times
from gzcli.models.denoising.samplers import TABLEAUX
from gzcli.models.flow_matching.fm import FM, couple_noise
from gzcli.models.score.sgm import SGM
from gzcli.recipe import schema

INFO = DataInfo((1, 4, 4), 256, tuple("abc"))
CFM = catalog.load("cfm")
SCALE = CondOT.scale
CALLS = {"sde": 1, "adams": 1} | {
    name: len(weights) for name, (_, _, weights) in TABLEAUX.items()
}  # of a step
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}


def batch(n: int = 8, double: bool = False) -> Batch:
    x = draws.images(n, INFO.shape, seed=1)
    return draws.batch(x.double() if double else x, y=torch.arange(n) % 3)


class Exact(nn.Module):
    """The velocity of data N(mean, std²) by pixel: E[x_1 − x_0 | x_t]."""

    def __init__(self, mean: torch.Tensor, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean), std
        self.times: list[float] = []

    def forward(self, x, t, y=None, drop=None):
        t = t / SCALE
        self.times.append(float(t[0]))
        t = t[:, None, None, None]
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x - t * self.mean)


class ExactImage(Exact):
    """E[x_1 | x_t] of the same data: x_t + (1 − t) v."""

    def forward(self, x, t, y=None, drop=None):
        return x + (1 - t / SCALE)[:, None, None, None] * super().forward(x, t)


def exact(std: float = 0.3, info: DataInfo = INFO, net: type[Exact] = Exact) -> FM:
    model = FM.of(info, **SMALL, prediction="velocity" if net is Exact else "x0").double().eval()
    model.net = net(0.2 * torch.randn(info.shape, generator=torch.Generator().manual_seed(2)).double(), std)
    return model


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("solver", [*CALLS, "adaptive"])
def test_solvers_recover_the_data_at_the_cost_that_they_state(solver):
    model, steps = exact(), 40
    x = flat(model.sample)(4000, noise=noise(4000), progress=no_progress, sampler=solver, steps=steps)
    assert solver == "adaptive" or len(model.net.times) == CALLS[solver] * steps
    torch.testing.assert_close(x.mean(0), model.net.mean.detach(), atol=0.02, rtol=0)
    wide = {"euler": 0.05, "sde": 0.02}.get(solver, 0.01)  # of first order; of random steps
    torch.testing.assert_close(x.std(0), torch.full_like(x[0], 0.3), atol=wide, rtol=0)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("solver", [*CALLS, "adaptive"])
def test_a_predicted_image_is_a_velocity(solver):
    """The same samples but for the last step of solvers that look at its end, likelihoods and losses."""
    models = exact(), exact(net=ExactImage)
    drawn = [flat(model.sample)(64, noise=noise(64), sampler=solver, steps=40) for model in models]
    wide = 0.02 if solver in ("heun", "rk4") else 1e-4
    torch.testing.assert_close(*drawn, atol=wide, rtol=0)
    if solver == "euler":
        log_p = [model.log_prob(batch().x.double(), noise=noise(8)) for model in models]
        torch.testing.assert_close(*log_p, atol=1e-6, rtol=0)
        models[1].draw_times = models[0].draw_times = lambda noise, n: torch.linspace(0, 0.94, n).double()
        torch.testing.assert_close(*(model.loss(batch(64, double=True))["loss"] for model in models))


@pytest.mark.parametrize("solver", ["rk4", "adaptive"])
def test_the_likelihood_of_a_gaussian_is_exact(solver):
    """A diagonal Jacobian, for which Rademacher probes are exact; σ/α of data is that of dequantisation."""
    model, x = exact(0.5), batch(16).x.double()
    value = model.log_prob(x, noise=noise(16), ode=LikelihoodOptions(solver, 60, 1e-7))
    y = x + 2 / 255 * (noise(16).rand(16, *INFO.shape).double() - 0.5)
    law = torch.distributions.Normal(model.net.mean, math.hypot(0.5, 1 / 255 / 3**0.5))
    log_p = law.log_prob(y).flatten(1).sum(1) + 16 * math.log(2 / 255)
    torch.testing.assert_close(value, log_p, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"solver": "adaptive"}])
def test_the_likelihood_is_true_by_default(options):
    """Of broad and of narrow Gaussians, whatever the shape."""
    for std, info in product((0.5, 0.05, 0.02), (INFO, DataInfo((1, 2, 2), 256))):
        model = exact(std, info)
        check_likelihood(model, model.net.mean.detach(), std, n=64, **options)
        assert options or len(model.net.times) == 96


def test_the_loss_is_that_of_torchcfm():
    peer = pytest.importorskip("torchcfm.conditional_flow_matching")
    torch.manual_seed(0)
    for sigma in (0.0, 0.1):
        model, b = FM.of(INFO, **SMALL, sigma_min=sigma, time_sampling="uniform").train(), batch()
        nn.init.normal_(model.net.conv_out.weight, std=0.1)
        t, x0 = b.noise.rand(8), b.noise.randn(*b.x.shape)
        matcher = peer.TargetConditionalFlowMatcher(sigma) if sigma else peer.ConditionalFlowMatcher(0.0)
        noised = matcher.compute_sigma_t(t)[:, None, None, None] * x0 if sigma else 0.0
        x_t = matcher.compute_mu_t(x0, b.x, t) + noised
        target = matcher.compute_conditional_flow(x0, b.x, t, x_t)
        expected = (model.net(x_t, SCALE * t, None) - target).square().mean()
        torch.testing.assert_close(model.loss(batch())["loss"], expected, rtol=1e-4, atol=1e-5)


def test_the_coupling_is_the_cheapest_of_all_within_each_class():
    """Else the noise of a class would lie near it, and samples start elsewhere (arXiv:2503.10636)."""
    x0, x1 = torch.randn(5, 3), torch.randn(5, 3)
    cost = lambda order: sum(float((x0[i] - x1[j]).square().sum()) for j, i in enumerate(order))  # noqa: E731
    best = min(permutations(range(5)), key=cost)
    assert torch.equal(couple_noise(x0, x1, None, nn.Identity()), x0[list(best)])
    x0, y = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    x1 = x0.flip(0) + 4.0 * y[:, None]
    for labels in (y, torch.tensor([[0, 0], [1, 0], [1, 1]])[y]):
        pairs = couple_noise(x0, x1, labels, nn.Identity())
        for k in range(3):
            assert torch.equal(pairs[y == k], couple_noise(x0[y == k], x1[y == k], None, nn.Identity()))
            assert torch.equal(pairs[y == k].sort(0).values, x0[y == k].sort(0).values)
    skewed = couple_noise(x0, x1, None, nn.Identity())
    assert float((skewed[y == 2].mean() - skewed[y == 0].mean()).abs()) > 1


@pytest.mark.parametrize("model", ["fm", "cfm"])
def test_a_coupled_step_does_not_depend_on_its_parts(model):
    case = Case(model, {"channels": 8, "mult": (1, 2), "attention": (), "coupling": "ot"}, batch=16)
    losses = []
    for parts in (1, 2, 4):
        t = trainer(recipe(case, steps=1, sets=(f"train.accumulate={parts}",)))
        t.begin()
        losses.append([float(t.step(step)["loss"]) for step in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_shift_moves_times_as_the_paper_says():
    model = FM.of(INFO, **SMALL)
    t = model.draw_times(BatchNoise(0, total=20000), 20000)
    z = t.logit()
    assert abs(float(z.mean())) < 0.01 and float(z.std()) == pytest.approx(1, abs=0.01)
    assert t.min() > 0 and t.max() < 1
    info = DataInfo((3, 256, 128))
    with torch.device("meta"):
        plain, model = FM.of(info, channels=8), FM.of(info, channels=8, shift="auto")
    s = math.sqrt(256 * 128 / 64**2)
    assert model.process.shift == s
    draws = [m.draw_times(BatchNoise(0, 0, "main", total=500), 500).double() for m in (plain, model)]
    theirs = [1 - t for t in draws]
    torch.testing.assert_close(theirs[1], s * theirs[0] / (1 + (s - 1) * theirs[0]), atol=1e-6, rtol=1e-5)
    snr = [2 * torch.log(t / (1 - t)) for t in draws]
    torch.testing.assert_close(snr[1], snr[0] - 2 * math.log(s), atol=1e-3, rtol=0)
    assert shift_times(0.0, s) == 0 and shift_times(1.0, s) == 1
    assert shift_times(shift_times(0.3, s), 1 / s) == pytest.approx(0.3)


def test_ways_between_and_halfway():
    """From t = .5 to 1: what is solved is the way that is left, not the one already gone."""
    model, x = exact(), batch().x.double()
    model.reconstruct(x, noise=noise(8), progress=no_progress, strength=0.5, steps=4)
    assert model.net.times == pytest.approx([0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375])
    way = exact().interpolate(x[:2], noise=noise(2), frames=5, steps=60).images
    torch.testing.assert_close(way[[0, -1]], x[:2], atol=2e-3, rtol=0)
    assert way.shape == (5, 1, 4, 4)


def test_inpainting_and_enlarging_draw_from_what_images_may_be():
    """Of a correlated Gaussian: a half given the other, pixels given the means of blocks, which are kept."""
    field, n = GaussianField(), 3000
    model = FM.of(DataInfo((1, 4, 4), None), **SMALL).double().eval()  # latents: nothing is clipped
    model.net = field.velocity_net()
    x, mask, mean, covariance = field.halved()
    out = model.inpaint(x.expand(n, 1, 4, 4), mask=mask.expand(n, 1, 4, 4), noise=noise(n)).images
    check_moments(out[:, :, 2:].flatten(1), mean, covariance)
    assert model.net.calls == 25
    small = nn.functional.avg_pool2d(field.one, 2)
    out = model.upscale(small.expand(n, 1, 2, 2), noise=noise(n)).images
    torch.testing.assert_close(nn.functional.avg_pool2d(out, 2), small.expand(n, 1, 2, 2))
    rows = nn.functional.avg_pool2d(torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4), 2).flatten(1).T
    cross = field.covariance @ rows.T
    gain = cross @ torch.linalg.inv(rows @ cross)
    mean = field.mean + gain @ (small.flatten() - rows @ field.mean)
    index = [i for i in range(16) if i % 2 or i // 4 % 2]  # all but the first pixel of each block
    check_moments(out.flatten(1)[:, index], mean[index], (field.covariance - gain @ cross.T)[index][:, index])


def test_a_class_is_found_and_changed():
    """Of a flow whose classes are the signs of all pixels, by its exact velocity."""
    model = CFM.of(DataInfo((1, 4, 4), 256, ("dark", "bright")), **SMALL).double().eval()

    def velocity(x, t, y=None, drop=None):  # of N(±.5, .1²) at x_t = (1 − t) x_0 + t x_1
        t = t[:, None, None, None] / 1000
        m, var = y.double()[:, None, None, None] - 0.5, (1 - t) ** 2 + (0.1 * t) ** 2
        return m + (0.01 * t - (1 - t)) / var * (x - t * m)

    model.net.forward = velocity
    y = torch.tensor([0, 1, 1, 0])
    x = y.double()[:, None, None, None] - 0.5 + 0.1 * noise(4).randn(4, 1, 4, 4).double()
    result = model.classify(x, y=y, noise=noise(4))
    assert torch.equal(result.labels, y) and result.figures == {"accuracy": 1.0}
    assert model.classify(x, noise=noise(4)).figures == {}
    for source in (y, None):  # a class that is not known is found first
        translation = model.translate(x, labels=1 - y, y=source, noise=noise(4), steps=100)
        want = x + (1 - 2 * y.double())[:, None, None, None]
        torch.testing.assert_close(translation.images, want.clamp(-1, 1), atol=0.01, rtol=0)
    # class k is the constant image of k: the velocity given the right class has no error
    model, values = CFM.of(INFO, **SMALL).eval(), torch.tensor([-0.8, 0.0, 0.8]).view(-1, 1, 1, 1)
    model.net.forward = lambda x, t, y, drop=None: (values[y] - x) / (1 - t[:, None, None, None] / SCALE)
    y = torch.arange(9) % 3
    x = values[y].expand(-1, *INFO.shape)
    assert torch.equal(model.class_errors(x, noise(9)).argmin(1), y)
    assert model.measure([Batch(x, y, torch.arange(9), noise(9))]) == {"accuracy": 1.0}


@pytest.mark.parametrize("family", [CFM, SGM])
def test_guidance_is_the_extrapolation_and_only_guided_times_take_two_passes(family):
    model = family.of(INFO, **SMALL, conditional=True).eval()
    nn.init.normal_(model.net.conv_out.weight, std=0.3)
    nn.init.normal_(model.net.label.table.weight)
    rows, x, y = [], batch().x, torch.arange(8) % 3
    model.net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    noise_times = [model.process.at_share(share) for share in (0.9, 0.5)]
    early, inside = (torch.full((8,), t) for t in noise_times)
    if family is CFM:
        one, without, twice = (model.guided_output(x, inside, y, w) for w in (1.0, 0.0, 2.5))
        assert rows == [8, 8, 16]
        torch.testing.assert_close(twice, without + 2.5 * (one - without), atol=1e-5, rtol=1e-4)
        rows.clear()
    f, always, never = model.velocity(y, 2.5, (0.4, 0.6)), model.velocity(y, 2.5), model.velocity(y)
    with torch.no_grad():
        outer, inner = f(x, early), f(x, inside)
        assert rows == [8, 16]
        mixed = f(x, torch.tensor(noise_times * 4))  # as in the adaptive solver
        assert sum(rows[2:]) == 4 + 8
        for got, want in ((mixed[::2], outer[::2]), (mixed[1::2], inner[1::2])):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outer, never(x, early))
        torch.testing.assert_close(inner, always(x, inside))
    refused("needs a conditional model", FM.of(INFO, **SMALL).velocity, None, 2.0)


def test_paths_of_strange_images_are_strange():
    model = exact(0.2)
    z = torch.randn(400, *INFO.shape, generator=torch.Generator().manual_seed(3)).double()
    data = (model.net.mean + 0.2 * z).detach()
    model.fit_path([Batch(data, None, torch.arange(400), noise(400))])
    inside = model.score_path(data[:50], noise=noise(50))
    outside = model.score_path(data[:50] + 0.7, noise=noise(50))
    assert outside.min() > inside.max()


def test_recipes_and_runs_that_name_the_solver_of_images_are_read():
    """`sample.sampler` of flows was `sample.solver`; score models have both keys."""
    check = lambda model, sample: schema.check(  # noqa: E731
        {"sample": sample}, schema.schema(catalog.card(model)), lambda *_: ""
    )
    for model in ("fm", "cfm", "rf", "reflow", "zigma"):
        assert check(model, {"solver": "heun"}) == ({"sample": {"sampler": "heun"}}, [])
        run = part_of({"model": {"name": model}, "sample": {"solver": "heun", "steps": 3}})
        assert run.sample == {"sampler": "heun", "steps": 3}
    both = {"sampler": "ode", "solver": "heun"}
    assert check("sgm", both) == ({"sample": both}, [])
    assert part_of({"model": {"name": "sgm"}, "sample": both}).sample == both


@pytest.mark.usefixtures("fp64")
def test_images_of_the_sde_forget_the_noise_that_they_began_with():
    ode, sde = (
        flat(exact().sample)(400, noise=noise(400), progress=no_progress, sampler=name, steps=40)
        for name in ("midpoint", "sde")
    )
    pixels = torch.stack([ode[:, 0, 0, 0], sde[:, 0, 0, 0]])
    assert abs(float(torch.corrcoef(pixels)[0, 1])) < 0.2


@pytest.mark.usefixtures("fp64")
def test_sampler_round_trip_and_likelihood_have_the_shift():
    """Samplers step through the shifted times; data and density of the exact velocity stay what they are."""
    model = exact()
    model.process.shift = 3.0
    x = flat(model.sample)(4000, noise=noise(4000), progress=no_progress, sampler="midpoint", steps=40)
    torch.testing.assert_close(x.std(0), torch.full_like(x[0], 0.3), atol=0.01, rtol=0)
    model.net.times.clear()
    flat(model.sample)(4, noise=noise(4), progress=no_progress, sampler="euler", steps=4)
    assert model.net.times == pytest.approx([0, 1 / 10, 1 / 4, 1 / 2])
    x_t, _ = model.round_trip(torch.zeros(2000, *INFO.shape), noise(2000), 0.5, 2)
    assert float(x_t.std()) == pytest.approx(0.5, rel=0.02), "as much noise as image"
    x = 2 * (torch.rand(16, *INFO.shape).mul(255).round() / 255) - 1
    ode = LikelihoodOptions("rk4", 60, 1e-7)
    moved = model.log_prob(x, noise=noise(16), ode=ode)
    model.process.shift = 1.0
    torch.testing.assert_close(moved, model.log_prob(x, noise=noise(16), ode=ode), rtol=1e-3, atol=0)
