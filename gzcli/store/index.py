"""A cache of values read from runs, in files beside them, so that a list of thousands of runs opens few
files. An entry is valid while its files have the same times, sizes and inodes. A damaged, missing or older
index is rebuilt. If it cannot be written, gz works without an index."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from gzcli.store import cache_files, files
from gzcli.version import __version__

INDEX_NAME = ".index-{}.json"
SETTLED = 2e9  # nanoseconds after which a rewritten file is certain to have another time

Mark = list[int]  # mtime, ctime, size, inode
Marks = dict[str, Mark | None]  # path below the run → fingerprint of the file; None: no such file

_open: dict[tuple[str, str], _Index] = {}  # by folder of runs, and kind


class _Index:
    """For each run id, the marks of the files that were read, and the value read from them."""

    def __init__(self, path: Path):
        self.path, self.changed = path, False
        self.runs: dict[str, tuple[Marks, Any]] = cache_files.read(path, _entries) or {}


def _entries(path: Path) -> dict[str, tuple[Marks, Any]]:
    """The entries in a file. Raises an error unless the file is complete, and from this version of gz."""
    head, _, body = (files.read_text(path) or "").partition("\n")
    if head != _head(body):
        raise ValueError("its checksum differs")
    entries: dict[str, tuple[Marks, Any]] = json.loads(body)
    return entries


def _head(body: str) -> str:
    """The first line of an index: gz's version, and a checksum of the rest."""
    return f"gz {__version__} {zlib.crc32(body.encode()):08x}"


def begin(root: Path, kind: str) -> None:
    """Reads the index of a kind, "status" or "summary". Unless it is called, `recall` and `keep` do
    nothing."""
    if (str(root), kind) not in _open:
        _open[str(root), kind] = _Index(root / INDEX_NAME.format(kind))


def save(root: Path, kind: str, names: Iterable[str]) -> None:
    """Writes the index if it changed, for the runs of these names."""
    index = _open.get((str(root), kind))
    if index and index.changed:
        body = json.dumps({name: index.runs[name] for name in names if name in index.runs})
        cache_files.write(index.path, files.write_atomic, f"{_head(body)}\n{body}")
        index.changed = False


def recall(folder: Path, kind: str) -> Any | None:
    """The stored value of a run; None if there is none, or if a file that it was read from has changed."""
    index = _open.get((str(folder.parent), kind))
    marks, value = index.runs.get(folder.name, ({}, None)) if index else ({}, None)
    return value if all(mark(f"{folder}/{place}") == was for place, was in marks.items()) else None


def store_value(folder: Path, kind: str, marks: Marks, value: Any) -> None:
    """Stores a value read from a run, with the marks that its files had before the reading. It is not stored
    if a file is so new that its next change might not alter its time."""
    newest = max((max(was[:2]) for was in marks.values() if was), default=0)
    if (index := _open.get((str(folder.parent), kind))) and time.time_ns() - newest > SETTLED:
        index.runs[folder.name] = marks, value
        index.changed = True


def mark(path: str) -> Mark | None:
    """The attributes that change with the content of a file or folder; None if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino]


def survey(folder: Path, records: Container[str]) -> tuple[Marks, int]:
    """The marks of all folders below this one and of files with these names, and the total size of all files
    in bytes. A file with two links counts once."""
    marks: Marks = {}
    sizes: dict[int, int] = {}  # by inode
    for subfolder, _, names in os.walk(folder):
        place = os.path.relpath(subfolder, folder)
        marks[place] = mark(subfolder)
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                of_file = os.lstat(f"{subfolder}/{name}")
                sizes[of_file.st_ino] = of_file.st_size
            if name in records:
                marks[f"{place}/{name}"] = mark(f"{subfolder}/{name}")
    return marks, sum(sizes.values())
