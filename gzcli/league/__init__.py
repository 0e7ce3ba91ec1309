"""Several trainings by one command: leagues, which rank models, and sweeps, which rank settings.
`gzcli.league(…)` runs a league."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Leagues(ModuleType):
    """A package that can be called."""

    def __call__(self, *words: Any, **options: Any) -> Any:
        """Calls `gzcli.league.call.league`, whose options these are."""
        from gzcli.league.call import league

        return league(*words, **options)


sys.modules[__name__].__class__ = _Leagues
