"""The worth of samples: duplicates of real images gain nothing, fresh ones what they gain elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refused import refused
from sklearn.metrics import balanced_accuracy_score

from gzcli.metrics import classifier, features
from gzcli.metrics.classifier import NetFeatures, trained
from gzcli.metrics.features import LENET
from gzcli.metrics.quality import worth as module
from gzcli.metrics.quality.worth import filling, worth

STEPS, CLASSES = 30, 4


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(features, "LENET", replace(LENET, batch=64))


def noisy(rng, n):
    """Images of one pattern for each class, in so much noise that three images of a class are too few."""
    patterns = np.random.default_rng(9).integers(60, 196, (CLASSES, 1, 8, 8))
    y = np.arange(n) % CLASSES
    return (patterns[y] + rng.normal(0, 60, (n, 1, 8, 8))).clip(0, 255).astype(np.uint8), y


@pytest.fixture(scope="module")
def sides():
    """Few real images, many fresh ones, and test images, each with labels."""
    rng = np.random.default_rng(0)
    return noisy(rng, 3 * CLASSES), noisy(rng, 400), noisy(rng, 400)


def test_fresh_real_images_gain_what_they_gain_and_duplicates_gain_nothing(sides):
    few, many, test = sides
    doubled, fresh = (worth(few, samples, test, CLASSES, steps=STEPS) for samples in (few, many))
    assert doubled["real"] == fresh["real"] == doubled["samples"]
    assert doubled["both_gain"].low <= 0 <= doubled["both_gain"].high
    assert abs(doubled["both_gain"].value) < 0.03
    both = [np.concatenate(pair) for pair in zip(few, many, strict=True)]
    way = replace(LENET, augment=None, batch=64, steps=STEPS, seed=11)
    nets = [trained(*data, CLASSES, way) for data in (both, few)]
    judges = [NetFeatures(net, "", 0, False, torch.device("cpu")) for net in nets]
    accuracies = [(judge.predict(test[0]) == test[1]).mean() for judge in judges]
    assert 0 < fresh["both_gain"].low <= accuracies[0] - accuracies[1] <= fresh["both_gain"].high
    for figures in (doubled, fresh):
        assert "filled" not in figures  # the classes are equally frequent
        for name in ("samples", "both"):
            for end in ("", "_balanced"):
                difference = figures[name + end].value - figures["real" + end].value
                assert figures[f"{name}{end}_gain"].value == pytest.approx(difference, abs=1e-12)


def test_it_is_a_function_of_its_arguments(sides):
    few, _, test = sides
    before = torch.get_rng_state()
    first, again = (worth(few, few, test, CLASSES, seeds=2, steps=1) for _ in range(2))
    assert first == again and torch.equal(before, torch.get_rng_state())
    few, _, test = sides
    for labels in (None, np.eye(CLASSES)[few[1]], few[1][:5]):
        refused("", worth, few, (few[0], labels), test, 10)
    real, made = np.array([0, 0, 0, 0, 1, 2, 2]), np.array([1, 0, 1, 2, 1, 1])
    assert filling(real, made, 3).tolist() == [0, 2, 4] and filling(real, made[:3], 3).tolist() == [0, 2]
    assert filling(real, made, 4).tolist() == []  # no sample is of class 3, which no real image has
    assert filling(np.arange(3), made, 3).tolist() == []


def test_the_filled_set_has_the_real_images_and_those_samples(sides, monkeypatch):
    (x, y), (more, labels), test = sides
    sets = []

    def training(images, classes, outputs, way):
        sets.append((images, classes))
        return trained(images, classes, outputs, replace(way, steps=1))

    monkeypatch.setattr(classifier, "trained", training)
    figures = worth((x[1:], y[1:]), (more, labels), test, CLASSES, seeds=1)
    assert {"filled", "filled_gain", "filled_balanced"} <= figures.keys()
    images, classes = sets[-1]
    assert len(images) == 12 and (np.bincount(classes) == 3).all() and (images[:11] == x[1:]).all()
    assert any((images[11] == sample).all() for sample in more[labels == y[0]])


def test_balanced_accuracy_and_its_intervals():
    rng = np.random.default_rng(1)
    y, guess = rng.choice([0, 2, 3], 200, p=[0.7, 0.2, 0.1]), rng.choice([0, 2, 3], 200)
    rows = np.stack([(guess == y).astype(float), y], 1)
    assert module._balanced(rows) == pytest.approx(balanced_accuracy_score(y, guess), abs=1e-12)
    rng, covered = np.random.default_rng(2), 0
    classes = np.repeat([0, 1], 100)
    for _ in range(100):
        skill = rng.normal(0.7, 0.03, 3)
        hits = (rng.random((3, 200)) < skill[:, None]).astype(float)
        interval = module._interval(module._mean, hits, classes, 0)
        covered += interval.low <= 0.7 <= interval.high
    assert covered >= 88
    alike = np.repeat((rng.random((1, 200)) < 0.7).astype(float), 3, 0)  # classifiers that agree
    interval = module._interval(module._mean, alike, classes, 0)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * alike[0].std() / np.sqrt(200), rel=0.2)
    certain = module._interval(module._mean, np.ones((3, 200)), classes, 0)
    assert (certain.low, certain.value, certain.high) == (1, 1, 1)
