"""Figures by nearest neighbours in a feature space: `prc_…`, precision, recall, density and coverage; and
`memory`, whether samples are copies of training images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gzcli.metrics.metric import Column, Figures, Interval, Metric

if TYPE_CHECKING:
    import numpy as np

NEAR, FAR = 3, 5  # whose distance is the radius: of precision and recall, of density and coverage
DRAWS = 12  # halves of the images for the interval of the density
KEEP = {"precision": 16, "recall": 15, "coverage": 6, "density": 3}


def compare(features: str, fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    """Both sides are taken in equal numbers, on which these figures depend. Three are shares of the images,
    whose intervals take the neighbours as given; that of the density is by halves of the images."""
    from gzcli.metrics.interval import half_samples, not_negative, share, subset
    from gzcli.metrics.manifold import prdc

    n = min(len(fake), len(real))
    fake, real = (rows[subset(len(rows), n)] for rows in (fake, real))
    near, far = prdc(fake, real, k=NEAR), prdc(fake, real, k=FAR)
    shares = {"precision": near["precision"], "recall": near["recall"], "coverage": far["coverage"]}
    figures = {f"{figure}_{features}": share(value, n) for figure, value in shares.items()}
    density = Interval(far["density"])
    if intervals:
        density = half_samples(lambda a, b: prdc(a, b, k=FAR)["density"], fake, real, draws=DRAWS)
    return figures | {f"density_{features}": not_negative(density)}


def memory(judge: Any, images: Any) -> Figures:
    """`authenticity`, the share of samples that are farther from a training image than it is from the next,
    and `duplicates`, the share as close to one as 1 % of the test images are, which are the floor."""
    from gzcli.metrics.interval import share
    from gzcli.metrics.manifold import authenticity, duplicates

    sets = (images, judge.train_images, judge.real.of("test"))
    made, train, held_out = (each.features(judge.memory_space) for each in sets)
    values = {"authenticity": authenticity(made, train), "duplicates": duplicates(made, train, held_out)}
    return {name: share(value, len(made)) for name, value in values.items()}


def metric(order: int, features: str, **more: Any) -> Metric:
    columns = tuple(Column(f"{figure}_{features}", "up", keep=keep) for figure, keep in KEEP.items())
    return Metric(f"prc_{features}", order, columns, features, compare=partial(compare, features), **more)


MEMORY = (Column("authenticity", "up"), Column("duplicates", "down"))
METRICS = (
    metric(40, "lenet", default="always"),
    Metric("memory", 110, MEMORY, floor="test", of_images=memory),
    metric(240, "lite"),
    metric(420, "dinov2"),
    metric(520, "clip"),
)
