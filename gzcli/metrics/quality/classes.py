"""`classes`: whether samples are of the classes that they should be of, by the set's LeNet."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gzcli.metrics.metric import Column, Figures, Metric

if TYPE_CHECKING:
    import numpy as np


def of_images(judge: Any, images: Any) -> Figures:
    """`tv`, by how much the classes differ from those of training images, and the share of images that the
    LeNet takes for their label's class; {} of a set without classes."""
    import numpy as np

    from gzcli.metrics.interval import half_samples, not_negative, share

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
    import numpy as np

    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (seen, labels))
    return float(0.5 * np.abs(p - q).sum())


COLUMNS = (Column("tv", "down", keep=12), Column("label_accuracy", "up", keep=11))
METRICS = (Metric("classes", 70, COLUMNS, "lenet", default="always", of_images=of_images),)
