"""TarFlow: causality by gradients, its cached inverse against whole passes, Tweedie on a Gaussian."""

import math

import pytest
import torch
from draws import batch, images, noise
from flows import DIGITS, roughen
from refused import refused

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.nn.transformer import TransformerOptions
from gzcli.models.normalizing_flow.tarflow import Coupling, PatchFlow, TarFlow

TINY = {"depth": 2, "patch": 2, "width": 16, "layers": 2, "heads": 2}


def tarflow(shape=(1, 8, 8), levels=256, classes=DIGITS, multilabel=False, size=0.1, **options) -> TarFlow:
    torch.manual_seed(0)
    return roughen(TarFlow.of(DataInfo(shape, levels, classes, multilabel), **TINY | options), size)


def patch_flow(*, flip: bool) -> PatchFlow:
    torch.manual_seed(0)
    options = TransformerOptions(width=16, layers=2, heads=2)
    return roughen(PatchFlow((2, 3), 4, options, int(flip)), 0.3).double()


@pytest.mark.parametrize("flip", [False, True])
def test_a_patch_depends_on_those_before_it_through_scale_and_shift_alone(flip):
    flow, c = patch_flow(flip=flip), torch.randn(1, 1, 16, dtype=torch.float64)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    jac = torch.autograd.functional.jacobian(lambda t: flow(t, c)[0], x)[0, :, :, 0]  # [T, D, T, D]
    jac = jac.flip(0, 2) if flip else jac
    before = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    blocks = jac.permute(0, 2, 1, 3)  # [T, T, D, D]
    assert (blocks[before].abs().amax((1, 2)) > 1e-6).all()
    assert (blocks[before.T] == 0).all()
    jacobians = blocks.diagonal().permute(2, 0, 1)  # [T, D, D]
    assert torch.equal(jacobians, torch.diag_embed(jacobians.diagonal(dim1=1, dim2=2)))
    assert torch.equal(jacobians[0], torch.eye(4, dtype=torch.float64)), "the first patch is as it was"


def recomputed(flow: PatchFlow, z: torch.Tensor, c: torch.Tensor, null: torch.Tensor, guidance: float):
    """The inverse by a pass over all patches for each, without a cache."""
    z = flow.ordered(z)
    x = z.clone()
    for i in range(1, z.shape[1]):
        outs = [
            flow.out(flow.trunk(flow.embed(x[:, :-1]) + flow.position()[1:] + e, causal=True))[:, i - 1]
            for e in (c, null)
        ]
        mu, alpha = (outs[1] + guidance * (outs[0] - outs[1])).chunk(2, -1)
        x[:, i] = z[:, i] * alpha.exp() + mu
    return flow.ordered(x)


@pytest.mark.parametrize("flip", [False, True])
def test_the_cached_inverse_is_that_of_whole_passes_also_with_guidance(flip):
    flow, (c, null) = patch_flow(flip=flip), torch.randn(2, 3, 1, 16, dtype=torch.float64)
    z = torch.randn(3, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        x = flow.inverse(z, c)
        torch.testing.assert_close(x, recomputed(flow, z, c, null, 1.0), atol=1e-12, rtol=0)
        torch.testing.assert_close(flow(x, c)[0], z, atol=1e-12, rtol=0)
        guided = flow.inverse(z, torch.cat([c, null]), 2.5)
        torch.testing.assert_close(guided, recomputed(flow, z, c, null, 2.5), atol=1e-10, rtol=0)
        assert (guided - x).abs().max() > 0.1


@pytest.mark.parametrize(("index", "dim"), [(0, 4), (1, 3), (4, 4), (1, 1)])
def test_a_coupling_moves_what_it_does_not_see_by_what_it_sees(index, dim):
    torch.manual_seed(0)
    coupling = Coupling((2, 3), dim, TransformerOptions(width=16, layers=1, heads=2), index)
    coupling = roughen(coupling, 0.3).double()
    x, (c, null) = torch.randn(2, 6, dim, dtype=torch.float64), torch.randn(2, 2, 1, 16, dtype=torch.float64)
    jac = (
        torch.autograd.functional.jacobian(lambda t: coupling(t, c)[0], x)[0, :, :, 0]
        .flatten(2)
        .flatten(0, 1)
    )
    seen = coupling.sees.flatten() == 1
    assert 2 * seen.sum() == 6 * dim or dim == 3
    assert torch.equal(jac[seen], torch.eye(6 * dim, dtype=torch.float64)[seen])
    block = jac[~seen][:, ~seen]
    assert torch.equal(block, block.diagonal().diag()) and (jac[~seen][:, seen] != 0).all()
    torch.testing.assert_close(block.diagonal().log().sum(), coupling(x, c)[1][0])
    with torch.no_grad():
        torch.testing.assert_close(coupling.inverse(coupling(x, c)[0], c), x)
        guided = coupling.inverse(x, torch.cat([c, null]), 2.0)
        h = coupling.embed(coupling.sees * x) + coupling.position()
        outs = [(1 - coupling.sees.repeat(1, 2)) * coupling.out(coupling.trunk(h + e)) for e in (c, null)]
        shift, s = (2 * outs[0] - outs[1]).chunk(2, -1)
        torch.testing.assert_close(guided, x / (2 * s.sigmoid()) - shift)


def test_a_new_model_of_noise_is_a_gaussian_and_denoises_as_one():
    """v ~ N(m + ½, s²) for a flow that starts as the identity: E[v₀ | v] = v + σ² (m + ½ − v) / s²."""
    model, m, s = tarflow(size=0.0, noise_std=0.2).double(), 0.1, 0.5
    with torch.no_grad():
        model.top[0], model.top[1] = m, math.log(s)
    v = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        denoised = model.denoised(v, model.embedding(None, 3))
    torch.testing.assert_close(denoised, v + 0.1**2 * (m + 0.5 - v) / s**2)
    x = images(200, (1, 8, 8)).mul(127.5).round().div(127.5)
    middle = ((x + 1) * 127.5 + 0.5) / 256
    expected = 64 * (math.log(s) + 0.5 * math.log(2 * math.pi) + 0.5 * 0.1**2 / s**2)
    expected += 0.5 * ((middle - m - 0.5) / s).square().sum((1, 2, 3)).mean()
    assert model.loss(batch(x))["loss"].item() == pytest.approx(expected.item(), rel=2e-3)
    for options in ({"logit": 0.1}, {"dequant": "variational"}):
        assert "model.noise_std" in refused("replaces dequantisation", tarflow, noise_std=0.1, **options).hint


def test_labels_are_hidden_in_a_share_of_training_and_edit_leaves_an_image_of_its_own_class():
    x, y = images(4, (1, 8, 8)), torch.arange(4)
    for share, same in ((1.0, True), (0.0, False)):
        model = tarflow(conditional=True, label_dropout=share)
        losses = [model.loss(batch(x, y=labels))["loss"] for labels in (y, y + 1)]
        assert (losses[0] == losses[1]) == same
    error = refused("without label dropout", model.interpolate, x, noise=noise(4))
    assert "`--label`" in error.hint and "model.label_dropout" in error.hint
    model = tarflow(conditional=True)
    with torch.no_grad():
        each = torch.stack([model.log_prob(x, torch.full((4,), k), noise=noise(4)) for k in range(10)])
    best = each.argmax(0)
    edited = model.edit(x, labels=best, noise=noise(4), progress=no_progress).images
    moved = model.edit(x, labels=(best + 1) % 10, noise=noise(4), progress=no_progress).images
    assert (edited - x).abs().max() < 1.01 / 127.5 < (moved - x).abs().max()
    assert "conditional" in refused("can edit", tarflow().edit, x, noise=noise(4)).hint
