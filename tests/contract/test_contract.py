"""What every model owes: the contract of `gzcli.testing` over the whole zoo, on the embedded digits."""

from __future__ import annotations

import pytest
from zoo import CASES

from gzcli.testing import CHECKS


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check, case):
    check(case)
