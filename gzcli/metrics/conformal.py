"""Conformal p-values: how surprising a score is among those of held-out in-distribution images.

Where an image is exchangeable with the n held-out ones, its p-value is at most u with a probability of at
most u, whatever the score (Vovk et al. 2005, Algorithmic Learning in a Random World, §2; Bates et al. 2023,
arXiv:2104.08279, eq. 2). No score may have been fitted on the held-out images. A higher score is more
out-of-distribution.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDING = 1e-9  # that products as .01 · 100 may be off by


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + number of held-out scores that are at least as high) / (n + 1) of each score, float64 [N].

    calibration: scores of held-out images, [n].
    scores: scores of the images in question, [N].
    """
    ordered = np.sort(np.asarray(calibration, np.float64))
    above = len(ordered) - np.searchsorted(ordered, np.asarray(scores, np.float64), side="left")
    return (1 + above) / (len(ordered) + 1)


def bonferroni(p: np.ndarray) -> np.ndarray:
    """One p-value of K for each image, min(1, K · the least): it is valid however the K scores depend on each
    other. float64 [N].

    p: p-values [K, N].
    """
    return np.minimum(1, len(p) * p.min(0))


def threshold(calibration: np.ndarray, fpr: float) -> float:
    """The score above which an image's p-value is at most `fpr`: the k-th highest of n held-out scores, k
    being the whole part of fpr · (n + 1). Infinity where n is too small for any alarm.

    calibration: scores of held-out images, [n].
    fpr: share of in-distribution images that may be flagged.
    """
    k = math.floor(fpr * (len(calibration) + 1) + ROUNDING)
    return float(np.sort(calibration)[-k]) if k else math.inf


def fewest(fpr: float, scores: int = 1) -> int:
    """How many held-out images there must be for a p-value of `fpr` to exist: scores / fpr − 1, rounded up.

    fpr: share of in-distribution images that may be flagged.
    scores: number of scores that are combined by `bonferroni`.
    """
    return math.ceil(scores / fpr - 1 - ROUNDING)


def flagged(p: np.ndarray, fpr: float) -> np.ndarray:
    """Which images are flagged, bool [N]: those whose p-value is at most `fpr`."""
    return p <= fpr * (1 + ROUNDING)
