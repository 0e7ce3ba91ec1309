"""gz from Python: train, sample, score and compare every kind of image generative model.

    import gzcli

    run = gzcli.train("vae", data="digits", steps=600)
    images = run.sample(16, seed=0)  # uint8 [16, C, H, W]

Names load as they are used: an import of this package alone loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gzcli.version import __version__

if TYPE_CHECKING:
    from gzcli import models
    from gzcli.api.functions import datasets, load, open_data, train
    from gzcli.api.handles import Data, Run
    from gzcli.core.types import Batch, DataInfo, Noise, Progress
    from gzcli.models.base import Model, Phase

_MODULES = {
    "Batch": "gzcli.core.types",
    "Data": "gzcli.api.handles",
    "DataInfo": "gzcli.core.types",
    "Model": "gzcli.models.base",
    "Noise": "gzcli.core.types",
    "Phase": "gzcli.models.base",
    "Progress": "gzcli.core.types",
    "Run": "gzcli.api.handles",
    "datasets": "gzcli.api.functions",
    "load": "gzcli.api.functions",
    "open_data": "gzcli.api.functions",
    "train": "gzcli.api.functions",
}

__all__ = [
    "Batch",
    "Data",
    "DataInfo",
    "Model",
    "Noise",
    "Phase",
    "Progress",
    "Run",
    "__version__",
    "datasets",
    "load",
    "models",
    "open_data",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("gzcli.models")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module `gzcli` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
