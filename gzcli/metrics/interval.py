"""Metrics with 95 % intervals, by resampling the images from which they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from gzcli.core.errors import UsageError
from gzcli.metrics.metric import Interval

UPPER_QUANTILE = 0.975  # quantile of the upper end of an interval
Function = Callable[..., float]


def half_samples(
    function: Function, *samples: np.ndarray, draws: int = 100, seed: int = 0, fraction: float = 0.5
) -> Interval:
    """A metric of samples with an interval from random halves of their rows, without repetition. This is the
    delete-d jackknife with d = N/2, whose halves vary as much as the whole (Shao & Wu 1989, Ann. Statist.
    17:1176). The interval is centred on the metric, because a half is more biased than the whole.

    fraction: share q of the rows in a draw, whose deviation is multiplied by √(q / (1 - q)). The jackknife
        overestimates the variance of terms of two rows, by (1 + q) / q: 3 for halves, 2.1 for q = 0.9.
    """
    check_rows(samples, 4)
    values = [float(function(*rows)) for rows in random_parts(samples, draws, fraction, seed)]
    return around(float(function(*samples)), values, (fraction / (1 - fraction)) ** 0.5)


def random_parts(
    samples: Sequence[np.ndarray], draws: int, fraction: float, seed: int = 0
) -> Iterator[list[np.ndarray]]:
    """Yields random parts of the rows of each sample, without repetition within a part."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        sizes = [(rows, int(len(rows) * fraction)) for rows in samples]
        yield [rows[np.sort(rng.choice(len(rows), n, replace=False))] for rows, n in sizes]


def around(value: float, draws: Sequence[float] | np.ndarray, scale: float = 1.0) -> Interval:
    """value ± t·s·scale, where s is the standard deviation of the draws and t is Student's quantile for their
    number. Percentiles of few draws are too narrow: with 12 draws, they contain the mean in 82 % of cases.
    A single draw has no interval.

    scale: standard deviation of the metric in units of that of a draw.
    """
    if len(draws) < 2:
        return Interval(value)
    half = float(student(len(draws)) * np.std(draws, ddof=1) * scale)
    return Interval(value, value - half, value + half)


def student(n: int) -> float:
    """Half the width of a mean's interval, in units of the standard error that n values reveal."""
    from scipy.stats import t

    return float(t.ppf(UPPER_QUANTILE, n - 1))


def check_rows(samples: Sequence[np.ndarray], least: int) -> None:
    if min(map(len, samples)) < least:
        raise UsageError(f"an interval needs at least {least} rows of each sample")


def halves(
    function: Function, fake: np.ndarray, real: Any, *, intervals: bool = True, **how: Any
) -> Interval:
    """A metric of samples against real images. The interval covers only the samples' variation, because all
    contestants share the real images."""
    if not intervals:
        return Interval(function(fake, real))
    return half_samples(lambda rows: function(rows, real), fake, **how)


def moved_rows(figure: Interval, value: float, unit: float = 1.0) -> Interval:
    """The interval of a metric, moved to another value. The metric is in units of 1 / `unit`."""
    ends = (figure.value if end is None else end for end in (figure.low, figure.high))
    return Interval(value, *(value + unit * (end - figure.value) for end in ends))


def not_negative(figure: Interval) -> Interval:
    """The metric and its interval, at least 0. Rounding may make a value negative, for example for equal
    images."""
    figure = replace(figure, value=0.0) if figure.value < 0 else figure  # NaN stays
    return figure if figure.low is None else replace(figure, low=max(0.0, figure.low))


def share(value: float, n: int) -> Interval:
    """A proportion of n independently drawn images, with its exact interval (Clopper & Pearson 1934). Near 0
    or 1, Wilson's interval contains the true proportion in as few as 90 % of cases."""
    low, high = exact_share(round(value * n), n, 1 - UPPER_QUANTILE)
    return Interval(value, float(low), float(high))


def exact_share(count: Any, n: int, tail: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the exact interval of a proportion, of which each side excludes at most the probability
    `tail`. Also works on arrays of counts and tails."""
    from scipy.stats import beta

    low = np.where(count > 0, beta.ppf(tail, np.maximum(count, 1), n - count + 1), 0.0)
    high = np.where(count < n, beta.ppf(1 - tail, count + 1, np.maximum(n - count, 1)), 1.0)
    return low, high


def wider(figure: Interval, rival: Interval) -> Interval:
    """A proportion, whose interval is extended by another one."""
    lows = [one.low for one in (figure, rival) if one.low is not None]
    highs = [one.high for one in (figure, rival) if one.high is not None]
    return Interval(figure.value, max(0.0, min(lows)), min(1.0, max(highs)))


def subset(total: int, n: int) -> np.ndarray:
    """The sorted positions of min(n, total) images, drawn with seed 0. A larger subset contains every smaller
    one."""
    return np.sort(np.random.default_rng(0).permutation(total)[:n])


def parts(rows: np.ndarray, n: int, most: int) -> list[np.ndarray]:
    """At most `most` disjoint parts of n rows each. The first is that of `subset`."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[np.sort(order[i * n : (i + 1) * n])] for i in range(min(most, len(rows) // n))]


def mean_of_draws(draws: Sequence[float] | np.ndarray, *, signed: bool = False) -> Interval:
    """The mean of a metric over several draws of images, with Student's interval of that mean."""
    values = np.asarray(draws, np.float64)
    figure = around(float(values.mean()), values, len(values) ** -0.5)
    return figure if signed else not_negative(figure)


def excess(figure: Interval, floor: Interval, better: Literal["down", "up"]) -> Interval:
    """How much worse a metric is than the floor. Both are compared with the same real images, so their errors
    come only from the drawn images and are independent."""
    sign, squares = (1 if better == "down" else -1), 0.0
    for side in (figure, floor):
        ends = (side.low, side.high) if side.low is not None and side.high is not None else [side.value] * 2
        squares += max(side.value - ends[0], ends[1] - side.value) ** 2
    value, half = sign * (figure.value - floor.value), float(np.sqrt(squares))
    return Interval(value, value - half, value + half)
