"""The sets that are made: `glyphs`, and `shapes`, of whose images all is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from gzcli.data.sets import embedded
from gzcli.data.sets.embedded import MAKERS, SIDE, distance, matrices, pictures
from gzcli.data.sets.registry import SPECS

FEW = {name: replace(SPECS[name], n_train=144, n_test=72) for name in ("glyphs", "shapes", "shapes-factors")}


@cache
def made(name):
    """The few images of a set, uint8 [216, C, H, W], and what was read."""
    raw = MAKERS[name](FEW[name])
    return np.concatenate([block.data for block in raw.blocks()]), raw


def test_they_are_made_alike_each_time():
    for name in FEW:
        images, raw = made(name)
        again = np.concatenate([block.data for block in MAKERS[name](FEW[name]).blocks()])
        assert images.shape == (216, *SPECS[name].shape) and (images == again).all(), name
        assert raw.counts == {"train": 144, "test": 72} and raw.classes == SPECS[name].class_names, name


def test_glyphs_are_told_apart_by_their_class():
    """Each class has as many images in each split; the mean glyph of its class is nearest to most of them, in
    pixels."""
    images, raw = made("glyphs")
    labels = np.concatenate(list(raw.labels.values()))
    counts = {split: set(np.bincount(y, minlength=36)) for split, y in raw.labels.items()}
    assert counts == {"train": {4}, "test": {2}}
    ink = images.reshape(len(images), -1) / 255
    assert 0.08 < ink.mean() < 0.25 and (ink.max(1) > 0.9).all() and (images[:, :, [0, -1]] < 60).all()
    means = np.stack([ink[labels == k].mean(0) for k in range(36)])
    nearest = ((ink[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.7


def test_shapes_are_what_their_factors_say():
    """The form has its colour, its middle lies where it should, its area is as large as its radius says."""
    images, raw = made("shapes")
    known = embedded.factors(216)
    ink = np.array(list(embedded.COLOURS.values()))[known.colour]
    inside = np.abs(images.astype(int) - ink[:, :, None, None]).max(1) < 12
    assert inside.reshape(216, -1).any(1).all() and raw.labels["train"].tolist() == known.kind[:144].tolist()
    at = np.arange(32) - 15.5
    area = inside.sum((1, 2))
    center = np.stack([(inside * at).sum((1, 2)), (inside * at[:, None]).sum((1, 2))], 1) / area[:, None]
    symmetric = ("circle", "square", "cross", "star")
    whole = np.isin(known.kind, [embedded.KINDS.index(kind) for kind in symmetric])
    assert np.abs(center - known.center)[whole].max() < 0.5
    round_ = known.kind == embedded.KINDS.index("circle")
    assert np.abs(np.sqrt(area[round_] / np.pi) - known.radius[round_]).max() < 1.0
    assert set(raw.captions["train"][0].split()) >= {"red", "circle"}


def test_factors_are_labels_of_the_same_images():
    images, raw = made("shapes-factors")
    assert (images == made("shapes")[0]).all()
    known, labels = embedded.factors(216), np.concatenate(list(raw.labels.values()))
    assert labels.shape == (216, len(embedded.FACTORS))
    assert SPECS["shapes-factors"].class_names == embedded.FACTORS
    kinds, colours = len(embedded.KINDS), len(embedded.COLOURS)
    assert (labels[:, :kinds].argmax(1) == known.kind).all()
    assert (labels[:, kinds : kinds + colours].argmax(1) == known.colour).all()
    left = labels[:, embedded.FACTORS.index("left")] == 1
    assert (known.center[left, 0] < 0).all() and left.any()


def test_a_form_is_turned_enlarged_and_made_bolder():
    """A bar 10 pixels wide and 2 high: turned by a quarter it stands; a pixel bolder it is 12 by 4."""
    drawing = np.zeros((SIDE, SIDE), bool)
    drawing[SIDE // 2 - 8 : SIDE // 2 + 8, SIDE // 2 - 40 : SIDE // 2 + 40] = True
    turns, size = np.array([0.0, np.pi / 2, 0.0]), np.full((3, 2), 8.0)
    forms = matrices(turns, np.zeros(3), size)
    found = pictures(distance(drawing), forms, np.zeros((3, 2)), np.array([0.0, 0, 1]), 20)
    assert found.sum((1, 2)) == pytest.approx([20, 20, 48], rel=0.06)
    assert np.abs(found[1] - found[0].T).max() < 0.02
    assert (found[0, :8].max(), found[0, 9:11, 6:14].min()) == (0, 1)
