"""The classes of samples, predicted by the set's LeNet: `classes`, their frequencies and their agreement with
labels; `legible`, the LeNet's confidence. Also `is`, the inception score (Salimans et al. 2016,
arXiv:1606.03498, §4)."""

from __future__ import annotations

from functools import partial
from typing import Any

from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

SCORE_SPLITS = 10  # parts of the samples over which the inception score is averaged, as torch-fidelity does
UNSURE = 0.05  # share of real images with less confidence than counts as legible
STUDENT_T = 2.262  # Student's t with nine degrees of freedom


def of_images(judge: Any, images: Any) -> Figures:
    """`tv`, the total variation between the classes of these images and of training images, and the share of
    images whose predicted class is their label. {} for a set without classes."""
    import numpy as np

    from gzcli.metrics.interval import half_samples, not_negative, share

    if (net := of_classes(judge)) is None:
        return {}
    predicted, labels = logits(images, net).argmax(1), judge.pack.labels("train")
    distance = partial(total_variation, labels=labels, classes=len(judge.pack.meta.classes))
    figures = {"tv": not_negative(half_samples(distance, predicted))}
    if images.labels is not None:
        figures["label_accuracy"] = share(float(np.mean(predicted == images.labels)), len(predicted))
    return figures


def legible(judge: Any, images: Any) -> Figures:
    """The share of images that the LeNet classifies as confidently as 95 % of the real test images."""
    import numpy as np

    from gzcli.metrics.interval import share

    if (net := of_classes(judge)) is None:
        return {}
    sure, real = (sureness(logits(side, net)) for side in (images, judge.real.of("test")))
    return {"legible": share(float(np.mean(sure >= np.quantile(real, UNSURE))), len(sure))}


def of_classes(judge: Any) -> Any:
    """The judge's LeNet if it was trained on single-label classes; otherwise None."""
    net = judge.lenet
    return net if net and net.alive and not net.rotations and not judge.pack.meta.multilabel else None


def logits(images: Any, net: Any) -> Array:
    """The logits [N, K], from the features if these have been computed."""
    return net.logits_of(images.features(net) if images.knows(net) else net.features(images.images))


def sureness(logits: Array) -> Array:
    """The logarithm of the largest class probability, [N]. The logarithm avoids rounding of probabilities
    close to 1."""
    import numpy as np

    rest = np.sort(logits - logits.max(1, keepdims=True), 1)[:, :-1]
    return -np.log1p(np.exp(rest).sum(1))


def total_variation(predicted: Array, labels: Array, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `predicted` [N] and of `labels` [M]."""
    import numpy as np

    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (predicted, labels))
    return float(0.5 * np.abs(p - q).sum())


def inception_score(fake: Array, real: Array, intervals: bool) -> Figures:
    """exp E KL(p(y | x) ‖ p(y)) from the logits, as a mean over ten parts with its interval."""
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    from gzcli.metrics.pretrained import POOLED

    score = isc_features_to_metric(torch.from_numpy(fake[:, POOLED:]).float(), splits=SCORE_SPLITS)
    value, spread = score["inception_score_mean"], score["inception_score_std"]
    half = STUDENT_T * spread / (SCORE_SPLITS - 1) ** 0.5
    return {"is": Interval(value, value - half, value + half)}


CLASS_COLUMNS = (Column("tv", "down", keep=12), Column("label_accuracy", "up", keep=11))
LEGIBLE = (
    Column(
        "legible",
        "up",
        keep=14,
        beside=True,
        meaning="share of samples with a confident class; 0.95 for real images",
    ),
)
METRICS = (
    Metric("classes", 70, CLASS_COLUMNS, "lenet", default="always", of_images=of_images),
    Metric("legible", 75, LEGIBLE, "lenet", default="always", of_images=legible),
    Metric("is", 320, (Column("is", "up"),), "inception", fewest=SCORE_SPLITS, compare=inception_score),
)
