"""The classes of samples: `classes`, whether they are those that they should be, by the set's LeNet; and
`is`, the inception score (Salimans et al. 2016, arXiv:1606.03498, §4)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from gzcli.metrics.interval import half_samples, not_negative, share
from gzcli.metrics.metric import Figures, Interval
from gzcli.metrics.pretrained import POOLED

SPLITS = 10  # parts of the samples over which the inception score is averaged, as torch-fidelity does
T = 2.262  # Student's t of nine degrees of freedom


def of_images(judge: Any, images: Any) -> Figures:
    """`tv`, by how much the classes differ from those of training images, and the share of images that the
    LeNet takes for their label's class; {} of a set without classes."""
    labels, net, meta = judge.pack.labels("train"), judge.lenet, judge.pack.meta
    if labels is None or net is None or net.rotations or meta.multilabel:
        return {}
    seen = net.predict(images.images)
    distance = partial(total_variation, labels=labels, classes=len(meta.classes))
    figures = {"tv": not_negative(half_samples(distance, seen))}
    if images.labels is not None:
        figures["label_accuracy"] = share(float(np.mean(seen == images.labels)), len(seen))
    return figures


def total_variation(seen: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `seen` [N] and of `labels` [M]."""
    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (seen, labels))
    return float(0.5 * np.abs(p - q).sum())


def inception_score(fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    """exp E KL(p(y | x) ‖ p(y)) of the logits, with the interval of a mean of ten."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(torch.from_numpy(fake[:, POOLED:]).float(), splits=SPLITS)
    value, spread = score["inception_score_mean"], score["inception_score_std"]
    half = T * spread / (SPLITS - 1) ** 0.5
    return {"is": Interval(value, value - half, value + half)}
