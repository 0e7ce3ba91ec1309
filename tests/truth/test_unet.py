"""The shared U-Net: diffusers' `UNet2DModel` parameter for parameter; what networks have in common."""

import pytest
import torch
from draws import awake
from refused import refused
from torch.nn import functional as F

from gzcli.core.types import DataInfo
from gzcli.models.nn.dit import DiTNet, DiTOptions
from gzcli.models.nn.unet import DIFFUSERS_NAMES, Levels, UNet, UNetOptions, attended, renamed, widths_of
from gzcli.models.nn.zigzag import ZigzagNet

A, D = True, False
CASES = {
    "plain": (Levels((8, 16), (D, D), layers=1), {}),
    "attention": (Levels((8, 16, 16), (D, A, A), layers=2), {}),
    "heads": (Levels((16, 16), (A, D), layers=1, head_dim=4), {}),
    "classes": (Levels((8, 16), (D, A), layers=1), {"classes": 10}),
    "scale_shift": (Levels((8, 16), (A, D), layers=1), {"scale_shift": True, "classes": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_diffusers(case):
    levels, kw = CASES[case]
    pytest.importorskip("diffusers")
    ours = awake(UNet(3, 2, levels, groups=4, **kw).eval())
    peer = ours.to_diffusers((12, 12), 2)
    names = {renamed(key, DIFFUSERS_NAMES) for key in peer.state_dict()}
    assert names == set(ours.state_dict()), "every parameter has its counterpart"
    x, t = torch.randn(3, 3, 12, 12), torch.tensor([0, 17, 999])
    y = torch.tensor([0, 2, kw["classes"]]) if "classes" in kw else None
    with torch.no_grad():
        want = peer(x, t, class_labels=y).sample
        got = ours(x, t, y)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if y is not None:  # `drop` and no label are the null row
        dropped = ours(x, t, torch.zeros(3, dtype=torch.long), torch.tensor([False, False, True]))
        torch.testing.assert_close(dropped[2], got[2])
        torch.testing.assert_close(ours(x, t)[2], got[2])


def test_any_size_has_levels_and_attention():
    net = UNet(1, 1, Levels((8, 8, 8, 8), (D, D, A, A), layers=1))
    for size in ((28, 28), (27, 28), (13, 9)):
        assert net(torch.randn(2, 1, *size), torch.zeros(2)).shape == (2, 1, *size)
    for size, (sides, attend) in SIDES.items():
        mult = widths_of((3, *size), UNetOptions())
        assert mult == (1, 2, 2, 2, 4, 4)[: len(sides)]
        assert attended((3, *size), len(mult), UNetOptions()) == tuple(side in attend for side in sides)
        with torch.device("meta"):
            net = UNet.of(DataInfo((3, *size)), UNetOptions(channels=8, mult=mult))
            assert net(torch.zeros(1, 3, *size), torch.zeros(1)).shape == (1, 3, *size)
    options = UNetOptions(mult=(1, 3), attention=(32,), patch=2)
    assert widths_of((1, 64, 64), options) == (1, 3)
    assert attended((1, 64, 64), 2, options) == (True, False), "sides are those after the patches"
    assert attended((1, 28, 28), 3, UNetOptions(attention=())) == (False, False, False)
    refused("12 channels cannot be divided into 8 norm groups", UNet, 1, 1, Levels((8, 12), (D, D)))
    refused("heads of 3 channels", UNet, 1, 1, Levels((8, 16), (D, A), head_dim=3))


def net_of(kind: str, side: int, classes: int = 0) -> torch.nn.Module:
    shape = (1, side, side)
    if kind == "unet":
        return UNet(1, 1, Levels((8, 16), (D, A), layers=1), classes=classes)
    if kind == "dit":
        return DiTNet(shape, DiTOptions(32, 2, 4, min(4, side // 4)), classes=classes)
    return ZigzagNet(shape, DiTOptions(16, 8, patch=2, state=4), classes=classes)


@pytest.mark.parametrize("kind", ["unet", "dit", "zigma"])
def test_starts_at_zero_and_every_parameter_gets_a_gradient(kind):
    net = net_of(kind, 8, classes=4)
    x, t, y = torch.randn(6, 1, 8, 8), torch.arange(6), torch.arange(6) % 4
    assert not net(x, t, y).any()
    # off the zero start, where branches have no gradient yet
    awake(net)(x, t, y, torch.arange(6) == 5).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad.isfinite().all(), key
        assert p.grad.any() or key.endswith(".k.bias"), key  # softmax does not see a shift of the keys


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_half_precision_and_memory_format(kind):
    net, x, t = awake(net_of(kind, 28), 0.1).eval(), torch.randn(2, 1, 28, 28), torch.tensor([3, 400])
    with torch.no_grad():
        want = net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, t).float()
    with torch.autocast("cpu", torch.bfloat16):
        trained = net(x, t).float()  # with a gradient: another attention
    assert (half - want).norm() / want.norm() < 0.05 and (trained - want).norm() / want.norm() < 0.05
    torch.testing.assert_close(trained, half, atol=0.02 * float(want.abs().max()), rtol=0)
    got = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


SIDES = {  # size → sides of the levels, and those that have self-attention
    (28, 28): ([28, 14, 7], [14, 7]),
    (32, 32): ([32, 16, 8], [16, 8]),
    (32, 48): ([32, 16, 8], [16, 8]),  # the shorter side
    (64, 64): ([64, 32, 16, 8], [16, 8]),
    (128, 128): ([128, 64, 32, 16, 8], [16, 8]),
    (256, 256): ([256, 128, 64, 32, 16, 8], [16, 8]),
    (8, 8): ([8], [8]),
    (26, 26): ([26, 13, 7], [13, 7]),
    (27, 40): ([27, 14, 7], [14, 7]),
    (45, 45): ([45, 23, 12], [12]),
    (23, 23): ([23, 12], [12]),
}


def test_patches_are_positions():
    """A network of patches is the plain one on the pixels of each patch as channels."""
    net = awake(UNet(3, 2, Levels((8, 16), (D, A), layers=1), patch=2))
    plain = UNet(12, 8, Levels((8, 16), (D, A), layers=1))
    plain.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 12, 8), torch.tensor([3.0, 700.0])
    cells = x.unflatten(3, (4, 2)).unflatten(2, (6, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    out = plain(cells, t).unflatten(1, (2, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(net(x, t), out, atol=1e-5, rtol=1e-5)
    refused("diffusers has no U-Net with patches", net.to_diffusers, (12, 8), 1)
    x = torch.randn(2, 3, 11, 7)  # continued by zeros to 12×8
    torch.testing.assert_close(net(x, t), net(F.pad(x, (0, 1, 0, 1)), t)[..., :11, :7])
    assert UNet.of(DataInfo((3, 33, 47)), UNetOptions(patch=4)).config["block_out_channels"] == (32,)
    refused("cannot be 0", UNet.of, DataInfo((3, 8, 8)), UNetOptions(patch=0))
