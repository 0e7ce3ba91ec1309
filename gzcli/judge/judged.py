"""What the alarm finds of each picture: p-values by its scores among those of held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gzcli.judge.ood_scores import Scored
from gzcli.metrics import conformal
from gzcli.metrics.likelihood_scores import tails_of


@dataclass(frozen=True)
class Judged:
    """What is found of each picture."""

    scores: Mapping[str, np.ndarray]  # float64 [N] of each score, by name; infinite where the model overflows
    spread: Mapping[str, np.ndarray]
    p: np.ndarray  # p-values [N], of all scores together
    flagged: np.ndarray  # whether each picture is, [N]
    low: np.ndarray  # whether the score that decides is lower than usual, not higher, [N]
    thresholds: Mapping[str, tuple[float, float]]
    strangeness: np.ndarray
    n: int  # number of images that the pictures were compared with

    def row(self, i: int) -> dict[str, Any]:
        """What is found of picture i, for JSON; None in the place of what is not finite."""

        def of(table: Mapping[str, np.ndarray]) -> dict[str, float | None]:
            return {name: finite(values[i]) for name, values in table.items()}

        spread = {"spread": of(self.spread)}
        return {
            "scores": of(self.scores),
            "p": float(self.p[i]),
            "side": "low" if self.low[i] else "high",
            "flagged": bool(self.flagged[i]),
            **(spread if self.spread else {}),
        }

    def limits(self) -> dict[str, Any]:
        """The thresholds, for JSON; None where a side has none."""
        ends = {name: [finite(end) for end in both] for name, both in self.thresholds.items()}
        low, high = ({name: both[side] for name, both in ends.items()} for side in (0, 1))
        only = next(iter(high.values())) if len(high) == 1 else None
        return {"threshold": only, "thresholds": high, "thresholds_low": low}

    def overflown(self) -> int:
        """How many pictures have a score that is not finite."""
        return int(np.any([~np.isfinite(values) for values in self.scores.values()], 0).sum())

    def one_sided(self) -> bool:
        """Whether a score with two tails cannot flag by the lower one, as the held-out images are too few."""
        ends = self.thresholds.items()
        return any(tails_of(name) == 2 and not math.isfinite(low) for name, (low, _) in ends)


def finite(value: float) -> float | None:
    """The number for JSON, which has none that is not finite."""
    return float(value) if math.isfinite(value) else None


def judged(scored: Scored, fpr: float) -> Judged:
    """The p-values of the pictures, and which are flagged at a false-alarm rate.

    A score that is not finite counts as higher than any: no held-out image has one.
    """
    held_out = scored.mean("compared")
    scores = {
        name: np.where(np.isnan(values), np.inf, values) for name, values in scored.mean("pictures").items()
    }
    names, n = list(scores), len(next(iter(held_out.values())))
    p = np.stack([conformal.p_values(held_out[name], scores[name], tails=tails_of(name)) for name in names])
    low = np.stack([(tails_of(name) == 2) & (scores[name] < np.median(held_out[name])) for name in names])
    of_all = conformal.bonferroni(p)
    thresholds, beyond = {}, []
    for name in names:
        unit = held_out[name].std() or 1
        ends = conformal.thresholds(held_out[name], fpr / len(names), tails=tails_of(name))
        thresholds[name] = ends
        beyond += [(ends[0] - scores[name]) / unit, (scores[name] - ends[1]) / unit]
    return Judged(
        scores,
        scored.spread("pictures"),
        of_all,
        conformal.flagged(of_all, fpr),
        np.take_along_axis(low, p.argmin(0)[None], 0)[0],
        thresholds,
        np.max(beyond, 0),
        n,
    )
