"""The zoo, a folder a family, a file a model; called, as `gzcli.models()`, it tells what there is."""

from __future__ import annotations

import sys
from types import ModuleType

from gzcli.models.catalog import ModelCard, cards


class _Zoo(ModuleType):
    """This package, which can be called."""

    def __call__(self) -> dict[str, ModelCard]:
        """The card of every model by name: the zoo, and what `GZ_MODELS` and installed packages add."""
        return cards()


sys.modules[__name__].__class__ = _Zoo
