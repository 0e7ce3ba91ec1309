"""The floor of figures, on classes of Gaussian features, and the places by the excess over it."""

import numpy as np
import pytest
import scipy.stats

from gzcli.data.packs.open import open_pack
from gzcli.judge.real import ImageSet, RealImages, Strata, by_label
from gzcli.metrics import standings
from gzcli.metrics.interval import excess, mean_of_draws
from gzcli.metrics.metric import Interval, metrics
from gzcli.metrics.standings import Excess

SHARES = np.array([0.4, 0.3, 0.2, 0.1])
CENTRES = 3 * np.eye(4, 8)
FD = metrics()["fd"].compare


def drawn(rng, labels):
    return CENTRES[labels] + rng.normal(size=(len(labels), 8))


def labels_of(rng, n, strata=None):
    return rng.choice(4, n, p=SHARES) if strata is None else np.repeat(np.arange(4), strata.quotas(n))


def test_quotas_are_shares_and_short_strata_are_filled_up():
    strata = Strata("label", SHARES, lambda images: images.labels)
    for n in (1, 7, 50, 999):
        quotas = strata.quotas(n)
        assert quotas.sum() == n and np.abs(quotas - n * SHARES).max() < 1
    labels = np.repeat(np.arange(4), (100, 100, 100, 5))
    rows = strata.draw(labels, 100, np.random.default_rng(0))
    assert len(set(rows)) == 100 and list(rows) == sorted(rows)
    counts = np.bincount(labels[rows], minlength=4)
    assert counts[3] == 5 and (counts[:3] >= (40, 30, 20)).all()
    assert list(by_label(np.array([0, 0, 1]), 3).shares) == [2 / 3, 1 / 3, 0]


@pytest.mark.parametrize("evenly", [pytest.param(False, marks=pytest.mark.slow), True])
def test_real_images_have_no_excess_over_the_floor_that_is_drawn_as_they_are(evenly):
    """The nominal 95 % interval holds 0 at least 19 times in 20; by another floor it does not."""
    strata = Strata("label", SHARES, lambda images: images.labels) if evenly else None
    rng, held, excesses = np.random.default_rng(1), 0, []
    real = drawn(rng, labels_of(rng, 4000))
    for _ in range(60):
        floors = {}
        for how in (strata, None if evenly else Strata("label", SHARES, lambda images: images.labels)):
            draws = [FD(drawn(rng, labels_of(rng, 200, how)), real, False)["fd"].value for _ in range(20)]
            floors[how is strata] = mean_of_draws(draws)
        figure = FD(drawn(rng, labels_of(rng, 200, strata)), real, True)["fd"]
        over = excess(figure, floors[True], "down")
        held += over.low <= 0 <= over.high
        excesses.append(excess(figure, floors[False], "down").value)
    assert held >= 57
    assert (-1 if evenly else 1) * np.mean(excesses) > 3 * scipy.stats.sem(excesses)


def test_an_excess_is_a_difference_whose_errors_are_added_in_squares():
    over = excess(Interval(9.0, 6.0, 11.0), Interval(4.0, 0.0, 8.0), "down")
    assert (over.value, over.low, over.high) == (5.0, 0.0, 10.0)
    assert excess(Interval(0.7), Interval(0.9), "up").value == pytest.approx(0.2)


def test_the_draws_of_a_floor_are_rows_of_the_other_split():
    digits, n = open_pack("digits"), 100
    real = RealImages(digits)
    labels = digits.labels("train")
    strata = by_label(labels, 10)
    for how in (None, strata):
        pairs = list(real.draws(n, None, how))
        assert len(pairs) == 20 and all(len(fake) == n and fake.labels is None for fake, _ in pairs)
        assert all(against is real.reference(None) for _, against in pairs)
    train = {image.tobytes(): y for image, y in zip(digits.images("train"), labels, strict=True)}
    classes = np.array([train[image.tobytes()] for image in pairs[0][0].images[:]])
    assert list(np.bincount(classes, minlength=10)) == list(strata.quotas(n))
    assert len(list(real.draws(len(labels), None))) == 1, "all that there are"
    everything = RealImages(digits, "all")
    fake, rest = next(everything.draws(300, None))
    assert len(fake) + len(rest) == len(everything.reference(None)) == sum(digits.meta.counts.values())
    assert len(ImageSet(np.zeros((9, 1))).first(4)) == 4


def row(name, fd, half, second):
    metrics_of_row = {"fd": fd, "fd_second": second}
    over = {"fd": [fd - 4, fd - 4 - half, fd - 4 + half], "fd_second": [second, second - 0.1, second + 0.1]}
    return {"name": name, "model": name, "seed": 0, "n": 9, "metrics": metrics_of_row, "excess": over}


def test_places_are_shared_by_what_the_intervals_do_not_tell_apart():
    rows = [row("a", 5, 0.5, 7), row("b", 5.5, 0.5, 1), row("c", 5.9, 0.5, 3), row("d", 9, 0.5, 5)]
    way = {"fd": "down", "fd_second": "down"}
    result = standings.two_judges(rows, None, way)
    assert result["metric"] == "fd"
    assert result["places"] == {"a": "1–2", "b": "1–3", "c": "2–3", "d": "4"}
    second = result["second"]
    assert second["spearman"] == pytest.approx(scipy.stats.spearmanr((1, 2, 3, 4), (4, 1, 2, 3)).statistic)
    assert second["apart"] == [["a", "1–2", "4"], ["d", "4", "3"]]
    by_seed = standings.summary(rows, "fd")
    assert [line["model"] for line in by_seed] == list("abcd") and by_seed[3]["place"] == "4"
    assert standings.ranking_metric(rows, None, way | {"fd": None}) == "fd_second", "of a dead judge"


def test_what_is_below_the_floor_does_not_win():
    assert standings.rank_ranges({"a": Excess(-3, 0.5), "b": Excess(0.1, 0.5), "c": Excess(2, 0.5)}) == {
        "a": "1–2",
        "b": "1–2",
        "c": "3",
    }


def test_the_excess_over_seeds_has_students_interval():
    values = [Excess(1.0, 0.1), Excess(2.0, 0.1), Excess(3.0, 0.1)]
    low, high = scipy.stats.t.interval(0.95, 2, 2.0, scipy.stats.sem([1, 2, 3]))
    over = standings.over_seeds(values)
    assert over.value == 2 and over.half == pytest.approx((high - low) / 2)
    assert standings.over_seeds([Excess(1, 0.3)] * 3).half == pytest.approx(0.3 / 3**0.5)
