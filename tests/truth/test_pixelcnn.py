"""PixelCNN: what it learns and starts as, and in bf16; the rest is in `test_autoregressive.py`."""

import math

import pytest
import torch
from draws import batch, fitted
from test_autoregressive import images

from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.models.autoregressive.pixelcnn import PixelCNN
from gzcli.models.nn import from_levels


def test_it_learns_a_rule_between_pixels():
    """Images whose rows repeat their first pixel, of a fair coin each: 4 ln 2 nats are the entropy."""
    torch.manual_seed(0)
    model = PixelCNN(DataInfo((1, 4, 4), 2), hidden=16, head=16, dilations=(1,), first=3)

    def rows(step: int) -> Batch:
        x = BatchNoise(step, total=32).randint(2, 32, 1, 4, 1).expand(-1, -1, -1, 4) * 2.0 - 1
        return Batch(x, None, torch.arange(32), BatchNoise(0, total=32))

    assert 4 * math.log(2) - 0.1 < fitted(model, rows, 80, 2e-2)[-1] < 4 * math.log(2) + 0.2


@pytest.mark.parametrize("levels", [2, 5])
def test_the_softmax_starts_at_the_marginal_of_each_channel(levels):
    model = PixelCNN(DataInfo((3, 6, 6), levels), hidden=6, head=6, dilations=(1,), first=3)
    x = images(64, (3, 6, 6), levels, torch.float32)
    x[:, 1] = -1
    model.on_start(batch(x))
    bias = model.logits.bias.detach().view(3, -1).clone()
    p = torch.stack([1 - bias.sigmoid()[:, 0], bias.sigmoid()[:, 0]], 1) if levels == 2 else bias.softmax(1)
    grey = from_levels(torch.arange(levels), levels)
    for c in range(3):
        shares = (x[:, c].flatten()[:, None] - grey).abs().lt(1e-4).float().mean(0)
        assert torch.allclose(p[c], shares, atol=2e-3)
    model.on_start(batch(-x))  # a resume changes nothing
    assert torch.equal(model.logits.bias.view(3, -1), bias)


@pytest.mark.parametrize("hidden", [33, 48])
def test_gradients_in_bf16_are_those_in_fp32(hidden):
    """Also where the number of channels is none that oneDNN's kernels of bf16 are made for."""
    torch.manual_seed(0)
    model = PixelCNN.of(DataInfo((3, 32, 32), levels=2), hidden=hidden, head=18, dilations=(1, 4))
    x = torch.randint(2, (16, 3, 32, 32)) * 2.0 - 1
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = -model.part_log_prob(model(x), x).mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() <= 0.1 * exact.norm(), name
