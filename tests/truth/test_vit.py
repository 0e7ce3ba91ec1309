"""The networks of `fd_dinov2` and `fd_clip` on small random weights: those of transformers, an implementation
of its own, by the names that the publishers gave them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from gzcli.core.errors import MissingError, UsageError
from gzcli.metrics import vit
from gzcli.store.hub import CLIP, DINOV2
from gzcli.store.paths import cache_dir

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 20), np.uint8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    cache_dir("weights").mkdir(parents=True, exist_ok=True)


def seeded(build):
    """A network of transformers with weights that no start has, so that none of them could be left out."""
    torch.manual_seed(0)
    net = build().eval()
    for p in net.parameters():
        p.data = 0.2 * torch.randn_like(p)
    return net


def dino(side: int):
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=side,
    )
    net = seeded(lambda: Dinov2Model(config))
    state, found = net.state_dict(), {}
    at = "embeddings."
    found["cls_token"], found["mask_token"] = state[f"{at}cls_token"], state[f"{at}mask_token"]
    found["pos_embed"] = state[f"{at}position_embeddings"]
    pairs = {f"{at}patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
    for i in range(2):
        here, there = f"encoder.layer.{i}.", f"blocks.{i}."
        pairs |= {here + name: there + name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        found |= {f"{there}ls{k}.gamma": state[f"{here}layer_scale{k}.lambda1"] for k in (1, 2)}
        for kind in ("weight", "bias"):
            q, k, v, o = (state[f"{here}attention.{word}_proj.{kind}"] for word in "qkvo")
            found |= {f"{there}attn.qkv.{kind}": torch.cat([q, k, v]), f"{there}attn.proj.{kind}": o}
    found |= {f"{b}.{kind}": state[f"{a}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}
    return net, found


def by_hand(images, mean, std):
    """Pictures as torchvision and Pillow prepare them, one by one."""
    big = [np.array(Image.fromarray(x.transpose(1, 2, 0)).resize((224, 224), Image.BICUBIC)) for x in images]
    x = torch.from_numpy(np.stack(big)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_dinov2_is_that_of_transformers():
    net, state = dino(224)
    torch.save(state, cache_dir("weights", DINOV2))
    space = vit.dinov2()
    with torch.no_grad():
        want = net(by_hand(IMAGES, space.mean, space.std)).pooler_output.numpy()
    np.testing.assert_allclose(space.features(IMAGES), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    grey = space.features(IMAGES[:, :1])
    np.testing.assert_array_equal(grey, space.features(IMAGES[:, :1].repeat(3, 1)))
    assert len(space.hash) == 64 and space.features(IMAGES).dtype == np.float64


def test_a_larger_table_of_positions_is_resized_as_its_authors_do():
    """By Keys' cubic kernel of -3/4, at places that a tenth of a patch moves."""
    _, state = dino(518)
    table = state["pos_embed"][0, 1:].unflatten(0, (37, 37)).double().numpy()
    found = vit.of_dinov2(state)["positions"]
    assert found.shape == (257, 128) and torch.equal(found[0], state["pos_embed"][0, 0])

    def weights(at: float) -> np.ndarray:
        d = np.abs(np.arange(-2, 40) - at)  # two places beyond each rim, which repeat it
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        w = np.where(d <= 1, near, np.where(d < 2, far, 0))
        return np.array([w[:3].sum(), *w[3:38], w[38:].sum()])

    kernel = np.stack([weights((i + 0.5) * 37 / 16.1 - 0.5) for i in range(16)])
    want = np.einsum("iy,jx,yxd->ijd", kernel, kernel, table).reshape(256, 128)
    np.testing.assert_allclose(found[1:].numpy(), want, atol=1e-5)


def test_clip_is_that_of_transformers():
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=32,
        projection_dim=48,
    )
    net = seeded(lambda: CLIPVisionModelWithProjection(config))
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    torch.save({**net.state_dict(), **text}, cache_dir("weights", CLIP))
    space = vit.clip()
    with torch.no_grad():
        want = net(by_hand(IMAGES, space.mean, space.std)).image_embeds.numpy()
    np.testing.assert_allclose(space.features(IMAGES), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    wide = np.concatenate([np.zeros_like(IMAGES), IMAGES, np.zeros_like(IMAGES)], 3)
    np.testing.assert_allclose(space.features(wide)[0], space.features(IMAGES)[0], rtol=0.2, atol=0.05)


def test_files_that_are_none_are_refused():
    with pytest.raises(MissingError, match="dinov2_vitl14_pretrain") as absent:
        vit.dinov2()
    assert str(cache_dir("weights", DINOV2)) in absent.value.hint and "--weights" not in absent.value.hint
    torch.save({"cls_token": torch.zeros(1)}, cache_dir("weights", DINOV2))
    with pytest.raises(UsageError, match="does not hold the weights of dinov2"):
        vit.dinov2()
    cache_dir("weights", CLIP).write_bytes(b"no pickle")
    with pytest.raises(UsageError, match="does not hold the weights of `openai"):
        vit.clip()
    with pytest.raises(UsageError, match="not of 2"):
        vit.prepared(np.zeros((1, 2, 8, 8), np.uint8), cut=False)
