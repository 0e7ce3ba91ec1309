"""Folders, zips and tars as one thing: names of members and their bytes. Nothing is extracted to disk."""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import counted, number_in, size
from gzcli.data.readers.images import (
    TABLE_ENDINGS,
    Content,
    Members,
    Span,
    content_of,
    damaged,
    is_regular,
    refuse_exhausted,
    refuse_large,
    walk,
)

MAX_ARCHIVE = 200_000_000_000  # maximum of unpacked bytes, unless `GZ_MAX_ARCHIVE` is set
# An archive of more than MAX_DENSE_BYTES unpacked bytes, and more than MAX_RATIO for each packed one, is
# taken for a bomb. Images of one colour, as a collapsed sampler makes them, have any ratio: MAX_DENSE_BYTES
# contains 50,000 of 256×256.
MAX_RATIO = 200
MAX_DENSE_BYTES = 10_000_000_000
LONGEST_NAME = 1 << 17  # maximum bytes of a name, or of other facts about a member of a tar
_NAMING = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
HEIC_ENDINGS = (".heic", ".heif")  # photos of many phones
LOCAL_HEADER = 30  # bytes before a zip member's name
# What zipfile and tarfile raise for damaged files. ValueError and those after it come of headers of numbers
# that are none, or that lie one upon the other.
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, LookupError, OverflowError, RuntimeError, struct.error),
)

# First bytes of an archive → its kind, and the command that unpacks it.
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"7z\xbc\xaf": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
}
# What `walk` finds besides files, as notes call it.
_BESIDE = {"broken": "broken link", "special": "pipe or device file", "repeated": "link"}


def open_members(path: Path, accepts: Callable[[str], bool]) -> Members:
    """The members of a folder, zip or tar for which `accepts(name)`."""
    if not is_regular(path):
        raise UsageError(f"`{path}` is not a regular file", hint="give a folder, a zip, a tar or an npz")
    if path.is_dir():
        return open_folder(path, accepts)
    refuse_foreign(path)
    name = path.name.lower()
    if zipfile.is_zipfile(path) or name.endswith(".zip"):
        return Zip(path, accepts)
    if re.search(r"\.(tar|tgz|tar\.\w+)$", name) or tarfile.is_tarfile(path):
        return Tar(path, accepts)
    hint = "give a folder, a zip, a tar or an npz"
    if path.suffix.lower() in TABLE_ENDINGS:
        hint = "give the folder that contains it and the images"
    elif path.suffix.lower() in HEIC_ENDINGS:
        hint = "convert it to JPEG or PNG"
    raise UsageError(f"`{path}` is not a set of images", hint=hint)


# --- what is refused ---


def refuse_foreign(path: Path) -> None:
    """Raises UsageError for an archive of a kind that gz cannot read, identified by its first bytes."""
    with path.open("rb") as file:
        kind, unpack = _FOREIGN.get(file.read(4), ("", ""))
    if kind and not (kind == "zstd" and hasattr(tarfile.TarFile, "zstopen")):  # Python 3.14 reads it
        hint = f"run `{unpack} {path.name}` and give the result, or repack it as a zip or a tar.gz"
        raise UsageError(f"`{path}` is compressed with {kind}, which gz cannot read", hint=hint)


def refuse_escape(path: Path, name: str) -> None:
    """Raises MissingError for a member whose name leads outside of the archive's folder."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise refused(path, f"`{name}` points outside the archive")


def refuse_bomb(path: Path, unpacked: int, packed: int) -> None:
    """Raises MissingError for an archive that would unpack to too many bytes, in total or relative to its
    size."""
    limit = number_in("GZ_MAX_ARCHIVE", "bytes")
    most = MAX_ARCHIVE if limit is None else limit
    if unpacked > most:
        hint = f"if you trust it, set `GZ_MAX_ARCHIVE={unpacked}`"
        raise MissingError(f"`{path}` is refused: it unpacks to more than {size(most)}", hint=hint)
    if unpacked > MAX_DENSE_BYTES and unpacked > MAX_RATIO * max(packed, 1):
        raise refused(path, f"it unpacks to {size(unpacked)}, more than {MAX_RATIO} times its size")


def refused(path: Path, why: str) -> MissingError:
    hint = "if you trust it, unpack it yourself and give the folder"
    return MissingError(f"`{path}` is refused: {why}", hint=hint)


@contextmanager
def _reading(path: Path, archive: Callable[[], Any]) -> Iterator[Any]:
    """Turns faults of an archive that is opened and read within the block into MissingError."""
    try:
        with archive() as opened:
            yield opened
    except _DAMAGED as e:
        refuse_exhausted(e)
        raise damaged(path, f": {e}") from e


# --- folders, zips and tars ---


class Files:
    """Regular files below a folder."""

    def __init__(self, folder: Path, names: list[str], notes: Sequence[str] = ()):
        self.folder, self.names, self.notes = folder, names, list(notes)

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, Content]]:
        for name in self.names if some is None else some:
            yield name, content_of(self.folder / name)

    def spans(self) -> dict[str, Span]:
        paths = {name: os.path.join(os.path.abspath(self.folder), name) for name in self.names}
        try:
            return {name: Span(path, 0, os.path.getsize(path), False) for name, path in paths.items()}
        except OSError as e:
            raise MissingError(f"`{e.filename}` cannot be read: {e.strerror}") from e


def open_folder(path: Path, accepts: Callable[[str], bool]) -> Files:
    """The wanted regular files below a folder. `notes` count the entries that are not regular files."""
    names, irregular = walk(path)
    notes = []
    for kind, odd in irregular.items():
        place = " to folders already read" if kind == "repeated" else ""
        notes.append(f"{counted(len(odd), _BESIDE[kind])}{place} skipped (`{odd[0]}`)")
    return Files(path, [name for name in names if accepts(name)], notes)


class Zip:
    """The wanted members of a zip."""

    def __init__(self, path: Path, accepts: Callable[[str], bool]):
        self.path, self.notes = path, list[str]()
        self._infos: dict[str, zipfile.ZipInfo] = {}
        with self.opened() as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            refuse_bomb(path, sum(i.file_size for i in infos), path.stat().st_size)
            for info in infos:
                refuse_escape(path, info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise refused(path, f"`{info.filename}` is a link")
                if info.flag_bits & 1:
                    raise MissingError(f"`{path}` is encrypted", hint="unpack it and give the folder")
                if accepts(name := _clean(info.filename)):
                    self._infos[name] = info
        self.names = list(self._infos)

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        with self.opened() as archive:
            for name in self.names if some is None else some:
                refuse_large(name, self._infos[name].file_size)
                yield name, archive.read(self._infos[name])

    def spans(self) -> dict[str, Span]:
        spans = {}
        path = os.path.abspath(self.path)
        with self.opened(), open(path, "rb") as file:
            for name, info in self._infos.items():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    hint = "repack it with deflate or uncompressed, or unpack it and give the folder"
                    message = f"`{path}` cannot be streamed: `{name}` is not compressed with deflate"
                    raise UsageError(message, hint=hint)
                file.seek(info.header_offset)
                header = file.read(LOCAL_HEADER)
                if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                    raise zipfile.BadZipFile(f"`{name}` has no header")
                # the directory of the zip may have other lengths of name and extra field than this header
                offset = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                spans[name] = Span(path, offset, info.compress_size, deflated)
        return spans

    def opened(self) -> AbstractContextManager[zipfile.ZipFile]:
        return _reading(self.path, partial(zipfile.ZipFile, self.path))


class Tar:
    """The wanted members of a tar with any compression, read from its front to its end."""

    def __init__(self, path: Path, accepts: Callable[[str], bool]):
        self.path, self.notes = path, list[str]()
        names: dict[str, None] = {}
        total, packed = 0, path.stat().st_size
        with self.opened() as archive:
            for member in archive:
                refuse_escape(path, member.name)
                if member.issym() or member.islnk():
                    raise refused(path, f"`{member.name}` is a link")
                if not (member.isfile() or member.isdir()):
                    raise refused(path, f"`{member.name}` is a device")
                if member.issparse():  # some of its bytes are missing
                    raise refused(path, f"`{member.name}` is a sparse file")
                total += member.size
                refuse_bomb(path, total, packed)
                if member.isfile() and accepts(_clean(member.name)):
                    names[_clean(member.name)] = None
            # tarfile takes any block that is no header for the end. Reading on checks that the end is there,
            # and a compressed file's checksum.
            file = archive.fileobj
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the archive is truncated")
            while block := file.read(1 << 20):
                total += len(block)
                refuse_bomb(path, total, packed)
        self.names = list(names)

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        missing = set(self.names if some is None else some)
        with self.opened() as archive:
            for member in archive:
                name = _clean(member.name)
                if name in missing and member.isfile():
                    missing.discard(name)
                    refuse_large(name, member.size)
                    if file := archive.extractfile(member):
                        yield name, file.read()
                    if not missing:
                        return

    def spans(self) -> dict[str, Span]:
        path = os.path.abspath(self.path)
        spans: dict[str, Span] = {}
        names = set(self.names)
        with self.opened() as archive:
            if not isinstance(archive.fileobj, io.BufferedReader):
                hint = "decompress it to a plain tar, or unpack it and give the folder"
                raise UsageError(
                    f"`{self.path}` cannot be streamed: the whole archive is compressed", hint=hint
                )
            for member in archive:
                name = _clean(member.name)
                if member.isfile() and name in names:
                    spans.setdefault(name, Span(path, member.offset_data, member.size, False))
        return spans

    def opened(self) -> AbstractContextManager[tarfile.TarFile]:
        return _reading(self.path, partial(tarfile.open, self.path, "r:*", tarinfo=_Member))


class _Member(tarfile.TarInfo):
    """A tar header that refuses overlong names, because tarfile reads a name into memory at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in _NAMING and member.size > LONGEST_NAME):
            raise ValueError(f"a header declares a size of {member.size:,} bytes")
        return member


def _clean(name: str) -> str:
    r"""The normalised name: `./cats\1.png`, as some Windows programs write it, becomes `cats/1.png`."""
    return str(PurePosixPath(name.replace("\\", "/")))
