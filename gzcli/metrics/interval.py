"""Figures with 95 % intervals, by resampling the images from which they are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gzcli.core.errors import UsageError
from gzcli.metrics.metric import Figures, Interval, column_of

LEVELS = (0.025, 0.975)  # the quantiles that bound an interval
Function = Callable[..., float]


def bootstrap(function: Function, *samples: np.ndarray, draws: int = 100, seed: int = 0) -> Interval:
    """A figure of samples with its percentile interval over resamples of their rows (Efron & Tibshirani
    1993, §13.3): for means and others that repeated rows do not change. Repetition raises a Fréchet
    distance and shrinks the distances to neighbours: `half_samples` is for these."""
    check_rows(samples, 1)
    rng = np.random.default_rng(seed)
    drawn = ((rows[rng.integers(0, len(rows), len(rows))] for rows in samples) for _ in range(draws))
    low, high = np.quantile([float(function(*each)) for each in drawn], LEVELS)
    return Interval(float(function(*samples)), float(low), float(high))


def half_samples(function: Function, *samples: np.ndarray, draws: int = 100, seed: int = 0) -> Interval:
    """A figure of samples with an interval from random halves of their rows, which repeat no row: the
    delete-d jackknife with d = N/2 (Shao & Wu 1989, Ann. Statist. 17:1176). It is moved to the figure,
    because a half is more biased than the whole."""
    check_rows(samples, 4)
    rng = np.random.default_rng(seed)

    def half(rows: np.ndarray) -> np.ndarray:
        return rows[np.sort(rng.choice(len(rows), len(rows) // 2, replace=False))]

    values = np.array([float(function(*map(half, samples))) for _ in range(draws)])
    value = float(function(*samples))
    low, high = value + np.quantile(values, LEVELS) - values.mean()
    return Interval(value, float(low), float(high))


def check_rows(samples: Sequence[np.ndarray], least: int) -> None:
    if min(map(len, samples)) < least:
        raise UsageError(f"an interval needs at least {least} rows of each sample")


def halves(function: Function, *samples: np.ndarray, intervals: bool, **how: Any) -> Interval:
    return half_samples(function, *samples, **how) if intervals else Interval(function(*samples))


def not_negative(figure: Interval) -> Interval:
    return figure if figure.low is None else replace(figure, low=max(0.0, figure.low))


def share(value: float, n: int) -> Interval:
    """A share of n images that were drawn independently, with Wilson's interval (1927)."""
    from scipy.stats import binomtest

    ends = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return Interval(value, float(ends.low), float(ends.high))


def subset(total: int, n: int) -> np.ndarray:
    """Sorted positions of min(n, total) images, drawn with seed 0: a larger subset holds every smaller
    one."""
    return np.sort(np.random.default_rng(0).permutation(total)[:n])


def mean_of_draws(draws: Sequence[Mapping[str, Interval]]) -> Figures:
    """The mean of each figure over several draws of images, with Student's interval of that mean, which is no
    narrower than that of a draw where this is known; of a single draw the figures themselves."""
    from scipy.stats import t

    if len(draws) == 1:
        return dict(draws[0])
    means, n = {}, len(draws)
    for name in draws[0]:
        figures = [draw[name] for draw in draws]
        values = np.array([figure.value for figure in figures])
        half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
        of_draws = [(f.high - f.low) / 2 for f in figures if f.low is not None and f.high is not None]
        half = max([half, *of_draws])  # all draws are compared with the same real images
        mean = float(values.mean())
        figure = Interval(mean, mean - half, mean + half)
        means[name] = figure if column_of(name).signed else not_negative(figure)
    return means
