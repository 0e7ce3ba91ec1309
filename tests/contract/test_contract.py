"""What every model owes: the contract of `gzcli.testing` over the whole zoo, on the embedded digits."""

import pytest
from zoo import CASES

from gzcli.testing import CHECKS
from gzcli.testing import contract as tools

FIRST = {case.model: case for case in reversed(CASES)}.values()
DEAR = ("training_helps", "each_phase_learns_alone", "every_kind_of_set")  # which train, or build three times


def checks():
    """Each check of each case; of a model's further cases the dear ones are slow."""
    for name, check in CHECKS.items():
        for case in CASES:
            quick = name not in DEAR or any(case is first for first in FIRST)
            marks = () if quick else pytest.mark.slow
            yield pytest.param(check, case, id=f"{case}-{name}", marks=marks)


@pytest.mark.parametrize(("check", "case"), checks())
def test_contract(check, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_over_all_their_steps_know_nothing_of_their_batch(case, monkeypatch):
    """The check itself takes few."""
    monkeypatch.setattr(tools, "FEW", {})
    monkeypatch.setattr(tools, "ODE_STEPS", 8)
    CHECKS["scores_know_nothing_of_their_batch"](case)
