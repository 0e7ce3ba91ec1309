"""The publishers' files of known sets in the cache. No heavy import."""

from __future__ import annotations

from pathlib import Path

from gzcli.data.specs import DataFile, DataSpec
from gzcli.store.paths import cache_dir

SPLIT_FOLDERS = ("train", "val")  # folders that `raw_dir` of a linked set may hold instead of its files

HUB = "hub"  # a link to the folder of its parquet files, which may be there instead too


def raw_dir(spec: DataSpec) -> Path:
    """The folder of a set's files, in whatever sizes its publisher offers."""
    return cache_dir("raw", spec.name)


def is_fetched(spec: DataSpec) -> bool:
    """Whether every file is there; or, for a linked set, the two folders or the hub's copy in their place."""
    folder = raw_dir(spec)
    if spec.linked and ((folder / HUB).is_dir() or all((folder / name).is_dir() for name in SPLIT_FOLDERS)):
        return True
    return bool(spec.files) and all(is_there(spec, file) for file in spec.files)


def is_there(spec: DataSpec, file: DataFile) -> bool:
    """Whether a file is there, with its size if that is known. Its checksum was checked when it was
    fetched."""
    path = raw_dir(spec) / file.name
    return path.exists() and (not file.exact or path.stat().st_size == file.size)
