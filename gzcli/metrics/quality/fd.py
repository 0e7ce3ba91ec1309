"""`fd…` and `fid`: the Fréchet distance of Gaussians fitted to two sets of features (Heusel et al. 2017,
arXiv:1706.08500, eq. 6). Also two variants for few images, and one within classes."""

from __future__ import annotations

from functools import partial
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.metrics.frechet import (
    Moments,
    check_widths,
    frechet_distance,
    frechet_of_moments,
    moments,
    rows_of,
)
from gzcli.metrics.metric import Array, Column, Figures, Metric

WIDE_FEATURES = (
    256  # from this number of features, an interval has fewer draws, because each takes about a second
)
INTERVAL_SPLITS, FEW_DRAWS = 50, 12  # splits of the images into halves, for the interval
INFINITY_DRAWS = CLASS_DRAWS = 20
FEWEST_INFINITY = 10  # images in each set
EXTRAPOLATION_POINTS = 15  # numbers of images from which `fd_inf` is extrapolated
# A class has few images, so terms of two rows dominate its distance. Halves would be up to √3 times too wide.
CLASS_FRACTION = 0.9


def pca_frechet(fake: Array, real: Array, *, dims: int = 64) -> float:
    """The Fréchet distance in the first principal components of the real features. The noise of a covariance
    grows with the number of features. With fewer images than features, it hides the differences."""
    import numpy as np
    from scipy.linalg import eigh

    fake, covariance = rows_of(fake), moments(real).covariance
    width = len(covariance)
    check_widths(fake.shape[1], width)
    axes = eigh(covariance, subset_by_index=(max(0, width - dims), width - 1))[1]
    return frechet_distance(fake @ axes, np.asarray(real, np.float64) @ axes)


def frechet_infinity(fake: Array, real: Array, *, seed: int = 0) -> float:
    """The Fréchet distance for infinitely many images: the intercept of a line fitted to the distances of n
    rows over 1/n (Chong & Forsyth 2020, arXiv:1911.07023, §3). Subsets take the same fraction of both sides,
    because the bias of both decreases as 1/n. The paper uses all real images each time."""
    import numpy as np

    n = min(len(fake), len(real))
    if n < FEWEST_INFINITY:
        raise UsageError("an extrapolated Fréchet distance needs at least ten images in each set")
    # Below two rows a feature the distance does not fall as 1/n yet: half of the rows at most are left out.
    least = max(0.1, min(0.5, 2 * np.shape(real)[1] / n))
    rng, shares = np.random.default_rng(seed), np.linspace(least, 1, EXTRAPOLATION_POINTS)
    distances = [
        frechet_distance(*(f[rng.permutation(len(f))[: round(share * len(f))]] for f in (fake, real)))
        for share in shares
    ]
    return float(np.polynomial.polynomial.polyfit(1 / shares, distances, 1)[0])


def within_classes(fake: Array, real: Array, fake_classes: Array, real_classes: Array) -> float:
    """Σ_k share_k · FD(samples of class k, real images of class k). The shares are those of the real images,
    so drawing the classes evenly is no advantage. For a class with fewer than two samples, all samples are
    compared. A class with fewer than two real images is ignored."""
    import numpy as np

    total, count = 0.0, 0
    for k, size in zip(*np.unique(real_classes, return_counts=True), strict=True):
        if size < 2:
            continue
        samples = fake[fake_classes == k]
        samples = samples if len(samples) > 1 else fake
        total += size * frechet_distance(samples, real[real_classes == k])
        count += size
    if not count:
        raise UsageError("no class has at least two real images")
    return float(total / count)


def within(fake: Array, real: Array, fake_classes: Array, real_classes: Array, intervals: bool) -> Figures:
    import numpy as np

    from gzcli.metrics.interval import halves, not_negative

    def distance(a: Array, b: Array) -> float:  # rows with their class in the last column
        return within_classes(a[:, :-1], b[:, :-1], a[:, -1], b[:, -1])

    sides = (np.column_stack(side) for side in ((fake, fake_classes), (real, real_classes)))
    how: dict[str, Any] = {"draws": CLASS_DRAWS, "fraction": CLASS_FRACTION, "intervals": intervals}
    return {"fd_class": not_negative(halves(distance, *sides, **how))}


def compare(
    name: str, distance: Any, width: int, draws: int, fake: Array, real: Array, intervals: bool
) -> Figures:
    from gzcli.metrics.interval import halves, not_negative

    figure = halves(distance, fake[:, :width], real[:, :width], draws=draws, intervals=intervals)
    return {name: figure if name == "fd_inf" else not_negative(figure)}


def to_moments(metric: Metric, real: Moments, fake: Array) -> Figures:
    """The Fréchet distance of features [N, D] to given moments of real images."""
    from gzcli.metrics.interval import halves, not_negative

    fake = fake[:, : metric.width]
    draws = FEW_DRAWS if fake.shape[1] >= WIDE_FEATURES else INTERVAL_SPLITS
    distance = halves(lambda rows, real: frechet_of_moments(moments(rows), real), fake, real, draws=draws)
    return {metric.name: not_negative(distance)}


def distance_metric(
    name: str, order: int, features: str, width: int, rank: int | None, distance: Any, **options: Any
) -> Metric:
    draws = INFINITY_DRAWS if name == "fd_inf" else FEW_DRAWS if width >= WIDE_FEATURES else INTERVAL_SPLITS
    keep, signed, meaning = 18 if name == "fid" else 19, name == "fd_inf", MEANINGS.get(name, "")
    how: dict[str, Any] = {"rank": rank, "signed": signed, "meaning": meaning, "beside": name == "fd_second"}
    columns = [Column(name, "down", keep=keep, **how)]
    if name == "fd":
        columns.append(Column("fd_rot", "down", keep=19, rank=2))
    compare_features = partial(compare, name, distance, width, draws)
    raw = width if distance is frechet_distance else None
    return Metric(name, order, tuple(columns), features, raw, compare=compare_features, **options)


MEANINGS = {
    "fd": "Fréchet distance in features of the set's own LeNet",
    "fd_second": "Fréchet distance in features of a second network, which was not used to tune recipes",
    "fid": "Fréchet Inception distance",
}
FD_CLASS = Column("fd_class", "down", keep=5, meaning="Fréchet distance within predicted classes")
METRICS = (
    distance_metric("fd", 10, "lenet", 64, 1, frechet_distance, default="always"),
    distance_metric("fd_second", 15, "second", 64, 3, frechet_distance, default="always"),
    distance_metric("fd_inf", 20, "lenet", 64, None, frechet_infinity, fewest=2 * FEWEST_INFINITY),
    Metric("fd_class", 25, (FD_CLASS,), "lenet", default="always", within=within),
    distance_metric("fd_lite", 210, "lite", 1280, 12, frechet_distance),
    distance_metric("fd_lite_pca", 220, "lite", 1280, None, pca_frechet),
    distance_metric("fid", 300, "inception", 2048, 4, frechet_distance),
    distance_metric("fd_dinov2", 400, "dinov2", 1024, 5, frechet_distance),
    distance_metric("fd_clip", 500, "clip", 512, 6, frechet_distance),
)
