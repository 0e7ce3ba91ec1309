"""`prc_…`: precision, recall, density and coverage by nearest neighbours in a feature space."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gzcli.metrics.metric import Column, Figures, Interval, Metric

if TYPE_CHECKING:
    import numpy as np

NEAR, FAR = (
    3,
    5,
)  # the neighbour whose distance is the radius: of precision and recall, of density and coverage
DRAWS = 12  # halves of the images for the interval of the density


def compare(name: str, fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    """Both sides are taken in equal numbers, on which these figures depend. Three are shares of the images,
    whose intervals take the neighbours as given; that of the density is by halves of the images."""
    from gzcli.metrics.interval import half_samples, not_negative, share, subset
    from gzcli.metrics.manifold import prdc

    n = min(len(fake), len(real))
    fake, real = (rows[subset(len(rows), n)] for rows in (fake, real))
    near, far = prdc(fake, real, k=NEAR), prdc(fake, real, k=FAR)
    shares = {"precision": near["precision"], "recall": near["recall"], "coverage": far["coverage"]}
    figures = {name.replace("prc", figure): share(value, n) for figure, value in shares.items()}
    density = Interval(far["density"])
    if intervals:
        density = half_samples(lambda a, b: prdc(a, b, k=FAR)["density"], fake, real, draws=DRAWS)
    return figures | {name.replace("prc", "density"): not_negative(density)}


def metric(order: int, features: str, *, default: bool = False) -> Metric:
    keep = {"precision": 16, "recall": 15, "coverage": 6, "density": 3}
    return Metric(
        f"prc_{features}",
        order,
        tuple(Column(f"{figure}_{features}", "up", keep=number) for figure, number in keep.items()),
        features,
        default="always" if default else "",
        compare=partial(compare, f"prc_{features}"),
    )


METRICS = (metric(40, "lenet", default=True), metric(240, "lite"), metric(420, "dinov2"), metric(520, "clip"))
