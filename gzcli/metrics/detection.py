"""How well a score separates out-of-distribution (OOD) images, the positive class, from in-distribution ones.
A higher score is more OOD. `fpr95`, as in OpenOOD v1.5 (arXiv:2306.09301), is the share of in-distribution
images that are flagged when 95 % of the OOD images are. `fpr95_id` is the older convention (ODIN,
arXiv:1706.02690): the share of OOD images that are accepted when 95 % of the in-distribution images are."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gzcli.core.errors import DivergedError, UsageError
from gzcli.metrics.interval import exact_share

# metric → heading with the direction of better values
DETECTION_METRICS: dict[str, tuple[str, Literal["down", "up"]]] = {
    "auroc": ("AUROC", "up"),
    "fpr95": ("FPR95", "down"),
    "fpr95_id": ("FPR95 (id)", "down"),
    "aupr_in": ("AUPR in", "up"),
    "aupr_out": ("AUPR out", "up"),
}


CHI2 = 3.841458820694124  # the 95 % quantile of χ² with one degree of freedom, 1.96²
Ends = tuple[float, float]


def detection(s_in: np.ndarray, s_out: np.ndarray, *, trapezoid: bool = False) -> dict[str, Any]:
    """The metrics of DETECTION_METRICS, and `ci`, their 95 % intervals."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    s_in, s_out = (np.asarray(s, np.float64).ravel() for s in (s_in, s_out))
    if not len(s_in) or not len(s_out):
        raise UsageError("detection metrics need scores of both in- and out-of-distribution images")
    scores = np.concatenate([s_in, s_out])
    if bad := int((~np.isfinite(scores)).sum()):
        raise DivergedError(f"{bad} of {len(scores)} scores are not finite")
    ood = np.repeat([0, 1], [len(s_in), len(s_out)])
    # Every metric below depends on the order alone; ranks keep the ties.
    values, rank = np.unique(scores, return_inverse=True)
    in_, out = (np.bincount(rank[ood == side], minlength=len(values)) for side in (0, 1))

    def fpr_at_95(positive: np.ndarray, s: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(positive, s, drop_intermediate=False)
        return float(fpr[np.argmax(tpr >= 0.95)])

    def aupr(positive: np.ndarray, s: np.ndarray) -> float:
        if not trapezoid:
            return float(average_precision_score(positive, s))
        precision, recall, _ = precision_recall_curve(positive, s)
        return float(auc(recall, precision))

    figures = {
        "auroc": float(roc_auc_score(ood, rank)),
        "aupr_in": aupr(1 - ood, -rank),
        "aupr_out": aupr(ood, rank),
        "fpr95": fpr_at_95(ood, rank),
        "fpr95_id": fpr_at_95(1 - ood, -rank),
    }
    ends = {
        "auroc": auroc_interval(in_, out),
        "aupr_in": aupr_interval(figures["aupr_in"], out[::-1], in_[::-1]),
        "aupr_out": aupr_interval(figures["aupr_out"], in_, out),
        "fpr95": fpr_interval(in_, out),
        "fpr95_id": fpr_interval(out[::-1], in_[::-1]),
    }
    # rounding must not put the value outside
    ci = {name: [min(low, figures[name]), max(high, figures[name])] for name, (low, high) in ends.items()}
    return {**figures, "n_in": len(s_in), "n_out": len(s_out), "ci": ci}


def wilson(share: float, n: float) -> Ends:
    """Wilson's interval (1927) of a proportion of n, which need not be an integer."""
    middle, half = share + CHI2 / (2 * n), np.sqrt(CHI2 * (share * (1 - share) / n + CHI2 / (4 * n * n)))
    scale = 1 + CHI2 / n
    return max(0.0, float(middle - half) / scale), min(1.0, float(middle + half) / scale)


def auroc_interval(negative: np.ndarray, positive: np.ndarray) -> Ends:
    """Wilson's interval of the AUROC, as a proportion of the number of images for which it has DeLong's
    variance (1988). That number has two bounds. The first is the smaller side, because no scores vary more
    (Birnbaum & Klose 1957). The second is twice the smaller side, because the few misplaced images of a good
    detector do not reveal how much their number varies. For equal sides it is the limit of Newcombe's score
    interval (2006) near perfect separation. Both sides are counts by ascending rank."""
    area, variance = delong(negative, positive)
    least = int(min(negative.sum(), positive.sum()))
    size = min(max(area * (1 - area) / variance, least), 2 * least) if variance else least
    return wilson(area, size)


def aupr_interval(area: float, negative: np.ndarray, positive: np.ndarray) -> Ends:
    """Wilson's interval of an area under the precision–recall curve, as a proportion of the number of images
    for which it has the variance of its influence function. That number is at most twice the smaller side, as
    for the AUROC. Both sides are counts by ascending rank."""
    least, variance = int(min(negative.sum(), positive.sum())), precision_variance(negative, positive)
    size = min(area * (1 - area) / variance, 2 * least) if variance and 0 < area < 1 else least
    return wilson(area, size)


def precision_variance(negative: np.ndarray, positive: np.ndarray) -> float:
    """The variance of an average precision, A = E₊[p(X)] with p = S / (S + r F), by the delta method. S and
    F are the shares of positives and negatives at X or above, and r is the ratio of their numbers. A
    positive z has the influence p(z) + E₊[r F / (S + r F)² 1(X ≤ z)], a negative one −E₊[r S / (S + r F)²
    1(X ≤ z)]."""
    (s, q), (f, p) = ((np.cumsum(c[::-1])[::-1] / c.sum(), c / c.sum()) for c in (positive, negative))
    ratio = negative.sum() / positive.sum()
    total = s + ratio * f
    weight = q * ratio / total**2
    influences = (positive, q, s / total + np.cumsum(weight * f)), (negative, p, -np.cumsum(weight * s))
    return sum(
        float(share @ (influence - share @ influence) ** 2) / max(counts.sum() - 1, 1)
        for counts, share, influence in influences
    )


def delong(negative: np.ndarray, positive: np.ndarray) -> Ends:
    """The AUROC and its variance (DeLong, DeLong & Clarke-Pearson 1988), computed from ranks (Sun & Xu
    2014)."""
    n, m = negative.sum(), positive.sum()
    below = (np.cumsum(negative) - negative / 2) / n  # negatives below each rank; ties count one half
    above = 1 - (np.cumsum(positive) - positive / 2) / m  # positives above it
    area, variance = float(positive @ below) / m, 0.0
    for counts, shares, total in ((positive, below, m), (negative, above, n)):
        variance += float(counts @ (shares - area) ** 2) / (max(total - 1, 1) * total)
    return float(area), variance


def fpr_interval(negative: np.ndarray, positive: np.ndarray) -> Ends:
    """An interval of the false-positive rate at a true-positive rate of 95 %, whose threshold is itself an
    estimate. A threshold whose own true-positive rate is some χ² away from 95 % leaves the rest of χ² to
    the exact interval of its false-positive rate. The interval is the union of these (a profile, like the
    likelihood profile of Claeskens et al. 2003). With fewer than 73 positive images, no threshold is too low,
    so it ends at 1. Both sides are counts by ascending rank."""
    from scipy.stats import chi2

    fpr, tpr = (np.append(np.cumsum(c[::-1])[::-1], 0) / c.sum() for c in (negative, positive))
    above = np.append(tpr[1:], 0)  # the rate at the next higher threshold, which is below 95 %
    gap = np.maximum(0, np.maximum(0.95 - tpr, above - 0.95))
    left = CHI2 - positive.sum() * gap**2 / (0.95 * 0.05)
    flagged, tails = np.round(fpr * negative.sum())[left >= 0], chi2.sf(left[left >= 0], 1) / 2
    low, high = exact_share(flagged, negative.sum(), tails)
    return float(low.min()), float(high.max())
