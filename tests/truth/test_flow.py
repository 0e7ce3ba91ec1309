"""The flow family's base, checkerboards and dequantisation, on `flow`: autograd, quadrature, normflows."""

import pytest
import torch
from draws import fitted
from flows import DIGITS, FixedNoise, batch, images, log_det_by_autograd, noise, roughen
from refused import refused

from gzcli.core.types import BatchNoise, DataInfo, no_progress
from gzcli.models.nn import zero_init
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import VariationalDequantiser
from gzcli.models.normalizing_flow.flow import Flow, GatedNet


def flow(shape=(1, 8, 8), levels=256, classes=DIGITS, multilabel=False, size=0.1, **options) -> Flow:
    torch.manual_seed(0)
    options = {"depth": 3, "hidden": 8, "blocks": 1, **options}
    return roughen(Flow.of(DataInfo(shape, levels, classes, multilabel), **options), size)


def test_a_coupling_changes_the_squares_of_one_colour_given_those_of_the_other():
    model = flow(depth=1).double()
    zero_init(model.flow[0][1])  # ActNorm
    flat = lambda v: layers.unsqueeze(model.flow[0][0].inverse(model.encode(v)[0][0]))  # noqa: E731
    v = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    jac = torch.autograd.functional.jacobian(flat, v).view(64, 64)
    black = (torch.arange(8)[:, None] + torch.arange(8) + 1).remainder(2).flatten().bool()  # (0, 0) is black
    assert torch.equal(jac[black], torch.eye(64, dtype=torch.float64)[black])
    white = jac[~black][:, ~black]
    assert torch.equal(white, torch.diag(white.diagonal())) and (white.diagonal() != 1).all()
    assert (jac[~black][:, black] != 0).any(1).all()


@pytest.mark.parametrize("flip", [False, True])
def test_a_checkerboard_coupling_agrees_with_normflows(flip):
    """z = b x + (1 − b)(x exp(s(b x)) + t(b x)) at full resolution, with the same net inside."""
    masked = pytest.importorskip("normflows").flows.MaskedAffineFlow
    torch.manual_seed(0)
    order = layers.Permute(layers.checkerboard(8))
    coupling = layers.AffineCoupling(8, roughen(GatedNet(4, 8, 8, 1), 0.3), flip=flip)
    black = (torch.arange(6)[:, None] + torch.arange(6) + 1).remainder(2).float().expand(2, 6, 6)

    class Placed(torch.nn.Module):
        """s, or t · exp(s), of the masked image, on a grid of full size."""

        def __init__(self, shift: bool):
            super().__init__()
            self.shift = shift

        def forward(self, x):
            x1, _ = coupling.split(order(layers.squeeze(x))[0])
            shift, log_scale = coupling.shift_and_log_scale(x1, None)
            value = shift * log_scale.exp() if self.shift else log_scale
            return layers.unsqueeze(order.inverse(coupling.join(torch.zeros_like(value), value)))

    peer = masked(black if not flip else 1 - black, Placed(True), Placed(False))
    x = torch.randn(3, 2, 6, 6)
    z, expected = peer.forward(x)
    y, log_det = coupling(order(layers.squeeze(x))[0])
    torch.testing.assert_close(layers.unsqueeze(order.inverse(y)), z)
    torch.testing.assert_close(log_det, expected)


def dequantiser(levels=17, size=0.2) -> VariationalDequantiser:
    torch.manual_seed(0)
    return roughen(VariationalDequantiser(DataInfo((1, 2, 2), levels), hidden=8), size).double()


def test_log_q_is_the_density_of_the_dequantisation_noise():
    """The noise starts uniform, so log q(u | x) = −log |det du / d noise|."""
    made, x = dequantiser(), images(1, (1, 2, 2), 17).double()
    start = 0.1 + 0.8 * torch.rand(1, 1, 2, 2, dtype=torch.float64)
    v, log_q = made(x, FixedNoise(start))
    log_det = log_det_by_autograd(lambda r: made(x, FixedNoise(r))[0] * 17, start)
    torch.testing.assert_close(log_q, -log_det)
    u = v * 17 - (x + 1) * 8
    assert (u > 0).all() and (u < 1).all() and not torch.allclose(u, start, atol=0.01)
    # q(u | x) on a grid of 12⁴ points u, by the layers' inverses
    made, x = dequantiser(size=0.1), images(2, (1, 2, 2), 17).double()
    cells = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    u = torch.cartesian_prod(*[cells] * 4).view(-1, 1, 2, 2)
    densities = []
    with torch.no_grad():
        for one in x:
            one = one.expand(len(u), -1, -1, -1)
            y, context = layers.squeeze(u.logit()), made.context(layers.squeeze(one)).relu()
            for step in reversed(made.steps):
                y = step.inverse(y, context)
            v, log_q = made(one, FixedNoise(layers.unsqueeze(y).sigmoid()))
            torch.testing.assert_close(v * 17 - (one + 1) * 8, u)
            densities.append(log_q.exp())
            assert densities[-1].mean().item() == pytest.approx(1, abs=0.03) and densities[-1].std() > 0.1
    assert (densities[0] - densities[1]).abs().max() > 0.01


@pytest.mark.parametrize("dequant", ["uniform", "variational"])
def test_the_bound_tightens_with_more_dequantisations(dequant):
    model, x = flow(levels=17, dequant=dequant, size=0.15), images(128, levels=17)
    bound = lambda k: model.log_prob(x, noise=BatchNoise(k, total=128), samples=k).mean().item()  # noqa: E731
    assert bound(1) < bound(4) < bound(16)


def test_variational_noise_starts_uniform_and_learns_what_that_cannot():
    """A flow that cannot change (one coupling, frozen) fits other noise only by the dequantiser."""
    nets = flow(size=0.0, dequant="variational"), flow(size=0.0)
    variational, plain = (net.log_prob(images(4), noise=noise(4)) for net in nets)
    torch.testing.assert_close(variational, plain, rtol=1e-5, atol=1e-3)
    model, x = flow((1, 4, 4), levels=4, dequant="variational", size=0.3), images(64, (1, 4, 4), 4)
    model.flow.requires_grad_(False)
    losses = fitted(model, lambda step: batch(x, seed=step), 40, 1e-2)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 1


def test_edit_moves_the_top_latent_between_classes_and_by_attributes():
    model, x = flow(conditional=True, levels=17), images(6, levels=17)
    model.classes.table.weight.data.mul_(3)
    each = [model.log_prob(x, torch.full((6,), k), noise=noise(6)) for k in range(10)]
    best = torch.stack(each).argmax(0)
    to = (best + 1) % 10
    edit = lambda **k: model.edit(x, noise=noise(6), **k).images  # noqa: E731
    back = model.reconstruct(x, noise=noise(6)).images
    assert torch.equal(edit(labels=best), back) and torch.equal(edit(labels=to, strength=0.0), back)
    assert not torch.equal(edit(labels=to), back)
    assert model.edit(images(3), noise=noise(3)).labels.tolist() == [0, 1, 2]
    refused("class-conditional", flow().edit, images(1), labels=torch.tensor([1]), noise=noise(1))
    # standardised latents are kept: what is edited is as probable, given its class, as it was
    (*eps, top), _ = model.encode(model.to_unit(x, noise(6))[0])
    (mean, log_std), (to_mean, to_log_std) = model.top_prior(best, 6), model.top_prior(to, 6)
    moved = to_mean + (top - mean) * (to_log_std - log_std).exp()
    assert torch.equal(model.images([*eps, moved], no_progress), edit(labels=to))
    model, x = flow(classes=tuple("abc"), multilabel=True, conditional=True, levels=17), images(2, levels=17)
    y = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    (*_, top), _ = model.encode(model.to_unit(x, noise(2))[0])
    row = model.classes.table.weight[0].view(2, *model.shapes[-1])
    for strength in (1.0, -1.0):
        seen = []
        decode = model.decode
        model.decode = lambda z, progress, seen=seen: (seen.append(z[-1]), decode(z, progress))[1]  # noqa: B023
        model.edit(x, labels=y, noise=noise(2), strength=strength)
        model.decode = decode
        base_mean, base_log_std = model.top
        standard = (top - base_mean) * (-base_log_std).exp()
        expected = base_mean + strength * row[0] + standard * (base_log_std + strength * row[1]).exp()
        torch.testing.assert_close(seen[0], expected)


def test_latents_are_modelled_as_they_are():
    model = flow((4, 8, 8), levels=None)
    z = torch.randn(2, 4, 8, 8)
    (got, *_), _ = model.encode(z)
    torch.testing.assert_close(model.reconstruct(z, noise=noise(2)).images, z, atol=1e-4, rtol=0)
    assert got.shape == (2, 16, 4, 4)
