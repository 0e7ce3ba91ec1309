"""Weights from outside, as files in the cache's `weights` folder or wherever the user keeps them."""

from __future__ import annotations

from pathlib import Path

from gzcli.errors import MissingError
from gzcli.store.paths import cache_dir

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's port of the TensorFlow network of 2015-12-05


def weights(name: str, *, path: str | Path | None = None, use: str, source: str) -> Path:
    """The file of weights `name`: at `path` if given, else in the cache.

    Raises MissingError that says for what `use` it is needed, and where to get it (`source`) and to put it.
    """
    place = cache_dir("weights", name)
    file = Path(path).expanduser() if path else place
    if not file.is_file():
        raise MissingError(
            f"{use} need the weights `{name}`, and `{file}` is not there",
            hint=f"put that file of {source} at `{place}`, or name it with `--weights FILE`",
        )
    return file
