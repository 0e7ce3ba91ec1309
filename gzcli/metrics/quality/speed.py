"""`speed`: how fast a model draws samples, and how fast it was trained."""

from __future__ import annotations

from typing import Any

from gzcli.metrics.metric import Column, Figures, Interval, Metric


def of_model(judge: Any, contestant: Any) -> Figures:
    """Samples a second, and what is known of the training's use of the machine."""

    if not contestant.seconds:
        return {}
    rates = contestant.facts["train"] = judge.training_speed(contestant.trained)
    figures = {"samples_per_s": Interval(round(len(contestant) / contestant.seconds, 3))}
    return figures | {f"train_{name}": Interval(rates[name]) for name in rates if name in ("tflops", "mfu")}


METRICS = (
    Metric(
        "speed",
        100,
        (Column("samples_per_s", "up", keep=7, cost=True), Column("train_*", "up", keep=1, cost=True)),
        default="always",
        of_sampler=True,
        of_model=of_model,
    ),
)
