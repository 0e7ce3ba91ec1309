"""Conformal p-values against counting, and the rate of false alarms against its exact distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import betabinom, chisquare

from gzcli.metrics import conformal


def test_a_p_value_is_a_place_in_an_order():
    rng = np.random.default_rng(0)
    held_out, scores = rng.integers(0, 9, 50).astype(float), np.arange(-1.0, 11.0)  # with ties
    found = conformal.p_values(held_out, scores)
    assert found.tolist() == [(1 + sum(c >= s for c in held_out)) / 51 for s in scores]
    assert found[0] == 1 and found[-1] == 1 / 51
    infinite = np.array([np.inf])
    assert [float(conformal.p_values(held_out, infinite, tails=k)[0]) for k in (1, 2)] == [1 / 51] * 2
    held_out = np.arange(10.0)
    scores = np.array([9.5, -0.5, 8.5, 0.5, 4.6, 9.0, 0.0])
    found = conformal.p_values(held_out, scores, tails=2) * 11
    assert found.tolist() == pytest.approx([1, 2, 3, 4, 11, 3, 4])
    assert (conformal.p_values(held_out, np.full(3, 4.5), tails=2) == 1).all()
    assert conformal.fewest(0.01) == 99 and conformal.fewest(0.05) == 19 and conformal.fewest(0.3) == 3
    assert conformal.fewest(0.01, scores=3) == 299


@pytest.mark.parametrize("n", [9, 10, 57])
@pytest.mark.parametrize("tails", [1, 2])
def test_p_values_of_images_of_the_set_are_uniform(n, tails):
    """Each of n + 1 places is as likely, be their number even or odd."""
    rng, draws = np.random.default_rng(n), 4_000
    drawn = rng.gamma(1.0, size=(draws, n + 1))  # skewed: the distribution does not matter
    p = [float(conformal.p_values(row[1:], row[:1], tails=tails)[0]) for row in drawn]
    counts = np.bincount(np.rint(np.array(p) * (n + 1)).astype(int), minlength=n + 2)
    assert counts[0] == 0 and chisquare(counts[1:]).pvalue > 1e-3


def test_p_values_are_valid_where_scores_tie():
    rng, n = np.random.default_rng(3), 57
    drawn = rng.integers(0, 6, size=(4_000, n + 1)).astype(float)
    for tails in (1, 2):
        p = np.array([float(conformal.p_values(row[1:], row[:1], tails=tails)[0]) for row in drawn])
        for u in (0.02, 0.1, 0.3, 0.6):
            assert (p <= u).mean() <= u + 4 * np.sqrt(u * (1 - u) / len(p))
    held_out = np.linspace(100, 200, 101)
    for tails in (1, 2):
        for at in (0, 1, 99, 100):
            copies = held_out[at] * (1 + 1e-6 * np.array([-1, 0, 1]))
            assert len(set(conformal.p_values(held_out, copies, tails=tails))) == 1


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [9, 99, 100, 730])
@pytest.mark.parametrize("tails", [1, 2])
def test_the_thresholds_flag_what_the_p_values_flag(n, fpr, tails):
    rng = np.random.default_rng(n)
    held_out = rng.normal(size=n).round(1)
    scores = np.unique(np.concatenate([held_out, held_out + 0.05, [-9.0, 9.0]]))
    flagged = conformal.flagged(conformal.p_values(held_out, scores, tails=tails), fpr)
    low, high = conformal.thresholds(held_out, fpr, tails=tails)
    assert (flagged == ((scores < low) | (scores > high))).all()
    assert flagged.any() == (n >= conformal.fewest(fpr)), "too few images flag nothing"
    assert flagged[0] == (tails == 2 and n >= conformal.fewest(fpr, scores=2)), (
        "the lower tail needs two places"
    )


@pytest.mark.parametrize("fpr", [0.01, 0.05])
def test_the_rate_of_false_alarms_over_twenty_splits(fpr):
    """Of m images, as many are flagged as a draw of a beta-binomial: k in n + 1 by the order of all scores.
    New images for each split make the twenty draws independent."""
    n, m = 799, 600
    k = round(fpr * (n + 1))
    exact = betabinom(m, k, n + 1 - k)
    rng = np.random.default_rng(1)
    found = []
    for _ in range(20):
        scores = rng.standard_t(2, n + m)  # heavy tails: the distribution does not matter
        found.append(conformal.flagged(conformal.p_values(scores[:n], scores[n:]), fpr).sum())
    assert abs(np.mean(found) - exact.mean()) < 3 * exact.std() / np.sqrt(20)
    assert exact.mean() / m == pytest.approx(fpr, rel=1e-9)
    assert all(exact.ppf(1e-4) <= one <= exact.ppf(1 - 1e-4) for one in found)
    wrong = np.array(found) * 2  # such a bound would notice twice the rate
    assert abs(wrong.mean() - exact.mean()) > 3 * exact.std() / np.sqrt(20)


def test_bonferroni_holds_for_scores_that_depend_on_each_other():
    rng = np.random.default_rng(2)
    n, m, flags = 999, 1000, []
    for _ in range(20):
        base = rng.normal(size=(n + m, 1))
        scores = base + 0.5 * rng.normal(size=(n + m, 3))
        p = np.stack([conformal.p_values(s[:n], s[n:]) for s in scores.T])
        flags.append(conformal.flagged(conformal.bonferroni(p), 0.05).mean())
    assert 0.01 < np.mean(flags) < 0.05
    assert conformal.bonferroni(np.array([[0.01, 0.9], [0.2, 0.7]])).tolist() == [0.02, 1.0]
