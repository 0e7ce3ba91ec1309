"""Parts: files and folders on their way, beside the place that they get when they are whole. Those of killed
processes are left over, and removed by who holds the lock next."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
import zlib
from functools import cache
from pathlib import Path

DAY = 86_400.0
# machine and process that write a part: see `beside`; version 0.1 named no machine
_PART = re.compile(r"\..+?\.(?:([0-9a-f]{8})\.)?(\d+)(?:\.\d+)?\.part")
_parts = itertools.count()


def beside(path: Path) -> Path:
    """Where a file or folder is written that is renamed to `path` when it is whole. The name is new, and says
    which process of which machine writes there, by which `sweep` knows what is left over."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{next(_parts)}.part")


def sweep(*folders: Path) -> None:
    """Removes what was left `beside` its place by processes that were killed. What living ones write stays;
    of another machine, whose processes cannot be seen, what has not changed for a day is left over.

    To be called by who holds the lock of what is written there.

    folders: are looked into, and not below; they need not exist.
    """
    for folder in folders:
        for part in folder.glob(".*.part") if folder.is_dir() else ():
            if (named := _PART.fullmatch(part.name)) and _is_left(part, *named.groups()):
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _is_left(part: Path, machine: str | None, pid: str) -> bool:
    """Whether the process is gone that wrote a part, or another one has its number by now."""
    import psutil

    try:
        changed = part.stat().st_mtime
        if machine not in (None, _machine()):
            return time.time() - changed > DAY
        process = psutil.Process(int(pid))
        return process.create_time() > changed + 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (FileNotFoundError, psutil.Error):  # renamed meanwhile; another user's process
        return False


@cache
def _machine() -> str:
    """A name for the machine, or the container, whose processes have numbers of their own; 8 digits."""
    import platform

    space = Path("/proc/self/ns/pid")
    spaces = os.readlink(space) if space.is_symlink() else ""
    return f"{zlib.crc32((platform.node() + spaces).encode()):08x}"
