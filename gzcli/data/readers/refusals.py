"""Archives that are refused: those that unpack to too much, have members outside of their folder, or are of a
kind that is not read."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import number_in

MAX_ARCHIVE = 200_000_000_000  # unpacked bytes, unless `GZ_MAX_ARCHIVE` says otherwise
# An archive of more than DENSE unpacked bytes, and more than RATIO for each packed one, is taken for a bomb.
# Images of one colour, as a collapsed sampler makes them, have any ratio: DENSE holds 50,000 of 256×256.
RATIO = 200
DENSE = 10_000_000_000
AGAIN = "fetch or make the archive again"

# First bytes of an archive → its kind, and the command that unpacks it.
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"7z\xbc\xaf": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
}


def max_archive() -> int:
    """The limit on an archive's unpacked bytes. Raises UsageError where `GZ_MAX_ARCHIVE` is no number."""
    limit = number_in("GZ_MAX_ARCHIVE", "bytes")
    return MAX_ARCHIVE if limit is None else limit


def refuse_foreign(path: Path) -> None:
    """Raises UsageError for an archive of a kind that is not read here, told by its first bytes."""
    with path.open("rb") as file:
        begins = file.read(4)
    for mark, (kind, unpack) in _FOREIGN.items():
        is_read = kind == "zstd" and hasattr(tarfile.TarFile, "zstopen")  # Python 3.14 reads it
        if begins == mark and not is_read:
            hint = f"`{unpack} {path.name}`, then give what comes of it; or pack it as a zip or a tar.gz"
            raise UsageError(f"`{path}` is compressed by {kind}, which gz does not read", hint=hint)


def refuse_escape(path: Path, name: str) -> None:
    """Raises MissingError for a member whose name leads outside of the archive's folder."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise refused(path, f"`{name}` points outside of it")


def refuse_bomb(path: Path, unpacked: int, packed: int) -> None:
    """Raises MissingError for an archive that would unpack to too many bytes, or to too many for its size."""
    if unpacked > max_archive():
        raise MissingError(
            f"`{path}` is refused: it unpacks to more than {max_archive() / 1e6:,.0f} MB",
            hint=f"`GZ_MAX_ARCHIVE={unpacked}` allows it",
        )
    if unpacked > DENSE and unpacked > RATIO * max(packed, 1):
        raise refused(path, f"it unpacks to {unpacked / 1e6:,.0f} MB, more than {RATIO} times its size")


def refused(path: Path, why: str) -> MissingError:
    """The error that an archive is refused with."""
    return MissingError(
        f"`{path}` is refused: {why}", hint="if you trust it, unpack it yourself and give the folder"
    )
