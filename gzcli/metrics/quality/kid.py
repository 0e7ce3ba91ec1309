"""`kid…`: the kernel distance KID (Bińkowski et al. 2018, arXiv:1801.01401). It is unbiased, so it is valid
for few images."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

KERNEL_ROWS_AT_ONCE = 1000  # rows of the kernel matrix that are held in memory at once
INTERVAL_HALVES, MAX_INTERVAL_ROWS = (
    100,
    2000,
)  # random halves for an interval, and rows of each side that they come from
MAX_FEATURES = 2048  # most features: Inception's logits follow its features
SUBSET_SEED = 2020  # torch-fidelity's seed, so that the subsets are the same


def kid(
    fake: Array, real: Array, *, subsets: int = 100, size: int = 1000, seed: int = 0, intervals: bool = True
) -> Interval:
    """The mean over random subsets of the squared maximum mean discrepancy with the kernel (x·y / D + 1)³.
    The subsets are those of torch-fidelity for this seed. The interval covers the variation of the samples
    and of the subsets, but not that of the real images, which all contestants share."""
    import numpy as np

    from gzcli.metrics.interval import mean_of_draws

    fake, real = (np.asarray(f, np.float64) for f in (fake, real))
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise UsageError(f"features of shapes {fake.shape} and {real.shape} cannot be compared")
    n = min(len(fake), len(real))
    if n < 4:
        raise UsageError("a kernel distance needs at least four images in each set")
    size = min(size, n // 2)
    rng = np.random.RandomState(seed)
    draws = [[rng.choice(len(f), size, replace=False) for f in (fake, real)] for _ in range(subsets)]
    # All subsets share one kernel matrix if it is smaller than theirs together, else each has its own.
    groups = 1 if len(fake) * len(real) <= subsets * size**2 else subsets
    values = np.concatenate([_mmd2(fake, real, draws[i::groups]) for i in range(groups)])
    value = float(values.mean())
    if not intervals:
        return Interval(value)
    parts = mean_of_draws(values, signed=True), _of_halves(fake, real, seed)
    half = math.hypot(*(one.high - one.value for one in parts if one.high is not None))
    return Interval(value, value - half, value + half)


def _of_halves(fake: Array, real: Array, seed: int) -> Interval:
    """MMD² without the term of the real images, which is constant. The interval is that of `half_samples`, by
    one kernel matrix for all halves."""
    import numpy as np

    from gzcli.metrics.interval import around, subset

    n, (fake, real) = len(fake), (f[subset(len(f), MAX_INTERVAL_ROWS)] for f in (fake, real))
    rng, half = np.random.default_rng(seed), len(fake) // 2
    uses = np.zeros((INTERVAL_HALVES, len(fake)))  # which samples each half has, 0 or 1
    for line in uses:
        line[rng.choice(len(fake), half, replace=False)] = 1
    pairs = _sums((fake, uses), (fake, uses)) - uses @ _kernel(np.square(fake).sum(1), fake.shape[1])
    across = _sums((fake, uses), (real, np.ones((INTERVAL_HALVES, len(real)))))
    values = pairs / (half * (half - 1)) - 2 * across / (half * len(real))
    return around(float(values.mean()), values, (len(fake) / n) ** 0.5)


def _mmd2(fake: Array, real: Array, draws: list[list[Array]]) -> Array:
    """The unbiased estimate of MMD² for each of S subsets, [S] (Gretton et al. 2012, JMLR 13, eq. 3)."""
    import numpy as np

    m = len(draws[0][0])
    sides = []
    for i, features in enumerate((fake, real)):
        rows = np.unique([subset[i] for subset in draws])  # rows used by any subset
        uses = np.zeros((len(draws), len(rows)))  # which rows each subset uses, 0 or 1
        for line, subset in zip(uses, draws, strict=True):
            line[np.searchsorted(rows, subset[i])] = 1
        sides.append((features[rows], uses))
    within = sum(
        _sums((x, uses), (x, uses)) - uses @ _kernel(np.square(x).sum(1), x.shape[1]) for x, uses in sides
    )
    return within / (m * (m - 1)) - 2 * _sums(*sides) / m**2


def _sums(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """The sum of the kernel over all pairs of each subset, [S]."""
    import numpy as np

    (x, in_x), (y, in_y) = a, b
    sums = np.zeros(len(in_x))
    for i in range(0, len(x), KERNEL_ROWS_AT_ONCE):
        part = slice(i, i + KERNEL_ROWS_AT_ONCE)
        sums += ((in_x[:, part] @ _kernel(x[part] @ y.T, x.shape[1])) * in_y).sum(1)
    return sums


def _kernel(products: Array, width: int) -> Array:
    base = products / width + 1
    return base * base * base  # `**` takes ten times as long


def standardised(fake: Array, real: Array) -> tuple[Array, Array]:
    """Both sides, standardised by the mean and standard deviation of the real features. The features of a
    network trained on the set have no natural scale, and the kernel is a cubic polynomial."""
    import numpy as np

    fake, real = (np.asarray(side, np.float64) for side in (fake, real))
    mean, deviation = real.mean(0), real.std(0)
    deviation[deviation == 0] = 1
    return (fake - mean) / deviation, (real - mean) / deviation


def compare(name: str, subsets: int, fake: Array, real: Array, intervals: bool) -> Figures:
    if name == "kid_lenet":
        fake, real = standardised(fake, real)
    fake, real = fake[:, :MAX_FEATURES], real[:, :MAX_FEATURES]
    return {name: kid(fake, real, subsets=subsets, seed=SUBSET_SEED, intervals=intervals)}


def kernel_metric(
    name: str, order: int, features: str, rank: int, *, subsets: int = 40, **options: Any
) -> Metric:
    meaning = "kernel Inception distance" if name == "kid" else ""
    how: dict[str, Any] = {"rank": rank, "signed": True, "meaning": meaning, "beside": name == "kid_lenet"}
    column = Column(name, "down", keep=17, **how)
    return Metric(name, order, (column,), features, compare=partial(compare, name, subsets), **options)


METRICS = (
    kernel_metric("kid_lenet", 30, "lenet", 7, default="always"),
    kernel_metric("kid_lite", 230, "lite", 8, default="colour"),
    kernel_metric("kid", 310, "inception", 9, subsets=100),
    kernel_metric("kid_dinov2", 410, "dinov2", 10),
    kernel_metric("kid_clip", 510, "clip", 11),
)
