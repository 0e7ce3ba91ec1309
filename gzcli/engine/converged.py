"""Whether an ODE solver takes enough steps for a likelihood: twice as many must give the same."""

from __future__ import annotations

import math
from typing import Any

import torch

from gzcli.engine.trained import Trained
from gzcli.models.options import defaults, grouped
from gzcli.types import Batch, ImageNoise

IMAGES = 8
NOTABLE = 0.01  # bits a dimension: the last digit in which tables give bpd


def solver_gap(
    trained: Trained, batch: Batch, labels: torch.Tensor | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """By how much `log_prob` of a batch's first images changes in twice the steps: {steps, mean, worst, n}.

    mean, worst: in bits a dimension, above 0 where the likelihood is too high.

    None for a model whose likelihood is not by an ODE in fixed steps.
    """
    model, n = trained.model, min(IMAGES, len(batch))
    if model.likelihood != "ode" or trained.space is not None:
        return None
    options = defaults(model.log_prob)
    if options["solver"] == "adaptive":
        return None
    steps, x = options["steps"], batch.x[:n]
    y = None if labels is None else labels[:n]

    def nats(count: int) -> torch.Tensor:
        noise = ImageNoise(seed, batch.index[:n].tolist(), x.device)
        with torch.no_grad():
            keywords = grouped(model.log_prob, {"steps": count})
            return model.log_prob(x, y, noise=noise, **keywords).cpu().double()

    gap = (nats(steps) - nats(2 * steps)) / (x[0].numel() * math.log(2))
    return {"steps": steps, "mean": float(gap.mean()), "worst": float(gap.abs().max()), "n": n}


def gap_line(gap: dict[str, Any]) -> str:
    """The gap in words."""
    line = (
        f"likelihood by the ODE: {gap['steps']} steps read {gap['mean']:+.4f} bpd against "
        f"{2 * gap['steps']}, {gap['worst']:.4f} at most, on {gap['n']} images"
    )
    return line if gap["worst"] < NOTABLE else f"{line}: too few steps for the second decimal"
