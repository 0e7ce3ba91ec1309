"""The publishers' files of known sets in the cache. No heavy import."""

from __future__ import annotations

from pathlib import Path

from gzcli.core.errors import MissingError
from gzcli.data.packs.forms import Say
from gzcli.data.sets.specs import DataFile, DataSpec
from gzcli.store.files import checksum
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
    """Whether a file is there, with its size if that is known. `check_files` reads its bytes."""
    path = raw_dir(spec) / file.name
    return path.exists() and (not file.exact or path.stat().st_size == file.size)


def check_files(spec: DataSpec, say: Say) -> list[Path]:
    """The files of a set that are there, each of which is read. Raises MissingError for one whose checksum is
    not the publisher's."""
    paths = []
    for file in spec.files:
        path = raw_dir(spec) / file.name
        if not path.exists():
            continue  # a linked set may have folders in the place of files
        say(f"checking `{path}`")
        kind = "sha256" if file.sha256 else "md5"
        if not is_there(spec, file) or checksum(path, kind) != (file.sha256 or file.md5):
            again = f"`gz data remove {spec.name}`, then `gz data download {spec.name}"
            raise MissingError(
                f"`{path}` is damaged: its {kind} is not the publisher's",
                hint=f"{again}{' --from DIR`' if spec.linked else '`'} fetches it anew",
            )
        paths.append(path)
    return paths
