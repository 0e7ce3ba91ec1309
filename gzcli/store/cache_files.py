"""Files of the cache, which gz makes again whatever is wrong with them. If one cannot be written, gz says so
and continues. Packs are separate, because gz cannot continue without them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gzcli.core.errors import MissingError
from gzcli.store import files

if TYPE_CHECKING:  # this module is part of every list of runs
    from gzcli.core.types import Say

T = TypeVar("T")


def read(path: Path, load: Callable[[Path], T], say: Say | None = None) -> T | None:
    """The value that `load` reads from a file; None if there is none. Every error of `load` means damage, and
    so does anything but a regular file. What is damaged is reported through `say` and removed."""
    if not os.path.lexists(path):
        return None
    try:
        with files.reading(path, None):
            return load(path)
    except MissingError as e:
        if say:
            say(f"{e.message}; gz recreates it")
        remove(path)
        return None


def write(path: Path, save: Callable[[Path, T], None], value: T, say: Say | None = None) -> None:
    """Stores a value by `save`, such as `files.write_json`. If that fails, for example because the disk is
    full, it is reported through `say`."""
    files.remove_leftovers(path.parent)
    try:
        save(path, value)
    except (OSError, MissingError) as e:
        why = os.strerror(e.errno or 0).lower() if isinstance(e, OSError) else e.message
        if say:
            say(f"`{path}` cannot be stored ({why}), so gz will compute it again")


def remove(path: Path) -> None:
    """Removes a file of the cache, or what is in its place, unless the cache is read-only."""
    with contextlib.suppress(OSError):
        files.remove_tree(path)


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps other processes from making the same file within the block, if its folder is writable."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, MissingError):
            stack.enter_context(files.lock(path.with_suffix(".lock"), on_wait=on_wait))
        yield
