"""RealNVP: batch norm in the flow, weight norm in its nets, against autograd, nflows and torch."""

import copy

import pytest
import torch
from flows import DIGITS, batch, images, log_det_by_autograd, noise, roughen

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.normalizing_flow.layers import initialising
from gzcli.models.normalizing_flow.realnvp import BatchNorm, RealNVP, ResNet, WeightNormConv


def realnvp(shape=(1, 8, 8), levels=256, classes=DIGITS, size=0.05, **options) -> RealNVP:
    """In eval mode, its averages moved towards those of a batch."""
    torch.manual_seed(0)
    options = {"couplings": 2, "hidden": 8, "blocks": 1, **options}
    model, x = RealNVP.of(DataInfo(shape, levels, classes), **options), images(16, shape, levels)
    model.on_start(batch(x))
    roughen(model, size).log_prob(x, noise=noise(16))
    return model.eval()


def test_both_masks_stand_at_every_scale_but_the_last():
    model = realnvp((1, 16, 16), scales=3, couplings=3)
    kinds = [[type(m).__name__[0] for m in steps] for steps in model.flow]
    assert kinds == [["P", *"AB" * 3, "P", *"AB" * 3]] * 2 + [["P", *"AB" * 4]]
    x = torch.randn(1, 4, 2, 2)
    (there, _), back = model.flow[0][0](x), model.flow[0][7]
    assert torch.equal(back(there)[0], x) and not torch.equal(there, x)


def test_batch_norm_agrees_with_nflows_and_its_jacobian():
    norm = BatchNorm(3).double().eval()
    norm.mean.normal_()
    norm.var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    y, log_det = norm(x)
    torch.testing.assert_close(log_det.expand(2), log_det_by_autograd(lambda t: norm(t)[0], x))
    torch.testing.assert_close(norm.inverse(y), x)
    normalization = pytest.importorskip("nflows.transforms.normalization")
    peer, mine = normalization.BatchNorm(3, eps=1e-6, momentum=0.05, affine=True), BatchNorm(3)
    peer.unconstrained_weight.data.fill_(float(torch.tensor(1 - peer.eps).expm1().log()))  # a weight of one
    g = torch.Generator().manual_seed(0)
    for mode in (True, True, False):
        peer.train(mode), mine.train(mode)
        x = 3 + 2 * torch.randn(64, 3, generator=g)
        (expected, their_log_det), (y, log_det) = peer(x), mine(x.view(64, 3, 1, 1))
        torch.testing.assert_close(y.view(64, 3), expected, atol=1e-5, rtol=0.02 if mode else 1e-5)
        torch.testing.assert_close(log_det.expand(64), their_log_det, atol=0.03 if mode else 1e-5, rtol=0)
        peer.running_mean.copy_(mine.mean)
        peer.running_var.copy_(mine.var)
    # what batch norm undoes, a shift and a scale of its input, has no gradient through y and log-det
    norm, x = BatchNorm(2).double(), torch.randn(8, 2, 3, 3, dtype=torch.float64)
    shift, log_scale = (torch.zeros(2, 1, 1, dtype=torch.float64).requires_grad_() for _ in "ab")
    y, log_det = norm(x * log_scale.exp() + shift)
    (y * torch.randn_like(y)).sum().add(log_det + 9 * log_scale.sum()).backward()
    assert shift.grad.abs().max() < 1e-5 and log_scale.grad.abs().max() < 1e-4


def test_averages_start_at_the_first_batch_follow_training_and_rest_in_eval():
    model = RealNVP.of(DataInfo((1, 8, 8)), couplings=1, hidden=8, blocks=1)
    model.on_start(batch(images(16)))
    norm = next(m for m in model.modules() if isinstance(m, BatchNorm))
    start = norm.mean.clone()
    assert start.abs().max() > 0.01 and (norm.var != 1).all()
    model.on_start(batch(images(16, seed=1)))  # once
    assert torch.equal(norm.mean, start)
    model.loss(batch(images(16, seed=1)))
    assert not torch.equal(norm.mean, start)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.log_prob(images(4), noise=noise(4))
        model.sample(2, noise=noise(2), progress=no_progress)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weight_norm_agrees_with_torch_and_starts_normed():
    mine = roughen(WeightNormConv(3, 4))
    peer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        peer.parametrizations.weight.original0.copy_(mine.g.view(4, 1, 1, 1))
        peer.parametrizations.weight.original1.copy_(mine.v)
        peer.bias.copy_(mine.bias)
    torch.testing.assert_close(mine(x), peer(x))
    net = ResNet(2, 4, 8, 2)
    x = 5 + 3 * torch.randn(16, 2, 6, 6)
    x[:, 1] = 3.0
    with initialising(net) as fresh:
        net(x)
    assert fresh
    seen = []
    convs = [m for m in net.modules() if isinstance(m, WeightNormConv)]
    for m in convs:
        m.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    net(x)
    assert len(seen) == 5
    for h in seen:
        torch.testing.assert_close(h.mean((0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
        torch.testing.assert_close(h.var((0, 2, 3), correction=0), torch.ones(8), atol=1e-3, rtol=0)
