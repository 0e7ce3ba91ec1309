"""Which processes use a data set: it is not removed while one reads or packs it. No heavy import.

Each use is a file `packs/.NAME.PID.N.used` that its process keeps locked, and that the next one removes where
the process was killed. These files are made and looked at under a lock of the set, its gate.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from gzcli.core.errors import UsageError
from gzcli.data.sets.names import DataSet
from gzcli.data.sets.specs import DataSpec
from gzcli.store.files import is_locked, lock
from gzcli.store.paths import cache_dir

_uses = itertools.count()
WAIT = "stop it first, or wait for it"


class Use:
    """A use of a set by this process, until `end`, until nothing refers to it any more, or until the process
    ends.

    found: the set.
    """

    def __init__(self, found: DataSet):
        self._held = contextlib.ExitStack()
        # `__del__` might find the modules gone that it needs, or not be called, where the interpreter ends
        self.end = weakref.finalize(self, _let_go, self._held, os.getpid())
        file = cache_dir("packs", f".{found.key}.{os.getpid()}.{next(_uses)}.used")
        with contextlib.suppress(OSError), lock(_gate(found)):  # where nothing can be written, nothing can go
            _others(found)
            self._held.callback(file.unlink, missing_ok=True)
            self._held.enter_context(lock(file, wait=False))

    def __enter__(self) -> Use:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Lets the set go where the block has failed."""
        if kind:
            self.end()


def _let_go(held: contextlib.ExitStack, pid: int) -> None:
    """Ends a use, but not in a child that has a copy of it."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            held.close()


@contextlib.contextmanager
def alone(found: DataSet) -> Iterator[None]:
    """Inside, no other process uses the set, and none can begin to. Raises UsageError that names one."""
    raw = cache_dir("raw", f".{found.key}.lock") if isinstance(found, DataSpec) else None
    with lock(_gate(found)):
        if others := _others(found):
            raise UsageError(f"`{found.reference}` is being used by process {others[0]}", hint=WAIT)
        with lock(raw, wait=False) if raw else contextlib.nullcontext(True) as got:
            if not got:
                raise UsageError(f"`{found.reference}` is being downloaded by another process", hint=WAIT)
            yield


def _gate(found: DataSet) -> Path:
    return cache_dir("packs", f".{found.key}.gate.lock")


def _others(found: DataSet) -> list[int]:
    """The other processes that use a set. The files of those that were killed are removed."""
    living = []
    for file in cache_dir("packs").glob(f".{found.key}.*.used"):
        pid = int(file.name.split(".")[-3])
        if pid == os.getpid():
            continue
        if is_locked(file):
            living.append(pid)
        else:
            file.unlink(missing_ok=True)
    return living
