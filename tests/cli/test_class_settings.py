"""What VAEs, GANs and normalizing flows choose for sets that no recipe names: by shape class and traits."""

from __future__ import annotations

import numpy as np
import pytest

from gzcli.data.facts import SHAPES
from gzcli.models import catalog
from gzcli.recipe.resolve import resolve
from gzcli.sizes import sides
from gzcli.types import DataInfo

FLOWS = ["glow", "realnvp", "flow", "flowpp"]
MODELS = ["vae", "cvae", "aae", "hvae", "dcgan", "cgan", "wgan", "presgan", "cyclegan", *FLOWS]
SIDES = {"colour": 32, "64px": 64, "128px": 128, "256px": 256}  # of a set of each class
KNOWN = {"cyclegan": "horse2zebra"}  # a set in colour that the model takes


def chosen(model: str, scale: str, **data):
    keys = {f"data.{key}": value for key, value in data.items()}
    return resolve(model, data=KNOWN.get(model, "svhn"), flags={"scale": scale, **keys})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_class_has_a_setting_of_its_own(model, scale):
    for side in SIDES.values():
        train = chosen(model, scale, size=side).parts[-1].train
        assert train.ema == 0 or 1 / (1 - train.ema) <= 0.1 * train.steps + 1, "an average of late steps"
    few = chosen(model, scale, size=64, n=2000).parts[-1].train
    assert model == "cyclegan" or few.steps < chosen(model, scale, size=64).parts[-1].train.steps
    grey = chosen(model, scale, size=28, channels=1)
    assert SHAPES[0] == "grey" and grey.parts[-1].data.channels == 1


@pytest.mark.parametrize("model", MODELS)
def test_nets_follow_the_sides_of_pictures_that_are_not_square(model):
    import torch

    for scale, size in (("small", "48x32"), ("full", "96x64")):
        part = chosen(model, scale, size=size).parts[-1]
        assert sides(part.data.size) == sides(size)
        info = DataInfo((3, *sides(size)), part.data.levels or 256, ("a", "b"))
        with torch.device("meta"):
            assert catalog.load(part.model).of(info, **part.options)


@pytest.mark.parametrize("model", FLOWS)
def test_a_brought_set_with_flat_backgrounds_gets_what_a_named_one_gets(model, tmp_path):
    """Characters: a few strokes on black."""
    rng = np.random.default_rng(0)
    images = np.zeros((5_001, 28, 28), np.uint8)
    images[:, 8:20, 12:16] = rng.integers(1, 256, (5_001, 12, 4))
    np.savez(tmp_path / "characters.npz", images=images)
    own, named = (
        resolve(model, data=data, flags={"scale": "small"}).tree()
        for data in (str(tmp_path / "characters.npz"), "fashionmnist")
    )
    assert own["data"].pop("name") != named["data"].pop("name")
    assert own == named and named["model"]["logit"] == 1e-6
    assert named["model"]["dequant"] == "variational"
