"""Folders, zips and tars as one thing: names of members and their bytes. Nothing is extracted to disk."""

from __future__ import annotations

import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from gzcli.errors import MissingError, UsageError

RATIO = 200  # unpacked bytes for a packed one: beyond it an archive is taken for a bomb
MAX_ARCHIVE = 200_000_000_000  # unpacked bytes, unless `GZ_MAX_ARCHIVE` says otherwise
AGAIN = "fetch or make the archive again"
LOCAL_HEADER = 30  # bytes before a zip member's name


class Span(NamedTuple):
    """Where the bytes of a member lie, to be read without opening the archive."""

    path: str  # absolute, of the file that holds them
    offset: int
    length: int  # as they lie there
    deflated: bool  # as a raw deflate stream


class Members(Protocol):
    """Names (POSIX, relative) of the wanted members, in the order of reading; (name, bytes) of them or of a few; where
    the bytes of each lie. Raises UsageError for spans of an archive that has to be read from its start."""

    names: list[str]

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]: ...

    def spans(self) -> dict[str, Span]: ...


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

    def spans(self) -> dict[str, Span]:
        top = os.path.abspath(self.path)
        found = {}
        for name in self.names:
            path = os.path.join(top, name)
            try:
                found[name] = Span(path, 0, os.path.getsize(path), False)
            except OSError as e:
                raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e
        return found


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

    def spans(self) -> dict[str, Span]:
        found = {}
        path = os.path.abspath(self.path)
        with self.opened() as archive, open(path, "rb") as file:
            for name in self.names:
                info = archive.getinfo(name)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    hint = "pack it anew with deflate or uncompressed, or unpack it and give the folder"
                    raise UsageError(f"`{path}` cannot be streamed: `{name}` is compressed, but not by deflate", hint=hint)
                file.seek(info.header_offset)
                header = file.read(LOCAL_HEADER)
                if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                    raise zipfile.BadZipFile(f"`{name}` has no header")
                # The lengths of name and extra field are those of this header: the directory's own may differ.
                offset = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))
                found[name] = Span(path, offset, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED)
        return found

    @contextmanager
    def opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
            raise MissingError(f"`{self.path}` is damaged: {e}", hint=AGAIN) from e


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

    def spans(self) -> dict[str, Span]:
        path = os.path.abspath(self.path)
        try:
            archive = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError as e:  # it was read whole when it was opened, so that it is not damaged
            hint = "`gunzip` it, or unpack it and give the folder"
            raise UsageError(f"`{self.path}` cannot be streamed: it is compressed as a whole", hint=hint) from e
        found, wanted = {}, set(self.names)
        with archive:
            for member in archive:
                name = _clean(member.name)
                if member.isfile() and name in wanted:
                    found.setdefault(name, Span(path, member.offset_data, member.size, False))
        return found

    @contextmanager
    def opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path, "r:*") as archive:
                yield archive
        except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
            raise MissingError(f"`{self.path}` is damaged: {e}", hint=AGAIN) from e


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


def read_span(span: Span) -> bytes:
    """The bytes of a member. Raises MissingError where the file is gone, ends before them or is damaged."""
    try:
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            data = file.read(span.length)
    except OSError as e:
        raise MissingError(f"`{span.path}` cannot be read: {e.strerror}") from e
    if len(data) < span.length:
        raise MissingError(f"`{span.path}` is damaged: it ends before byte {span.offset + span.length:,}", hint=AGAIN)
    if not span.deflated:
        return data
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(data, max(1 << 20, RATIO * span.length))
    except zlib.error as e:
        raise MissingError(f"`{span.path}` is damaged at byte {span.offset:,}: {e}", hint=AGAIN) from e
    if not inflate.eof:
        raise MissingError(f"`{span.path}` is damaged at byte {span.offset:,}: a member has no end", hint=AGAIN)
    return data


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
