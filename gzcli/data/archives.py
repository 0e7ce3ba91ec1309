"""Folders, zips and tars as one thing: names of members and their bytes. Nothing is extracted to disk."""

from __future__ import annotations

import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from gzcli.errors import MissingError, UsageError

RATIO = 200  # unpacked bytes for a packed one: beyond it an archive is taken for a bomb
MAX_ARCHIVE = 200_000_000_000  # unpacked bytes, unless `GZ_MAX_ARCHIVE` says otherwise


class Members(Protocol):
    """Names (POSIX, relative) of the wanted members, in the order of reading, and (name, bytes) of them or of a few."""

    names: list[str]

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]: ...


class Folder:
    """The files below a folder; links to folders are followed once."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]):
        self.path = path
        self.names = []
        seen = set()
        for top, folders, files in os.walk(path, followlinks=True):
            if os.path.realpath(top) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(top))
            relative = Path(top).relative_to(path)
            self.names += [name for f in files if wanted(name := (relative / f).as_posix())]
        self.names.sort()

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name in self.names if some is None else some:
            try:
                yield name, (self.path / name).read_bytes()
            except OSError as e:
                raise MissingError(f"`{self.path / name}` cannot be read: {e.strerror}") from e


class Zip:
    """A zip's members. Raises MissingError for one that escapes, links, explodes or is damaged."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]):
        self.path = path
        with self.opened() as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            _refuse_bomb(path, sum(i.file_size for i in infos), path.stat().st_size)
            for info in infos:
                _refuse_escape(path, info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise _refused(path, f"`{info.filename}` is a link")
                if info.flag_bits & 1:
                    raise MissingError(f"`{path}` is encrypted", hint="unpack it and give the folder")
                if info.file_size > 1 << 20:
                    _refuse_bomb(path, info.file_size, info.compress_size)
            self.names = list(dict.fromkeys(info.filename for info in infos if wanted(info.filename)))

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        with self.opened() as archive:
            for name in self.names if some is None else some:
                yield name, archive.read(name)

    @contextmanager
    def opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
            raise MissingError(f"`{self.path}` is damaged: {e}", hint="fetch or make the archive again") from e


class Tar:
    """A tar's members (any compression), read from front to back, the order in which they lie."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]):
        self.path = path
        self.names, total, packed = [], 0, path.stat().st_size
        with self.opened() as archive:
            for member in archive:
                _refuse_escape(path, member.name)
                if member.issym() or member.islnk():
                    raise _refused(path, f"`{member.name}` is a link")
                if not (member.isfile() or member.isdir()):
                    raise _refused(path, f"`{member.name}` is a device")
                total += member.size
                _refuse_bomb(path, total, packed)
                if member.isfile() and wanted(_clean(member.name)):
                    self.names.append(_clean(member.name))
            # tarfile takes any block that is no header for the end; reading on to it checks a compressed file's sum.
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
            if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends in the middle")
            while block := archive.fileobj.read(1 << 20):
                total += len(block)
                _refuse_bomb(path, total, packed)
        self.names = list(dict.fromkeys(self.names))

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        want = set(self.names if some is None else some)
        with self.opened() as archive:
            for member in archive:
                name = _clean(member.name)
                if name in want and member.isfile():
                    want.discard(name)
                    yield name, archive.extractfile(member).read()
                    if not want:
                        return

    @contextmanager
    def opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path, "r:*") as archive:
                yield archive
        except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
            raise MissingError(f"`{self.path}` is damaged: {e}", hint="fetch or make the archive again") from e


def open_members(path: Path, wanted: Callable[[str], bool]) -> Members:
    """The members of a folder, zip or tar for which `wanted(name)`. Raises UsageError for another kind of file."""
    if path.is_dir():
        return Folder(path, wanted)
    name = path.name.lower()
    if zipfile.is_zipfile(path) or name.endswith(".zip"):
        return Zip(path, wanted)
    if re.search(r"\.(tar|tgz|tar\.\w+)$", name) or tarfile.is_tarfile(path):
        return Tar(path, wanted)
    raise UsageError(f"`{path}` is not a set of images", hint="give a folder, a zip, a tar or an npz")


def max_archive() -> int:
    """The limit on an archive's unpacked bytes."""
    text = os.environ.get("GZ_MAX_ARCHIVE", "")
    if text and not text.isdigit():
        raise UsageError(f"`GZ_MAX_ARCHIVE` is a number of bytes, not `{text}`")
    return int(text) if text else MAX_ARCHIVE


def _clean(name: str) -> str:
    return str(PurePosixPath(name))


def _refuse_escape(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise _refused(path, f"`{name}` points outside of it")


def _refuse_bomb(path: Path, unpacked: int, packed: int) -> None:
    if unpacked > max_archive():
        raise MissingError(
            f"`{path}` is refused: it unpacks to more than {max_archive() / 1e6:,.0f} MB",
            hint=f"`GZ_MAX_ARCHIVE={unpacked}` allows it",
        )
    if unpacked > 1 << 20 and unpacked > RATIO * max(packed, 1):
        raise _refused(path, f"it unpacks to more than {RATIO} times its size")


def _refused(path: Path, why: str) -> MissingError:
    return MissingError(f"`{path}` is refused: {why}", hint="if you trust it, unpack it yourself and give the folder")
