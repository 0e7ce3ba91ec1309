"""PixelCNN: causality by gradients, what it learns and starts as; the rest is in `test_autoregressive.py`."""

import itertools
import math

import pytest
import torch
from draws import fitted
from test_autoregressive import build, images

from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.models.autoregressive.pixelcnn import PixelCNN
from gzcli.models.nn import from_levels


@pytest.mark.parametrize("channels", [1, 3])
def test_each_value_sees_exactly_the_values_before_it(channels):
    """By gradients: every earlier value within reach, no blind spot, and none of the later ones."""
    height, width = 5, 6
    model = build(PixelCNN, (channels, height, width), 4, dilations=(1, 1, 1, 1, 1, 1), hidden=12, head=12)
    x = images(1, (channels, height, width), 4).requires_grad_()
    logits = model(x)
    order = torch.arange(height * width * channels).view(height, width, channels).movedim(2, 0)  # [C, H, W]
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        (grad,) = torch.autograd.grad(logits[0, c, i, j].square().sum(), x, retain_graph=True)
        assert torch.equal(grad[0] != 0, order < order[c, i, j]), (c, i, j)


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
    model.on_start(Batch(x, None, torch.arange(64), BatchNoise(0, total=64)))
    bias = model.logits.bias.detach().view(3, -1).clone()
    p = torch.stack([1 - bias.sigmoid()[:, 0], bias.sigmoid()[:, 0]], 1) if levels == 2 else bias.softmax(1)
    for c in range(3):
        grey = from_levels(torch.arange(levels), levels)
        shares = (x[:, c].flatten()[:, None] - grey).abs().lt(1e-4).float().mean(0)
        assert torch.allclose(p[c], shares, atol=2e-3)
    model.on_start(Batch(-x, None, torch.arange(64), BatchNoise(0, total=64)))  # a resume changes nothing
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
