"""Files that are complete or absent: atomic writes, locks between processes, checksums, free space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gzcli.core.errors import DamagedError, MissingError
from gzcli.store.leftovers import beside

if TYPE_CHECKING:
    from filelock import BaseFileLock


LARGEST = 256_000_000  # bytes of a text that gz reads back: captions of a large set; recipes have a few kB
PROBED = 0.5  # seconds to try for a lock without waiting: `is_locked` of others takes it for a moment


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Writes a temporary file beside `path`, syncs it and renames it: a reader sees the old file or the new
    one, never a part of it.

    mode: its rights, less those that the user's umask takes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Writes a value as JSON, as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=1) + "\n", mode=mode)


def read_text(path: Path) -> str | None:
    """The text of a file, or None where it is missing. Raises DamagedError where it is too large, no text, or
    cannot be read."""
    try:
        if path.stat().st_size > LARGEST:
            raise DamagedError(f"`{path}` is damaged: it has more than {LARGEST / 1e6:.0f} MB")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as e:
        raise DamagedError(f"`{path}` is damaged: it is no text") from e
    except OSError as e:
        raise DamagedError(f"`{path}` cannot be read: {e.strerror}") from e


def read_json(path: Path) -> Any:
    """The parsed file, or None where it is missing. Raises DamagedError where it is no JSON."""
    if (text := read_text(path)) is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # cut short, another file, or nested without end
        raise DamagedError(f"`{path}` is damaged: it is no JSON ({e})") from e


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where the file is missing. Raises DamagedError for anything else."""
    found = read_json(path)
    if not isinstance(found, dict | None):
        raise DamagedError(f"`{path}` is damaged: it is no JSON object")
    return found or {}


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy of it where links do not work."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` when the block ends, and removed when it raises."""
    part = beside(path)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                fsync(file)
        if path.exists():
            remove_tree(path)
        os.replace(part, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_tree(path: Path) -> None:
    """Removes a folder, which is gone at once: a process that is killed here leaves no half of it. Raises
    OSError, and FileNotFoundError where another process removes it too."""
    part = beside(path)
    os.replace(path, part)
    try:
        shutil.rmtree(part)
    except OSError:  # what cannot be removed keeps its name
        os.replace(part, path)
        raise


@contextmanager
def lock(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """An exclusive lock between processes, which the system frees when its holder dies.

    Yields whether the lock was acquired.

    path: the lock's file.
    wait: whether to wait for another holder; if not, False is yielded soon.
    on_wait: called once before waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = _holder(path)
    got = _try_lock(holder, patience=0.0 if wait else PROBED)
    if not got and wait:
        if on_wait:
            on_wait()
        while not (got := _try_lock(holder)):
            time.sleep(0.2)
    try:
        yield got
    finally:
        if got:
            holder.release()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock; a lock that we may not read or write counts as held."""
    if not path.exists():
        return False
    try:
        return _is_flocked(path)
    except PermissionError:
        return True
    except (ImportError, OSError):  # Windows, or a file system without such locks
        pass
    holder = _holder(path)
    try:
        got = _try_lock(holder)
    except PermissionError:
        return True
    if got:
        holder.release()
    return not got


def _holder(path: Path) -> BaseFileLock:
    """A new lock object, by flock on Unix and msvcrt on Windows; it excludes others of this process too."""
    from filelock import FileLock

    return FileLock(path)


def _is_flocked(path: Path) -> bool:
    """What `is_locked` says, by a shared lock, which needs no right to write; for lists of many runs."""
    import fcntl

    with open(path, "rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _try_lock(holder: BaseFileLock, patience: float = 0.0) -> bool:
    from filelock import Timeout

    try:
        holder.acquire(timeout=patience, poll_interval=0.02)
    except Timeout:
        return False
    return True


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk; Windows cannot and need not sync folders."""
    if path.is_dir():
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY)
    else:
        fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path: Path, kind: str = "sha256") -> str:
    """The checksum of a file in hexadecimal digits.

    kind: name of the algorithm, as hashlib has it.
    """
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, kind).hexdigest() if hasattr(hashlib, "file_digest") else _digest(f, kind)
        )


def _digest(f: IO[bytes], kind: str) -> str:
    """What `hashlib.file_digest` returns, which Python 3.10 does not have."""
    digest = hashlib.new(kind)
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def need_space(folder: Path, size: int) -> None:
    """Raises MissingError unless `size` bytes are free on the disk of `folder`."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < size:
        raise MissingError(
            f"{size / 1e6:,.0f} MB are needed in `{folder}`, {free / 1e6:,.0f} MB are free",
            hint="free some space, or set `GZ_HOME` to a folder on a larger disk",
        )
