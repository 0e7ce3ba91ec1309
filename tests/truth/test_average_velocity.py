"""Average velocities (arXiv:2512.15657, 2505.13447) of Gaussian data, in closed form."""

import pytest
import torch
from draws import batch, noise
from torch import Tensor, nn

from gzcli.core.types import DataInfo, no_progress
from gzcli.models import catalog
from gzcli.models.flow_matching.average_velocity import AverageVelocity, MapOptions

INFO = DataInfo((1, 4, 4), None)
MEAN, STD = 0.4, 0.3
SCALE = 10.0
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}
SMALL |= {"map_every": 1, "weight_power": 0.0, "time_scale": SCALE}


class Exact(nn.Module):
    """F of data N(MEAN, STD²), with a relative error."""

    def __init__(self, error: float):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))

    def forward(self, x: Tensor, times: Tensor, y=None, drop=None) -> Tensor:
        t, gap = (times[:, :, None, None, None] / SCALE).unbind(1)
        gap = gap.clamp(min=1e-6)
        s = t + gap
        std = lambda t: ((1 - t) ** 2 + (STD * t) ** 2).sqrt()  # noqa: E731
        return (s * MEAN + std(s) / std(t) * (x - t * MEAN) - x) / gap * (1 + self.error)


def exact(name: str, error: float = 0.0, **options) -> AverageVelocity:
    model = catalog.load(name).of(INFO, **SMALL, **options).double()
    model.net = Exact(error).double()
    return model.eval()


@pytest.mark.usefixtures("fp64")
def test_one_call_is_many_calls_and_the_ode_of_equal_times():
    model, n = exact("soflow"), 2000
    one, many = (model.sample(n, noise=noise(n), options=MapOptions(steps=k)) for k in (1, 32))
    torch.testing.assert_close(one, many, atol=1e-3, rtol=0)
    solved = model.to_data(noise(n).randn(n, *INFO.shape), None, 100, 1.0, no_progress)
    torch.testing.assert_close(one, solved.detach(), atol=1e-3, rtol=0)
    assert [float(one.mean()), float(one.std())] == pytest.approx([MEAN, STD], abs=0.01)


def gradient(model: AverageVelocity) -> float:
    """Of the loss by the error of F."""
    n = 20_000
    x = MEAN + STD * torch.randn(n, *INFO.shape, generator=torch.Generator().manual_seed(0))
    return float(torch.autograd.grad(model.loss(batch(x))["loss"], model.net.error)[0])


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("name", "options"), [("soflow", {"rho": (0.01, 0.01)}), ("meanflow", {})])
def test_the_loss_is_least_at_the_exact_map(name, options):
    low, right, high = (gradient(exact(name, error, **options)) for error in (-0.1, 0.0, 0.1))
    assert low < -0.1 and abs(right) < 1e-3 and high > 0.1


@pytest.mark.usefixtures("fp64")
def test_a_long_step_with_the_velocity_of_one_path_is_biased():
    assert gradient(exact("soflow", rho=(0.5, 0.5))) < -0.02
