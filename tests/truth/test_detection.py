"""Detection against scikit-learn and counting; conformal p-values against counting and their distribution."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from refused import refused
from scipy.stats import betabinom, chisquare
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from gzcli.core.errors import DivergedError
from gzcli.metrics import baselines, conformal
from gzcli.metrics.alarms.whole import fit_knn_pixels
from gzcli.metrics.detection import detection


def test_the_worked_example_and_exact_values():
    """N(0, 1) against N(2, 3): an AUROC of .734 is an FPR95 of .9985 or .453, by which class is positive."""
    rng = np.random.default_rng(0)
    figures = detection(rng.normal(0, 1, 100_000), rng.normal(2, 3, 100_000))
    assert figures["auroc"] == pytest.approx(0.734, abs=0.004)
    assert figures["fpr95"] == pytest.approx(0.9985, abs=0.001)
    assert figures["fpr95_id"] == pytest.approx(0.453, abs=0.006)
    s = 1e6 + np.arange(1000) * 1e-6
    assert detection(s[:500], s[500:])["auroc"] == 1.0
    low, high = np.arange(50.0), np.arange(100.0, 150.0)
    assert detection(low, high)["auroc"] == 1 and detection(low, high)["fpr95"] == 0
    assert detection(high, low)["auroc"] == 0 and detection(high, low)["fpr95"] == 1
    constant = detection(np.ones(10), np.ones(10))
    assert constant["auroc"] == 0.5 and constant["fpr95"] == 1
    refused("", detection, np.empty(0), np.ones(3))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(DivergedError, match="1 of 20 scores are not finite"):
            detection(np.arange(10.0), np.array([*range(9), bad]))


def test_a_benchmark_s_aupr_is_openood_s_trapezoid():
    rng = np.random.default_rng(3)
    s_in, s_out = rng.integers(0, 12, 60), rng.integers(4, 16, 40)
    result, plain = (detection(s_in, s_out, trapezoid=trapezoid) for trapezoid in (True, False))
    for key, y, s in (
        ("aupr_out", [0] * 60 + [1] * 40, [*s_in, *s_out]),
        ("aupr_in", [1] * 60 + [0] * 40, [*-s_in, *-s_out]),
    ):
        points = [(1.0, 0.0)]  # (precision, recall), then one for each threshold from the highest
        for level in sorted(set(s), reverse=True):
            taken = [label for label, score in zip(y, s, strict=True) if score >= level]
            points.append((sum(taken) / len(taken), sum(taken) / sum(y)))
        area = sum((p0 + p1) / 2 * (r1 - r0) for (p0, r0), (p1, r1) in itertools.pairwise(points))
        assert result[key] == pytest.approx(area) and result[key] != plain[key]
    assert {key: result[key] for key in ("auroc", "fpr95")} == {key: plain[key] for key in ("auroc", "fpr95")}


@pytest.mark.parametrize("offset", [0.0, 4000.0, -1e9])
def test_equals_sklearn_and_counting_with_ties_at_any_offset(offset):
    rng = np.random.default_rng(1)
    s_in, s_out = rng.integers(0, 12, 400) + offset, rng.integers(4, 16, 300) + offset
    figures = detection(s_in, s_out)
    y, s = np.repeat([0, 1], [400, 300]), np.concatenate([s_in, s_out])
    assert figures["auroc"] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    pairs = (s_out[:, None] > s_in).mean() + 0.5 * (s_out[:, None] == s_in).mean()
    assert figures["auroc"] == pytest.approx(pairs, abs=1e-12)
    assert figures["aupr_out"] == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert figures["aupr_in"] == pytest.approx(average_precision_score(1 - y, -s), abs=1e-12)
    threshold = max(t for t in s_out if (s_out >= t).mean() >= 0.95)
    assert figures["fpr95"] == pytest.approx((s_in >= threshold).mean(), abs=1e-12)
    threshold = min(t for t in s_in if (s_in <= t).mean() >= 0.95)
    assert figures["fpr95_id"] == pytest.approx((s_out <= threshold).mean(), abs=1e-12)
    assert (figures["n_in"], figures["n_out"]) == (400, 300)


def test_codes_are_lossless_and_grow_with_detail():
    """Each coder's size is that of a file which decodes to the very image."""
    rng = np.random.default_rng(3)
    flat = np.full((1, 1, 32, 32), 90, np.uint8)
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))[None, None]
    noise = rng.integers(0, 256, (1, 1, 32, 32), dtype=np.uint8)
    lengths = [baselines.code_length(image)[0] for image in (flat, ramp, noise)]
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[2] >= 32 * 32 * 8  # noise has no code shorter than its entropy
    assert (baselines.code_length(noise) <= 8 * baselines.png_size(noise)).all()
    noise = np.random.default_rng(4).integers(0, 2, (1, 1, 28, 28), dtype=np.uint8) * 255
    # a filter byte and 28 bits a row, and the headers
    assert 28 * 4 <= baselines.png_size(noise)[0] <= 28 * (1 + 4) + 80
    image = np.random.default_rng(5).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    assert {"png", "deflate"} <= set(baselines.coders())
    for kind, options in {"PNG": {"optimize": True}, "JPEG2000": {"irreversible": False}}.items():
        if kind.lower() in baselines.coders():
            buffer = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format=kind, **options)
            assert baselines.coders()[kind.lower()](image) == buffer.tell()
            assert (np.asarray(Image.open(buffer)) == image.transpose(1, 2, 0)).all()


def test_knn_equals_neighbours_in_pixels_when_no_component_is_dropped():
    rng = np.random.default_rng(6)
    sets = (0, 100, 80), (0, 100, 20), (150, 250, 20)
    train, seen, far = (rng.integers(lo, hi, (n, 1, 6, 6), dtype=np.uint8) for lo, hi, n in sets)
    near, away = map(fit_knn_pixels(train).score, (seen, far))
    direct = NearestNeighbors(n_neighbors=5).fit(train.reshape(80, -1) / 255.0)
    assert np.allclose(near, direct.kneighbors(seen.reshape(20, -1) / 255.0)[0][:, -1], atol=1e-5)
    assert detection(near, away)["auroc"] == 1
    assert np.allclose(baselines.pixel_mean(seen), seen.mean((1, 2, 3)))


def test_a_p_value_is_a_place_in_an_order_and_thresholds_flag_alike():
    rng = np.random.default_rng(0)
    held_out, scores = rng.integers(0, 9, 50).astype(float), np.arange(-1.0, 11.0)  # with ties
    p_values = conformal.p_values(held_out, scores)
    assert p_values.tolist() == [(1 + sum(c >= s for c in held_out)) / 51 for s in scores]
    assert p_values[0] == 1 and p_values[-1] == 1 / 51
    infinite = np.array([np.inf])
    assert [float(conformal.p_values(held_out, infinite, tails=k)[0]) for k in (1, 2)] == [1 / 51] * 2
    held_out = np.arange(10.0)
    scores = np.array([9.5, -0.5, 8.5, 0.5, 4.6, 9.0, 0.0])
    p_values = conformal.p_values(held_out, scores, tails=2) * 11
    assert p_values.tolist() == pytest.approx([1, 2, 3, 4, 11, 3, 4])
    assert (conformal.p_values(held_out, np.full(3, 4.5), tails=2) == 1).all()
    assert conformal.fewest(0.01) == 99 and conformal.fewest(0.05) == 19 and conformal.fewest(0.3) == 3
    assert conformal.fewest(0.01, scores=3) == 299
    for n, scores in itertools.product(range(5, 300), (1, 2, 6)):
        rate = conformal.lowest_rate(n, scores)
        enough, short = (conformal.fewest(percent / 100, scores) for percent in (rate, rate - 0.1))
        assert enough <= n < short, (n, scores)
    # too few images flag nothing, and the lower tail needs two places
    for n, fpr, tails in itertools.product((9, 99, 100, 730), (0.01, 0.05, 0.1, 0.3), (1, 2)):
        held_out = np.random.default_rng(n).normal(size=n).round(1)
        scores = np.unique(np.concatenate([held_out, held_out + 0.05, [-9.0, 9.0]]))
        flagged = conformal.flagged(conformal.p_values(held_out, scores, tails=tails), fpr)
        low, high = conformal.thresholds(held_out, fpr, tails=tails)
        assert (flagged == ((scores < low) | (scores > high))).all(), (n, fpr, tails)
        assert flagged.any() == (n >= conformal.fewest(fpr)), (n, fpr, tails)
        assert flagged[0] == (tails == 2 and n >= conformal.fewest(fpr, scores=2)), (n, fpr, tails)


@pytest.mark.parametrize("tails", [1, 2])
def test_p_values_of_images_of_the_set_are_uniform_and_valid_where_scores_tie(tails):
    """Each of n + 1 places is as likely, be their number even or odd."""

    def p_values(drawn: np.ndarray) -> np.ndarray:
        return np.array([float(conformal.p_values(row[1:], row[:1], tails=tails)[0]) for row in drawn])

    for n in (9, 10, 57):
        p = p_values(np.random.default_rng(n).gamma(1.0, size=(4_000, n + 1)))  # the law does not matter
        counts = np.bincount(np.rint(p * (n + 1)).astype(int), minlength=n + 2)
        assert counts[0] == 0 and chisquare(counts[1:]).pvalue > 1e-3
    p = p_values(np.random.default_rng(3).integers(0, 6, size=(4_000, 58)).astype(float))
    for u in (0.02, 0.1, 0.3, 0.6):
        assert (p <= u).mean() <= u + 4 * np.sqrt(u * (1 - u) / len(p))
    held_out = np.linspace(100, 200, 101)
    for at in (0, 1, 99, 100):
        copies = held_out[at] * (1 + 1e-6 * np.array([-1, 0, 1]))
        assert len(set(conformal.p_values(held_out, copies, tails=tails))) == 1


@pytest.mark.parametrize("fpr", [0.01, 0.05])
def test_the_rate_of_false_alarms_over_twenty_splits(fpr):
    """As many of m images are flagged as a beta-binomial draws: each split has new images, so 20 draws."""
    n, m = 799, 600
    k = round(fpr * (n + 1))
    exact = betabinom(m, k, n + 1 - k)
    rng = np.random.default_rng(1)
    counts = []
    for _ in range(20):
        scores = rng.standard_t(2, n + m)  # heavy tails: the distribution does not matter
        counts.append(conformal.flagged(conformal.p_values(scores[:n], scores[n:]), fpr).sum())
    assert abs(np.mean(counts) - exact.mean()) < 3 * exact.std() / np.sqrt(20)
    assert exact.mean() / m == pytest.approx(fpr, rel=1e-9)
    assert all(exact.ppf(1e-4) <= one <= exact.ppf(1 - 1e-4) for one in counts)
    wrong = np.array(counts) * 2  # such a bound would notice twice the rate
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
