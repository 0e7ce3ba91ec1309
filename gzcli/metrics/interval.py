"""Figures with 95 % intervals, by resampling the images from which they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gzcli.core.errors import UsageError

LEVELS = (0.025, 0.975)  # the quantiles that bound an interval


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; `low` and `high` are None where none is known."""

    value: float  # the figure
    low: float | None = None  # lower bound
    high: float | None = None  # upper bound


def bootstrap(
    function: Callable[..., float], *samples: np.ndarray, draws: int = 100, seed: int = 0
) -> Interval:
    """A figure of samples with its percentile interval over resamples of the rows of each sample, drawn with
    replacement.

    It is for means and other figures that repeated rows do not change. Repetition raises a Fréchet distance
    and shrinks the distances to neighbours: `half_samples` is for these.

    Efron & Tibshirani 1993, §13.3. Raises UsageError for a sample without rows.
    """

    def resample(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        return rows[rng.integers(0, len(rows), len(rows))]

    values = _values(function, samples, resample, draws, seed, least=1)
    low, high = np.quantile(values, LEVELS)
    return Interval(float(function(*samples)), float(low), float(high))


def half_samples(
    function: Callable[..., float], *samples: np.ndarray, draws: int = 100, seed: int = 0
) -> Interval:
    """A figure of samples with an interval from random halves of the rows of each sample.

    Halves drawn without replacement spread about their mean as the figure of all rows does about its
    expectation at this number of rows, and repeat no row: the delete-d jackknife with d = N/2 (Shao & Wu
    1989, Ann. Statist. 17:1176). The interval is theirs, moved to the figure, because a half is more biased
    than the whole.

    Raises UsageError for a sample of fewer than four rows.
    """

    def half(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        return rows[np.sort(rng.choice(len(rows), len(rows) // 2, replace=False))]

    values = _values(function, samples, half, draws, seed, least=4)
    value = float(function(*samples))
    low, high = value + np.quantile(values, LEVELS) - values.mean()
    return Interval(value, float(low), float(high))


def _values(
    function: Callable[..., float],
    samples: tuple[np.ndarray, ...],
    draw: Callable[[np.random.Generator, np.ndarray], np.ndarray],
    draws: int,
    seed: int,
    least: int,
) -> np.ndarray:
    """The figure of `draws` resamples, float64 [draws]."""
    if min(len(rows) for rows in samples) < least:
        raise UsageError(f"an interval needs at least {least} rows of each sample")
    rng = np.random.default_rng(seed)
    return np.array([function(*(draw(rng, rows) for rows in samples)) for _ in range(draws)], np.float64)
