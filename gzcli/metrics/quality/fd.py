"""`fd…` and `fid`: the Fréchet distance of Gaussians fitted to two sets of features (Heusel et al. 2017,
arXiv:1706.08500, eq. 6), and two forms of it for few images."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from gzcli.core.errors import UsageError
from gzcli.metrics.metric import Array, Column, Figures, Metric

WIDE = 256  # features from which an interval has fewer draws: each takes about a second
DRAWS, FEW_DRAWS = 50, 12  # halves of the images for the interval
INFINITY_DRAWS = 20


class Moments(NamedTuple):
    mean: Array
    covariance: Array


def moments(features: Array) -> Moments:
    import numpy as np

    features = rows_of(features)
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def rows_of(features: Array) -> Array:
    """Features [N, D] in float64, of two rows or more, all finite. Raises UsageError for others."""
    import numpy as np

    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UsageError(f"features of the shape {features.shape} are not rows")
    if len(features) < 2:
        raise UsageError("a Fréchet distance needs at least two images on each side")
    if not np.isfinite(features).all():
        raise UsageError("some features are not finite")
    return features


def check_widths(width: int, other_width: int) -> None:
    if width != other_width:
        raise UsageError(f"features of widths {width} and {other_width} cannot be compared")


def frechet_of_moments(a: Moments, b: Moments) -> float:
    import numpy as np

    check_widths(len(a.mean), len(b.mean))
    difference = a.mean - b.mean
    # Σ₁Σ₂ has the eigenvalues of the symmetric matrix Σ₁^½ Σ₂ Σ₁^½. They are real and, but for rounding, not
    # negative: the square root needs no complex numbers, and no ε on the diagonal of singular covariances.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def frechet_distance(f1: Array, f2: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features [N1, D] and [N2, D], in float64."""
    import numpy as np

    f1, f2 = rows_of(f1), rows_of(f2)
    if max(len(f1), len(f2)) >= f1.shape[1] or f1.shape[1] != f2.shape[1]:
        return frechet_of_moments(moments(f1), moments(f2))
    # With Σ = AᵀA, tr (Σ₁Σ₂)^½ is the sum of the singular values of A₁A₂ᵀ, [N1, N2]: the same distance, in
    # less time where there are fewer rows than features.
    a1, a2 = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (f1, f2))
    difference = f1.mean(0) - f2.mean(0)
    cross = np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()
    return float(difference @ difference + np.square(a1).sum() + np.square(a2).sum() - 2 * cross)


def pca_frechet(fake: Array, real: Array, *, dims: int = 64) -> float:
    """The Fréchet distance in the first principal components of the real features. The noise of a covariance
    grows with its width: with fewer images than features it hides the differences."""
    import numpy as np
    from scipy.linalg import eigh

    fake, covariance = rows_of(fake), moments(real).covariance
    width = len(covariance)
    check_widths(fake.shape[1], width)
    axes = eigh(covariance, subset_by_index=(max(0, width - dims), width - 1))[1]
    return frechet_distance(fake @ axes, np.asarray(real, np.float64) @ axes)


def frechet_infinity(fake: Array, real: Array, *, points: int = 15, seed: int = 0) -> float:
    """The Fréchet distance of infinitely many images: the intercept of the line that is fitted to the
    distances of n rows over 1/n (Chong & Forsyth 2020, arXiv:1911.07023, §3). The subsets take the same
    share of both sides, because the bias of both falls as 1/n; the paper keeps the real side whole."""
    import numpy as np

    n = min(len(fake), len(real))
    if n < 10:
        raise UsageError("an extrapolated Fréchet distance needs at least ten images on each side")
    # Below two rows a feature the distance does not fall as 1/n yet: half of the rows at most are left out.
    least = max(0.1, min(0.5, 2 * np.shape(real)[1] / n))
    rng, shares = np.random.default_rng(seed), np.linspace(least, 1, points)
    distances = [
        frechet_distance(*(f[rng.permutation(len(f))[: round(share * len(f))]] for f in (fake, real)))
        for share in shares
    ]
    return float(np.polynomial.polynomial.polyfit(1 / shares, distances, 1)[0])


def compare(
    name: str, distance: Any, width: int, draws: int, fake: Array, real: Array, intervals: bool
) -> Figures:
    from gzcli.metrics.interval import halves, not_negative

    figure = halves(distance, fake[:, :width], real[:, :width], draws=draws, intervals=intervals)
    return {name: figure if name == "fd_inf" else not_negative(figure)}


def to_moments(metric: Metric, real: Moments, fake: Array) -> Figures:
    """The distance of features [N, D] to given moments of real images. Its interval is that of the samples
    alone."""
    from gzcli.metrics.interval import half_samples, not_negative

    fake = fake[:, : metric.width]
    draws = FEW_DRAWS if fake.shape[1] >= WIDE else DRAWS
    distance = half_samples(lambda rows: frechet_of_moments(moments(rows), real), fake, draws=draws)
    return {metric.name: not_negative(distance)}


def metric(
    name: str, order: int, features: str, width: int, rank: int | None, distance: Any, **options: Any
) -> Metric:
    draws = INFINITY_DRAWS if name == "fd_inf" else FEW_DRAWS if width >= WIDE else DRAWS
    keep, signed, meaning = 18 if name == "fid" else 19, name == "fd_inf", MEANINGS.get(name, "")
    columns = [Column(name, "down", keep=keep, rank=rank, signed=signed, meaning=meaning)]
    if name == "fd":
        columns.append(Column("fd_rot", "down", keep=19, rank=2))
    compare_features = partial(compare, name, distance, width, draws)
    raw = width if distance is frechet_distance else None
    return Metric(name, order, tuple(columns), features, raw, compare=compare_features, **options)


MEANINGS = {"fd": "Fréchet distance in features of the set's own LeNet", "fid": "Fréchet Inception distance"}
METRICS = (
    metric("fd", 10, "lenet", 64, 1, frechet_distance, default="always"),
    metric("fd_inf", 20, "lenet", 64, None, frechet_infinity),
    metric("fd_lite", 210, "lite", 1280, 11, frechet_distance),
    metric("fd_lite_pca", 220, "lite", 1280, None, pca_frechet),
    metric("fid", 300, "inception", 2048, 3, frechet_distance),
    metric("fd_dinov2", 400, "dinov2", 1024, 4, frechet_distance),
    metric("fd_clip", 500, "clip", 512, 5, frechet_distance),
)
