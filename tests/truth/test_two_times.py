"""Two times on the core of denoisers: SoFlow's solution map (arXiv:2512.15657) of Gaussian data."""

import pytest
import torch
from draws import noise
from torch import Tensor, nn

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models.flow_matching.fm import FlowMatching, FlowOptions, SamplingOptions
from gzcli.models.labelled import ClusterOptions

INFO = DataInfo((1, 4, 4), None)
MEAN, STD = 0.4, 0.3


class SolutionMap(FlowMatching):
    """f(x, t, s) = x + (s − t) F(x, t, s), from noise at 0 to data at 1."""

    def time_input(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        return self.process.scale * torch.stack([t, t if s is None else s], 1)

    def mapped(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + (s - t)[:, None, None, None] * self.net(x, self.time_input(t, s), None)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        t = self.draw_times(batch.noise, len(batch))
        s = t + (1 - t) * batch.noise.rand(len(batch))
        later = t + (s - t) * 0.1
        eps, x = self.noise_and_images(batch)
        at, v = self.process.levels_at(t), x - eps
        x_t = at.alpha * x + at.sigma * eps
        with torch.no_grad():
            target = self.mapped(x_t + v * (later - t)[:, None, None, None], later, s)
        gap = (self.mapped(x_t, t, s) - target) / (later - t)[:, None, None, None]
        return {"loss": gap.square().mean()}


class Exact(nn.Module):
    """F of data N(MEAN, STD²), with an error."""

    def __init__(self):
        super().__init__()
        self.error = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, times, y=None, drop=None):
        t, s = (times / 1000).double().unbind(1)
        t, s = t[:, None, None, None], s[:, None, None, None]
        s = torch.where(s == t, t + 1e-6, s)
        std = lambda t: ((1 - t) ** 2 + (STD * t) ** 2).sqrt()  # noqa: E731
        return (s * MEAN + std(s) / std(t) * (x - t * MEAN) - x) / (s - t) + self.error


def model() -> SolutionMap:
    return SolutionMap(INFO, Exact(), FlowOptions("uniform"), ClusterOptions()).double().eval()


def test_one_call_is_the_ode_equal_times_are_flows_and_the_exact_map_has_the_least_loss():
    solved, z = model(), noise(50).randn(50, *INFO.shape).double()
    once = solved.mapped(z, torch.zeros(50), torch.ones(50))
    many = solved.to_data(z, None, 100, 1.0, no_progress)
    torch.testing.assert_close(once, many, atol=1e-3, rtol=0)
    n = 2000
    x = model().sample(n, noise=noise(n), options=SamplingOptions(steps=40)).detach()
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01) and float(x.std()) == pytest.approx(STD, abs=0.01)
    n, losses = 4000, []
    x = MEAN + STD * torch.randn(n, *INFO.shape, generator=torch.Generator().manual_seed(0)).double()
    for error in (0.0, 0.2, -0.2):
        wrong = model()
        nn.init.constant_(wrong.net.error, error)
        batch = Batch(x, None, torch.arange(n), BatchNoise(0, total=n))
        losses.append(float(wrong.loss(batch)["loss"].detach()))
    assert losses[0] < min(losses[1:])
