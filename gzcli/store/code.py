"""A hash of gz's code, by which caches and leagues recognise the results of other code."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# the folders of the package whose code draws samples, and of the code that computes values from them
DRAWING = ("core", "data", "engine", "judge", "models")
JUDGING = ("core", "data", "engine", "judge", "metrics")


def code_hash(*rooms: str, beside: Path | None = None) -> str:
    """A hash of the Python files in these folders of the package, and in `beside`, a file or folder that may
    change while gz runs. Comments, docstrings and formatting do not count."""
    hashes = [*map(_hash_of_room, rooms), *([_hash_of(beside)] if beside else [])]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


@cache
def _hash_of_room(room: str) -> str:
    return _hash_of(PACKAGE / room)


def _hash_of(place: Path) -> str:
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        digest.update(f"{path.relative_to(place)} {_instructions(path)}".encode())
    return digest.hexdigest()


def _instructions(path: Path) -> Any:
    """The compiled content of a file without the lines of its source; that content itself if it is no
    program."""
    source = path.read_bytes()
    try:  # an optimisation of 2 leaves out docstrings; to parse the syntax tree would take four times as long
        return _plain(compile(source, path.name, "exec", dont_inherit=True, optimize=2))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of a damaged copy in a run
        return source


def _plain(value: Any) -> Any:
    """A constant of a program, in a form whose text is the same in every process."""
    if isinstance(value, CodeType):
        names = (value.co_name, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        counts = (value.co_flags, value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount)
        blocks = getattr(value, "co_exceptiontable", b"")  # since Python 3.11
        return value.co_code, blocks, names, counts, [_plain(constant) for constant in value.co_consts]
    if isinstance(value, tuple | frozenset):
        plain = [repr(_plain(each)) for each in value]
        return type(value).__name__, plain if isinstance(value, tuple) else sorted(plain)
    return value
