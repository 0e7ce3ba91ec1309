"""A path from data to noise is its marginal: all else is held against autograd, differences and Gaussians."""

import math

import numpy as np
import pytest
import torch
from draws import flat, noise
from gaussian import check_likelihood
from torch import nn

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.denoising.process import VE, VP, CondOT, Cosine, DiscreteVP, Process, SubVP
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.models.flow_matching.fm import FM
from gzcli.models.score.sgm import SGM
from gzcli.testing import contract
from gzcli.testing.contract import Broken

INFO = DataInfo((1, 4, 4), 256)
SMALL = {"channels": 8, "mult": (1,), "attention": ()}


class Trigonometric(Process):
    """α = cos, σ = sin of π t / 2."""

    def marginal(self, t):
        return (t * math.pi / 2).cos(), (t * math.pi / 2).sin()


class Reversed(Process):
    """The same from noise to data."""

    clean, noisy = 1.0, 0.0

    def marginal(self, t):
        return (t * math.pi / 2).sin(), (t * math.pi / 2).cos()


class Wrong(Reversed):
    def ratio_level(self, ratio):  # of straight lines
        return self.level(1 / (1 + ratio))


class WrongSlope(Reversed):
    def derivatives(self, t):
        return 1.0, -1.0


PATHS = [Trigonometric(), Reversed(), VP(1e-5, 0.1), SubVP(1e-5, 0.1), VE(1e-5, 0.01, 50.0), CondOT(0.01)]
PATHS += [Cosine(), Cosine(3.0)]


def check(process):
    contract._check_levels(process)
    contract._check_derivatives(process)
    contract._check_density(process)


@pytest.mark.parametrize("process", PATHS, ids=lambda p: type(p).__name__)
def test_all_of_a_path_follows_from_its_marginal(process):
    check(process)
    general = lambda name: getattr(Process, name).__get__(process)  # noqa: E731  # whatever overrides it
    for share in (0.3, 0.5, 0.7):
        t = process.at_share(share)
        assert process.share(t) == pytest.approx(share, abs=2e-3)
        np.testing.assert_allclose(general("derivatives")(t), process.derivatives(t), rtol=1e-6, atol=1e-9)
        times = torch.full((3,), t, dtype=torch.float64)
        for got, special in zip(general("rates")(times), process.rates(times.view(3, 1, 1, 1)), strict=True):
            torch.testing.assert_close(got, special.expand_as(got), rtol=1e-6, atol=1e-9)
        log_ratio = np.array([math.log(math.tan(share * math.pi / 2))])
        np.testing.assert_allclose(general("times_at")(log_ratio), process.times_at(log_ratio), rtol=1e-3)


def test_a_wrong_closed_form_is_found():
    for wrong, sentence in ((Wrong(), "ratio_level"), (WrongSlope(), "derivatives")):
        with pytest.raises(Broken, match=sentence):
            check(wrong)


class Exact(nn.Module):
    """The velocity of a process whose data are N(m, .3²)."""

    def __init__(self, process):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.mean = nn.Parameter(0.2 * torch.randn(INFO.shape, generator=draw))
        self.path = [process]  # no submodule

    def forward(self, x, t, y=None, drop=None):
        process = self.path[0]
        _, alpha, sigma = process.levels_at(t / process.scale)
        scaled = (x - alpha * self.mean) / (alpha**2 * 0.09 + sigma**2)
        d_alpha, d_sigma = process.derivatives(t / process.scale)
        return d_alpha * (self.mean + alpha * 0.09 * scaled) + d_sigma * sigma * scaled


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("path", [Trigonometric, Reversed])
def test_a_path_of_a_few_lines_samples_and_has_likelihoods(path):
    model = FM.of(INFO, **SMALL)
    model.process = path()
    model.net = Exact(model.process)
    for options in ({"sampler": "rk4", "steps": 40}, {"sampler": "sde", "steps": 60}):
        x = flat(model.sample)(3000, noise=noise(3000), progress=no_progress, **options)
        torch.testing.assert_close(x.mean(0), model.net.mean.detach(), atol=0.03, rtol=0)
        torch.testing.assert_close(x.std(0), torch.full_like(x[0], 0.3), atol=0.02, rtol=0)
    check_likelihood(model, model.net.mean.detach(), 0.3, n=32)


def test_a_moment_is_the_same_noise_in_every_process():
    """`interval`, `strength` and the levels of scores; in runs of format 1 they are of the model's time."""
    processes = [*PATHS, DiscreteVP("cosine", 1000), DiscreteVP("linear", 1000)]
    for process in processes:
        for share in (0.4, 0.6):
            wanted = math.tan(share * math.pi / 2)
            levels = process.path(5, start=share)[0], process.level_at(share), process.error_levels(5)[2]
            ratios = [level.sigma / level.alpha for level in levels]
            np.testing.assert_allclose(ratios, [wanted, wanted, 1], rtol=0.01)
            ends = [process.ratio_level(r).t for r in (wanted / 1.1, wanted * 1.1)]
            low, high = map(process.share, ends)
            assert low < share < high
            if not isinstance(process, DiscreteVP):
                inside = process.share(torch.tensor(ends))
                torch.testing.assert_close(inside, torch.tensor([low, high]), atol=1e-3, rtol=0)
    time = {}
    for kind, key in ((DDPM, "ddpm"), (SGM, "sgm"), (FM, "fm")):
        with torch.device("meta"):
            model = kind.of(INFO, **SMALL)
        model.on_format(1)
        time[key] = model.process.path(5, start=0.4)[0].t, model.process.share(0.25)
    assert time == {"ddpm": (399, 0.25 / 1000), "sgm": (0.4, 0.25), "fm": (0.6, 0.25)}
