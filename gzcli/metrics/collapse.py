"""Has a generator collapsed? How diverse its images are, as shares of what real images are."""

from __future__ import annotations

import numpy as np

FEW_CLASSES, CLOSE = (
    0.7,
    0.5,
)  # below these shares it has collapsed: ten classes become five, or images move together


def entropy(classes: np.ndarray) -> float:
    """Nats of the frequencies of integers [N]."""
    p = np.bincount(classes) / len(classes)
    return float((p[p > 0] * np.log(1 / p[p > 0])).sum())  # 0 of one class, and not -0


def spread(features: np.ndarray, classes: np.ndarray) -> float:
    """The root mean square distance of pairs of rows of [N, D] of one class: √(2 tr Cov), the mean over all
    rows."""
    groups = [features[classes == k] for k in np.unique(classes)]
    return float(
        np.sqrt(sum(2 * len(g) * np.asarray(g, np.float64).var(0).sum() for g in groups) / len(features))
    )


def diversity(features: np.ndarray, classes: np.ndarray, real: np.ndarray, real_classes: np.ndarray) -> float:
    """The distance of pairs of generated images as a share of that of real ones, in features [N, D] and [M,
    D] and within the classes [N] and [M] that a classifier sees: a conditional generator may have one picture
    of each."""
    return spread(features, classes) / max(spread(real, real_classes), 1e-12)


def coverage(classes: np.ndarray, real: np.ndarray) -> float:
    """The entropy of the classes [N] that a classifier sees in generated images, as a share of that of real
    ones [M]."""
    return entropy(classes) / max(entropy(real), 1e-12)


def warning(distance: float, classes: float | None) -> str | None:
    """What to say of a generator with so much of the real images' pairwise distance and entropy of classes;
    None if all is well."""
    if classes is not None and classes < FEW_CLASSES:
        return (
            f"the generator may have collapsed: the entropy of its classes is {classes:.0%} of the real "
            "images'"
        )
    if distance < CLOSE:
        return (
            f"the generator may have collapsed: the distance between its images is {distance:.0%} of "
            "that of real ones"
        )
    return None
