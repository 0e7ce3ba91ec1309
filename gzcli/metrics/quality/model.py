"""Figures of a model itself: `bpd`, the likelihood of test images; `own`, what it measures of itself; and
`speed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gzcli.metrics.metric import Figures, Interval

IMAGES = 10_000  # test images that a model measures itself on, at most


def bpd(judge: Any, contestant: Any) -> Figures:
    """The likelihood, in nats of binary images; that of log p(x | y) ends in `|y`. Latents have none of
    pixels; an ODE, which takes long, gives it only where metrics are named."""
    trained = contestant.trained
    kind = None if trained.space else trained.model.likelihood
    if kind not in ("exact", "bound") and not (kind == "ode" and judge.named):
        return {}
    likelihood = contestant.facts["likelihood"] = judge.likelihood(trained)
    binary = contestant.levels == 2
    unit, mark = ("nats", "") if binary else ("bpd", judge.mark(contestant.levels))

    def of(part: Mapping[str, float]) -> Interval:
        half = 1.96 * part["se"] / (1 if binary else judge.values * np.log(2))
        return Interval(part[unit], part[unit] - half, part[unit] + half)

    if not likelihood["given_labels"]:
        return {unit + mark: of(likelihood)}
    marginal = likelihood["marginal"]
    return {f"{unit}|y{mark}": of(likelihood)} | ({unit + mark: of(marginal)} if marginal else {})


def own(judge: Any, contestant: Any) -> Figures:
    """The figures of the model's `measure`; {} of a model without one."""
    trained = contestant.trained
    if not hasattr(trained.model, "measure"):
        return {}
    with torch.inference_mode():
        figures = trained.model.measure(map(trained.seen, judge.test_images(trained, IMAGES)))
    return {name: Interval(value) for name, value in figures.items()}


def speed(judge: Any, contestant: Any) -> Figures:
    """Samples a second, and what is known of the training's use of the machine."""
    if not contestant.seconds:
        return {}
    rates = contestant.facts["train"] = judge.training_speed(contestant.trained)
    figures = {"samples_per_s": Interval(round(len(contestant) / contestant.seconds, 3))}
    return figures | {f"train_{name}": Interval(rates[name]) for name in rates if name in ("tflops", "mfu")}
