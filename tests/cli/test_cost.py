"""What a job costs, in numbers and in words, without a trial."""

from __future__ import annotations

import pytest

from gzcli.launch.cost import TO_FIT, UNKNOWN_IMAGE, Cost


def test_costs_add_and_multiply():
    cost = 2 * (Cost.once(10.0, TO_FIT) + Cost(5.0, 0.25, 20.0)) + Cost.once(3.0, TO_FIT)
    assert (cost.fixed, cost.each, cost.calls) == (33.0, 0.5, 40.0) and cost.why == {TO_FIT: 23.0}
    assert cost.seconds() == 33.0 and cost.seconds(100) == 83.0
    assert sum([cost, cost], Cost()) == 2 * cost


@pytest.mark.parametrize(
    "cost", [UNKNOWN_IMAGE, Cost(None, 1.0), Cost(None) + Cost(1.0, 1.0), 3 * Cost(None)]
)
def test_an_unknown_part_makes_the_whole_unknown(cost):
    assert cost.seconds(10) is None and cost.in_words(10) == "unknown"


def test_an_unknown_number_counts_only_if_images_do():
    assert Cost(4.0).seconds(None) == 4.0 and Cost(4.0, 1.0).seconds(None) is None
    assert UNKNOWN_IMAGE.seconds(0) == 0.0
    assert UNKNOWN_IMAGE.or_else(Cost(1.0, 2.0, 3.0)) == Cost(0.0, 2.0, 3.0)


def test_a_cost_in_words():
    cost = Cost.once(40.0, "to train the judges") + Cost.once(0.5, TO_FIT) + Cost(0.0, 0.28, 20.0)
    words = "about 3 minutes for 500 images × 20 network calls; 40 seconds of it to train the judges"
    assert cost.in_words(500) == words
    assert cost.of_samples(500) == "about 2 minutes, 20 calls per image"
    assert cost.of_samples(None) == "0.28 s per image, 20 calls per image"
    assert UNKNOWN_IMAGE.of_samples(500) == "an unknown time"
    assert cost.parts == ["about 40 seconds to train the judges", "about 1 second to fit the scores"]
