"""Has a generator collapsed? How diverse its images are, as shares of what real images are."""

from __future__ import annotations

import numpy as np

FEW_CLASSES, CLOSE = 0.7, 0.5  # below these shares it has collapsed: ten classes become five, or images move together


def entropy(classes: np.ndarray) -> float:
    """Nats of the frequencies of integers [N]."""
    p = np.bincount(classes) / len(classes)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def spread(features: np.ndarray) -> float:
    """The root mean square distance of pairs of rows of [N, D]: √(2 tr Cov)."""
    return float(np.sqrt(2 * np.asarray(features, np.float64).var(0).sum()))


def diversity(features: np.ndarray, real: np.ndarray) -> float:
    """The pairwise distance of generated images as a share of that of real ones, in features [N, D] and [M, D]."""
    return spread(features) / max(spread(real), 1e-12)


def coverage(classes: np.ndarray, real: np.ndarray) -> float:
    """The entropy of the classes [N] that a classifier sees in generated images, as a share of that of real ones [M]."""
    return entropy(classes) / max(entropy(real), 1e-12)


def warning(distance: float, classes: float | None) -> str | None:
    """What to say of a generator with so much of the real images' pairwise distance and entropy of classes; None if all is well."""
    if classes is not None and classes < FEW_CLASSES:
        return f"the generator may have collapsed: the entropy of its classes is {classes:.0%} of the real images'"
    if distance < CLOSE:
        return f"the generator may have collapsed: the distance between its images is {distance:.0%} of that of real ones"
    return None
