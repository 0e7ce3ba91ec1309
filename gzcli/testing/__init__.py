"""The contract that every model must keep, in gz or outside. `gz model check FILE` runs it, or pytest does:

from gzcli.testing import CHECKS, Case

@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check):
    check(Case("maf", {"hidden": 32}))
"""

from gzcli.recipe.files import mistakes
from gzcli.testing.contract import CHECKS, Broken, Case, fault_of

__all__ = ["CHECKS", "Broken", "Case", "fault_of", "mistakes"]
