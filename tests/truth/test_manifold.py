"""Figures of nearest neighbours against scikit-learn, the package prdc and counting; copies are found."""

import numpy as np
import pytest
from refused import refused
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from gzcli.metrics import baselines
from gzcli.metrics.quality import neighbours as manifold
from gzcli.metrics.quality.neighbours import authenticity, duplicates, nearest_rows, prdc


def distance(a, b) -> float:
    return float(np.sqrt(((np.asarray(a, np.float64) - b) ** 2).sum()))


@pytest.fixture(scope="module")
def rows():
    """Fake and real rows that overlap in part."""
    rng = np.random.default_rng(0)
    return rng.normal(0.7, 0.8, size=(50, 3)), rng.normal(size=(70, 3))


def test_prdc_equals_counting_by_its_definitions_and_its_authors_package(rows, monkeypatch):
    monkeypatch.setattr(manifold, "DISTANCES_AT_ONCE", 1000)  # several blocks
    fake, real = rows

    def radii(points):
        return [sorted(distance(p, q) for q in points)[4] for p in points]  # the 4th other; itself is at 0

    real_radii, fake_radii = radii(real), radii(fake)
    inside = [[distance(f, r) < radius for r, radius in zip(real, real_radii, strict=True)] for f in fake]
    balls = list(zip(fake, fake_radii, strict=True))
    recalled = [any(distance(f, r) < radius for f, radius in balls) for r in real]
    expected = {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean(recalled),
        "density": np.sum(inside) / (4 * len(fake)),
        "coverage": np.mean(np.any(inside, 0)),
    }
    assert prdc(fake, real, near=4, far=4) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected["recall"] < expected["precision"] < 1

    peer = pytest.importorskip("prdc")  # the package of its authors
    for k in (1, 5):
        assert prdc(*rows, near=k, far=k) == pytest.approx(peer.compute_prdc(rows[1], rows[0], k), abs=1e-12)


def test_prdc_of_a_set_with_itself_and_of_one_far_away():
    """Rows on the surface of a ball do not count, so a row lies in its own and in k − 1 others on average."""
    rows = 100 + np.random.default_rng(1).normal(size=(200, 64))
    assert prdc(rows, rows[::-1]) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert set(prdc(rows + 50, rows).values()) == {0}
    refused("", prdc, rows[:5], rows)


def test_nearest_equals_scikit_learn(rows, monkeypatch):
    monkeypatch.setattr(manifold, "DISTANCES_AT_ONCE", 500)
    distances, places = nearest_rows(*rows, k=6)
    expected = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(rows[1]).kneighbors(rows[0])
    assert np.allclose(distances, expected[0], atol=1e-12) and (places == expected[1]).all()
    for real in (rows[1][:5], rows[1][:, :2]):
        refused("", nearest_rows, rows[0], real, k=6)
    # ranked by features, rows have length 1
    fake, real = rows
    near, far = baselines.knn_features(real, [real + 1e-6, 5 * fake], k=3)
    expected = NearestNeighbors(n_neighbors=3).fit(normalize(real)).kneighbors(normalize(fake))[0][:, -1]
    assert np.allclose(far, expected, atol=1e-12) and near.dtype == np.float64 and len(near) == 70
    assert np.allclose(baselines.knn_features(real, [real], k=1)[0], 0)


def test_copies_are_found_and_have_no_authenticity():
    """‖a‖² + ‖b‖² − 2 a·b of bytes is of the order 10⁷, its error in single precision more than 1."""
    images = np.random.default_rng(2).integers(1, 255, (40, 3, 16, 16), dtype=np.uint8)
    near = images.copy()
    near[:, 0, 0, 0] += 1
    distances, places = nearest_rows(near, images)
    assert (distances == 1).all() and (places[:, 0] == np.arange(40)).all()
    assert (nearest_rows(images, images)[0] == 0).all()
    rng = np.random.default_rng(4)
    train, held_out, fresh = (rng.normal(size=(n, 4)) for n in (300, 1000, 1000))
    assert duplicates(held_out, train, held_out) == 0.01
    assert duplicates(fresh, train, held_out) < 0.01 + 4 * np.sqrt(2 * 0.01 * 0.99 / 1000)
    copies = train + 1e-3 * rng.normal(size=train.shape)
    assert duplicates(copies, train, held_out) == 1
    assert duplicates(np.concatenate([copies, fresh]), train, held_out) == pytest.approx(300 / 1300, abs=0.02)
    # a held-out image that was trained on: only exact copies are as close
    assert duplicates(train, train, np.concatenate([train[:50], held_out])) == 1
    rng = np.random.default_rng(3)
    train, fake = rng.normal(size=(60, 4)), rng.normal(size=(40, 4))
    authentic = []
    for sample in fake:
        to = [distance(sample, t) for t in train]
        i = int(np.argmin(to))
        authentic.append(to[i] > min(distance(train[i], t) for j, t in enumerate(train) if j != i))
    assert authenticity(fake, train) == np.mean(authentic) and 0.2 < np.mean(authentic) < 0.9
    assert authenticity(train[::2], train) == 0
    assert authenticity(train + 1e-4 * rng.normal(size=train.shape), train) == 0
    assert authenticity(train, np.repeat(train, 2, 0)) == 0  # copies of rows that stand twice
    mixed = np.concatenate([fake, train[:40]])
    assert authenticity(mixed, train) == np.mean(authentic) / 2
