"""Files that are complete or absent: atomic writes, reads that detect damage, locks between processes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from gzcli.core.errors import (
    PLACE_HINT,
    SPACE_HINT,
    DamagedError,
    GzError,
    MissingError,
    first_line,
    system_error,
)
from gzcli.core.units import size as size_in_words

if TYPE_CHECKING:
    import numpy as np
    from filelock import BaseFileLock
    from torch import Tensor

T = TypeVar("T")

# most bytes of a text file, enough for the captions of a large set; recipes have a few kB
MAX_TEXT_BYTES = 256_000_000
PROBED = 0.5  # seconds to try for a lock without `wait`, because another `is_locked` may hold it briefly
LONGEST_HEADER = 100_000_000  # bytes of a safetensors header, as the library has it
DAY_SECONDS = 86_400.0
RECREATED_HINT = "remove it: gz recreates it"
# machine and process in the name of `part_path`; version 0.1 named no machine
_PART = re.compile(r"\..+?\.(?:([0-9a-f]{8})\.)?(\d+)(?:\.\d+)?\.part")
_parts = itertools.count()


def part_path(path: Path) -> Path:
    """A temporary name beside `path`, for a file or folder that is renamed to `path` when complete. It
    contains the machine and the process, by which `sweep` recognises leftovers."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{next(_parts)}.part")


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files of killed processes directly in these folders. The processes of other
    machines are not visible, so their files are removed a day after their last change."""
    for folder in folders:
        for part in folder.glob(".*.part") if folder.is_dir() else ():
            if (match := _PART.fullmatch(part.name)) and _is_left_over(part, *match.groups()):
                with suppress(OSError):  # another process removed it first, or the disk is read-only
                    _delete(part)


def _delete(path: Path) -> None:
    """Removes a file, a link, or a folder with its content."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_left_over(part: Path, machine: str | None, pid: str) -> bool:
    """Whether the process that wrote a temporary file has ended, even if another process has reused its
    id."""
    import psutil

    try:
        changed = part.stat().st_mtime
        if machine not in (None, _machine()):
            return time.time() - changed > DAY_SECONDS
        process = psutil.Process(int(pid))
        return process.create_time() > changed + 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (FileNotFoundError, psutil.Error):  # renamed meanwhile; another user's process
        return False


@cache
def _machine() -> str:
    """Eight digits that identify the machine, or the container that numbers the processes."""
    import platform

    space = Path("/proc/self/ns/pid")
    spaces = os.readlink(space) if space.is_symlink() else ""
    return f"{zlib.crc32((platform.node() + spaces).encode()):08x}"


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """Creates a folder and its parents. Raises MissingError if that is impossible, for example below
    `/proc`."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileNotFoundError as e:
        raise MissingError(f"the folder `{path}` cannot be created", hint=PLACE_HINT) from e


def write_atomic(path: Path, content: str | bytes | memoryview, *, mode: int = 0o666) -> None:
    """Writes a file atomically and flushes it to the disk: readers see the old file or the new one."""
    make_folder(path.parent)
    with replacing(path) as part, open(part, "wb", opener=partial(os.open, mode=mode)) as f:
        f.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """Yields a text file that is open for appending. Raises DamagedError for anything but a regular file."""
    if path.exists():
        check_regular(path)
    with open(path, "a", encoding="utf-8") as f:
        yield f


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Writes a value as JSON, as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=1) + "\n", mode=mode)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, as `write_atomic` does. The library's writer does not report a full disk,
    and makes the file unreadable for other users."""
    write_atomic(path, bytes_of(tensors, metadata or {}))


def bytes_of(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file. The metadata is sorted, because the library's order changes from call
    to call."""
    from safetensors.torch import save

    data = save(tensors, metadata=dict(metadata) or None)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header |= {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[begin:]))


def write_state(path: Path, state: Any) -> None:
    """Writes a file for `torch.load`, as `write_atomic` does, so that a disk error keeps its error number."""
    import torch

    torch.save(state, buffer := io.BytesIO())
    write_atomic(path, buffer.getbuffer())


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file, as `write_atomic` does."""
    import numpy as np

    make_folder(path.parent)
    with replacing(path) as part, open(part, "wb") as f:
        # to a file itself numpy writes by C, whose error has no number
        np.save(SimpleNamespace(write=f.write), array)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed `.npz` file, as `write_atomic` does."""
    import numpy as np

    make_folder(path.parent)
    with replacing(path) as part, open(part, "wb") as f:
        np.savez_compressed(f, **dict[str, Any](arrays))


def readable(folder: Path) -> None:
    """Gives files of another library the permissions of gz's own files; those of safetensors have 0600."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.parent.stat().st_mode & 0o666)


def check_regular(path: Path, hint: str | None = None) -> None:
    """Raises DamagedError for a pipe, a socket, a device or a folder, because to open a pipe would wait for
    another process. Raises OSError if nothing is there."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedError(f"`{path}` is damaged: it is not a regular file", hint=hint or f"remove `{path}`")


def check_folder(folder: Path, hint: str | None = None) -> None:
    """Raises DamagedError if there is anything but regular files and folders below a folder, because the
    library that reads it would wait for another process."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_dir():
            check_regular(path, hint)


def read_text(path: Path, hint: str | None = None) -> str | None:
    """The text of a file; None if it is missing. Raises DamagedError if it is not text or too large."""
    try:
        check_regular(path, hint)
        if path.stat().st_size > MAX_TEXT_BYTES:
            message = f"`{path}` is damaged: it is larger than {MAX_TEXT_BYTES / 1e6:.0f} MB"
            raise DamagedError(message, hint=hint)
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as e:
        raise DamagedError(f"`{path}` is damaged: it is not text", hint=hint) from e
    except OSError as e:
        raise DamagedError(f"`{path}` cannot be read: {e.strerror}", hint=hint) from e


def read_json(path: Path, hint: str | None = None) -> Any:
    """The parsed file, or None if it is missing. Raises DamagedError if it is not JSON."""
    if (text := read_text(path, hint)) is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # truncated, not JSON, or nested too deeply
        raise DamagedError(f"`{path}` is damaged: it is not JSON ({e})", hint=hint) from e


def read_object(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is missing. Raises DamagedError for any other content."""
    value = read_json(path, hint)
    if not isinstance(value, dict | None):
        raise DamagedError(f"`{path}` is damaged: it is not a JSON object", hint=hint)
    return value or {}


def read_record(path: Path, kinds: Mapping[str, Any], hint: str | None = RECREATED_HINT) -> dict[str, Any]:
    """The JSON object of a file. Raises DamagedError if the file is missing, or if a key is missing or has a
    value of another type."""
    record = read_object(path, hint)
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise DamagedError(f"`{path}` is damaged, or not from gz: it has no valid `{key}`", hint=hint)
    return record


def whole_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if it is missing or damaged."""
    with suppress(DamagedError):
        return read_object(path)
    return {}


@contextmanager
def reading(path: Path, hint: str | None = RECREATED_HINT) -> Iterator[None]:
    """Turns every error within the block, which reads and validates a file, into DamagedError."""
    try:
        check_regular(path, hint)
        yield
    except FileNotFoundError as e:
        raise MissingError(f"`{path}` does not exist") from e
    except GzError:
        raise
    except Exception as e:  # of zip, pickle, numpy, safetensors and torch, which share no error class
        # numpy takes any other file for pickled objects, and advises to load them unsafely
        why = "it contains no arrays" if "allow_pickle" in str(e) else first_line(e)
        raise DamagedError(f"`{path}` is damaged, or not from gz: {why}", hint=hint) from e


def read_tensors(path: Path, hint: str | None = RECREATED_HINT) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises DamagedError, also if a tensor contains
    NaN."""
    from safetensors import safe_open

    with reading(path, hint), safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        for name, value in tensors.items():
            if value.is_floating_point() and value.isnan().any():
                raise ValueError(f"`{name}` contains NaN")
        return tensors, dict(f.metadata() or {})


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: `__metadata__`, and dtype, shape and offsets of each tensor. Raises
    ValueError for any other file, and if the tensors do not fill the rest of the file without overlap.
    Otherwise a small file could describe any number of tensors that share bytes."""
    check_regular(file)
    size = file.stat().st_size - 8
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= min(size, LONGEST_HEADER):
            raise ValueError("its header is truncated, or too long")
        text = f.read(length)
    try:
        head = json.loads(text)
        spans = sorted(spec["data_offsets"] for name, spec in head.items() if name != "__metadata__")
        are_integers = all(isinstance(position, int) for first, last in spans for position in (first, last))
        texts = head.setdefault("__metadata__", {})
        if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
            raise ValueError("its metadata is not text")
    except RecursionError as e:
        raise ValueError("its header is nested too deeply") from e
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError("its header does not describe the tensors") from e
    position = 0
    for first, last in spans:
        if not are_integers or first != position or last < first:
            raise ValueError("its tensors overlap, or leave bytes between them")
        position = last
    if position != size - length:
        raise ValueError("its tensors do not end where the file ends")
    return head


def read_array(path: Path) -> np.ndarray:
    """The array of a `.npy` file. Raises DamagedError."""
    import numpy as np

    with reading(path):
        if not isinstance(array := np.load(path, allow_pickle=False), np.ndarray):
            raise ValueError("it is not an array")
        return array


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file. Raises DamagedError, also if one of `names` is missing."""
    import numpy as np

    with reading(path):
        if isinstance(archive := np.load(path, allow_pickle=False), np.ndarray):
            raise ValueError("it is a single array, not an archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
        if lacking := [name for name in names if name not in arrays]:
            raise ValueError(f"it has no `{lacking[0]}`")
        return arrays


def first_rows(path: Path, name: str, n: int, hint: str | None = RECREATED_HINT) -> np.ndarray:
    """The first n images, uint8 [n, H, W, C], of a `.npz` file. The rest is not unpacked, because a small
    file may unpack to any size. Raises DamagedError, before it allocates memory, for other arrays and for
    large images."""
    from zipfile import ZipFile

    import numpy as np

    with reading(path, hint), ZipFile(path) as archive, archive.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(f)
        if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or fortran:
            raise ValueError(f"`{name}` is not a uint8 array [N, H, W, 1 or 3]")
        n, row = min(n, shape[0]), math.prod(shape[1:])
        if not 0 < row * max(n, 1) <= MAX_TEXT_BYTES or len(data := f.read(n * row)) < n * row:
            raise ValueError(f"`{name}` is truncated, or its images are too large")
        return np.frombuffer(data, np.uint8).reshape(n, *shape[1:])


def is_below(path: Path, root: Path) -> bool:
    """Whether `path` is a regular file below the folder, reached through no link, and at most MAX_TEXT_BYTES
    bytes."""
    try:
        way = path.absolute().relative_to(root.absolute())
        return (
            path.resolve() == root.resolve() / way
            and path.is_file()
            and path.stat().st_size <= MAX_TEXT_BYTES
        )
    except (OSError, ValueError, RuntimeError):  # an impossible name, another folder, or a circle of links
        return False


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy of it if links do not work."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def new_dir(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yields a temporary folder. At the end of the block it is renamed to `path`; if the block raises, it is
    removed. With `keep`, an existing folder of a concurrent process is not replaced."""
    part = part_path(path)
    make_folder(part, exist_ok=False)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                fsync(file)
        if os.path.lexists(path) and not keep:
            remove_tree(path)
        try:
            os.replace(part, path)
        except OSError:
            if not (keep and path.is_dir()):
                raise
        fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_tree(path: Path) -> None:
    """Removes a folder, or a file in its place, atomically: if the process is killed, no incomplete folder
    remains under its name. Raises OSError."""
    part = part_path(path)
    os.replace(path, part)
    try:
        _delete(part)
    except OSError:  # a file that cannot be removed keeps its name
        os.replace(part, path)
        raise


@contextmanager
def lock(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """An exclusive lock between processes, which the system releases when the owner ends. Yields whether it
    was acquired; with `wait`, always True. `on_wait` is called once before waiting."""
    make_folder(path.parent)
    holder = _acquired(path, 0.0 if wait else PROBED)
    if holder is None and wait:
        if on_wait:
            on_wait()
        while (holder := _acquired(path)) is None:
            time.sleep(0.2)
    try:
        yield holder is not None
    finally:
        if holder is not None:
            holder.release()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock. A lock file that this process may not open counts as
    locked."""
    if not path.exists():
        return False
    try:
        import fcntl

        # a shared lock, which needs no right to write, for lists of many runs; a pipe would wait for a writer
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):  # Windows, or a file system without such locks
        pass
    try:
        holder = _acquired(path)
    except PermissionError:
        return True
    if holder is not None:
        holder.release()
    return holder is None


def _acquired(path: Path, patience: float = 0.0) -> BaseFileLock | None:
    """The acquired lock (flock on Unix, msvcrt on Windows); None if any process has it, even this one."""
    from filelock import FileLock, Timeout

    holder = FileLock(path)
    try:
        holder.acquire(timeout=patience, poll_interval=0.02)
    except Timeout:
        return None
    return holder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path`, which replaces `path` once it is completely on the disk. An error of the
    system names `path`. Raises MissingError if no file can be created there, as in `/proc`."""
    part = part_path(path)
    try:
        yield part
        fsync(part)
        part.replace(path)
    except OSError as e:
        if e.errno and str(e.filename or part) == str(part):  # a failed write names no file
            e.filename = str(path)
            if isinstance(e, FileNotFoundError):
                raise system_error(e) or MissingError(f"`{path}` cannot be created", hint=PLACE_HINT) from e
        raise
    finally:
        part.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk. Windows has no such call for folders, and
    there it does nothing."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path: Path, kind: str = "sha256") -> str:
    check_regular(path)
    digest = hashlib.new(kind)  # `hashlib.file_digest` came with Python 3.11
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def nearest_place(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def need_space(folder: Path, size: int) -> None:
    """Raises MissingError unless `size` bytes are free on the disk of `folder`."""
    folder = nearest_place(folder)
    if (free := shutil.disk_usage(folder).free) < size:
        message = f"`{folder}` needs {size_in_words(size)} of free space, but has {size_in_words(free)}"
        raise MissingError(message, hint=SPACE_HINT)
