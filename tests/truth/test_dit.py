"""The transformer of DiT: diffusers' `DiTTransformer2DModel` weight for weight, sizes, and patches."""

import re

import pytest
import torch
from draws import awake, flat, noise
from refused import refused

from gzcli.core.types import DataInfo
from gzcli.core.units import sides
from gzcli.models import catalog
from gzcli.models.nn.dit import DIFFUSERS_NAMES, DiTNet, DiTOptions, ModernBlock, default_patch, rotations
from gzcli.models.nn.unet import renamed

SMALL = {"width": 32, "layers": 2, "heads": 4, "patch": 2}
SIZES = [(384, 12, 6, 33e6), (768, 12, 12, 130e6), (1024, 24, 16, 458e6), (1152, 28, 16, 675e6)]


def from_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of diffusers, whose blocks each hold a copy of the embeddings, by the names of `DiTNet`."""
    ours = {}
    for key, value in state.items():
        if ".attn1.to_q." in key:
            name = key.replace("transformer_blocks", "blocks").replace("attn1.to_q", "qkv")
            ours[name] = torch.cat([value, *(state[key.replace("to_q", part)] for part in ("to_k", "to_v"))])
        elif not re.search(r"\.attn1\.to_[kv]\.", key) and ".emb." not in (
            name := renamed(key, DIFFUSERS_NAMES)
        ):
            ours[name] = value
    return ours


@pytest.mark.parametrize(("patch", "heads", "layers"), [(2, 4, 2), (4, 2, 1), (1, 8, 1)])
def test_agrees_with_diffusers(patch, heads, layers):
    diffusers = pytest.importorskip("diffusers")
    theirs = {"num_attention_heads": heads, "attention_head_dim": 32 // heads, "num_layers": layers}
    theirs |= {"in_channels": 3, "out_channels": 3, "sample_size": 8, "patch_size": patch}
    peer = diffusers.DiTTransformer2DModel(num_embeds_ada_norm=5, norm_eps=1e-6, **theirs).eval()
    awake(peer)
    state = peer.state_dict()
    for key in state:  # it has a copy of the embeddings in each block, which its checkpoints hold alike
        _, emb, tail = key.partition(".norm1.emb.")
        state[key] = state[f"transformer_blocks.0{emb}{tail}"] if emb else state[key]
    peer.load_state_dict(state)
    sizes = DiTOptions(width=32, layers=layers, heads=heads, patch=patch)
    ours = DiTNet((3, 8, 8), sizes, classes=5, freq_shift=1.0).eval()
    ours.load_state_dict(from_diffusers(state))  # strict: every parameter has a counterpart of its shape
    t = torch.tensor([0.0, 0.5, 3.0, 17.0])  # the angles of late times differ in their last bits
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 4, 5])
    with torch.no_grad():
        want, got = peer(x, t, y).sample, ours(x, t, y)
        dropped = ours(x, t, torch.zeros(4, dtype=torch.long), torch.tensor([False, False, False, True]))
        without = ours(x, t)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dropped[3], got[3])  # `drop` and no label are the null row
    torch.testing.assert_close(without[3], got[3])


def test_sizes_are_the_papers():
    """Table 1 and section 5, with patches of 2 of latents 4×32×32 and a thousand classes."""
    for width, layers, heads, params in SIZES:
        with torch.device("meta"):
            net = DiTNet((4, 32, 32), DiTOptions(width, layers, heads, patch=2), classes=1000)
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(params, rel=0.02)


@pytest.mark.parametrize("conditional", [True, False])
def test_an_exported_model_makes_the_same_pictures(conditional, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    info = DataInfo((1, 8, 8), classes=("cat", "dog", "owl"))
    model = catalog.load("dit").of(info, **SMALL, timesteps=50, conditional=conditional).eval()
    awake(model, std=0.1)
    model.to_diffusers().save_pretrained(tmp_path)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path, vae=None)
    labels = torch.tensor([0, 2, 1, 2])
    options = {"sampler": "dpmpp", "steps": 10, "spacing": "trailing"}
    options["labels"] = labels if conditional else None
    mine = flat(model.sample)(4, noise=noise(4), **options)
    x = noise(4).randn(4, 1, 8, 8)
    pipeline.scheduler.set_timesteps(10)
    y = labels if conditional else torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            out = pipeline.transformer(x, t.expand(4), y).sample
            x = pipeline.scheduler.step(out, t, x).prev_sample
    assert mine.std() > 0.1
    torch.testing.assert_close(x.clamp(-1, 1), mine, atol=1e-4, rtol=0)


def test_a_modern_block_sees_the_distance_of_patches_and_the_direction_of_features():
    """Rotary positions against complex numbers; norms against their definition; as many weights as DiT's."""
    torch.manual_seed(0)
    block, angles = ModernBlock(16, 2, (3, 5)).eval(), rotations((3, 5), 8)
    x = torch.randn(2, 2, 15, 8)
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(block.rotate(x), torch.cat([turned.real, turned.imag], -1))
    q, k = (block.rotate(torch.randn(8).expand(1, 1, 15, 8)) for _ in range(2))
    scores, place = (q @ k.mT)[0, 0], torch.cartesian_prod(torch.arange(3), torch.arange(5))
    steps = place[:, None] - place
    for step in steps.flatten(0, 1).unique(dim=0):
        alike = scores[(steps == step).all(-1)]
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), atol=1e-5, rtol=0)
    assert scores.std() > 0.1
    unit = block.q_norm(x) / block.q_norm(3 * x)
    torch.testing.assert_close(unit, torch.ones_like(unit), atol=1e-3, rtol=0)
    sizes = [
        sum(p.numel() for p in DiTNet((1, 8, 8), DiTOptions(patch=2, block=kind)).parameters())
        for kind in ("plain", "modern")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    refused("a multiple of 4, not 6", DiTNet, (1, 8, 8), DiTOptions(24, 1, 4, 2, block="modern"))


PATCHES = [(28, 28, 256, 2), (28, 28, 64, 4), (32, 32, 256, 2), (64, 64, 256, 4), (128, 128, 256, 8)]
PATCHES += [(32, 48, 256, 2), (32, 48, 64, 4), (30, 45, 256, 3), (29, 31, 256, 1)]


def test_the_patch_follows_from_the_sides_and_what_fits_is_told():
    for h, w, tokens, patch in PATCHES:
        assert default_patch(h, w, tokens) == patch
        net = DiTNet((1, h, w), DiTOptions(width=8, layers=0, heads=1, tokens=tokens))
        assert net.patch == patch and net.grid == (h // patch, w // patch)
        assert net(torch.zeros(2, 1, h, w), torch.zeros(2)).shape == (2, 1, h, w)
    for h, w, near in ((127, 127, "120"), (61, 90, "88x56"), (1024, 512, "176x360")):
        refused(f"images of {w}×{h} make", default_patch, h, w, 256, hint=f"data.size={near}`,")
        assert default_patch(*sides(near), 256)
