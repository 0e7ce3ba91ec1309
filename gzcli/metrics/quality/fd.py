"""`fd…` and `fid`: the Fréchet distance of Gaussians that are fitted to two sets of features (Heusel et al.
2017, arXiv:1706.08500, eq. 6), and two forms of it that hold where there are few images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gzcli.metrics.metric import Column, Figures, Metric

if TYPE_CHECKING:
    import numpy as np

    from gzcli.metrics.frechet import Moments

WIDE = 256  # features from which an interval has fewer draws: each takes about a second
DRAWS, FEW_DRAWS = 50, 12  # halves of the images for the interval
INFINITY_DRAWS = 20


def raw(name: str, width: int, fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    from gzcli.metrics.frechet import frechet_distance
    from gzcli.metrics.interval import halves, not_negative

    draws = FEW_DRAWS if min(width, fake.shape[1]) >= WIDE else DRAWS
    sides = (rows[:, :width] for rows in (fake, real))
    return {name: not_negative(halves(frechet_distance, *sides, draws=draws, intervals=intervals))}


def to_moments(metric: Metric, fake: np.ndarray, real: Moments) -> Figures:
    """The distance of features [N, D] to a mean and a covariance, of the real images of which no more is
    known. Its interval is that of the samples alone."""
    from gzcli.metrics.frechet import frechet_of_moments, moments
    from gzcli.metrics.interval import half_samples, not_negative

    fake = fake[:, : metric.width]
    draws = FEW_DRAWS if fake.shape[1] >= WIDE else DRAWS
    distance = half_samples(lambda rows: frechet_of_moments(moments(rows), real), fake, draws=draws)
    return {metric.name: not_negative(distance)}


def infinity(fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    from gzcli.metrics.frechet import frechet_infinity
    from gzcli.metrics.interval import halves

    return {"fd_inf": halves(frechet_infinity, fake, real, draws=INFINITY_DRAWS, intervals=intervals)}


def pca(fake: np.ndarray, real: np.ndarray, intervals: bool) -> Figures:
    from gzcli.metrics.frechet import pca_frechet
    from gzcli.metrics.interval import halves, not_negative

    distance = halves(pca_frechet, fake, real, draws=FEW_DRAWS, intervals=intervals)
    return {"fd_lite_pca": not_negative(distance)}


def metric(
    name: str, order: int, features: str, width: int, rank: int, meaning: str = "", **more: Any
) -> Metric:
    column = Column(name, "down", keep=18 if name == "fid" else 19, rank=rank, meaning=meaning)
    rotated = (Column("fd_rot", "down", keep=19, rank=2),) if name == "fd" else ()
    return Metric(name, order, (column, *rotated), features, width, compare=partial(raw, name, width), **more)


LENET = "Fréchet distance in features of the set's own LeNet"
INCEPTION = "Fréchet Inception distance"
METRICS = (
    metric("fd", 10, "lenet", 64, 1, LENET, default="always"),
    Metric("fd_inf", 20, (Column("fd_inf", "down", keep=19, signed=True),), "lenet", compare=infinity),
    metric("fd_lite", 210, "lite", 1280, 11),
    Metric("fd_lite_pca", 220, (Column("fd_lite_pca", "down", keep=19),), "lite", compare=pca),
    metric("fid", 300, "inception", 2048, 3, INCEPTION),
    metric("fd_dinov2", 400, "dinov2", 1024, 4),
    metric("fd_clip", 500, "clip", 512, 5),
)
