"""`bpd`: the likelihood of test images, in bits a dimension or, of binary images, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gzcli.metrics.metric import Column, Figures, Interval, Metric


def of_model(judge: Any, contestant: Any) -> Figures:
    """The likelihood, where the model has one: of an ODE, which takes long, only where metrics are named."""
    trained = contestant.trained
    kind = None if trained.space else trained.model.likelihood  # latents have no likelihood of pixels
    if not (kind in ("exact", "bound") or (kind == "ode" and judge.named)):
        return {}
    likelihood = contestant.facts["likelihood"] = judge.likelihood(trained)
    return columns(likelihood, judge.mark(contestant.levels), judge.values, binary=contestant.levels == 2)


def columns(likelihood: Mapping[str, Any], mark: str, values: int, *, binary: bool) -> Figures:
    """The figures of a likelihood of images of so many values: that of log p(x | y) ends in `|y`, that of log
    p(x) is named by the unit."""
    import numpy as np

    unit, mark = ("nats", "") if binary else ("bpd", mark)

    def of(part: Mapping[str, float]) -> Interval:
        half = 1.96 * part["se"] / (1 if binary else values * np.log(2))
        return Interval(part[unit], part[unit] - half, part[unit] + half)

    if not likelihood["given_labels"]:
        return {unit + mark: of(likelihood)}
    marginal = likelihood["marginal"]
    return {f"{unit}|y{mark}": of(likelihood)} | ({unit + mark: of(marginal)} if marginal else {})


METRICS = (
    Metric(
        "bpd",
        80,
        (
            Column("bpd", "down", keep=14, meaning="bits per dimension of unseen images"),
            Column("bpd|y", "down", keep=9),
            Column("nats", "down", keep=13),
            Column("nats|y", "down", keep=8),
        ),
        default="always",
        shared=True,
        of_model=of_model,
    ),
)
