"""`swd`: the sliced Wasserstein distance (Rabin et al. 2011; Bonneel et al. 2015, JMIV 51:22)."""

from __future__ import annotations

from functools import partial

from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric
from gzcli.metrics.quality.neighbours import paired

INTERVAL_SPLITS, PROJECTIONS = (
    20,
    64,
)  # splits of the images into halves, for the interval, and directions for each


def compare(fake: Array, real: Array, intervals: bool) -> Figures:
    """The distance in units of a pixel's range: images that are all lighter by a fraction s have distance
    s."""
    from gzcli.metrics.interval import halves, moved_rows, not_negative

    value = sliced_wasserstein(fake, real) / 255
    if not intervals:
        return {"swd": Interval(value)}
    fewer = partial(sliced_wasserstein, projections=PROJECTIONS)
    return {"swd": not_negative(moved_rows(halves(fewer, fake, real, draws=INTERVAL_SPLITS), value, 1 / 255))}


def sliced_wasserstein(fake: Array, real: Array, *, projections: int = 512) -> float:
    """The square root of the mean W₂² of projections of rows [N, D] and [M, D], over random directions, in
    the unit of the rows. Images are flattened."""
    import numpy as np

    rows = paired(fake, real)
    directions = np.random.default_rng(0).normal(size=(rows[0].shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    a, b = (np.sort(side @ directions.astype(side.dtype), axis=0).astype(np.float64) for side in rows)
    # W₂² is ∫ (F⁻¹ − G⁻¹)² over the steps that both quantile functions share, in units of 1 / (N M)
    n, m = len(a), len(b)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    start, width = edges[:-1], np.diff(edges) / (n * m)
    return float(np.sqrt((width @ np.square(a[start // m] - b[start // n])).mean()))


SWD = (Column("swd", "down", keep=4, rank=13),)
METRICS = (Metric("swd", 50, SWD, "pixels", default="always", compare=compare),)
