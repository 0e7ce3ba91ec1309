"""`own`: the figures that a model computes of itself on test images."""

from __future__ import annotations

from typing import Any

from gzcli.metrics.metric import Figures, Interval, Metric

IMAGES = 10_000  # test images at most


def of_model(judge: Any, contestant: Any) -> Figures:
    """The figures of the model's `measure`; {} of a model without one."""
    import torch

    trained = contestant.trained
    if not hasattr(trained.model, "measure"):
        return {}
    with torch.inference_mode():
        figures = trained.model.measure(map(trained.seen, judge.test_images(trained, IMAGES)))
    return {name: Interval(value) for name, value in figures.items()}


METRICS = (Metric("own", 90, (), default="always", of_model=of_model),)
