"""A consistency model, with the consistency function of a Gaussian, which is known."""

import pytest
import torch
from draws import batch, flat, noise
from torch import nn

from gzcli.core.types import DataInfo
from gzcli.models import catalog
from gzcli.models.score.consistency import Consistency

INFO = DataInfo((1, 4, 4), None, n=64, steps=1)
MEAN, STD = 0.2, 0.3


class Exact(nn.Module):
    """The output F from which f(x, σ) is the end, at σ = ε, of the path of N(MEAN, STD²), off by a factor."""

    def __init__(self, model: Consistency):
        super().__init__()
        self.off, self.__dict__["model"] = nn.Parameter(torch.zeros(())), model

    def forward(self, x, t, y=None, drop=None):
        model, sigma = self.model, (t / 250).exp()[:, None, None, None]
        above, variance = sigma - model.least, model.sigma_data**2
        x = x * (sigma**2 + variance).sqrt()
        end = MEAN + (x - MEAN) * ((STD**2 + model.least**2) / (STD**2 + sigma**2)).sqrt()
        skipped = variance / (above**2 + variance) * x
        out = (end - skipped) * (sigma**2 + variance).sqrt() / (above * model.sigma_data).clamp(min=1e-9)
        return (1 + self.off) * out


def exact(**options) -> Consistency:
    model = Consistency.of(INFO, channels=8, mult=(1,), attention=(), groups=4, **options).double()
    model.net = Exact(model)
    return model


@pytest.mark.usefixtures("fp64")
def test_one_call_and_three_draw_the_right_gaussian():
    model, n = exact().eval(), 4000
    for steps in (1, 3, 5):
        x = flat(model.sample)(n, noise=noise(n), steps=steps)
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.005), steps
        assert float(x.std()) == pytest.approx(STD, rel=0.01), steps
    x = noise(4).randn(4, *INFO.shape)  # at its boundary it is the identity
    torch.testing.assert_close(model.consistent(x, torch.full((4,), model.least), None), x)


@pytest.mark.usefixtures("fp64")
def test_the_true_function_is_where_the_loss_does_not_pull():
    x = MEAN + STD * torch.randn(4000, *INFO.shape, generator=torch.Generator().manual_seed(1))
    pulls = []
    for off in (0.0, 0.1):
        model = exact(q=256.0, stages=1).train()
        nn.init.constant_(model.net.off, off)
        model.loss(batch(x))["loss"].backward()
        pulls.append(abs(float(model.net.off.grad)))
    assert pulls[0] < 0.2 * pulls[1]


def test_it_only_samples():
    """The end of a path is not the mean of the images that it may come from. Taken for that, log p is .4 nats
    too high, and the ODE's samples have a deviation of .54."""
    for name in ("consistency", "ect"):
        card = catalog.card(name)
        assert set(card.can) <= {"sample", "conditional"} and card.likelihood is None
        assert not (card.do or card.scores or card.maps)
    assert set(catalog.card("consistency").sample["sampler"].words) == {"Literal", "renoise"}
    for name in ("edm", "sgm", "ncsnv2", "ddpm"):  # its sampler draws a smaller deviation from a denoiser
        assert "renoise" not in catalog.card(name).sample["sampler"].words
