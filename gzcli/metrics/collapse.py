"""Detects a collapsed generator, by the diversity of its images relative to that of real ones. The module is
separate from the trainer, its only caller, because it needs only features."""

from __future__ import annotations

import numpy as np

# a smaller share of the entropy of the classes means collapse; five of ten classes have 0.7
FEW_CLASSES = 0.7
COLLAPSE_SHARE = 0.5  # a smaller share of the distance between images means collapse


def entropy(classes: np.ndarray) -> float:
    """The entropy of the frequencies of integers [N], in nats."""
    p = np.bincount(classes) / len(classes)
    return float((p[p > 0] * np.log(1 / p[p > 0])).sum())  # one class gives 0, not −0


def spread(features: np.ndarray, classes: np.ndarray) -> float:
    """The root mean square distance between two rows of one class, √(2 tr Cov)."""
    groups = [features[classes == k] for k in np.unique(classes)]
    variances = (len(g) * np.asarray(g, np.float64).var(0).sum() for g in groups)
    return float(np.sqrt(2 * sum(variances) / len(features)))


def diversity(features: np.ndarray, classes: np.ndarray, real: np.ndarray, real_classes: np.ndarray) -> float:
    """The distance between generated images of one class, relative to that between real ones. It is within
    classes, because a conditional generator may have collapsed to one image per class."""
    return spread(features, classes) / max(spread(real, real_classes), 1e-12)


def coverage(classes: np.ndarray, real: np.ndarray) -> float:
    return entropy(classes) / max(entropy(real), 1e-12)


def warning(distance: float, classes: float | None) -> str | None:
    """A warning that the generator may have collapsed; None if neither share is small."""
    if classes is not None and classes < FEW_CLASSES:
        what = f"the entropy of its classes is {classes:.0%} of that of real images"
    elif distance < COLLAPSE_SHARE:
        what = f"the distance between its images is {distance:.0%} of that between real images"
    else:
        return None
    return f"the generator may have collapsed: {what}"
