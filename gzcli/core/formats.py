"""The formats in which images are read, by the endings of files. No heavy import.

To add a format of images that Pillow reads, add an entry to FORMATS. A format of files that contain all
images needs a reader in `SETS` of `data/readers/folder.py`, too.
"""

from __future__ import annotations

from typing import NamedTuple

# what a file contains: an image; an array, which is one image or all of them; all images; files of images
IMAGE, ARRAY, SET, ARCHIVE = "image", "array", "set", "archive"


class Format(NamedTuple):
    """A format of files."""

    reader: str  # what reads it: Pillow's name of an image format, or a module of `data.readers`
    content: str
    endings: tuple[str, ...]
    extra: str = ""  # the extra of gzcli whose package reads it, or reads more kinds of it


# Other readers of Pillow are never tried: some start another program (EPS: Ghostscript). TGA comes last: such
# a file has no mark at its beginning, so that its reader tries every file that no other reader takes.
FORMATS = (
    Format("PNG", IMAGE, (".png", ".apng")),
    Format("JPEG", IMAGE, (".jpg", ".jpeg", ".jpe", ".jfif")),
    Format("WEBP", IMAGE, (".webp",)),
    Format("BMP", IMAGE, (".bmp",)),
    Format("DIB", IMAGE, (".dib",)),
    Format("GIF", IMAGE, (".gif",)),
    Format("TIFF", IMAGE, (".tif", ".tiff"), "tiff"),
    Format("PPM", IMAGE, (".ppm", ".pgm", ".pbm", ".pnm")),
    Format("AVIF", IMAGE, (".avif",)),
    Format("JPEG2000", IMAGE, (".jp2", ".j2k")),
    Format("TGA", IMAGE, (".tga",)),
    Format("values", ARRAY, (".npy",)),
    Format("npz", SET, (".npz",)),
    Format("hub", SET, (".parquet",), "datasets"),
    Format("archive", ARCHIVE, (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")),
)


def endings_of(*names: str) -> tuple[str, ...]:
    """The endings of formats by their content or their reader."""
    return tuple(
        ending for each in FORMATS if {each.content, each.reader} & {*names} for ending in each.endings
    )


def extra_of(reader: str) -> str:
    """The requirement that installs the package of a format, such as `gzcli[tiff]`."""
    return next(f"gzcli[{each.extra}]" for each in FORMATS if each.reader == reader)
