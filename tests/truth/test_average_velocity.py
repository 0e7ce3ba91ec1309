"""Average velocities (arXiv:2512.15657, 2505.13447) of Gaussian data, in closed form."""

import pytest
import torch
from draws import batch, noise
from torch import Tensor, nn

from gzcli.core.types import DataInfo, no_progress
from gzcli.models import catalog
from gzcli.models.flow_matching.average_velocity import AverageVelocity, MapOptions

INFO = DataInfo((1, 4, 4), None)
CLASSES = DataInfo((1, 4, 4), None, classes=("a", "b"))
GUIDED = {
    "conditional": True,
    "trained_guidance": 3.0,
    "label_dropout": 1e-9,
}  # hidden labels have other data
MEAN, STD, UNLABELLED = 0.4, 0.3, 0.1
SCALE = 10.0
SMALL = {"channels": 8, "mult": (1,), "attention": (), "groups": 4}
SMALL |= {"map_every": 1, "weight_power": 0.0, "time_scale": SCALE}


class Exact(nn.Module):
    """F of data N(MEAN, STD²), with a relative error; without a label of N(UNLABELLED, STD²), and guided of
    the normal distribution to which the guided velocity leads: velocities are affine in the mean."""

    def __init__(self, error: float):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))
        self.rows: list[int] = []  # of each call

    def forward(self, x: Tensor, times: Tensor, y=None, drop=None) -> Tensor:
        self.rows.append(len(x))
        t, gap, *share = (times[:, :, None, None, None] / SCALE).unbind(1)
        gap = gap.clamp(min=1e-6)
        s, mean = t + gap, torch.full_like(t, MEAN)
        if share:
            mean = mean + (1 / (1 - share[0]) - 1) * (MEAN - UNLABELLED)
        if y is None:
            mean = torch.full_like(t, UNLABELLED) if share else mean
        elif drop is not None:
            mean = torch.where(drop[:, None, None, None], UNLABELLED, mean)
        std = lambda t: ((1 - t) ** 2 + (STD * t) ** 2).sqrt()  # noqa: E731
        return (s * mean + std(s) / std(t) * (x - t * mean) - x) / gap * (1 + self.error)


def exact(name: str, error: float = 0.0, info: DataInfo = INFO, **options) -> AverageVelocity:
    model = catalog.load(name).of(info, **SMALL, **options).double()
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


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", ["soflow", "meanflow"])
def test_a_guided_sample_of_one_step_is_one_call(name):
    model, n = exact(name, info=CLASSES, **GUIDED), 2000
    for guidance, rows in ((1.0, n), (2.5, n), (4.0, 2 * n)):  # beyond the training's it takes two passes
        model.net.rows.clear()
        x = model.sample(n, noise=noise(n), options=MapOptions(steps=1, guidance=guidance))
        assert model.net.rows == [rows]
        mean = MEAN + (guidance - 1) * (MEAN - UNLABELLED)
        if guidance <= 3:
            assert [float(x.mean()), float(x.std())] == pytest.approx([mean, STD], abs=0.01)
    before = exact(name, info=CLASSES, **GUIDED | {"trained_guidance": 1.0})
    before.sample(n, noise=noise(n), options=MapOptions(steps=1, guidance=2.5))
    assert before.net.rows == [2 * n]


def test_half_of_the_targets_and_those_of_hidden_labels_are_unguided():
    hidden = torch.arange(4000) < 400
    guidance = exact("meanflow", info=CLASSES, **GUIDED).draw_guidance(noise(4000), 4000, hidden)
    assert bool((guidance[hidden] == 1).all())
    rest = guidance[~hidden]
    assert float((rest == 1).float().mean()) == pytest.approx(0.5, abs=0.03)
    logs = rest[rest > 1].log() / torch.tensor(3.0).log()
    assert float(logs.max()) <= 1
    assert float(logs.mean()) == pytest.approx(0.5, abs=0.03), "log-uniform"


def gradient(model: AverageVelocity, n: int = 20_000) -> float:
    """Of the loss by the error of F."""
    x = MEAN + STD * torch.randn(n, *INFO.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 2 if model.conditional else None
    return float(torch.autograd.grad(model.loss(batch(x, y=y))["loss"], model.net.error)[0])


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("guided", [{}, {"info": CLASSES, **GUIDED}], ids=["unguided", "guided"])
@pytest.mark.parametrize(("name", "options"), [("soflow", {"rho": (0.01, 0.01)}), ("meanflow", {})])
def test_the_loss_is_least_at_the_exact_map(name, options, guided):
    low, high = (gradient(exact(name, error, **options, **guided)) for error in (-0.1, 0.1))
    assert low < -0.1 and high > 0.1
    assert abs(gradient(exact(name, **options, **guided), 100_000)) < 1e-3


@pytest.mark.usefixtures("fp64")
def test_a_long_step_with_the_velocity_of_one_path_is_biased():
    assert gradient(exact("soflow", rho=(0.5, 0.5))) < -0.02
