"""Conformal p-values: how surprising a score is among those of held-out in-distribution images.

If an image is exchangeable with the n held-out ones, P(p-value ≤ u) ≤ u for any score (Vovk et al. 2005,
Algorithmic Learning in a Random World, §2; Bates et al. 2023, arXiv:2104.08279, eq. 2). The held-out images
must not have been used to fit the score, and all images must be scored by the same rule. A higher score is
more out-of-distribution.

A low score may be unusual too: a blank image has less to explain than any image of the set. With both tails,
scores are ordered by rank: the highest is the most surprising, then the lowest, then the second highest, the
second lowest, and so on. This is an ordinary ordering of n + 1 scores, so its p-values are valid. They also
reach down to 1 / (n + 1), which 2 · min(p_high, p_low) does not.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDING = 1e-9  # rounding error of products such as .01 · 100
TIE = 1e-5  # relative; scores of the same image in different batches differ by less


def p_values(calibration: np.ndarray, scores: np.ndarray, *, tails: int = 1) -> np.ndarray:
    """The p-value of each score, float64 [N]. Equal scores count like more surprising ones; an infinite score
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
    """The p-value of each row of scores [N, K] by K models, float64 [N]. It is that of `p_values`, with each
    held-out score compared with the score by the same model, `fold` [n]."""
    n, scores = len(calibration), np.asarray(scores, np.float64)
    near = np.where(np.isfinite(scores), TIE * np.abs(scores), 0)
    high, low = (np.ones(len(scores), np.int64) for _ in range(2))
    for k in range(scores.shape[1]):
        ordered = np.sort(np.asarray(calibration, np.float64)[fold == k])
        high += len(ordered) - np.searchsorted(ordered, scores[:, k] - near[:, k], side="left")
        low += np.searchsorted(ordered, scores[:, k] + near[:, k], side="right")
    return _of_counts(high, low, n, tails)


def drift(calibration: np.ndarray, fold: np.ndarray, scores: np.ndarray) -> float:
    """The two-sided p-value that images with scores [N, K] by K models are exchangeable as a whole with the n
    held-out ones, by the ranks of both (Mann & Whitney 1947). Each held-out score is compared with those by
    the same model, `fold` [n]. The normal approximation counts ties as halves."""
    n, m, above = len(calibration), len(scores), 0.0
    for k in range(scores.shape[1]):
        ordered = np.sort(np.asarray(calibration, np.float64)[fold == k])
        sides = [np.searchsorted(ordered, scores[:, k], side=side).sum() for side in ("left", "right")]
        above += sum(sides) / 2
    z = (above / (n * m) - 0.5) / math.sqrt((n + m + 1) / (12 * n * m))
    return math.erfc(abs(z) / math.sqrt(2))


def bonferroni(p: np.ndarray) -> np.ndarray:
    """One p-value per image from K p-values, valid for any dependence between them: min(1, K · the
    smallest)."""
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
    """The number of held-out images that a p-value of `fpr` requires: scores / fpr − 1, rounded up."""
    return math.ceil(scores / fpr - 1 - ROUNDING)


def lowest_rate(n: int, scores: int = 1) -> float:
    """The lowest rate, in percent, that n held-out images allow, rounded up to a tenth."""
    return math.ceil(1000 * scores / (n + 1)) / 10


def flagged(p: np.ndarray, fpr: float) -> np.ndarray:
    """Which images are flagged, bool [N]: those whose p-value is at most `fpr`."""
    return p <= fpr * (1 + ROUNDING)
