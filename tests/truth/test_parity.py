"""Losses, samplers and transforms in float64 against the numbers of published code, which
`tools/references.py` recorded, and the page of these differences."""

import json

import parity
import pytest
import torch

from gzcli.core import measured

MOST = 1e-6  # tables of noise levels are float32; a wrong term of an equation is above .001


def recorded():
    return json.loads(parity.RECORDED.read_text())


def test_gz_computes_what_published_code_does():
    for name, theirs in recorded().items():
        mine = parity.value(name)
        apart = parity.difference(mine, torch.tensor(theirs["values"], dtype=torch.float64))
        assert mine.abs().max() > 0.01, name
        assert apart < MOST, (name, theirs["reference"])


def test_each_row_has_a_reference_and_its_line_on_the_page():
    rows = {(row["models"], row["part"]): row for row in measured.parity()}
    assert list(recorded()) == list(parity.ROWS)
    assert list(rows) == [(row.models, row.part) for row in parity.ROWS.values()]
    for (name, theirs), row in zip(recorded().items(), rows.values(), strict=True):
        assert (row["reference"], row["version"]) == (theirs["reference"], theirs["version"]), name
        assert float(row["difference"]) < MOST


@pytest.mark.parametrize(
    ("name", "attribute", "factor"), [("fm-loss", "X", 1.001), ("edm-heun", "MOST", 1.001)]
)
def test_a_difference_of_a_thousandth_is_seen(name, attribute, factor, monkeypatch):
    monkeypatch.setattr(parity, attribute, factor * getattr(parity, attribute))
    theirs = torch.tensor(recorded()[name]["values"], dtype=torch.float64)
    assert parity.difference(parity.value(name), theirs) > 10 * MOST
