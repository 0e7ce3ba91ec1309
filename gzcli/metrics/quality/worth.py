"""`worth`: the value of samples as training data. It is the accuracy, on real test images, of a small
classifier that is trained with them (Ravuri & Vinyals 2019, arXiv:1905.10887)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.core.types import Say, silent
from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

Labelled = tuple[Array, Array]  # images uint8 [N, C, H, W] and their classes [N]
WORTH_STEPS = 500  # the same for all training sets, so that more images do not mean more training


def of_images(judge: Any, images: Any) -> Figures:
    """The metrics of `worth`, with names that begin with `worth_`; {} for images without labels, or of sets
    without classes."""
    import numpy as np

    sets, meta = (judge.real.of("train"), images, judge.real.of("test")), judge.pack.meta
    if meta.multilabel or any(side.labels is None for side in sets):
        return {}
    real, samples, held_out = ((np.asarray(side.images[:]), side.labels) for side in sets)
    figures = worth(real, samples, held_out, len(meta.classes), say=judge.say)
    return {f"worth_{name}": value for name, value in figures.items()}


def worth(
    real: Labelled,
    samples: Labelled,
    test: Labelled,
    classes: int,
    *,
    seeds: int = 3,
    steps: int = WORTH_STEPS,
    say: Say = silent,
) -> Figures:
    """The accuracy of a LeNet on the test images, 0 … 1, by its training data: `real` images, `samples`,
    `both`, or `filled`. `filled` are real images whose rarest class is filled up with samples to the size of
    the largest, if there are any samples of it. `NAME_balanced` is averaged over classes; `…_gain` is the
    difference from `real` at equal seeds."""
    import numpy as np
    import torch

    from gzcli.metrics.classifier import NetFeatures, trained
    from gzcli.metrics.features import LENET

    for images, labels in (real, samples, test):
        if not len(images) or np.shape(labels) != (len(images),):
            raise UsageError("`worth` needs images with one class each in all sets")
    real, samples, (test_x, test_y) = (
        (np.asarray(x), np.asarray(y, np.int64)) for x, y in (real, samples, test)
    )

    def with_samples(rows: Any) -> Labelled:
        x, y = (np.concatenate([a, b[rows]]) for a, b in zip(real, samples, strict=True))
        return x, y

    sets = {"real": real, "samples": samples, "both": with_samples(slice(None))}
    if len(fill := filling(real[1], samples[1], classes)):
        sets["filled"] = with_samples(fill)
    right = {}  # by classifier and test image, float64 [seeds, K]
    for name, (x, y) in sets.items():
        say(f"training {seeds} classifiers on {len(x)} images ({name})")
        ways = [replace(LENET, augment=None, steps=steps, seed=seed) for seed in range(seeds)]
        nets = (trained(x, y, classes, way) for way in ways)
        guesses = [NetFeatures(n, "", 0.0, False, torch.device("cpu")).predict(test_x) for n in nets]
        right[name] = np.array([guess == test_y for guess in guesses], np.float64)
    gains = {name: hits - right["real"] for name, hits in right.items() if name != "real"}
    figures: Figures = {}
    for end, average in (("", _mean), ("_balanced", _balanced)):
        figures |= {name + end: _interval(average, hits, test_y, 0) for name, hits in right.items()}
        figures |= {f"{name}{end}_gain": _interval(average, gain, test_y, -1) for name, gain in gains.items()}
    return figures


def filling(real: Array, samples: Array, classes: int) -> Array:
    """The samples that fill up the rarest class of `real` to the size of the largest, as far as there are
    enough."""
    import numpy as np

    counts = np.bincount(real, minlength=classes)
    return np.flatnonzero(samples == counts.argmin())[: counts.max() - counts.min()]


def _mean(rows: Array) -> float:
    return float(rows[:, 0].mean())


def _balanced(rows: Array) -> float:
    """The mean over classes of the mean in each class. Rows [N, 2] contain values and classes."""
    import numpy as np

    classes = rows[:, 1].astype(np.int64)
    counts = np.bincount(classes)
    return float((np.bincount(classes, rows[:, 0])[counts > 0] / counts[counts > 0]).mean())


def _interval(average: Callable[[Array], float], values: Array, classes: Array, least: float) -> Interval:
    """The average, within `least` … 1, of values [S, N] for each classifier and test image. Its interval
    accounts for both draws, of test images and of classifiers, whose half-widths are added in quadrature."""
    import numpy as np

    from gzcli.metrics.interval import half_samples, mean_of_draws

    images = half_samples(average, np.stack([values.mean(0), classes], 1))
    averages = [average(np.stack([row, classes], 1)) for row in values]
    sides = images, mean_of_draws(averages, signed=True)
    half = float(np.linalg.norm([side.high - side.value for side in sides if side.high is not None]))
    return Interval(images.value, max(images.value - half, least), min(images.value + half, 1.0))


METRICS = (Metric("worth", 120, (Column("worth_*", "up"),), floor="train", of_images=of_images),)
