"""Code that readers share: the files below a folder, the meaning of their names, and the images of a set
before packing. No heavy import at the top."""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gzcli.core import formats
from gzcli.core.errors import EXHAUSTED_ERRORS, MissingError
from gzcli.core.formats import ARRAY, IMAGE, endings_of
from gzcli.core.units import counted
from gzcli.data.sets.registry import DataSpec

if TYPE_CHECKING:
    import numpy as np

LARGEST_FILE = 1 << 30  # maximum bytes of an image
PILLOW_FORMATS = tuple(
    each.reader for each in formats.FORMATS if each.content == IMAGE
)  # Pillow's names of them
SUFFIXES, ARRAYS = endings_of(IMAGE), endings_of(ARRAY)
METADATA = "metadata.jsonl"
LABEL_ENDING = ".cls"  # what WebDataset calls the file of an image's label
TABLE_ENDINGS = (".csv", ".tsv")  # files that may list the labels of images
_SPLIT = re.compile(r"(train|val|test)(ing|id|idation)?(set|images?|imgs?|data|split)?|dev(set)?")
# folders that hold images of any kind, and folders of images that mark others
IMAGE_FOLDERS = re.compile(r"(images?|imgs?|pictures?|photos?|jpe?g(images)?|rgb|png)", re.IGNORECASE)
MASK_FOLDERS = re.compile(r"(ground_?truth|gt|masks?|segmentations?|annotations?|labels?)", re.IGNORECASE)

Folders = dict[str, tuple[str, ...]]  # name of an image → its folders, the outermost first
Content = bytes | MissingError  # the bytes of an image file, or the reason why it cannot be read


def walk(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the regular files below a folder (POSIX, relative, sorted), and those of all other entries
    by kind: "broken" links, "special" files, and "repeated" links to folders that were already read.

    Links are followed. Each folder is read once, under its own name rather than a link's, so circles of links
    end. Names that begin with a dot are skipped.
    """
    files: list[str] = []
    odd: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    plain, linked = deque([""]), deque[str]()  # folders still to read, and links to folders
    while plain or linked:
        folder = plain.popleft() if plain else linked.popleft()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as e:
            refuse_exhausted(e)
            hint = "check its owner and permissions"
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
    """What an entry of a folder is, or what a link points to: "file", "folder", "broken" or "special"."""
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
    """Whether a path is a regular file or a folder; pipes and devices must not be read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def refuse_exhausted(e: Exception) -> None:
    """Raises an error of opening a file that is of the process rather than of the file, such as too many open
    files. No file may be skipped for it."""
    if isinstance(e, OSError) and e.errno in EXHAUSTED_ERRORS:
        raise e


def size_of(data: np.ndarray | Content) -> int:
    """The bytes of a block's data in memory."""
    if isinstance(data, MissingError):
        return 0
    return len(data) if isinstance(data, bytes) else data.nbytes


def content_of(path: Path) -> Content:
    """The bytes of an image file, or the error of `read_regular`: as one that does not decode, an unreadable
    image can be skipped."""
    try:
        return read_regular(path)
    except MissingError as e:
        return e


def bytes_in(content: Content) -> bytes:
    """The bytes of an image file. Raises MissingError if it cannot be read."""
    if isinstance(content, MissingError):
        raise content
    return content


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises MissingError."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MissingError(f"`{path}` is not a regular file", hint="remove it")
            refuse_large(str(path), status.st_size)
            return file.read(LARGEST_FILE)
    except OSError as e:
        refuse_exhausted(e)
        raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e


def refuse_large(name: str, size: int) -> None:
    """Raises MissingError for a file of more bytes than any image has."""
    if size > LARGEST_FILE:
        raise MissingError(f"`{name}` is too large for an image: {size:,} bytes", hint="remove it")


def is_hidden(name: str) -> bool:
    """Whether a file is one that systems leave behind: `.DS_Store`, `__MACOSX/…`, `Thumbs.db`."""
    inside = f"/{name}"
    hidden = "/." in inside or "/__MACOSX" in inside  # most names need no path object
    hidden = hidden and any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    return hidden or name.endswith(("Thumbs.db", "desktop.ini"))


def is_picture(name: str) -> bool:
    """Whether a file is an image, or the array of an image, judging by its name."""
    return (may_be_picture(name) or name.lower().endswith(ARRAYS)) and not is_hidden(name)


def may_be_picture(value: str) -> bool:
    """Whether a text may be the name of an image rather than a URL."""
    return splitext(value)[1].lower() in SUFFIXES and "://" not in value


class PictureFilter:
    """Selects images and the files that describe them, and counts all other files by kind."""

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()

    def __call__(self, name: str) -> bool:
        if is_picture(name):
            return True
        if is_hidden(name):
            return False
        path = PurePosixPath(name)
        if (
            path.name == METADATA
            or path.suffix in (".txt", LABEL_ENDING)
            or path.suffix.lower() in TABLE_ENDINGS
        ):
            return True
        self.ignored[path.suffix.lower() or path.name] += 1
        return False

    @property
    def notes(self) -> list[str]:
        """["4 files of unknown kinds skipped (.heic .md)"], or []."""
        if not (n := sum(self.ignored.values())):
            return []
        kinds = [kind for kind, _ in self.ignored.most_common(4)]
        examples = " ".join([*kinds, *(["…"] if len(self.ignored) > len(kinds) else [])])
        plural = "s" if len(self.ignored) > 1 else ""
        return [f"{counted(n, 'file')} of unknown kind{plural} skipped ({examples})"]


def split_of(folder: str | None) -> tuple[str, str] | None:
    """The split and the domain that a folder's name denotes: `test`, `testing`, `Test Images` → ("test", "");
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


def without_outer(names: Iterable[str], layout: str | None) -> Folders:
    """The folders of each image, without the outer folders that all images share."""
    folders = {name: PurePosixPath(name).parts[:-1] for name in names}
    while True:
        heads = {f[0] if f else None for f in folders.values()}
        head = next(iter(heads), None)
        if len(heads) != 1 or head is None or (layout in (None, "splits") and split_of(head)):
            return folders
        inner = {name: f[1:] for name, f in folders.items()}
        if layout == "classes" and not any(inner.values()):
            return folders
        if layout == "class-splits" and all(f and split_of(f[0]) for f in inner.values()):
            return folders
        folders = inner


# --- the images of a set, as readers return them ---


class Block(NamedTuple):
    """Consecutive images of an official split."""

    split: str  # "train", "val" or "test"
    start: int  # number of the first image in the split
    # uint8 [n, C, H, W], or values of this shape, or one encoded image
    data: np.ndarray | Content
    name: str  # file that contained it, for messages


class Span(NamedTuple):
    """The position of an encoded image's bytes, with which it is read without opening the archive."""

    path: str  # absolute path of the file that contains them
    offset: int  # bytes before them
    length: int  # number of bytes in the file
    deflated: bool  # whether they are a raw deflate stream


def read_span(span: Span) -> bytes:
    """The bytes of a member."""
    if os.path.exists(span.path) and not is_regular(Path(span.path)):
        hint = "download or create the archive again"
        raise MissingError(f"`{span.path}` is no longer a regular file", hint=hint)
    try:
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            data = file.read(span.length)
    except OSError as e:
        refuse_exhausted(e)
        raise MissingError(f"`{span.path}` cannot be read: {e.strerror}") from e
    if len(data) < span.length:
        raise damaged(span.path, f": it ends before byte {span.offset + span.length:,}")
    if not span.deflated:
        return data
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(data, LARGEST_FILE)
    except zlib.error as e:
        raise damaged(span.path, f" at byte {span.offset:,}: {e}") from e
    if not inflate.eof:
        raise damaged(span.path, f" at byte {span.offset:,}: a member is incomplete")
    return data


def damaged(path: str | Path, why: str) -> MissingError:
    return MissingError(f"`{path}` is damaged{why}", hint="download or create the archive again")


class Members(Protocol):
    """The wanted files of a folder or an archive."""

    names: list[str]  # POSIX, relative, in the order of reading
    notes: list[str]  # notes on omissions

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, Content]]:
        """Yields (name, content) for all members, or for some."""

    def spans(self) -> dict[str, Span]:
        """The positions of each member's bytes."""


Blocks = Callable[[], Iterator[Block]]


@dataclass
class RawImages:
    """The images of a set: labels and counts in memory, pixels as a sequence of blocks."""

    title: str  # its name in messages
    classes: tuple[str, ...]  # names of the classes; () without labels
    counts: dict[str, int]  # images of the official splits: train, and val and test if they exist
    # by split, int64 [N], or uint8 [N, K] if an image may have any number of classes; {} without
    labels: dict[str, np.ndarray]
    blocks: Blocks  # the images, each once
    # (C, H, W) if every block is an array of this shape; None if blocks are encoded images
    shape: tuple[int, int, int] | None = None
    # a few encoded images (name, bytes), from which size and channels follow; without `probe` and `shape`,
    # the user must set them
    probe: Callable[[], Iterator[tuple[str, Content]]] | None = None
    # by split, the place of each encoded image; without it, the set cannot be streamed
    spans: Callable[[], dict[str, list[Span]]] | None = None
    levels: int = 256  # grey levels, 2 … 256
    captions: dict[str, list[str]] = field(default_factory=dict)  # by split, a text for each image
    names: dict[str, list[str]] = field(default_factory=dict)  # by split, the user's images at their path
    # further images of each image by kind, of FURTHER, as blocks in the same places
    further: dict[str, Blocks] = field(default_factory=dict)
    rule: str = "lanczos"  # how images are resized, as in `Decoding`
    notes: list[str] = field(default_factory=list)  # notes on omissions from the set
    # `values.Values` of the arrays of blocks, if these are not 8-bit images
    values: Any = None

    @property
    def multilabel(self) -> bool:
        """Whether an image may have any number of the classes."""
        return any(labels.ndim == 2 for labels in self.labels.values())

    @property
    def extras(self) -> tuple[str, ...]:
        """The kinds of data besides each image, from EXTRAS."""
        return (*(["caption"] if self.captions else []), *self.further)


Arrays = Iterator[tuple[str, "np.ndarray", str]]  # split, images uint8 [n, C, H, W], file that held them
BLOCK_IMAGES = 256  # images packed at a time


def from_arrays(spec: DataSpec, labels: dict[str, np.ndarray], arrays: Callable[[], Arrays]) -> RawImages:
    """The images in the shape of their own set, each split in order."""

    def blocks() -> Iterator[Block]:
        first = dict.fromkeys(labels, 0)
        for split, images, name in arrays():
            for i in range(0, len(images), BLOCK_IMAGES):
                yield Block(split, first[split] + i, images[i : i + BLOCK_IMAGES], name)
            first[split] += len(images)

    counts = {split: len(y) for split, y in labels.items()}
    more: dict[str, Any] = {"shape": spec.shape, "levels": spec.levels}
    return RawImages(spec.title, spec.class_names, counts, labels, blocks, **more)


PROBED_IMAGES = 16  # images from which size and channels of a set are inferred

Place = tuple[str, Any]  # official split; label: a class's number, 0/1 for each class (multi-label), or None
PlacedMembers = tuple[Members, Mapping[str, Place]]  # an archive, and the place of each member that is used


class Encoded:
    """The images of `parts` that have a place. In each split they are numbered by part and name."""

    def __init__(self, title: str, parts: Sequence[PlacedMembers]):
        self.names: dict[str, list[str]] = {}  # by split
        self._labels: dict[str, list[Any]] = {}
        self._parts: list[tuple[Members, dict[str, tuple[str, int]]]] = []  # name → (split, number in it)
        for members, places in parts:
            if lost := set(places).difference(members.names):
                raise MissingError(f"`{title}` lacks {len(lost):,} of its images, such as `{min(lost)}`")
            rows = {}
            for name in sorted(places):
                split, label = places[name]
                names = self.names.setdefault(split, [])
                rows[name] = split, len(names)
                names.append(name)
                self._labels.setdefault(split, []).append(label)
            self._parts.append((members, rows))
        self.title, self.counts = title, {split: len(names) for split, names in self.names.items()}

    def images(self, classes: Sequence[str]) -> RawImages:
        """The images. If there are classes, they have labels int64 [N], or uint8 [N, K] (multi-label)."""
        import numpy as np

        labels = {
            split: np.asarray(rows, np.uint8 if isinstance(rows[0], np.ndarray) else np.int64)
            for split, rows in (self._labels.items() if classes else ())
        }
        return RawImages(self.title, tuple(classes), self.counts, labels, self.blocks(), spans=self.spans)

    def blocks(self, names: Mapping[str, str] | None = None) -> Blocks:
        """The images as blocks; with `names`, the corresponding images that it names."""

        def blocks() -> Iterator[Block]:
            for members, rows in self._parts:
                places: dict[str, list[tuple[str, int]]] = {}  # several images may share another image
                for name, place in rows.items():
                    places.setdefault(name if names is None else names[name], []).append(place)
                for name, data in members.read(list(places)):
                    yield from (Block(*place, data, name) for place in places[name])

        return blocks

    def spans(self) -> dict[str, list[Span]]:
        """By split, the places of the images' bytes."""
        spans: dict[str, list[Any]] = {split: [None] * n for split, n in self.counts.items()}
        for members, rows in self._parts:
            of_members = members.spans()
            for name, (split, i) in rows.items():
                spans[split][i] = of_members[name]
        return spans

    def probe(self) -> Iterator[tuple[str, Content]]:
        """A few evenly spaced images of the first part."""
        members, rows = self._parts[0]
        names = list(rows)
        return members.read(names[:: max(1, len(names) // PROBED_IMAGES)][:PROBED_IMAGES])
