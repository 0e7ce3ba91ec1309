"""`is`: the inception score (Salimans et al. 2016, arXiv:1606.03498, §4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gzcli.metrics.metric import Column, Figures, Interval, Metric

if TYPE_CHECKING:
    import numpy as np

SPLITS = 10  # parts of the samples over which the score is averaged, as torch-fidelity does
T = 2.262  # Student's t of nine degrees of freedom


def compare(fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    """exp E KL(p(y | x) ‖ p(y)) of the logits behind Inception's features, with the interval of a mean of
    ten."""
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    from gzcli.metrics.pretrained import POOLED

    logits = torch.from_numpy(fake[:, POOLED:]).float()
    score = isc_features_to_metric(logits, splits=SPLITS)
    value, spread = score["inception_score_mean"], score["inception_score_std"]
    half = T * spread / (SPLITS - 1) ** 0.5
    return {"is": Interval(value, value - half, value + half)}


METRICS = (Metric("is", 320, (Column("is", "up"),), "inception", compare=compare),)
