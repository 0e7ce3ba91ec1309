"""The networks of published weights against a vision transformer that is written out here, on small random
weights by their publishers' names; EfficientNet-Lite0 with its own weights, strictly read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from refused import refused
from sklearn.datasets import load_sample_image

from gzcli.core.errors import MissingError, UsageError, install_line
from gzcli.metrics import networks, pretrained
from gzcli.metrics.pretrained import LITE_SIDE, Lite0, lite, lite_weights, prepared
from gzcli.store.hub import CLIP, DINOV2
from gzcli.store.paths import cache_dir

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 20), np.uint8)
WIDTH, DEPTH = 128, 2


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    cache_dir("weights").mkdir(parents=True, exist_ok=True)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def dino(side: int) -> dict[str, torch.Tensor]:
    w = WIDTH
    shapes = {"cls_token": (1, 1, w), "mask_token": (1, w), "pos_embed": (1, 1 + (side // 14) ** 2, w)}
    shapes |= layer("patch_embed.proj", w, 3, 14, 14) | layer("norm", w)
    for b in (f"blocks.{i}" for i in range(DEPTH)):
        shapes |= layer(f"{b}.norm1", w) | layer(f"{b}.norm2", w) | layer(f"{b}.attn.qkv", 3 * w, w)
        shapes |= layer(f"{b}.attn.proj", w, w) | {f"{b}.ls1.gamma": (w,), f"{b}.ls2.gamma": (w,)}
        shapes |= layer(f"{b}.mlp.fc1", 2 * w, w) | layer(f"{b}.mlp.fc2", w, 2 * w)
    return random_state(shapes)


def openai() -> dict[str, torch.Tensor]:
    w, at = WIDTH, "vision_model."
    shapes = {f"{at}embeddings.class_embedding": (w,), f"{at}embeddings.position_embedding.weight": (50, w)}
    shapes |= {f"{at}embeddings.patch_embedding.weight": (w, 3, 32, 32), "visual_projection.weight": (48, w)}
    shapes |= layer(f"{at}pre_layrnorm", w) | layer(f"{at}post_layernorm", w)
    for b in (f"{at}encoder.layers.{i}" for i in range(DEPTH)):
        shapes |= layer(f"{b}.layer_norm1", w) | layer(f"{b}.layer_norm2", w)
        for part in ("q", "k", "v", "out"):
            shapes |= layer(f"{b}.self_attn.{part}_proj", w, w)
        shapes |= layer(f"{b}.mlp.fc1", 192, w) | layer(f"{b}.mlp.fc2", w, 192)
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    return random_state(shapes) | text


def attention(x, qkv):
    """Heads of 64, written out: [B, T, D] of queries, keys and values."""
    q, k, v = (part.unflatten(2, (-1, 64)).transpose(1, 2) for part in qkv)
    return ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)


def of_state(state, at: str, eps: float):
    """norm(name, x) and linear(name, x) with the weights of these names."""
    norm = lambda name, x: F.layer_norm(  # noqa: E731
        x, (WIDTH,), state[f"{at}{name}.weight"], state[f"{at}{name}.bias"], eps
    )
    return norm, lambda name, x: F.linear(x, state[f"{at}{name}.weight"], state[f"{at}{name}.bias"])


def dino_by_hand(state, x):
    norm, linear = of_state(state, "", 1e-6)
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], 1) + state["pos_embed"]
    for b in (f"blocks.{i}" for i in range(DEPTH)):
        qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).chunk(3, 2)
        x = x + state[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", attention(x, qkv))
        y = linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
        x = x + state[f"{b}.ls2.gamma"] * y
    return norm("norm", x)[:, 0]


def clip_by_hand(state, x):
    at = "vision_model."
    norm, linear = of_state(state, at, 1e-5)
    x = F.conv2d(x, state[f"{at}embeddings.patch_embedding.weight"], stride=32).flatten(2).mT
    first = state[f"{at}embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state[f"{at}embeddings.position_embedding.weight"]
    x = norm("pre_layrnorm", x)
    for b in (f"encoder.layers.{i}" for i in range(DEPTH)):
        y = norm(f"{b}.layer_norm1", x)
        qkv = [linear(f"{b}.self_attn.{p}_proj", y) for p in "qkv"]
        x = x + linear(f"{b}.self_attn.out_proj", attention(y, qkv))
        y = linear(f"{b}.mlp.fc1", norm(f"{b}.layer_norm2", x))
        x = x + linear(f"{b}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return norm("post_layernorm", x[:, 0]) @ state["visual_projection.weight"].T


def by_hand(images, file):
    """Pictures as torchvision and Pillow prepare them, one by one."""
    big = [np.array(Image.fromarray(x.transpose(1, 2, 0)).resize((224, 224), Image.BICUBIC)) for x in images]
    x = torch.from_numpy(np.stack(big)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(colours)[:, None, None] for colours in pretrained.COLOUR_STATISTICS[file])
    return (x - mean) / std


@pytest.mark.parametrize(
    ("file", "state", "opened", "reference"),
    [(DINOV2, dino(224), pretrained.dinov2, dino_by_hand), (CLIP, openai(), pretrained.clip, clip_by_hand)],
    ids=["dinov2", "clip"],
)
def test_the_network_is_that_of_its_publisher(file, state, opened, reference):
    torch.save(state, cache_dir("weights", file))
    space = opened()
    want = reference(state, by_hand(IMAGES, file)).numpy()
    features = space.features(IMAGES)
    np.testing.assert_allclose(features, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    grey = space.features(IMAGES[:, :1])
    np.testing.assert_array_equal(grey, space.features(IMAGES[:, :1].repeat(3, 1)))
    assert len(space.hash) == 64 and features.dtype == np.float64
    if file == CLIP:  # which cuts to a square
        wide = np.concatenate([np.zeros_like(IMAGES), IMAGES, np.zeros_like(IMAGES)], 3)
        np.testing.assert_allclose(space.features(wide)[0], features[0], rtol=0.2, atol=0.05)


def test_a_larger_table_of_positions_is_resized_as_its_authors_do():
    """By Keys' cubic kernel of -3/4, at places that a tenth of a patch moves."""
    state = dino(518)
    table = state["pos_embed"][0, 1:].unflatten(0, (37, 37)).double().numpy()
    positions = pretrained.dinov2_of(state).embeddings.position_embeddings[0]
    assert positions.shape == (257, WIDTH) and torch.equal(positions[0], state["pos_embed"][0, 0])

    def weights(at: float) -> np.ndarray:
        d = np.abs(np.arange(-2, 40) - at)  # two places beyond each rim, which repeat it
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        w = np.where(d <= 1, near, np.where(d < 2, far, 0))
        return np.array([w[:3].sum(), *w[3:38], w[38:].sum()])

    kernel = np.stack([weights((i + 0.5) * 37 / 16.1 - 0.5) for i in range(16)])
    want = np.einsum("iy,jx,yxd->ijd", kernel, kernel, table).reshape(256, WIDTH)
    np.testing.assert_allclose(positions[1:].detach().numpy(), want, atol=1e-5)


def test_weights_that_are_absent_or_damaged(monkeypatch, tmp_path):
    absent = refused("dinov2_vitl14_pretrain", pretrained.dinov2, error=MissingError)
    assert str(cache_dir("weights", DINOV2)) in absent.hint and "--weights" not in absent.hint
    torch.save({"cls_token": torch.zeros(1)}, cache_dir("weights", DINOV2))
    refused("does not contain the weights of dinov2", pretrained.dinov2)
    cache_dir("weights", CLIP).write_bytes(b"no pickle")
    refused("does not contain the weights of `openai", pretrained.clip)
    refused("not 2", pretrained.enlarged, np.zeros((1, 2, 8, 8), np.uint8), cut=False)
    for module in (networks, pretrained):
        monkeypatch.setattr(module, "LITE_PACKAGE", "no_such_package_of_weights")
    assert not networks.is_installed()
    error = refused("", lite, error=MissingError)
    assert error.hint == install_line("gzcli[features]")
    package = tmp_path / "damaged_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / pretrained.LITE_WEIGHTS).write_bytes(b"nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "LITE_PACKAGE", "damaged_weights")
    refused("does not contain the weights", lite)


# EfficientNet-Lite0

needs_weights = pytest.mark.skipif(not networks.is_installed(), reason="needs the extra `features`")
# The largest logits of `efficientnet_lite_pytorch` 0.1.0 with these weights, of the middle of scikit-learn's
# picture, `prepared`: a bell cote, a monastery and a palace for the Summer Palace.
LABELS = {"china.jpg": ([442, 663, 698], [16.8707, 15.9188, 15.4927]), "flower.jpg": ([949], [13.1930])}


@pytest.fixture(scope="module")
def state():
    return torch.load(lite_weights()[0], weights_only=True)


@needs_weights
@torch.no_grad()
def test_lite0_is_that_of_its_publisher(state):
    net, space = Lite0(state).eval(), lite()
    for name, (classes, values) in LABELS.items():
        image = load_sample_image(name).transpose(2, 0, 1)[None, :, :, 106:533]
        logits = net(prepared(torch.from_numpy(image.copy()).float() / 255))[0].numpy()
        assert logits.argsort()[::-1][: len(classes)].tolist() == classes
        assert logits[classes] == pytest.approx(values, abs=2e-3)
        features = space.features(image)
        by_head = net.head(torch.from_numpy(features).float()).numpy()
        assert np.allclose(by_head, logits, atol=1e-4), "averages before the classifier"


@needs_weights
def test_features_of_images_of_any_kind():
    net, images = lite(), np.random.default_rng(0).integers(0, 256, (3, 3, 20, 30), dtype=np.uint8)
    features = net.features(images)
    assert features.shape == (3, 1280) and features.dtype == np.float64
    assert features.min() >= 0 and features.max() <= 6  # means of ReLU6
    one_by_one = np.concatenate([net.features(images[i : i + 1]) for i in range(3)])
    assert np.allclose(features, one_by_one, atol=1e-4)
    grey = images[:1, :1]
    assert np.allclose(net.features(grey), net.features(np.repeat(grey, 3, 1)), atol=1e-5)
    refused("not 2", net.features, images[:, :2])
    # a checkerboard of one pixel's squares is grey where it is shrunk; nearest rows would keep it
    board = (torch.arange(4 * LITE_SIDE)[:, None] + torch.arange(4 * LITE_SIDE)) % 2
    made = prepared(board[None, None].float())  # the middle of the scale is 0
    assert made.shape == (1, 3, LITE_SIDE, LITE_SIDE) and made.abs().max() < 0.01


@needs_weights
def test_the_weights_are_read_by_their_names(state):
    digest = lite_weights()[1]
    assert lite().hash == digest[:16] and digest.startswith("57934424")
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"lack '_blocks\.3\._bn1\.bias'"):
        Lite0({name: value for name, value in state.items() if name != "_blocks.3._bn1.bias"})
    refused(r"`_blocks\.16", Lite0, {**state, "_blocks.16._bn1.bias": torch.zeros(3)})
    assert torch.equal(before, torch.get_rng_state())
