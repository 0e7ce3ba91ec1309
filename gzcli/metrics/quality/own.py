"""`own`: the figures that a model computes of itself on test images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gzcli.metrics.metric import Metric

if TYPE_CHECKING:
    from gzcli.metrics.interval import Figures

IMAGES = 10_000  # test images at most


def of_model(judge: Any, contestant: Any) -> Figures:
    """The figures of the model's `measure`; {} of a model without one."""
    import torch

    from gzcli.metrics.interval import Interval

    trained = contestant.trained
    if not hasattr(trained.model, "measure"):
        return {}
    with torch.inference_mode():
        found = trained.model.measure(map(trained.seen, judge.test_images(trained, IMAGES)))
    return {name: Interval(value) for name, value in found.items()}


METRICS = (Metric("own", 90, (), default="always", of_model=of_model),)
