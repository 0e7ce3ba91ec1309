"""What every model owes: the contract of `gzcli.testing` over the whole zoo, on the embedded digits."""

from __future__ import annotations

import pytest
from zoo import CASES

from gzcli.testing import CHECKS
from gzcli.testing import case as tools


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_over_all_their_steps_know_nothing_of_their_batch(case, monkeypatch):
    """The check itself takes few."""
    monkeypatch.setattr(tools, "FEW", {})
    monkeypatch.setattr(tools, "ODE_STEPS", 8)
    CHECKS["scores_know_nothing_of_their_batch"](case)
