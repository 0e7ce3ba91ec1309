"""Whether an ODE solver takes enough steps for a likelihood: twice as many must give the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gzcli.core.types import Batch, ImageNoise
from gzcli.engine.trained import Trained
from gzcli.models.nn import full_fp32
from gzcli.models.options import defaults, grouped

IMAGES = 8  # images of a batch on which the solver is checked, at most
NOTABLE = 0.01  # bits a dimension: the last digit in which tables give bpd


@dataclass(frozen=True)
class SolverGap:
    """How much the likelihood of some images changes with twice as many steps of the solver."""

    steps: int  # number of steps
    mean: float  # mean change in bits per dimension, above 0 where the likelihood is too high
    worst: float  # largest absolute change in bits per dimension
    n: int  # number of images

    def __str__(self) -> str:
        line = (
            f"likelihood by the ODE: {self.steps} steps read {self.mean:+.4f} bpd against {2 * self.steps}, "
            f"{self.worst:.4f} at most, on {self.n} images"
        )
        return line if self.worst < NOTABLE else f"{line}: too few steps for the second decimal"


def solver_gap(
    trained: Trained, batch: Batch, labels: torch.Tensor | None = None, seed: int = 0
) -> SolverGap | None:
    """The gap of a batch's first images; None where the likelihood is not by an ODE in fixed steps."""
    model, n = trained.model, min(IMAGES, len(batch))
    if model.likelihood != "ode" or trained.space is not None:
        return None
    options = defaults(model.log_prob)
    if options["solver"] == "adaptive":
        return None
    steps, x = options["steps"], batch.x[:n]
    y = None if labels is None else labels[:n]

    def nats(count: int) -> torch.Tensor:
        noise = ImageNoise(seed, batch.index[:n], x.device)
        with torch.no_grad(), full_fp32(x.device):
            keywords = grouped(model.log_prob, {"steps": count})
            return model.log_prob(x, y, noise=noise, **keywords).cpu().double()

    gap = (nats(steps) - nats(2 * steps)) / (x[0].numel() * math.log(2))
    return SolverGap(steps, float(gap.mean()), float(gap.abs().max()), n)
