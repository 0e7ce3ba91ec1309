"""What gz has read of its runs, kept in files beside them, so that a list of thousands opens few.

It is a cache and no more. An entry counts while the files that it was read from are what they were, by their
times, sizes and numbers on the disk; the folders of the runs stay the truth. An index that is damaged,
missing or of another version is made again, and where it cannot be written gz does without.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError
from gzcli.store import files
from gzcli.version import __version__

NAME = ".index-{}.json"
SETTLED = 2e9  # nanoseconds after which a file that is written again surely has another time
# records that are written anew or grow in place; other files of a run come, and go, with a change of their
# folder's time
RECORDS = ("status.json", "run.yaml", "metrics.jsonl", "best.json")

Mark = list[int]  # time of the content, time of the entry, size, number on the disk
Marks = dict[str, Mark | None]  # of files by their place below the run; None: there is none

_open: dict[tuple[str, str], _Index] = {}  # by the folder of the runs, and kind


class _Index:
    """What was kept of one kind of the runs of one folder.

    path: of the index.
    """

    def __init__(self, path: Path):
        self.path, self.changed = path, False
        self.runs: dict[str, tuple[Marks, Any]] = self._read()  # by a run's id, what was read of what files

    def _read(self) -> dict[str, tuple[Marks, Any]]:
        """The entries of the file; none unless it is whole, by its checksum, and of this version of gz."""
        with contextlib.suppress(DamagedError):
            head, _, body = (files.read_text(self.path) or "").partition("\n")
            if head == _head(body):
                return json.loads(body)
        return {}

    def write(self, names: Iterable[str]) -> None:
        body = json.dumps({name: self.runs[name] for name in names if name in self.runs})
        with contextlib.suppress(OSError):  # a store that may only be read
            files.write_atomic(self.path, f"{_head(body)}\n{body}")
        self.changed = False


def _head(body: str) -> str:
    """The first line of an index: gz's version, and a checksum of the rest."""
    return f"gz {__version__} {zlib.crc32(body.encode()):08x}"


def begin(root: Path, kind: str) -> None:
    """Reads what was kept of a folder of runs; without it `recall` and `keep` do nothing.

    root: the folder.
    kind: "status" or "summary".
    """
    if (str(root), kind) not in _open:
        _open[str(root), kind] = _Index(root / NAME.format(kind))


def save(root: Path, kind: str, names: Iterable[str]) -> None:
    """Writes what was kept since the last time.

    names: of the runs that there are; the entries of others are dropped.
    """
    index = _open.get((str(root), kind))
    if index and index.changed:
        index.write(names)


def recall(folder: Path, kind: str) -> Any | None:
    """What was kept of a run; None where nothing was, or where a file that it was read from has changed.

    folder: of the run.
    """
    above, name = os.path.split(folder)
    if not (index := _open.get((above, kind))) or name not in index.runs:
        return None
    marks, value = index.runs[name]
    same = all(mark(f"{folder}/{place}") == was for place, was in marks.items())
    return value if same else None


def keep(folder: Path, kind: str, marks: Marks, value: Any) -> None:
    """Keeps what was read of a run, unless a file has been written so lately that the next change might not
    be seen.

    folder: of the run.
    marks: of the files, taken before they were read.
    value: what JSON can hold, not None.
    """
    above, name = os.path.split(folder)
    newest = max((max(was[:2]) for was in marks.values() if was), default=0)
    if (index := _open.get((above, kind))) and time.time_ns() - newest > SETTLED:
        index.runs[name] = marks, value
        index.changed = True


def mark(path: str) -> Mark | None:
    """What tells one content of a file, or of a folder, from the next; None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]


def survey(folder: Path) -> tuple[Marks, int]:
    """The marks of all folders and records below a run, and the size of all its files together in bytes; a
    file that has two names counts once."""
    marks: Marks = {}
    linked: set[int] = set()
    total, left = 0, [""]
    while left:
        place = left.pop()
        marks[place] = mark(f"{folder}/{place}")
        with contextlib.suppress(OSError), os.scandir(f"{folder}/{place}") as found:
            for entry in found:
                below = f"{place}/{entry.name}" if place else entry.name
                if entry.is_dir(follow_symlinks=False):
                    left.append(below)
                    continue
                with contextlib.suppress(OSError):  # removed meanwhile
                    of_file = entry.stat(follow_symlinks=False)
                    total += 0 if of_file.st_ino in linked else of_file.st_size
                    linked |= {of_file.st_ino} if of_file.st_nlink > 1 else set()
                if entry.name in RECORDS:
                    marks[below] = mark(f"{folder}/{below}")
    return marks, total
