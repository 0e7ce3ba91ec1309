"""The files below a folder, and what their names say: which are pictures, and which split a folder means.
No heavy import."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, deque
from pathlib import Path, PurePosixPath

from gzcli.core.errors import MissingError
from gzcli.core.units import counted

LARGEST_FILE = 1 << 30  # bytes: no picture is larger
# Pillow's names of the formats that are read. Other readers of Pillow are never tried: some start another
# program (EPS: Ghostscript). TGA comes last: such a file has no mark at its beginning, so that its reader
# tries every file that no other reader takes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
PICTURE_KINDS = "png apng jpg jpeg jpe jfif webp bmp dib gif tif tiff ppm pgm pbm pnm avif jp2 j2k tga"
SUFFIXES = tuple(f".{kind}" for kind in PICTURE_KINDS.split())
METADATA = "metadata.jsonl"
LABEL = ".cls"  # what WebDataset calls the file of a picture's label
_SPLIT = re.compile(r"(train|val|test)(ing|id|idation)?(set|images?|imgs?|data|split)?|dev(set)?")


def walk(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the regular files below a folder (POSIX, relative, sorted), and of everything else by what it
    is: "broken" links, "special" files, and "repeated": links to folders that are read already.

    Links are followed. Each folder is read once, by its own name rather than a link's, so that a circle of
    links has an end. Names that begin with a dot are left out.
    """
    files: list[str] = []
    odd: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    plain, linked = deque([""]), deque[str]()  # folders yet to be read, and links to folders
    while plain or linked:
        folder = plain.popleft() if plain else linked.popleft()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as e:
            hint = "look at its owner and mode"
            raise MissingError(f"`{path}` cannot be read: {e.strerror}", hint=hint) from e
        if (status.st_dev, status.st_ino) in seen:
            odd.setdefault("repeated", []).append(folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind_of(entry)
            if kind == "folder":
                (linked if entry.is_symlink() else plain).append(name)
            else:
                (files if kind == "file" else odd.setdefault(kind, [])).append(name)
    return sorted(files), odd


def _kind_of(entry: os.DirEntry) -> str:
    """What an entry of a folder is or leads to: "file", "folder", "broken" or "special"."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        entry.stat()  # fails where a link leads nowhere, or in a circle
    except OSError:
        return "broken"
    return "special"


def is_regular(path: Path) -> bool:
    """Whether a path leads to a regular file or a folder; of a pipe or a device nothing should be read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MissingError(f"`{path}` is no regular file", hint="take it out")
            refuse_large(str(path), status.st_size)
            return file.read(LARGEST_FILE)
    except OSError as e:
        raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e


def refuse_large(name: str, size: int) -> None:
    """Raises MissingError for a file of more bytes than any picture has."""
    if size > LARGEST_FILE:
        raise MissingError(f"`{name}` is larger than any picture: {size:,} bytes", hint="take it out")


def is_hidden(name: str) -> bool:
    """Whether a file is one that systems leave behind: `.DS_Store`, `__MACOSX/…`, `Thumbs.db`."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return hidden or name.endswith(("Thumbs.db", "desktop.ini"))


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its name."""
    return may_be_picture(name) and not is_hidden(name)


def may_be_picture(value: str) -> bool:
    """Whether a text may be the name of a picture, and no URL."""
    return PurePosixPath(value).suffix.lower() in SUFFIXES and "://" not in value


class PictureFilter:
    """Chooses pictures and files that describe them, and counts the kinds of all other files."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()

    def __call__(self, name: str) -> bool:
        if is_hidden(name):
            return False
        path = PurePosixPath(name)
        if is_picture(name) or path.name == METADATA or path.suffix in (".txt", LABEL):
            return True
        self.others[path.suffix.lower() or path.name] += 1
        return False

    @property
    def notes(self) -> list[str]:
        """["4 files of unknown kinds skipped (.heic .md)"], or []."""
        if not (n := sum(self.others.values())):
            return []
        kinds = [kind for kind, _ in self.others.most_common(4)]
        named = " ".join([*kinds, *(["…"] if len(self.others) > len(kinds) else [])])
        plural = "s" if len(self.others) > 1 else ""
        return [f"{counted(n, 'file')} of unknown kind{plural} skipped ({named})"]


def split_of(folder: str | None) -> tuple[str, str] | None:
    """The split and the domain that a folder's name means: `test`, `testing`, `Test Images` → ("test", "");
    `trainA` → ("train", "A"); None for another name."""
    if folder is None:
        return None
    if pair := re.fullmatch(r"(train|val|test)([AB])", folder):
        return pair[1], pair[2]
    word = re.sub(r"[\s._-]", "", folder.lower())
    match = _SPLIT.fullmatch(word)
    if not match:
        return None
    split, ending = match[1], match[2]
    odd = ending == "ing" if split == "val" else ending in ("id", "idation")  # `valing`, `trainid`
    return None if odd else (split or "val", "")
