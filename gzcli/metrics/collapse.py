"""Whether a generator has collapsed: the diversity of its images as a share of that of real images."""

from __future__ import annotations

import numpy as np

FEW_CLASSES = 0.7  # a smaller share of the entropy of classes is a collapse, as five classes of ten are
CLOSE = 0.5  # and so is a smaller share of the distance between images


def entropy(classes: np.ndarray) -> float:
    """The entropy of the frequencies of integers [N], nats."""
    p = np.bincount(classes) / len(classes)
    return float((p[p > 0] * np.log(1 / p[p > 0])).sum())  # one class gives 0, not −0


def spread(features: np.ndarray, classes: np.ndarray) -> float:
    """The root mean square distance of two rows of one class: √(2 tr Cov) within a class, averaged over rows.

    features: [N, D].
    classes: integers [N].
    """
    groups = [features[classes == k] for k in np.unique(classes)]
    return float(
        np.sqrt(sum(2 * len(g) * np.asarray(g, np.float64).var(0).sum() for g in groups) / len(features))
    )


def diversity(features: np.ndarray, classes: np.ndarray, real: np.ndarray, real_classes: np.ndarray) -> float:
    """The distance of pairs of generated images as a share of that of real ones.

    Pairs are of one class: a conditional generator may have collapsed to one picture of each.

    features, real: of generated and real images, [N, D] and [M, D].
    classes, real_classes: that a classifier sees in them, [N] and [M].
    """
    return spread(features, classes) / max(spread(real, real_classes), 1e-12)


def coverage(classes: np.ndarray, real: np.ndarray) -> float:
    """The entropy of the classes [N] that a classifier sees in generated images, as a share of the entropy of
    those that it sees in real images [M]."""
    return entropy(classes) / max(entropy(real), 1e-12)


def warning(distance: float, classes: float | None) -> str | None:
    """A warning that the generator may have collapsed; None if nothing says so.

    distance: what `diversity` returned.
    classes: what `coverage` returned; None without classes.
    """
    if classes is not None and classes < FEW_CLASSES:
        found = f"the entropy of its classes is {classes:.0%} of the real images'"
    elif distance < CLOSE:
        found = f"the distance between its images is {distance:.0%} of that of real ones"
    else:
        return None
    return f"the generator may have collapsed: {found}"
