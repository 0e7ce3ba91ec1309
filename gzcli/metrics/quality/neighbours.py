"""Metrics by nearest neighbours in a feature space: `prc_…`, precision, recall, density and coverage; and
`memory`, whether samples are copies of training images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

RADIUS_NEIGHBOUR, DENSITY_NEIGHBOUR = (
    3,
    5,
)  # number of the neighbour that sets the radius: precision and recall, density and coverage
INTERVAL_PARTS = 12  # random parts of the samples, for the intervals
# Share of the samples in such a part. With halves, intervals of recall were too narrow if modes are rare.
FRACTION = 0.8
COLUMN_PRIORITY = {"precision": 16, "recall": 15, "coverage": 6, "density": 3}
LEAGUE_PRIORITY = 10  # the table of a league shows metrics whose priority is higher
DUPLICATE_QUANTILE = 0.01  # share of held-out images that counts as duplicates of training images
BALL_SHRINKAGE = 1 - 1e-9  # rows on a ball's surface are outside, however their distances were rounded
MAX_IMAGES_PER_PART = 5000  # images in a part, for which the distances of all pairs are computed
MAX_PARTS = 3  # most parts of the samples, and of the real images
DISTANCES_AT_ONCE = 2**24  # distances in memory at a time


def compare(features: str, fake: Array, real: Array, intervals: bool) -> Figures:
    """The means over disjoint parts of both sides. All parts have equally many images, because these metrics
    depend on the numbers. With a single part, its choice of real images changes precision by .02.

    The intervals come from random parts of the samples, as by `half_samples`. Those of the three proportions
    are at least as wide as the interval of a proportion of as many images as there are samples. Parts of the
    real images that meet the same samples do not vary independently. If a mode has few samples, these decide
    whether its real images are recalled, so recall varies more than a proportion.
    """
    from gzcli.metrics.interval import around, not_negative, parts, random_parts, share, wider

    n = min(len(fake), len(real), MAX_IMAGES_PER_PART)
    of_fake, of_real = parts(fake, n, MAX_PARTS), parts(real, n, MAX_PARTS)
    more = max(len(of_fake), len(of_real))
    pairs = [(of_fake[i % len(of_fake)], of_real[i % len(of_real)]) for i in range(more)]
    each = [prdc(*pair) for pair in pairs]
    values = {name: sum(figures[name] for figures in each) / more for name in each[0]}
    density = Interval(values.pop("density"))
    shares = {name: share(value, n * len(of_fake)) for name, value in values.items()}
    if intervals:
        drawn = [prdc(rows, of_real[0]) for (rows,) in random_parts(of_fake[:1], INTERVAL_PARTS, FRACTION)]
        scale = (FRACTION / (1 - FRACTION) / len(of_fake)) ** 0.5

        def spread(name: str, figure: Interval) -> Interval:
            return around(figure.value, [figures[name] for figures in drawn], scale)

        density = not_negative(spread("density", density))
        shares = {name: wider(figure, spread(name, figure)) for name, figure in shares.items()}
    return {f"{name}_{features}": figure for name, figure in (shares | {"density": density}).items()}


def memory(judge: Any, images: Any) -> Figures:
    """`authenticity` and `duplicates` of samples. The floor of `duplicates` is 1 %, its value for test
    images."""
    from gzcli.metrics.interval import share

    sets = (images, judge.train_images, judge.real.of("test"))
    fake, train, held_out = (images_of_set.features(judge.memory_space) for images_of_set in sets)
    values = {"authenticity": authenticity(fake, train), "duplicates": duplicates(fake, train, held_out)}
    return {name: share(value, len(fake)) for name, value in values.items()}


def prdc(
    fake: Array, real: Array, *, near: int = RADIUS_NEIGHBOUR, far: int = DENSITY_NEIGHBOUR
) -> dict[str, float]:
    """Precision and recall by the `near` neighbour (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1–3), and
    density and coverage by the `far` one (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 5), each a
    proportion except density, which may exceed 1."""
    import numpy as np

    fake, real = paired(fake, real)
    most = max(near, far)
    if min(len(fake), len(real)) <= most:
        raise UsageError(f"precision and recall need more than {most} images in each set")
    # the first neighbour of a row is the row itself
    of_real, of_fake = (nearest_rows(rows, rows, k=most + 1)[0] * BALL_SHRINKAGE for rows in (real, fake))
    # the balls that contain a sample
    precise, inside = np.zeros(len(fake), bool), np.empty(len(fake), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _blocks(fake, real):
        in_far = distances < of_real[:, far]
        precise[rows] = (distances < of_real[:, near]).any(1)
        inside[rows] = in_far.sum(1)
        covered |= in_far.any(0)
        recalled |= (distances < of_fake[rows, near, None]).any(0)
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "density": float(inside.mean() / far),
        "coverage": float(covered.mean()),
    }


def nearest_rows(queries: Array, bank: Array, *, k: int = 1) -> tuple[Array, Array]:
    """The Euclidean distances [N, k] to the nearest rows, in ascending order, and the rows' indices, int64
    [N, k]."""
    import numpy as np

    queries, bank = paired(queries, bank)
    if len(bank) < k:
        raise UsageError(f"{k} nearest neighbours need at least {k} images, but there are {len(bank)}")
    distances_to, places = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for rows, distances in _blocks(queries, bank):
        places[rows] = np.argpartition(distances, k - 1, axis=1)[:, :k]
        # The fast form of the distance, ‖a‖² + ‖b‖² − 2 a·b, is inexact where rows are close to each other.
        for j in range(k):
            distances_to[rows, j] = np.linalg.norm(queries[rows] - bank[places[rows, j]], axis=1)
    order = np.argsort(distances_to, axis=1, kind="stable")
    return np.take_along_axis(distances_to, order, 1), np.take_along_axis(places, order, 1)


def authenticity(fake: Array, train: Array) -> float:
    """The share of samples that are farther from their nearest training image than that image is from its
    nearest other training image (Alaa et al. 2022, arXiv:2102.08921, §4.3). Copies have the value 0."""
    import numpy as np

    distances, places = nearest_rows(fake, train)
    closest, inverse = np.unique(places[:, 0], return_inverse=True)
    train = paired(train, train)[0]
    # the second of the two nearest rows, because the first is the image itself; a duplicate is at 0
    apart = nearest_rows(train[closest], train, k=2)[0][:, 1]
    return float((distances[:, 0] > apart[inverse]).mean())


def duplicates(fake: Array, train: Array, held_out: Array) -> float:
    """The share of samples that are as close to a training image as the closest 1 % of held-out real images
    are. Held-out images have the value 0.01."""
    import numpy as np

    threshold = np.quantile(nearest_rows(held_out, train)[0], DUPLICATE_QUANTILE)
    return float((nearest_rows(fake, train)[0] <= threshold).mean())


def paired(a: Array, b: Array) -> tuple[Array, Array]:
    """Both sides as rows of floats (single precision for bytes). Images [N, C, H, W] are flattened."""
    import numpy as np

    if not len(a) or not len(b):
        raise UsageError("both sets must contain images")
    a, b = (np.asarray(f).reshape(len(f), -1) for f in (a, b))
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"rows of widths {a.shape[1]} and {b.shape[1]} cannot be compared")
    kind = np.result_type(a, b, np.float32)
    return a.astype(kind, copy=False), b.astype(kind, copy=False)


def _blocks(queries: Array, bank: Array) -> Iterator[tuple[slice, Array]]:
    """Yields the distances [B, M] of a block of queries to the whole bank, with the rows of the queries."""
    import numpy as np

    squares, size = np.square(bank).sum(1), max(1, DISTANCES_AT_ONCE // len(bank))
    for i in range(0, len(queries), size):
        some = queries[i : i + size]
        squared = np.square(some).sum(1)[:, None] + squares - 2 * some @ bank.T
        yield slice(i, i + size), np.sqrt(squared.clip(0))


def metric(order: int, features: str, **options: Any) -> Metric:
    columns = tuple(
        Column(f"{figure}_{features}", "up", keep=keep, beside=features == "lenet" and keep > LEAGUE_PRIORITY)
        for figure, keep in COLUMN_PRIORITY.items()
    )
    how: dict[str, Any] = {"fewest": 2 * (DENSITY_NEIGHBOUR + 1), "compare": partial(compare, features)}
    return Metric(f"prc_{features}", order, columns, features, **how, **options)


MEMORY_COLUMNS = (Column("authenticity", "up"), Column("duplicates", "down"))
METRICS = (
    metric(40, "lenet", default="always"),
    Metric("memory", 110, MEMORY_COLUMNS, floor="test", of_images=memory),
    metric(240, "lite"),
    metric(420, "dinov2"),
    metric(520, "clip"),
)
