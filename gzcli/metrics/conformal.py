"""Conformal p-values: how surprising a score is among those of held-out in-distribution images.

If an image is exchangeable with the n held-out ones, its p-value is at most u with a probability of at most
u, for any score (Vovk et al. 2005, Algorithmic Learning in a Random World, §2; Bates et al. 2023,
arXiv:2104.08279, eq. 2). No score may have been fitted on the held-out images, and all are scored by one
rule. A higher score is more out-of-distribution.

A score may be unusual by being low, too: a blank image has less to explain than any image of the set. Of
both tails an image is ordered by its place: the highest score is the most surprising, then the lowest, then
the second highest, the second lowest, and so on. This is an order of n + 1 scores as any other, so its
p-values are valid and reach down to 1 / (n + 1), which 2 · min(p_high, p_low) does not.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDING = 1e-9  # that products as .01 · 100 may be off by
TIE = 1e-5  # relative: scores of one image in different batches differ by less


def p_values(calibration: np.ndarray, scores: np.ndarray, *, tails: int = 1) -> np.ndarray:
    """The p-value of each score, float64 [N]. Equal scores count as more surprising ones do; an infinite one
    equals no other.

      one tail    h / (n + 1)
      both tails  min(1, (2h − 1) / (n + 1), 2l / (n + 1))

    h is 1 + the number of held-out scores that are at least as high, l of those that are at most as high.
    """
    scores = np.asarray(scores, np.float64)
    return cross_p_values(calibration, np.zeros(len(calibration), int), scores[:, None], tails=tails)


def cross_p_values(
    calibration: np.ndarray, fold: np.ndarray, scores: np.ndarray, *, tails: int = 1
) -> np.ndarray:
    """The p-value of each row of scores [N, K] by K models, float64 [N]: `p_values`, where each held-out
    score is compared with the score by the same model, `fold` [n]."""
    n, scores = len(calibration), np.asarray(scores, np.float64)
    near = np.where(np.isfinite(scores), TIE * np.abs(scores), 0)
    high, low = (np.ones(len(scores), np.int64) for _ in range(2))
    for k in range(scores.shape[1]):
        ordered = np.sort(np.asarray(calibration, np.float64)[fold == k])
        high += len(ordered) - np.searchsorted(ordered, scores[:, k] - near[:, k], side="left")
        low += np.searchsorted(ordered, scores[:, k] + near[:, k], side="right")
    return _of_counts(high, low, n, tails)


def bonferroni(p: np.ndarray) -> np.ndarray:
    """One p-value of K for each image, however they depend on each other: min(1, K · the least)."""
    return np.minimum(1, len(p) * p.min(0))


def _of_counts(high: np.ndarray, low: np.ndarray, n: int, tails: int) -> np.ndarray:
    return high / (n + 1) if tails == 1 else np.minimum(1, np.minimum(2 * high - 1, 2 * low) / (n + 1))


def thresholds(calibration: np.ndarray, fpr: float, *, tails: int = 1) -> tuple[float, float]:
    """The scores below and above which an image's p-value is at most `fpr`; infinite if n is too small for
    an alarm on that side."""
    ordered = np.sort(calibration)
    k = math.floor(fpr * (len(ordered) + 1) + ROUNDING)
    low, high = (k // 2, (k + 1) // 2) if tails == 2 else (0, k)
    return (float(ordered[low - 1]) if low else -math.inf, float(ordered[-high]) if high else math.inf)


def fewest(fpr: float, scores: int = 1) -> int:
    """How many held-out images a p-value of `fpr` needs: scores / fpr − 1, rounded up."""
    return math.ceil(scores / fpr - 1 - ROUNDING)


def flagged(p: np.ndarray, fpr: float) -> np.ndarray:
    """Which images are flagged, bool [N]: those whose p-value is at most `fpr`."""
    return p <= fpr * (1 + ROUNDING)
