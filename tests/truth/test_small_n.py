"""Metrics that hold at few images, against torch-fidelity, SciPy, scikit-learn and known Gaussians."""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from refused import refused
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from gzcli.metrics.interval import Interval, excess, half_samples, mean_of_draws, share
from gzcli.metrics.metric import metrics
from gzcli.metrics.quality import fd
from gzcli.metrics.quality import kid as kernel_distance
from gzcli.metrics.quality.fd import frechet_distance, frechet_of_moments, moments, pca_frechet
from gzcli.metrics.quality.kid import kid
from gzcli.metrics.quality.swd import sliced_wasserstein


def gaussian(rng, n, *, width=8, shift=0.0, scale=1.0):
    return shift + scale * rng.normal(size=(n, width))


def often_enough(covered: int, n: int) -> bool:
    """As 95 % intervals may: 3 deviations of the binomial below."""
    return covered / n > 0.95 - 3 * np.sqrt(0.95 * 0.05 / n)


def test_intervals_cover_and_are_as_wide_as_they_should_be():
    rng, mean = np.random.default_rng(0), lambda x: float(x.mean())
    intervals = [half_samples(mean, rng.normal(3, 2, 80), draws=150, seed=seed) for seed in range(150)]
    covered = sum(i.low <= 3 <= i.high for i in intervals)
    assert often_enough(covered, 150) and covered < 150
    assert np.mean([i.high - i.low for i in intervals]) == pytest.approx(2 * 1.96 * 2 / np.sqrt(80), rel=0.06)
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 200), rng.normal(0, 3, 50)
    interval = half_samples(lambda x, y: float(x.mean() - y.mean()), a, b, draws=400, seed=5)
    assert interval == half_samples(lambda x, y: float(x.mean() - y.mean()), a, b, draws=400, seed=5)
    assert interval.value == a.mean() - b.mean()
    wide = 2 * 1.96 * np.sqrt(a.var() / 200 + b.var() / 50)
    assert interval.high - interval.low == pytest.approx(wide, rel=0.15)
    refused("", half_samples, lambda x: float(x.mean()), a[:3])


@pytest.mark.parametrize("draws", [fd.FEW_DRAWS, fd.INTERVAL_SPLITS])
def test_half_samples_cover_a_frechet_distance(draws):
    rng, halves = np.random.default_rng(2), []
    for seed in range(80):
        pair = gaussian(rng, 40, width=4), gaussian(rng, 40, width=4, shift=0.2)
        halves.append(half_samples(frechet_distance, *pair, draws=draws, seed=seed))
    expected = np.mean([i.value for i in halves])
    assert often_enough(sum(i.low <= expected <= i.high for i in halves), 80)
    assert all(i.low < i.value < i.high for i in halves)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_a_larger_part_of_the_rows_is_less_too_wide(q):
    """The variance of |mean|², which has terms of two rows alone, is (1 + q) / q times too large."""
    rng, unit = np.random.default_rng(3), scipy.stats.t.ppf(0.975, 29)
    square = lambda rows: float((rows.mean(0) ** 2).sum())  # noqa: E731
    drawn = [
        half_samples(square, gaussian(rng, 100, width=20), draws=30, seed=seed, fraction=q)
        for seed in range(250)
    ]
    estimated = np.mean([((i.high - i.value) / unit) ** 2 for i in drawn])
    assert estimated / np.var([i.value for i in drawn], ddof=1) == pytest.approx((1 + q) / q, rel=0.2)


COVERED = ("fd", "fd_second", "fd_inf", "prc_lenet", "kid_lenet", "swd")
OF_IMAGES = ("fd_class", "classes", "legible", "memory")
CLASSES, WIDTH = 10, 16


def coverages(drawn: list[dict[str, Interval]]) -> dict[str, float]:
    """How often the interval of each figure contains its mean over all draws."""
    rows = {figure: [row[figure] for row in drawn] for figure in drawn[0]}
    means = {figure: np.mean([one.value for one in ends]) for figure, ends in rows.items()}
    return {
        figure: np.mean([one.low <= means[figure] <= one.high for one in ends])
        for figure, ends in rows.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERED)
def test_the_interval_of_every_metric_of_features_covers(name):
    """The expected figure at this number of samples, in 93 % of 300 draws against the same real images."""
    rng, metric = np.random.default_rng(8), metrics()[name]
    real = gaussian(rng, 1000, width=16)
    drawn = [
        metric.compare(gaussian(rng, 300, width=16, shift=0.1, scale=0.9), real, True) for _ in range(300)
    ]
    covered = coverages(drawn)
    assert min(covered.values()) >= 0.93, covered


def recalls(n: int, draws: int) -> list[Interval]:
    """Recalls of n samples by n real images of ten modes. Four of the modes have 1 % of the samples each."""
    rng, metric = np.random.default_rng(11), metrics()["prc_lenet"]
    centres, shares = 3 * np.eye(10, 16), np.repeat([0.16, 0.01], (6, 4))
    real = centres[rng.integers(0, 10, n)] + gaussian(rng, n, width=16)
    figures = []
    for _ in range(draws):
        fake = centres[rng.choice(10, n, p=shares)] + gaussian(rng, n, width=16, scale=0.9)
        figures.append(metric.compare(fake, real, True)["recall_lenet"])
    return figures


def test_the_interval_of_recall_is_wider_if_rare_modes_decide_it():
    """The standard deviation of 200 recalls is 1.5 times that of a proportion."""
    figures = recalls(300, 4)
    of_shares = [share(one.value, 300) for one in figures]
    assert np.mean([one.high - one.low for one in figures]) > 1.3 * (of_shares[0].high - of_shares[0].low)


@pytest.mark.slow
def test_the_interval_of_recall_covers_if_rare_modes_decide_it():
    """That of a proportion does so in 75 % of cases."""
    figures = recalls(400, 40)
    mean = np.mean([one.value for one in figures])
    assert np.mean([one.low <= mean <= one.high for one in figures]) >= 0.93


def test_the_interval_of_a_proportion_covers_near_its_bounds():
    """The exact sum over all counts. Wilson's interval falls to .91."""
    for n, p in itertools.product((50, 100), (0.5, 0.97, 0.99, 0.999)):
        ends = [share(k / n, n) for k in range(n + 1)]
        exact = scipy.stats.binomtest(n - 1, n).proportion_ci(method="exact")
        assert (ends[-2].low, ends[-2].high) == pytest.approx((exact.low, exact.high)), "SciPy's"
        weights = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
        assert sum(w for w, one in zip(weights, ends, strict=True) if one.low <= p <= one.high) >= 0.95


class Rows(NamedTuple):
    """Images whose features and logits are these rows [N, D]."""

    images: np.ndarray
    labels: np.ndarray | None = None

    def knows(self, net) -> bool:
        return True

    def features(self, net) -> np.ndarray:
        return self.images


def judge_of(train: Rows, test: Rows) -> SimpleNamespace:
    """A judge whose networks return their input."""
    net = SimpleNamespace(alive=True, rotations=False, logits_of=lambda rows: rows)
    meta = SimpleNamespace(multilabel=False, classes=tuple("0123456789"))
    sides = {"train": train, "test": test}
    pack = SimpleNamespace(meta=meta, labels=lambda split: sides[split].labels)
    real = SimpleNamespace(of=sides.get)
    return SimpleNamespace(lenet=net, memory_space=net, pack=pack, real=real, train_images=train)


@pytest.mark.slow
@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("uneven", [0.0, 0.5])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_interval_of_every_metric_of_classes_and_copies_covers(name, uneven, n):
    """Of samples whose classes are as frequent as those of real images, or are not."""
    rng, metric = np.random.default_rng(9), metrics()[name]
    centres = 3 * np.eye(CLASSES, WIDTH)
    shares = np.exp(uneven * rng.normal(size=CLASSES))

    def draw(n: int, shares: np.ndarray, scale: float) -> Rows:
        labels = rng.choice(CLASSES, n, p=shares / shares.sum())
        return Rows(centres[labels] + gaussian(rng, n, width=WIDTH, scale=scale), labels)

    def figures() -> dict[str, Interval]:
        fake = draw(n, shares, 0.9)
        if name == "fd_class":
            return metric.within(*(fake.images, real.images), *(fake.labels, real.labels), True)
        copied = rng.random(n) < 0.05
        fake.images[copied] = real.images[rng.integers(0, len(real.images), copied.sum())]
        logits = fake.images if name == "memory" else fake.images[:, :CLASSES]
        return metric.of_images(judge, Rows(logits, fake.labels))

    even = np.ones(CLASSES)
    real, test = draw(1500, even, 1.0), draw(1000, even, 1.0)
    judge = judge_of(real, test if name == "memory" else Rows(test.images[:, :CLASSES]))
    covered = coverages([figures() for _ in range(300)])
    assert min(covered.values()) >= 0.93, covered


@pytest.mark.slow
def test_the_interval_of_an_excess_covers():
    """Of a distance over that of real images, which is the mean of 20 draws."""
    rng, metric = np.random.default_rng(10), metrics()["fd"]
    real = gaussian(rng, 1000, width=16)

    def figures() -> dict[str, Interval]:
        fake = metric.compare(gaussian(rng, 300, width=16, shift=0.1, scale=0.9), real, True)["fd"]
        draws = (metric.compare(gaussian(rng, 300, width=16), real, False)["fd"] for _ in range(20))
        return {"excess": excess(fake, mean_of_draws([one.value for one in draws]), "down")}

    assert coverages([figures() for _ in range(300)])["excess"] >= 0.93


@pytest.mark.parametrize("sizes, subsets, size", [((90, 60), 30, 20), ((400, 300), 4, 50)])
def test_kid_is_that_of_torch_fidelity_for_the_same_subsets(sizes, subsets, size, monkeypatch):
    """Once with one kernel matrix for all subsets, in two blocks, and once with one for each."""
    rng = np.random.default_rng(3)
    a, b = gaussian(rng, sizes[0]), gaussian(rng, sizes[1], scale=1.3)
    monkeypatch.setattr(kernel_distance, "KERNEL_ROWS_AT_ONCE", 50)
    how = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": 7, "verbose": False}
    theirs = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **how)
    distance = kid(a, b, subsets=subsets, size=size, seed=7)
    assert distance.value == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-12)


def test_kid_lenet_is_of_standardised_features_and_signed():
    """By scikit-learn's kernel (x·y / D + 1)³ over all pairs, whatever the scale of each feature."""
    rng = np.random.default_rng(12)
    a, b = gaussian(rng, 40, shift=0.3), gaussian(rng, 40)
    x, y = ((side - b.mean(0)) / b.std(0) for side in (a, b))
    xx, yy, xy = (polynomial_kernel(*pair, degree=3) for pair in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (40 * 39) for k in (xx, yy))
    compare = metrics()["kid_lenet"].compare
    scale = 10.0 ** np.arange(-3, 5)
    distance = compare(a * scale + scale, b * scale + scale, True)["kid_lenet"]
    assert distance.value == pytest.approx(compare(a, b, True)["kid_lenet"].value, rel=1e-6)
    assert distance.low < within - 2 * xy.mean() < distance.high and distance.value > 0
    alike = [compare(*(gaussian(rng, 40) for _ in "ab"), True)["kid_lenet"].value for _ in range(9)]
    assert min(alike) < 0 < max(alike)
    assert np.isfinite(compare(np.ones((9, 3)), np.zeros((9, 3)), True)["kid_lenet"].value)


def test_a_frechet_distance_within_classes_by_hand():
    """Of rows that are moved by 1 and by 2 in classes of three quarters and a quarter; no even draw helps."""
    rng = np.random.default_rng(13)
    rows = gaussian(rng, 400, width=3)
    y = np.repeat([0, 1], (300, 100))
    shift = np.where(y[:, None] == 0, (1, 0, 0), (0, 2, 0))
    within = metrics()["fd_class"].within
    figure = within(rows + shift, rows, y, y, False)["fd_class"]
    assert figure.value == pytest.approx(0.75 * 1 + 0.25 * 4, rel=1e-9) and figure.low is None
    even = np.concatenate([np.arange(100), np.arange(300, 400)])
    by_hand = 0.75 * frechet_distance(rows[:100] + shift[:100], rows[:300]) + 0.25 * 4
    figure = within((rows + shift)[even], rows, y[even], y, True)["fd_class"]
    assert figure.value == pytest.approx(by_hand, rel=1e-9) and figure.low < by_hand < figure.high
    # a class without samples is compared with all of them, a class of one real image is left out
    none = 0.75 * frechet_distance(rows[:300], rows[:300]) + 0.25 * frechet_distance(rows[:300], rows[300:])
    figure = within(rows[:300], np.concatenate([rows, rows[:1]]), y[:300], np.append(y, 2), False)["fd_class"]
    assert figure.value == pytest.approx(none, abs=1e-9)
    refused("", within, rows, rows[:1], y, y[:1], False)


def test_the_interval_within_classes_is_of_nine_tenths_of_the_samples():
    """Of one class and one feature, whose Fréchet distance is that of means and of standard deviations."""
    rng = np.random.default_rng(14)
    fake, real, y = gaussian(rng, 50, width=1), gaussian(rng, 200, width=1), np.zeros(200)

    def distance(rows):
        return float((rows.mean() - real.mean()) ** 2 + (rows.std(ddof=1) - real.std(ddof=1)) ** 2)

    figure = metrics()["fd_class"].within(fake, real, y[:50], y, True)["fd_class"]
    by_hand = half_samples(distance, fake, draws=20, fraction=0.9)
    assert (figure.value, figure.high) == pytest.approx((by_hand.value, by_hand.high), rel=1e-6)


@pytest.mark.parametrize(
    "n, rows, subsets, size", [(60, 2000, 400, 30), (160, 40, 400, 80), (400, 2000, 4, 5)]
)
def test_the_interval_of_kid_is_as_wide_as_its_values_vary(n, rows, subsets, size, monkeypatch):
    """By Student's quantiles of 100 halves and of the subsets: for samples, for samples of which the halves
    take a part, and for subsets. A mean of means varies as those of one row, because the sets differ."""
    rng, unit = np.random.default_rng(15), scipy.stats.t.ppf(0.975, min(subsets, 100) - 1)
    monkeypatch.setattr(kernel_distance, "MAX_INTERVAL_ROWS", rows)
    real = gaussian(rng, 40, width=4)
    drawn = [
        kid(gaussian(rng, n, width=4, shift=0.7), real, subsets=subsets, size=size, seed=seed)
        for seed in range(200)
    ]
    above, below = (
        np.mean([((end - one.value) / unit) ** 2 for one, end in ends]) ** 0.5
        for ends in ([(one, one.high) for one in drawn], [(one, one.low) for one in drawn])
    )
    assert (above, below) == pytest.approx(2 * (np.std([one.value for one in drawn], ddof=1),), rel=0.2)


def test_kid_is_unbiased_and_its_interval_covers():
    """One and the same distribution has the distance 0, whatever the numbers of rows and of subset rows. The
    interval covers the mean over samples for the same real images, which may be few."""
    rng = np.random.default_rng(4)
    for size in (1000, 8):  # half of the rows, and far fewer
        of_pairs = [(gaussian(rng, 60), gaussian(rng, 50)) for _ in range(80)]
        values = np.array([kid(*pair, subsets=60, size=size, intervals=False).value for pair in of_pairs])
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(80)
    for n, few, size, shift in ((200, 12, 1000, 0.3), (60, 50, 8, 0.0)):
        real = gaussian(rng, few)
        intervals = [kid(gaussian(rng, n, shift=shift), real, subsets=60, size=size) for _ in range(50)]
        values = np.array([i.value for i in intervals])
        assert often_enough(sum(i.low <= values.mean() <= i.high for i in intervals), 50)
        assert np.mean([i.high - i.low for i in intervals]) < 8 * values.std()
    for a, b in ((np.ones((3, 2)), np.ones((9, 2))), (np.ones((9, 2)), np.ones((9, 3)))):
        refused("", kid, a, b)


def test_frechet_distances_of_moments_of_components_and_extrapolated():
    rows = gaussian(np.random.default_rng(6), 20)
    mean, covariance = moments(rows.astype(np.float32))
    assert mean.dtype == covariance.dtype == np.float64
    assert np.allclose(mean, rows.mean(0), atol=1e-6) and np.allclose(covariance, np.cov(rows.T), atol=1e-6)
    refused("", frechet_of_moments, moments(rows), moments(rows[:, :3]))
    rng = np.random.default_rng(5)
    a, b = gaussian(rng, 30, width=64), gaussian(rng, 40, width=64, shift=0.1)
    assert frechet_distance(a, b) == pytest.approx(frechet_of_moments(moments(a), moments(b)), rel=1e-6)
    theirs = [fid_features_to_statistics(torch.from_numpy(f)) for f in (a, b)]
    theirs = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-3)  # their root is of a singular matrix
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(32, 32))
    fake, real = gaussian(rng, 200, width=32, shift=0.2) @ mixing, gaussian(rng, 150, width=32) @ mixing
    pca = PCA(5, svd_solver="full").fit(real)
    direct = frechet_distance(pca.transform(fake), pca.transform(real))
    assert pca_frechet(fake, real, dims=5) == pytest.approx(direct, rel=1e-9)
    assert pca_frechet(fake, real) == pytest.approx(frechet_distance(fake, real), rel=1e-9)
    refused("", pca_frechet, fake[:, :9], real)
    rng, truth = np.random.default_rng(8), 32 * (0.1**2 + 0.2**2)
    raw, extrapolated = [], []
    for seed in range(4):
        fake, real = gaussian(rng, 500, width=32, shift=0.1, scale=1.2), gaussian(rng, 500, width=32)
        raw.append(frechet_distance(fake, real) - truth)
        extrapolated.append(fd.frechet_infinity(fake, real, seed=seed) - truth)
    assert np.mean(raw) > 0.4 and np.abs(extrapolated).mean() < np.abs(raw).mean() / 3
    assert abs(np.mean(extrapolated)) < 0.15


def test_sliced_wasserstein_against_scipy_and_known_gaussians():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(6, 1)), rng.gamma(2, size=(4, 1))
    pairs = np.repeat(a, 4, 0) - np.repeat(b, 6, 0).T
    best = (pairs**2)[linear_sum_assignment(pairs**2)].mean()
    assert sliced_wasserstein(a, b) == pytest.approx(np.sqrt(best), rel=1e-12)
    assert sliced_wasserstein(b, a) == sliced_wasserstein(a, b)
    assert sliced_wasserstein(a, np.repeat(a, 3, 0)[::-1]) == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(10)
    x = gaussian(rng, 300, width=12)
    shift = rng.normal(size=12)
    distance = sliced_wasserstein(x + shift, x, projections=4000)
    assert distance == pytest.approx(np.linalg.norm(shift) / np.sqrt(12), rel=0.03)
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True)).T)
    assert sliced_wasserstein(3 * x, x, projections=50) == pytest.approx(2, rel=1e-9)
    rng = np.random.default_rng(11)
    a, b = (rng.integers(0, high, (20, 3, 4, 4), dtype=np.uint8) for high in (256, 200))
    flat = [images.reshape(20, -1).astype(np.float64) for images in (a, b)]
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(*flat), rel=1e-5)
    for wrong in (b[:0], b[:, :1]):
        refused("", sliced_wasserstein, a, wrong)


@pytest.mark.slow
def test_at_few_pictures_the_robust_metrics_see_a_blur_that_the_raw_distance_hardly_does(shared_data):
    """600 pictures of Imagenette at 64 pixels: figures as multiples of what 600 other real ones have."""
    import zipfile

    from PIL import Image
    from scipy.ndimage import gaussian_filter

    from gzcli.metrics.pretrained import lite

    with zipfile.ZipFile(shared_data / "sets" / "imagenette64.zip") as archive:
        names = np.random.default_rng(0).permutation([n for n in archive.namelist() if n.endswith(".png")])
        opened = [Image.open(archive.open(name)).convert("RGB") for name in names[:1200]]
        images = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in opened])
    blurred = gaussian_filter(images[600:], (0, 0, 2, 2))
    real, fresh, blur = (lite().features(x) for x in (images[:600], images[600:], blurred))

    def times_floor(metric) -> float:
        return metric(blur, real) / metric(fresh, real)

    raw, pca = times_floor(frechet_distance), times_floor(pca_frechet)
    assert 1.2 < raw < 2.5 < pca
    assert times_floor(sliced_wasserstein) > raw
    distance: Interval = kid(blur, real)
    assert distance.value > 20 * abs(kid(fresh, real).value) and distance.low > 0.5 * distance.value


def test_metrics_and_their_intervals_need_no_more_images_than_declared():
    rng = np.random.default_rng(0)
    for metric in metrics().values():
        if metric.compare and metric.name != "is":  # `is` reads logits of photographs
            sides = (gaussian(rng, metric.fewest, width=64) for _ in "ab")
            for figure in metric.compare(*sides, True).values():
                assert np.isfinite([figure.value, figure.low, figure.high]).all(), metric.name
