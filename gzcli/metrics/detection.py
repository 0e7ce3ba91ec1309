"""How well a score separates out-of-distribution (OOD) images, the positive class, from in-distribution
ones: a higher score is more OOD. `fpr95`, as in OpenOOD v1.5 (arXiv:2306.09301), is the share of
in-distribution images that are flagged when 95 % of the OOD images are; `fpr95_id`, the older convention
(ODIN, arXiv:1706.02690), the share of OOD images that are accepted when 95 % of the in-distribution images
are."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gzcli.core.errors import DivergedError, UsageError

# of each figure: its heading, and where better values lie
FIGURES: dict[str, tuple[str, Literal["down", "up"]]] = {
    "auroc": ("AUROC", "up"),
    "fpr95": ("FPR95", "down"),
    "fpr95_id": ("FPR95 (id)", "down"),
    "aupr_in": ("AUPR in", "up"),
    "aupr_out": ("AUPR out", "up"),
}


def detection(
    s_in: np.ndarray, s_out: np.ndarray, *, trapezoid: bool = False, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The figures of FIGURES and `ci`, 95 % percentile intervals of `auroc` and `fpr95`."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    s_in, s_out = (np.asarray(s, np.float64).ravel() for s in (s_in, s_out))
    if not len(s_in) or not len(s_out):
        raise UsageError("detection needs scores of both sides")
    scores = np.concatenate([s_in, s_out])
    if bad := int((~np.isfinite(scores)).sum()):
        raise DivergedError(f"{bad} of {len(scores)} scores are not finite")
    ood = np.repeat([0, 1], [len(s_in), len(s_out)])
    # Every figure below depends on the order alone; ranks keep the ties.
    _, rank = np.unique(scores, return_inverse=True)

    def fpr_at_95(positive: np.ndarray, s: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(positive, s, drop_intermediate=False)
        return float(fpr[np.argmax(tpr >= 0.95)])

    def aupr(positive: np.ndarray, s: np.ndarray) -> float:
        if not trapezoid:
            return float(average_precision_score(positive, s))
        precision, recall, _ = precision_recall_curve(positive, s)
        return float(auc(recall, precision))

    return {
        "auroc": float(roc_auc_score(ood, rank)),
        "aupr_in": aupr(1 - ood, -rank),
        "aupr_out": aupr(ood, rank),
        "fpr95": fpr_at_95(ood, rank),
        "fpr95_id": fpr_at_95(1 - ood, -rank),
        "n_in": len(s_in),
        "n_out": len(s_out),
        "ci": _intervals(rank[: len(s_in)], rank[len(s_in) :], bootstrap, seed) if bootstrap else None,
    }


def _intervals(
    rank_in: np.ndarray, rank_out: np.ndarray, resamples: int, seed: int
) -> dict[str, list[float]]:
    """Percentile bootstrap over ranks: a resample is a count of each, which needs no sorting."""
    rng, bins = np.random.default_rng(seed), int(max(rank_in.max(), rank_out.max())) + 1
    n_in, n_out = len(rank_in), len(rank_out)
    values = np.empty((resamples, 2))
    for row in values:
        c_in = np.bincount(rank_in[rng.integers(0, n_in, n_in)], minlength=bins)
        c_out = np.bincount(rank_out[rng.integers(0, n_out, n_out)], minlength=bins)
        below = np.cumsum(c_in) - c_in  # in-distribution images below each rank
        row[0] = (c_out @ (below + 0.5 * c_in)) / (n_in * n_out)  # Mann–Whitney, ties count one half
        detected = np.cumsum(c_out[::-1])  # OOD found when the threshold falls to each rank, from the top
        row[1] = np.cumsum(c_in[::-1])[np.argmax(detected >= 0.95 * n_out)] / n_in
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(("auroc", "fpr95"))}
