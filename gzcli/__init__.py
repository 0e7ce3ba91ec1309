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
    from gzcli import league, models
    from gzcli.api import Data, datasets, load, open_data, runs, train
    from gzcli.api import LoadedRun as Run
    from gzcli.api.auditing import audit
    from gzcli.api.compare import bench, compare
    from gzcli.api.samples import Samples
    from gzcli.api.sampling import sample
    from gzcli.api.scoring import alarm, ood
    from gzcli.core.errors import DeviceError, DivergedError, GzError, MissingError, UsageError
    from gzcli.core.types import Batch, DataInfo, Noise, Progress
    from gzcli.league.call import sweep, which
    from gzcli.models.base import Model, Phase

# name → its module, and its name there if it differs
_PLACES = {
    **dict.fromkeys(("Data", "datasets", "load", "open_data", "runs", "train"), "gzcli.api"),
    "audit": "gzcli.api.auditing",
    **dict.fromkeys(("bench", "compare"), "gzcli.api.compare"),
    **dict.fromkeys(("alarm", "ood"), "gzcli.api.scoring"),
    "Samples": "gzcli.api.samples",
    "sample": "gzcli.api.sampling",
    **dict.fromkeys(
        ("DeviceError", "DivergedError", "GzError", "MissingError", "UsageError"), "gzcli.core.errors"
    ),
    **dict.fromkeys(("sweep", "which"), "gzcli.league.call"),
    **dict.fromkeys(("Batch", "DataInfo", "Noise", "Progress"), "gzcli.core.types"),
    **dict.fromkeys(("Model", "Phase"), "gzcli.models.base"),
    "Run": "gzcli.api:LoadedRun",
}

__all__ = [
    "Batch",
    "Data",
    "DataInfo",
    "DeviceError",
    "DivergedError",
    "GzError",
    "MissingError",
    "Model",
    "Noise",
    "Phase",
    "Progress",
    "Run",
    "Samples",
    "UsageError",
    "__version__",
    "alarm",
    "audit",
    "bench",
    "compare",
    "datasets",
    "league",
    "load",
    "models",
    "ood",
    "open_data",
    "runs",
    "sample",
    "sweep",
    "train",
    "which",
]


def __getattr__(name: str) -> Any:
    if name in ("league", "models"):
        return import_module(f"gzcli.{name}")
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module `gzcli` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
