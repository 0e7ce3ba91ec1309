"""The parts of an audit, on images and features whose faults are planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from gzcli.metrics import audit

CPU = torch.device("cpu")
SIDE, IMAGES = 32, 60


def drawn(seed: int, n: int = IMAGES) -> np.ndarray:
    """Smooth random images, uint8 [n, SIDE, SIDE]."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal((n, SIDE, SIDE)), (0, 1.5, 1.5))
    return np.clip(128 + 40 * field / field.std(), 0, 255).astype(np.uint8)


def features_of(objects: np.ndarray) -> audit.Features:
    """Features whose parts all show the same, float16."""
    rng = np.random.default_rng(1)
    sizes = (1280, 80, 224, 1368)
    parts = (objects @ rng.standard_normal((objects.shape[1], size)) for size in sizes)
    return audit.Features(*((2 + 0.2 * part).clip(0, 6).astype(np.float16) for part in parts))


def test_alignment_undoes_a_mirror_and_a_shift():
    images = drawn(0)
    shifted = np.roll(images[0], (1, -2), (0, 1))
    aligner = audit.Aligner(np.stack([images[0], images[0][:, ::-1], shifted, images[1]]), CPU)
    table = audit.agreements(aligner, np.array([[0, 1], [0, 2], [0, 3]]))
    assert table[:2, 0].min() > audit.CERTAIN_AGREEMENT > audit.MIN_AGREEMENT > table[2, 0]
    assert table[:2, 1].tolist() == [1, 0]
    assert table[1, 2:] == pytest.approx([1, -2], abs=0.2)


def test_copies_agree_beyond_what_similar_images_share():
    shape, noise = drawn(0, 1).astype(float), np.random.default_rng(1).normal(0, 12, (IMAGES, SIDE, SIDE))
    plates = np.clip(shape + noise, 0, 255).astype(np.uint8)  # alike in everything but noise
    plates[7] = np.clip(plates[3] + np.random.default_rng(2).normal(0, 3, (SIDE, SIDE)), 0, 255)
    neighbours = audit.Neighbours.of(
        np.random.default_rng(3).standard_normal((IMAGES, 8), np.float32), 50, CPU
    )
    near = audit.near_copies(plates, audit.Neighbourhood(neighbours, neighbours, neighbours), CPU)
    assert near.pairs.tolist() == [[3, 7]]


def test_groups_connect_copies_of_copies():
    group = audit.groups(5, np.array([[0, 2], [2, 4]]))
    assert group[0] == group[2] == group[4] and len({*group.tolist()}) == 3


def test_foreign_images_of_one_kind_do_not_hide_each_other():
    rng = np.random.default_rng(0)
    objects = np.concatenate([rng.normal(0, 1, (400, 12)), rng.normal(0, 0.1, (6, 12)) + 8])
    p, is_foreign = audit.foreign(audit.Neighbourhood.of(features_of(objects), CPU))
    assert is_foreign[-6:].all() and is_foreign[:400].mean() < 0.05
    assert p.min() == pytest.approx(1 / 406) and p[-6:].max() < 0.05


def test_p_values_of_images_that_all_belong_are_uniform():
    objects = np.random.default_rng(0).normal(0, 1, (300, 12))
    p, _ = audit.foreign(audit.Neighbourhood.of(features_of(objects), CPU))
    assert np.sort(p) == pytest.approx(np.arange(1, 301) / 300)


def test_wrong_labels_come_first():
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 4
    objects = rng.normal(0, 0.4, (200, 12)) + np.eye(4, 12)[truth] * 4
    labels, wrong = truth.copy(), np.arange(0, 200, 20)
    labels[wrong] = (truth[wrong] + 1) % 4
    odds, rival = audit.suspects(
        audit.class_probabilities(features_of(objects), labels, np.arange(200)), labels
    )
    assert sorted(np.argsort(-odds)[:10].tolist()) == wrong.tolist()
    assert (rival[wrong] == truth[wrong]).all()
    assert odds[wrong].min() > 1 > np.delete(odds, wrong).max()


def test_copies_are_judged_in_one_fold():
    labels, group = np.arange(40) % 2, np.arange(40) // 2
    fold = audit.folds_of(labels, group, np.random.default_rng(0))
    assert (fold[::2] == fold[1::2]).all() and {*fold.tolist()} <= {*range(audit.LABEL_FOLDS)}
