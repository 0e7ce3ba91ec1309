"""EDM2 (Karras 2023, arXiv:2312.02696): magnitudes of new nets, constant weights, learned uncertainty."""

import math

import pytest
import torch
from draws import batch, images, noise
from refused import refused

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.flow_matching.meanflow import MeanFlow
from gzcli.models.nn.magnitude import Block, MPFourier, MPWeight, mp_cat, mp_silu, mp_sum
from gzcli.models.score.edm import EDM

INFO = DataInfo((1, 16, 16), 17, ("a", "b", "c"), n=64, steps=100)
SMALL = {"net": "edm2", "channels": 16, "mult": (1, 2), "attention": (8,)}


def magnitude(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def edm(**options) -> EDM:
    torch.manual_seed(0)
    return EDM.of(INFO, **{"sigma_data": 0.5, **SMALL, **options}).eval()


def test_each_operation_keeps_the_magnitude_of_gaussian_inputs():
    """Equations 47, 75, 81, 88 and 103, by a hundred thousand draws."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2000, 64)
    assert magnitude(mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert magnitude(mp_sum(a, b, 0.3)) == pytest.approx(1, abs=0.01)
    both = mp_cat(a, b[:, :16])
    assert magnitude(both) == pytest.approx(1, abs=0.01)
    assert float(both[:, 64:].square().sum() / both[:, :64].square().sum()) == pytest.approx(1, abs=0.03)
    assert magnitude(MPFourier(4000)(torch.linspace(0, 1000, 50))) == pytest.approx(1, abs=0.02)
    assert magnitude(MPWeight(64, 500)(a)) == pytest.approx(1, abs=0.02)


def test_every_block_of_a_new_net_has_activations_of_magnitude_one():
    """On average: zeros around the image take some, and chance adds some; the output, of gain 0, has none."""
    model, seen = edm(channels=32, conditional=True), []
    for block in (m for m in model.net.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda _, __, out: seen.append(magnitude(out)))
    with torch.no_grad():
        out = model.net(torch.randn(64, 1, 16, 16), 1000 * torch.rand(64), torch.arange(64) % 3)
    assert len(seen) > 8 and sum(seen) / len(seen) == pytest.approx(1, abs=0.1), seen
    assert min(seen) > 0.75 and max(seen) < 1.3 and not out.any(), seen


def test_the_scale_of_a_weight_changes_nothing_and_training_resets_it():
    torch.manual_seed(0)
    layer, x = MPWeight(8, 4, 3).eval(), torch.randn(2, 8, 5, 5)
    before = layer(x)
    before.square().sum().backward()
    grad = layer.weight.grad
    radial = (grad * layer.weight).sum() / (grad.norm() * layer.weight.norm())
    assert grad.norm() > 1 and abs(float(radial.detach())) < 1e-3, "orthogonal to the weight"
    layer.weight.data *= 7
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    layer.train()(x)
    means = layer.weight.detach().flatten(1).square().mean(1)
    torch.testing.assert_close(means, torch.ones(4), rtol=1e-3, atol=0)


def test_uncertainty_weights_by_the_learned_error():
    """Of loss / e^u + u (eq. 21) the gradient of the net is e^−u times as large, and that of u is
    1 − error / e^u, which is 0 where e^u is the error."""
    plain, learned = edm(), edm(uncertainty=True)
    learned.net.load_state_dict(plain.net.state_dict())
    for model in (plain, learned):
        model.net.gain.data.fill_(1.0)
    u = torch.nn.Parameter(torch.tensor(0.7))
    learned.uncertainty.forward = lambda t: u.expand(len(t))
    error = plain.loss(batch(images(8)))["loss"]
    error.backward()
    losses = learned.loss(batch(images(8)))
    losses["loss"].backward()
    assert float(losses["unweighted"]) == pytest.approx(float(error.detach()), rel=1e-5)
    assert float(losses["loss"].detach()) == pytest.approx(
        float(error.detach()) / math.exp(0.7) + 0.7, rel=1e-5
    )
    assert float(u.grad) == pytest.approx(1 - float(error.detach()) / math.exp(0.7), rel=1e-4)
    for p, q in zip(plain.net.parameters(), learned.net.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad * math.exp(-0.7), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("side", "patch"), [(15, 1), (14, 2)])
def test_it_draws_odd_sizes_in_patches_by_labels_and_refuses_two_times(side, patch):
    torch.manual_seed(0)
    info = DataInfo((1, side, side), 17, ("a", "b", "c"), n=64, steps=100)
    model = EDM.of(info, **SMALL, patch=patch, conditional=True, sigma_data=0.5).eval()
    for m in model.net.modules():
        if hasattr(m, "gain"):
            m.gain.data.fill_(0.5)
    x, t = images(2, info.shape), torch.full((2,), 500.0)
    with torch.no_grad():
        outs = [model.net(x, t, torch.tensor([k, k])) for k in (0, 1)]
    assert outs[0].shape == x.shape and not torch.equal(*outs)
    drawn = model.sample(2, labels=torch.tensor([0, 1]), noise=noise(2), progress=no_progress)
    assert drawn.shape == x.shape
    assert "unet" in refused("supports one time", MeanFlow.of, info, net="edm2").hint
