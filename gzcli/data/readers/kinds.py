"""The kinds of files that are pictures, and the readers of Pillow that may open them. No heavy import."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

# Pillow's names of the formats that are read. Other readers of Pillow are never tried: some start another
# program (EPS: Ghostscript). TGA comes last: such a file has no mark at its beginning, so that its reader
# tries every file that no other reader takes.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
KINDS = "png apng jpg jpeg jpe jfif webp bmp dib gif tif tiff ppm pgm pbm pnm avif jp2 j2k tga"
SUFFIXES = tuple(f".{kind}" for kind in KINDS.split())

METADATA = "metadata.jsonl"
LABEL = ".cls"  # what WebDataset calls the file of a picture's label


def is_hidden(name: str) -> bool:
    """Whether a file is one that systems leave behind: `.DS_Store`, `__MACOSX/…`, `Thumbs.db`."""
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__MACOSX")) for part in parts) or name.endswith(
        ("Thumbs.db", "desktop.ini")
    )


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its name."""
    return may_be_picture(name) and not is_hidden(name)


def may_be_picture(value: str) -> bool:
    """Whether a text may be the name of a picture, and no URL."""
    return PurePosixPath(value).suffix.lower() in SUFFIXES and "://" not in value


def is_text(name: str) -> bool:
    """Whether a file may describe pictures: a caption, a label, lines of metadata."""
    path = PurePosixPath(name)
    return path.name == METADATA or path.suffix in (".txt", LABEL)


class Wanted:
    """Chooses pictures and files that describe them, and counts the kinds of all other files."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()

    def __call__(self, name: str) -> bool:
        if is_hidden(name):
            return False
        if is_picture(name) or is_text(name):
            return True
        self.others[PurePosixPath(name).suffix.lower() or PurePosixPath(name).name] += 1
        return False

    @property
    def notes(self) -> list[str]:
        """["4 files of unknown kinds skipped (.heic .md)"], or []."""
        if not (n := sum(self.others.values())):
            return []
        kinds = [kind for kind, _ in self.others.most_common(4)]
        named = " ".join([*kinds, *(["…"] if len(self.others) > len(kinds) else [])])
        return [
            f"{counted(n, 'file')} of unknown kind{'s' if len(self.others) > 1 else ''} skipped ({named})"
        ]


def counted(n: int, what: str) -> str:
    """A number with its noun: `1 file`, `2,000 files`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
