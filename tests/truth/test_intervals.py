"""Intervals of detection figures against their definitions, and how often they hold the true figure of known
distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chi2, norm
from sklearn.metrics import average_precision_score

from gzcli.metrics.detection import (
    CHI2,
    aupr_interval,
    auroc_interval,
    delong,
    detection,
    fpr_interval,
    precision_variance,
    wilson,
)
from gzcli.metrics.interval import around, mean_of_draws, not_negative
from gzcli.metrics.metric import Interval

EDGES = np.arange(-12.0, 16.0) - 0.5  # of scores that are rounded to whole numbers


class Scores:
    """In-distribution scores of N(0, 1) and foreign ones of a normal distribution whose mean gives the AUROC;
    or both rounded, so that most of them tie."""

    def __init__(self, deviation: float, auroc: float, *, rounded: bool = False):
        self.deviation, self.rounded = deviation, rounded
        self.mean = norm.ppf(auroc) * np.hypot(1, deviation)
        self.auroc = auroc
        self.fpr95 = norm.sf(self.mean + deviation * norm.ppf(0.05))
        if rounded:
            shares = (np.diff(norm.cdf(EDGES, *of)) for of in ((0, 1), (self.mean, deviation)))
            negative, positive = shares
            self.auroc = positive @ (np.cumsum(negative) - negative / 2)
            threshold = np.flatnonzero(np.cumsum(positive[::-1])[::-1] >= 0.95)[-1]
            self.fpr95 = negative[threshold:].sum()

    def draw(self, rng: np.random.Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        sides = rng.normal(0, 1, n), rng.normal(self.mean, self.deviation, m)
        return tuple(np.round(side) for side in sides) if self.rounded else sides


def counts(s_in: np.ndarray, s_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique([*s_in, *s_out])
    return tuple(np.bincount(np.searchsorted(values, s), minlength=len(values)) for s in (s_in, s_out))


def coverage(scores: Scores, n: int, m: int, draws: int) -> tuple[float, float]:
    """How often the intervals of AUROC and FPR95 hold the true values."""
    rng, held = np.random.default_rng(n + m), np.zeros(2)
    for _ in range(draws):
        sides = counts(*scores.draw(rng, n, m))
        for i, (true, find) in enumerate(((scores.auroc, auroc_interval), (scores.fpr95, fpr_interval))):
            low, high = find(*sides)
            held[i] += low <= true <= high
    return tuple(held / draws)


@pytest.mark.parametrize(
    ("scores", "n", "m"),
    [
        (Scores(1, 0.99), 20, 20),
        (Scores(3, 0.99), 400, 20),
        (Scores(1 / 3, 0.95), 20, 400),
        (Scores(1, 0.95, rounded=True), 100, 100),
        pytest.param(Scores(3, 0.95), 500, 50, marks=pytest.mark.slow),
        pytest.param(Scores(1 / 3, 0.999), 50, 400, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_true_value_as_often_as_they_say(scores, n, m):
    """Three standard errors below .95; a percentile bootstrap falls short of that in every case."""
    auroc, fpr95 = coverage(scores, n, m, 500)
    assert auroc >= 0.92 and fpr95 >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("auroc", [0.6, 0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("deviation", [1, 3, 1 / 3, "rounded"])
def test_intervals_hold_for_every_kind_of_scores(auroc, deviation):
    rounded = deviation == "rounded"
    scores = Scores(1 if rounded else deviation, auroc, rounded=rounded)
    for n, m in itertools.product((20, 100, 1000), repeat=2):
        of_auroc, of_fpr = coverage(scores, n, m, 1000)
        assert of_auroc >= 0.92 and of_fpr >= 0.92, (n, m, of_auroc, of_fpr)


def test_intervals_are_no_wider_than_they_must_be():
    rng, widths = np.random.default_rng(2), []
    scores = Scores(1, norm.cdf(1 / np.sqrt(2)))
    for _ in range(60):
        sides = counts(*scores.draw(rng, 1000, 1000))
        widths.append([np.diff(find(*sides))[0] for find in (auroc_interval, fpr_interval)])
    hanley_mcneil = 0.0236 * np.sqrt(200 / 1000)
    # the FPR's own error, and that of the threshold by the ratio of the densities there
    threshold = 1 + norm.ppf(0.05)
    slope = norm.pdf(threshold) / norm.pdf(threshold, 1)
    error = np.sqrt((scores.fpr95 * (1 - scores.fpr95) + slope**2 * 0.95 * 0.05) / 1000)
    exact = np.array([0, 1 / 1000])  # a proportion's exact interval is wider by the width of one image
    assert np.mean(widths, 0) == pytest.approx(2 * 1.96 * np.array([hanley_mcneil, error]) + exact, rel=0.12)


@pytest.mark.parametrize("rounded", [False, True])
def test_delong_s_variance_is_that_of_its_definition(rounded):
    """DeLong et al. 1988, equations 4 to 6: over all pairs, of which ties count one half."""
    s_in, s_out = Scores(2, 0.8, rounded=rounded).draw(np.random.default_rng(3), 40, 70)
    wins = (s_out[:, None] > s_in) + 0.5 * (s_out[:, None] == s_in)
    variance = wins.mean(1).var(ddof=1) / 70 + wins.mean(0).var(ddof=1) / 40
    assert delong(*counts(s_in, s_out)) == pytest.approx((wins.mean(), variance), rel=1e-12)


@pytest.mark.parametrize(
    "scores, n, m", [(Scores(1, 0.8), 300, 300), (Scores(2, 0.95), 800, 200), (Scores(3, 0.99), 1000, 50)]
)
def test_the_interval_of_average_precision_holds_the_true_value(scores, n, m):
    """And its variance is that of the drawn values."""
    rng = np.random.default_rng(6)

    def area(s_in, s_out):
        return average_precision_score(np.repeat([0, 1], [len(s_in), len(s_out)]), np.append(s_in, s_out))

    true, rows = area(*scores.draw(rng, 200 * n, 200 * m)), [scores.draw(rng, n, m) for _ in range(200)]
    areas = [area(*row) for row in rows]
    ends = np.array([aupr_interval(value, *counts(*row)) for value, row in zip(areas, rows, strict=True)])
    assert np.mean((ends[:, 0] <= true) & (true <= ends[:, 1])) >= 0.92
    variance = np.mean([precision_variance(*counts(*row)) for row in rows])
    assert variance == pytest.approx(np.var(areas), rel=0.3)


def test_an_interval_of_few_draws_holds_the_mean():
    """Percentiles of 12 draws hold it in 82 % of cases."""
    rng = np.random.default_rng(7)
    for n in (5, 12, 50):
        figures = [mean_of_draws(rng.normal(size=n), signed=True) for _ in range(2000)]
        assert np.mean([one.low <= 0 <= one.high for one in figures]) == pytest.approx(0.95, abs=0.016)
        one = around(3.0, [1.0, 2.0, 3.0], 0.5)
        assert (one.high - 3, 3 - one.low) == pytest.approx([4.302653 * 0.5] * 2)
    assert mean_of_draws([0.5]) == Interval(0.5), "a single draw has no interval"


def test_wilson_s_interval_is_scipy_s():
    for n in (1, 20, 333):
        for k in {0, 1, n // 3, n}:
            interval = binomtest(k, n).proportion_ci(method="wilson")
            assert wilson(k / n, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_interval_of_fpr_is_a_test_of_every_rate_at_every_threshold(rounded):
    """A rate is inside where both sides together do not refuse it at some threshold."""
    s_in, s_out = Scores(1, 0.9, rounded=rounded).draw(np.random.default_rng(4), 30, 90)
    rates = np.linspace(0.0005, 0.9995, 1000)
    inside = np.zeros(1000, bool)
    for threshold in [*np.unique([*s_in, *s_out]), np.inf]:
        tpr, above = (s_out >= threshold).mean(), (s_out > threshold).mean()
        gap = max(0.95 - tpr, above - 0.95, 0)  # rates of `tpr` or less, and of more than `above`, would fit
        flagged, left = (s_in >= threshold).sum(), CHI2 - gap**2 / (0.95 * 0.05 / 90)
        tails = np.minimum(binom.cdf(flagged, 30, rates), binom.sf(flagged - 1, 30, rates))
        inside |= (left >= 0) & (2 * tails >= chi2.sf(left, 1))
    ends = rates[inside][[0, -1]]
    assert fpr_interval(*counts(s_in, s_out)) == pytest.approx(ends, abs=0.001)


def test_perfect_separation_has_an_interval():
    few, many = (detection(np.arange(n), np.arange(n) + n)["ci"] for n in (20, 100))
    assert few["auroc"] == pytest.approx([0.839, 1], abs=1e-3) and few["auroc"][1] == 1
    assert many["auroc"] == pytest.approx([0.963, 1], abs=1e-3)
    assert few["fpr95"] == few["fpr95_id"] == [0, 1], "of 20 images none bounds the 5 % quantile"
    assert many["fpr95"][0] == 0 and many["fpr95"][1] == pytest.approx(0.037, abs=1e-3)
    wrong = detection(np.arange(20) + 20, np.arange(20))["ci"]
    assert wrong["auroc"] == pytest.approx([0, 0.161], abs=1e-3)
    for m, bounded in ((72, False), (73, True)):
        assert (detection(np.arange(50), np.arange(m) + 50)["ci"]["fpr95"][1] < 1) is bounded


def test_intervals_hold_their_figure_whatever_the_scores():
    rng = np.random.default_rng(5)
    for n, m, top in itertools.product((1, 2, 30), (1, 2, 30), (1, 3, 10**6)):
        s_in, s_out = rng.integers(0, top, n), rng.integers(0, top, m)
        with np.errstate(all="raise"):
            figures = detection(s_in, s_out)
        for name, (low, high) in figures["ci"].items():
            assert 0 <= low <= figures[name] <= high <= 1, name
        low, high = auroc_interval(*counts(s_out, s_in))
        assert figures["ci"]["auroc"] == pytest.approx([1 - high, 1 - low])


def test_a_distance_is_not_negative_and_nan_stays():
    assert not_negative(Interval(-1e-9, -0.2, 3.0)) == Interval(0.0, 0.0, 3.0)
    assert math.isnan(not_negative(Interval(math.nan)).value)
