"""The model zoo: a folder for each family, a file for each model. `gzcli.models()` lists the models."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard


class _Zoo(ModuleType):
    """A package that can be called."""

    def __call__(self) -> dict[str, ModelCard]:
        """The card of every model by name, including those from `GZ_MODELS` and from installed packages."""
        from gzcli.models.catalog import cards  # an import of a sampler alone must not load the catalog

        return cards()


sys.modules[__name__].__class__ = _Zoo
