"""NCSNv2: the paper's own ladders and steps, Langevin dynamics on an exact score, the network's parts."""

import math

import pytest
import torch
from draws import flat, noise
from torch import nn

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.score.ncsnv2 import InstanceNormPlus, NCSNv2, overlap_ratio, steady_step

INFO = DataInfo((1, 4, 4), 256, ("a", "b", "c"), n=64, steps=100)
SMALL = {"width": 4, "mult": (1, 2), "dilation": (1, 2), "sigma_max": 10.0}


class Exact(nn.Module):
    """ε or v of data N(mean, std²) at the level that `level` says: a noise-blind net that knows it."""

    def __init__(self, model: NCSNv2, std: float):
        super().__init__()
        self.mean, self.std, self.calls = nn.Parameter(torch.linspace(-0.5, 0.5, 16).view(INFO.shape)), std, 0
        self.__dict__["model"] = model

    def forward(self, x, t, y=None, drop=None):
        self.calls += 1
        at = self.model.process.levels_at(t / 1000)
        sigma, r = at.sigma, self.model.process.norm(at)
        v = self.model.prediction == "v"
        x = r * x if v else x
        eps = sigma * (x - self.mean) / (self.std**2 + sigma**2)
        return (eps - sigma * (x - sigma * eps)) / r if v else eps


def estimates(model: NCSNv2, x: torch.Tensor, t: torch.Tensor) -> Estimate:
    """What the network says of x at times [B]."""
    return model.estimate(x, model.process.levels_at(t))


def exact(std: float = 0.2, **options) -> NCSNv2:
    model = NCSNv2.of(INFO, **SMALL | options).eval()
    model.net = Exact(model, std)
    return model


def test_ladders_and_steps_are_those_of_the_paper():
    """Table 5 of its appendix B: CIFAR-10 and CelebA with five steps a level, and σ for images in [0, 1]."""
    for side, sigma, levels, step in ((32, 50, 232, 6.2e-6), (64, 90, 500, 3.3e-6)):
        count = 1 + math.log(sigma / 0.01) / math.log(overlap_ratio(3 * side**2))
        assert count == pytest.approx(levels, rel=0.06)  # its numbers of levels are rounded up
        steady = steady_step((sigma / 0.01) ** (1 / (levels - 1)), 5)
        assert 0.01**2 * steady == pytest.approx(step, rel=0.02)
    for side, sigma in ((32, 50), (64, 90), (96, 140), (128, 190), (256, 348)):
        with torch.device("meta"):
            model = NCSNv2.of(DataInfo((3, side, side)), width=4)
        assert model.process.prior_std == pytest.approx(2 * sigma, rel=0.1)
        assert model.process.prior_std == pytest.approx(1.7 * math.sqrt(3) * side)
    # of Langevin dynamics on N(0, 1) that start from N(0, γ²): x ← (1 − ε) x + √(2 ε) z
    for gamma, repeats in ((1.04, 5), (1.2, 3)):

        def gap(step: float, gamma=gamma, repeats=repeats) -> float:
            variance = gamma**2
            for _ in range(repeats):
                variance = (1 - step) ** 2 * variance + 2 * step
            return abs(variance - 1)

        best = steady_step(gamma, repeats)
        assert gap(best) < min(gamma**2 - 1, *(gap(best * factor) for factor in (0.5, 0.9, 1.1, 2.0)))
    x = torch.ones(4, *INFO.shape)
    x[::2] = -1
    for sigma_max, warned in ((10.0, False), (5.0, True)):
        model = NCSNv2.of(INFO, **SMALL | {"sigma_max": sigma_max})
        model.on_start(Batch(x, None, torch.arange(4), BatchNoise(0, total=4)))
        assert len(model.warnings) == warned
        assert all("images are up to 8 apart" in warning for warning in model.warnings)


def test_langevin_dynamics_recover_a_gaussian_and_denoise():
    model = exact(levels=150)
    draw = BatchNoise(0, total=2000)
    x = flat(model.sample)(2000, noise=draw, progress=no_progress, sampler="langevin", repeats=5, clip=False)
    assert model.net.calls == 150 * 5 + 1
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), model.net.mean.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full_like(x[0], 0.2), atol=0.02, rtol=0)
    model = exact(std=1e-4, levels=40)
    x = flat(model.sample)(8, noise=noise(8), progress=no_progress, sampler="langevin", repeats=5)
    torch.testing.assert_close(x, model.net.mean.detach().expand_as(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler, calls", [("dpmpp", 20), ("heun", 39), ("ode", None)])
def test_few_steps_of_the_ode_suffice(sampler, calls):
    model = exact()
    x = flat(model.sample)(2000, noise=noise(2000), sampler=sampler, steps=20, clip=False)
    assert calls is None or model.net.calls == calls
    torch.testing.assert_close(x.mean(0), model.net.mean.detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full_like(x[0], 0.2), atol=0.02, rtol=0)


def test_where_the_network_predicts_v_its_error_of_images_stays_bounded():
    """An error δ of ε is one of σ δ of images; of v it is one of σ δ / √(1 + σ²)."""
    eps, v = exact(), exact(prediction="v")
    x = 9.0 * torch.randn(4, *INFO.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.9)
    sigma = float(eps.process.levels_at(t).sigma[0])
    with torch.no_grad():
        true = estimates(eps, x, t)
        for mine, theirs in zip(estimates(v, x, t), true, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        for model, far in ((eps, sigma), (v, sigma / math.sqrt(1 + sigma**2))):
            exactly = model.net.forward
            model.net.forward = lambda *inputs, exactly=exactly: exactly(*inputs) + 0.1
            gap = estimates(model, x, t).x0 - true.x0
            torch.testing.assert_close(gap, torch.full_like(gap, -0.1 * far), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shared", ["uniform", "cosine"])
def test_its_times_are_those_of_levels(shared):
    """Uniform: each level as often as any other. Cosine: by the share of the angle atan σ."""
    model = NCSNv2.of(INFO, **SMALL, levels=7, time_sampling=shared)
    t = model.draw_times(BatchNoise(0, total=7000), 7000)
    level, counts = (t * 6).unique(return_counts=True)
    torch.testing.assert_close(level, torch.arange(7.0), atol=1e-4, rtol=0)
    edges = torch.atan(0.02 * 500 ** (torch.arange(8) / 7)) if shared == "cosine" else torch.arange(8.0)
    share = edges.diff() / (edges[-1] - edges[0])
    torch.testing.assert_close(counts / 7000, share, atol=1e-3, rtol=0)


def test_the_network_is_told_no_level_and_is_in_single_precision():
    model = NCSNv2.of(INFO, **SMALL, levels=7)
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float32}
    t = model.draw_times(BatchNoise(0, total=500), 500)
    assert t.dtype == torch.float32
    sigma = model.process.levels_at(t).sigma.unique().log()
    torch.testing.assert_close(sigma, torch.linspace(math.log(0.02), math.log(10), 7), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    model, x = NCSNv2.of(INFO, **SMALL).eval(), torch.randn(2, *INFO.shape)
    at = lambda t: estimates(model, x, torch.full((2,), t)).eps  # noqa: E731
    assert torch.equal(at(0.1), at(0.9))


def test_the_norm_is_that_of_the_paper():
    """γ ((x − μ)/s + α (μ − m)/v) + β, by channel (Song & Ermon 2019, A.1), labels added to the three."""
    norm, x = InstanceNormPlus(6, 3), 3 + 2 * torch.randn(4, 6, 5, 5)
    nn.init.normal_(norm.shift)
    y = torch.tensor([0, 2, 1, 1])
    mu, s = x.mean((2, 3)), x.var((2, 3), unbiased=False).add(1e-5).sqrt()
    m, v = mu.mean(1, keepdim=True), mu.std(1, keepdim=True)
    rows = torch.cat([norm.scale, norm.shift[None]]) + norm.label.table.weight[y].view(4, 3, 6)
    gamma, alpha, beta = rows[..., None, None].unbind(1)
    mu, s, m, v = (t[:, :, None, None] for t in (mu, s, m, v))
    expected = gamma * ((x - mu) / s + alpha * (mu - m) / v) + beta
    torch.testing.assert_close(norm(x, y, None), expected, atol=1e-4, rtol=1e-4)
