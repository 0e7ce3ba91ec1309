"""The classes of samples: `classes`, their frequencies and agreement with labels by the set's LeNet; and
`is`, the inception score (Salimans et al. 2016, arXiv:1606.03498, §4)."""

from __future__ import annotations

from functools import partial
from typing import Any

from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

SPLITS = 10  # parts of the samples over which the inception score is averaged, as torch-fidelity does
T = 2.262  # Student's t of nine degrees of freedom


def of_images(judge: Any, images: Any) -> Figures:
    """`tv`, the total variation between the classes of these and of training images, and the share of images
    whose class by the LeNet is their label; {} for a set without classes."""
    import numpy as np

    from gzcli.metrics.interval import half_samples, not_negative, share

    labels, net, meta = judge.pack.labels("train"), judge.lenet, judge.pack.meta
    if labels is None or net is None or net.rotations or meta.multilabel:
        return {}
    predicted = net.predict(images.images)
    distance = partial(total_variation, labels=labels, classes=len(meta.classes))
    figures = {"tv": not_negative(half_samples(distance, predicted))}
    if images.labels is not None:
        figures["label_accuracy"] = share(float(np.mean(predicted == images.labels)), len(predicted))
    return figures


def total_variation(predicted: Array, labels: Array, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `seen` [N] and of `labels` [M]."""
    import numpy as np

    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (predicted, labels))
    return float(0.5 * np.abs(p - q).sum())


def inception_score(fake: Array, real: Array, intervals: bool) -> Figures:
    """exp E KL(p(y | x) ‖ p(y)) of the logits, with the interval of a mean of ten."""
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    from gzcli.metrics.pretrained import POOLED

    score = isc_features_to_metric(torch.from_numpy(fake[:, POOLED:]).float(), splits=SPLITS)
    value, spread = score["inception_score_mean"], score["inception_score_std"]
    half = T * spread / (SPLITS - 1) ** 0.5
    return {"is": Interval(value, value - half, value + half)}


COLUMNS = (Column("tv", "down", keep=12), Column("label_accuracy", "up", keep=11))
METRICS = (
    Metric("classes", 70, COLUMNS, "lenet", default="always", of_images=of_images),
    Metric("is", 320, (Column("is", "up"),), "inception", compare=inception_score),
)
