"""Metrics of a model itself: `bpd`, the likelihood of test images; `own`, those of its method `measure`; and
`speed`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gzcli.metrics.metric import Column, Figures, Interval, Metric

MAX_TEST_IMAGES = 10_000  # most test images for `measure`


def bpd(judge: Any, contestant: Any) -> Figures:
    """The likelihood, in nats for binary images. Models of latents have no likelihood of pixels. The
    expensive likelihood by an ODE is computed only if metrics are named."""
    trained = contestant.trained
    kind = trained.model.likelihood if trained.has_levels else None
    if kind not in ("exact", "bound") and not (kind == "ode" and judge.named):
        return {}
    likelihood = contestant.facts["likelihood"] = judge.likelihood(trained)
    levels, values = trained.info.levels, math.prod(trained.info.shape)
    return likelihood_figures(likelihood, judge.mark(levels), values, binary=levels == 2)


def likelihood_figures(likelihood: Mapping[str, Any], mark: str, values: int, *, binary: bool) -> Figures:
    """The metrics of a likelihood of images with `values` values, in nats for binary images. The name of log
    p(x | y) ends in `|y`; that of log p(x) is the unit alone."""
    import numpy as np

    from gzcli.metrics.interval import student

    unit, mark = ("nats", "") if binary else ("bpd", mark)

    def interval(part: Mapping[str, Any]) -> Interval:
        if part["se"] is None:
            return Interval(part[unit])
        half = student(likelihood["n"]) * part["se"] / (1 if binary else values * np.log(2))
        return Interval(part[unit], part[unit] - half, part[unit] + half)

    if not likelihood["given_labels"]:
        return {unit + mark: interval(likelihood)}
    marginal = likelihood["marginal"]
    return {f"{unit}|y{mark}": interval(likelihood)} | ({unit + mark: interval(marginal)} if marginal else {})


def measured_figures(judge: Any, contestant: Any) -> Figures:
    """The metrics of the model's `measure`; {} for a model without that method."""
    import torch

    trained = contestant.trained
    if not hasattr(trained.model, "measure"):
        return {}
    with torch.inference_mode():
        figures = trained.model.measure(map(trained.encode, judge.test_images(trained, MAX_TEST_IMAGES)))
    return {name: Interval(value) for name, value in figures.items()}


def speed(judge: Any, contestant: Any) -> Figures:
    """Samples per second, and the recorded speed of the training."""
    if not contestant.seconds:
        return {}
    rates = contestant.facts["train"] = judge.training_speed(contestant.trained)
    figures = {"samples_per_s": Interval(round(len(contestant) / contestant.seconds, 3))}
    return figures | {f"train_{name}": Interval(rates[name]) for name in rates if name in ("tflops", "mfu")}


BPD = (
    Column("bpd", "down", keep=14, beside=True, meaning="bits per dimension of unseen images"),
    Column("bpd|y", "down", keep=9),
    Column("nats", "down", keep=13),
    Column("nats|y", "down", keep=8),
)
SPEED = (Column("samples_per_s", "up", keep=7, cost=True), Column("train_*", "up", keep=1, cost=True))
METRICS = (
    Metric("bpd", 80, BPD, default="always", distributed=True, of_model=bpd),
    Metric("own", 90, (), default="always", of_model=measured_figures),
    Metric("speed", 100, SPEED, default="always", of_sampler=True, of_model=speed),
)
