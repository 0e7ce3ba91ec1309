"""`memory`: whether samples are copies of training images, with held-out test images as the floor."""

from __future__ import annotations

from typing import Any

from gzcli.metrics.metric import Column, Figures, Metric


def of_images(judge: Any, images: Any) -> Figures:
    """`authenticity`, the share of samples that are farther from a training image than it is from the next,
    and `duplicates`, the share as close to one as 1 % of the test images are."""
    from gzcli.metrics.interval import share
    from gzcli.metrics.manifold import authenticity, duplicates

    sets = (images, judge.train_images, judge.real.of("test"))
    made, train, held_out = (each.features(judge.memory_space) for each in sets)
    values = {"authenticity": authenticity(made, train), "duplicates": duplicates(made, train, held_out)}
    return {name: share(value, len(made)) for name, value in values.items()}


METRICS = (
    Metric(
        "memory",
        110,
        (Column("authenticity", "up"), Column("duplicates", "down")),
        floor="test",
        of_images=of_images,
    ),
)
