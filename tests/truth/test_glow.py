"""Glow against autograd's Jacobian, enumeration, normflows and itself inverted."""

import math

import pytest
import torch
from flows import DIGITS, batch, images, log_det_by_autograd, noise, roughen

from gzcli.core.types import DataInfo
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.glow import Glow
from gzcli.models.normalizing_flow.layers import ActNorm, ActNormConv, initialising


class AffineNet(torch.nn.Module):
    """A net for couplings that is far from zero."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


def glow(shape=(1, 8, 8), levels=256, classes=DIGITS, multilabel=False, size=0.1, **options) -> Glow:
    torch.manual_seed(0)
    options = {"scales": 2, "depth": 2, "hidden": 8, **options}
    return roughen(Glow.of(DataInfo(shape, levels, classes, multilabel), **options), size)


LAYERS = {
    "actnorm": lambda: ActNorm(4),
    "conv1x1": lambda: layers.InvertibleConv1x1(4),
    "affine": lambda: layers.AffineCoupling(4, AffineNet(2, 4)),
    "affine-odd": lambda: layers.AffineCoupling(5, AffineNet(2, 6)),
    "additive": lambda: layers.AdditiveCoupling(4, AffineNet(2, 2)),
    "logit": lambda: layers.Logit(0.05),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_inverts_and_has_the_log_det_of_its_jacobian(name):
    torch.manual_seed(1)
    layer = roughen(LAYERS[name](), 0.5).double()
    x = torch.rand(2, 5 if name == "affine-odd" else 4, 4, 2, dtype=torch.float64)
    y, log_det = layer(x)
    torch.testing.assert_close(log_det.expand(2), log_det_by_autograd(lambda t: layer(t)[0], x))
    torch.testing.assert_close(layer.inverse(y), x)
    single = layer.float()
    torch.testing.assert_close(single.inverse(single(x.float())[0]), x.float(), atol=1e-4, rtol=0)


def test_squeeze_split_and_folded_actnorm():
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(layers.squeeze(x), torch.nn.functional.pixel_unshuffle(x, 2))
    torch.testing.assert_close(layers.unsqueeze(layers.squeeze(x)), x)
    split = roughen(layers.SplitPrior(4)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    x1, eps, log_det = split(x)
    expected = log_det_by_autograd(lambda t: torch.cat(split(t)[:2], 1), x)
    torch.testing.assert_close(log_det, expected)
    torch.testing.assert_close(split.inverse(x1, eps), x)
    norm, conv = roughen(ActNorm(4), 0.5), layers.InvertibleConv1x1(4)
    x = torch.randn(2, 4, 3, 3)
    folded, log_det = conv(x, norm)
    y, a = norm(x)
    y, b = conv(y)
    torch.testing.assert_close(folded, y)
    torch.testing.assert_close(log_det, a + b)
    hidden = roughen(ActNormConv(4, 6, 3))
    torch.testing.assert_close(hidden(x), hidden.norm(hidden.conv(x))[0])


def test_log_prob_reaches_the_image():
    model, x = glow(logit=0.01).double(), images(1).double()
    f, x = lambda t: model.log_prob(t, noise=noise(1)).sum(), x.clamp(-0.9, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(f, x, eps=1e-6, atol=1e-3, fast_mode=True)


def test_actnorm_starts_with_zero_mean_and_unit_variance_also_with_constant_pixels():
    model = glow(size=0.0, depth=3)
    x = images(32)
    x[:, :, :2] = -1  # borders without ink
    model.on_start(batch(x))
    seen = []
    hidden = [m for m in model.modules() if isinstance(m, ActNormConv)]
    convs = [m for m in model.modules() if isinstance(m, layers.InvertibleConv1x1)]
    for m in hidden:
        m.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    for m in convs:  # which get (x, the ActNorm before them)
        m.register_forward_hook(lambda m, args, y: seen.append(args[1](args[0])[0].detach()))
    model.encode(model.to_unit(x, batch(x).noise)[0])
    assert len(seen) == len(hidden) + len(convs) == 2 * 6 + 6
    for h in seen:
        torch.testing.assert_close(h.mean((0, 2, 3)), torch.zeros(h.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(h.var((0, 2, 3), correction=0), torch.ones(h.shape[1]), atol=1e-3, rtol=0)
    norm, x = ActNorm(2), torch.randn(16, 2, 4, 4)
    x[:, 1] = 3.0  # a constant channel keeps its scale
    with initialising(norm) as fresh:
        y = norm(x)[0].detach()
    assert fresh and y[:, 1].abs().max() == 0 and norm.log_scale[1] == 0
    assert y[:, 0].std() == pytest.approx(1, abs=0.01)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = Glow.of(model.data, scales=2, depth=3, hidden=8)
    twin.load_state_dict(before)
    for m in (model, twin):  # it happens once, and survives saving
        m.on_start(batch(images(16, seed=1)))
        for key, value in m.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_the_1x1_convolution_is_in_full_fp32():
    conv, x = layers.InvertibleConv1x1(16), torch.randn(4, 16, 8, 8)
    expected = torch.einsum("ij,bjhw->bihw", conv.weight().double(), x.double()).float()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = conv(x)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(conv.inverse(y), x, atol=1e-5, rtol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sizes_are_the_papers():
    """44 M parameters; scales go down to an odd side, or to 4: 3 scales of 32 pixels (section 6.1)."""
    with torch.device("meta"):
        model = Glow.of(DataInfo((3, 32, 32)), scales=3, depth=32, hidden=512)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(44.0, rel=0.02)
    tops = {(28, 28): (7, 7), (32, 32): (4, 4), (32, 48): (4, 6), (30, 44): (15, 22), (64, 64): (4, 4)}
    for sides, top in tops.items():
        assert Glow.of(DataInfo((3, *sides)), depth=1, hidden=8).shapes[-1][1:] == top


def test_one_step_agrees_with_normflows():
    """Its coupling is y₂ = x₂ · exp(s) + t on interleaved (t, s), its 1×1 convolution W."""
    flows = pytest.importorskip("normflows").flows
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 4)
    block = flows.GlowBlock(6, 16, scale_map="exp", init_zeros=False)
    coupling, conv, norm = block.flows
    norm.data_dep_init_done.fill_(1.0)
    torch.nn.init.normal_(norm.s, std=0.3)
    torch.nn.init.normal_(norm.t)
    mine = layers.InvertibleConv1x1(6)
    act = ActNorm(6)
    net = coupling.flows[1].param_map

    class Same(torch.nn.Module):
        """normflows' net with its shift moved inside the scale; s = 20 tanh(raw)."""

        def forward(self, x1):
            t, s = net(x1)[:, 0::2], net(x1)[:, 1::2]
            return torch.cat([t * (-s).exp(), torch.atanh(s / 20)], 1)

    theirs = layers.AffineCoupling(6, Same())
    with torch.no_grad():
        mine.permutation.copy_(conv.P.argmax(1))
        mine.sign.copy_(conv.sign_S)
        for p, q in ((mine.lower, conv.L.tril(-1)), (mine.upper, conv.U.triu(1)), (mine.log_s, conv.log_S)):
            p.copy_(q)
        # normflows goes from latent to data: `forward` of its coupling is ours, of the rest `inverse` is ours
        act.log_scale.copy_(-norm.s.flatten())
        act.bias.copy_(-norm.t.flatten())
        theirs.log_range.fill_(math.log(20.0))
        y, log_det = theirs(x)
        z, expected = coupling.forward(x)
        torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_det, expected, atol=1e-4, rtol=1e-5)
        for layer, peer in ((mine, conv), (act, norm)):
            (y, log_det), (z, expected) = layer(x), peer.inverse(x)
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(log_det, torch.as_tensor(expected), atol=1e-4, rtol=1e-5)
