"""Arrays of images in an `.npz`, which is a zip: they are read in blocks and never unpickled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import IO, NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError, first_line
from gzcli.core.units import counted
from gzcli.data.readers.archive import Zip
from gzcli.data.readers.images import Block, RawImages
from gzcli.data.readers.values import SHAPE_HINT, Values, axis_of, kind_of, with_bands

BLOCK_BYTES = 1 << 18
MAX_CLASSES = 100_000
# Names of arrays besides the name of a split: `train_images`, `x_train`, `train_x`.
IMAGE_KEYS, LABEL_KEYS = ("images", "x", "X"), ("labels", "y", "Y")
# Names of arrays of a set without splits; `gz sample --npz` writes `samples`, `np.savez` writes `arr_0`.
LONE_IMAGES, LONE_LABELS = ("images", "x", "X", "samples", "arr_0"), ("labels", "y", "Y", "arr_1")
CLASS_NAMES = ("class_names", "classes", "label_names")
BANDS = "bands"  # name of the array with the channels that previews show
LAYOUT = "layout"  # name of the array with the layout, "NHWC" or "NCHW"
MAX_WHOLE_BYTES = (
    8_000_000_000  # maximum bytes of an array that is read at once: labels, or images in Fortran order
)
LABEL_HINT = "labels must be integers from 0 of shape [N] or [N, 1], or 0s and 1s of shape [N, K]"
DOWNLOAD_HINT = "download or create the file again"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class Header(NamedTuple):
    """The format of an array of images."""

    n: int  # number of images
    shape: tuple[int, int, int]  # (C, H, W) of an image
    first: bool  # whether channels come first
    fortran: bool  # whether the array is in Fortran's order, column by column
    dtype: np.dtype
    values: Values | None  # None: images of 8 bits


def npz(path: Path) -> RawImages:
    """The images of an npz, by the names of its arrays.

    Images are numbers, [N, H, W], [N, H, W, C] or [N, C, H, W]. Splits have the names of MedMNIST
    (`train_images`, `val_images`, …) or Keras (`x_train`, …); `images` alone also works. Labels, if any, are
    integers [N], [N, 1] or [N, K] with corresponding names; `class_names` are the names of the classes [K].
    The string `layout`, "NHWC" or "NCHW", is needed if the layout is ambiguous. The three integers `bands`
    are the channels that previews show as red, green and blue.
    """
    archive = _Npz(path)
    images, labels = archive.of_splits(IMAGE_KEYS), archive.of_splits(LABEL_KEYS)
    labels = {split: name for split, name in labels.items() if split in images}
    if not images:
        lone = archive.first(LONE_IMAGES), archive.first(LONE_LABELS)
        images, labels = ({"train": name} if name else {} for name in lone)
    if "train" not in images:
        keras = "`x_train` (and `y_train`, …)"
        hint = f"name them `train_images` (and `train_labels`, `test_images`, …), {keras}, or `images`"
        arrays = ", ".join(archive.names) or "none"
        raise UsageError(f"`{path}` has no images: its arrays are {arrays}", hint=hint)
    if labels and len(labels) < len(images):
        raise UsageError(f"`{path}` has labels for some splits only", hint="give them for all, or for none")
    headers = {split: archive.header(name) for split, name in images.items()}
    if len({header.shape for header in headers.values()}) > 1:
        raise UsageError(f"the splits of `{path}` have different image sizes")
    counts = {split: header.n for split, header in headers.items()}
    y = {split: archive.labels(name, counts[split]) for split, name in labels.items()}
    if len({rows.shape[1:] for rows in y.values()}) > 1:
        raise UsageError(f"the labels of the splits of `{path}` have different shapes", hint=LABEL_HINT)
    most = [rows.shape[1] if rows.ndim == 2 else int(rows.max()) + 1 for rows in y.values() if len(rows)]
    least = max(most, default=0)  # minimum number of classes
    names = archive.first(CLASS_NAMES) if y else None
    classes = archive.class_names(names, least) if names else tuple(map(str, range(least)))

    def blocks() -> Iterator[Block]:
        for split, name in images.items():
            for start, rows in archive.images(name, headers[split]):
                yield Block(split, start, rows, name)

    unread = [
        name
        for name in archive.names
        if name not in {*images.values(), *labels.values(), names, LAYOUT, BANDS}
    ]
    notes = []
    if unread:
        notes.append(f"{counted(len(unread), 'array')} skipped (`{unread[0]}`{', …' if unread[1:] else ''})")
    if len({header.values for header in headers.values()}) > 1:
        raise UsageError(f"the splits of `{path}` have different data types")
    shape, values = headers["train"].shape, headers["train"].values
    if values and BANDS in archive.names:
        values = with_bands(values, archive.numbers(BANDS), str(path))
    return RawImages(str(path), classes, counts, y, blocks, shape=shape, notes=notes, values=values)


class _Npz:
    """The arrays of an npz, which is a zip of `.npy` files."""

    def __init__(self, path: Path):
        self.path = path
        self.zip = Zip(path, lambda name: name.endswith(".npy"))
        self.names = [name.removesuffix(".npy") for name in self.zip.names]

    def of_splits(self, words: Sequence[str]) -> dict[str, str]:
        """The name of the array for each split: `train_images`, `x_train`, …"""
        arrays = {}
        for split, spellings in SPLIT_NAMES.items():
            pairs = [(spelling, word) for spelling in spellings for word in words]
            if name := self.first([name for s, w in pairs for name in (f"{s}_{w}", f"{w}_{s}")]):
                arrays[split] = name
        return arrays

    def first(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.names), None)

    def header(self, name: str) -> Header:
        """The format of an array of images. Raises UsageError for other arrays and for ambiguous ones."""
        with self._opened(name) as (_, shape, fortran, dtype):
            pass
        description = f"`{name}` in `{self.path}` is {dtype} of shape {shape}"
        if len(shape) not in (3, 4):
            raise UsageError(description, hint=SHAPE_HINT)
        layout = str(self._whole(LAYOUT)) if LAYOUT in self.names else ""
        first = len(shape) == 4 and axis_of(shape[1:], description, layout=layout)
        n, *sides = shape
        c, h, w = (1, *sides) if len(sides) == 2 else sides if first else (sides[2], *sides[:2])
        return Header(n, (c, h, w), first, fortran, dtype, kind_of(dtype, c, description))

    def images(self, name: str, header: Header) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, values [n, C, H, W]) in order. An array in Fortran order is a single block."""
        c, h, w = header.shape
        shape = (-1, c, h, w) if header.first else (-1, h, w, c)
        row = c * h * w * header.dtype.itemsize
        block = header.n if header.fortran else max(1, BLOCK_BYTES // row)
        with self._opened(name) as (f, *_):
            for start in range(0, header.n, block):
                size = min(block, header.n - start) * row
                if header.fortran:
                    images = np.ascontiguousarray(self._whole(name)).reshape(shape)
                elif len(data := f.read(size)) == size:
                    images = np.frombuffer(data, header.dtype).reshape(shape)
                else:
                    raise MissingError(f"`{self.path}` is truncated in `{name}`", hint=DOWNLOAD_HINT)
                yield start, images if header.first else images.transpose(0, 3, 1, 2)

    def numbers(self, name: str) -> list[int]:
        """The integers of a small array. Raises UsageError for others."""
        values = self._whole(name)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            shape = f"{values.dtype} of shape {values.shape}"
            raise UsageError(f"`{name}` in `{self.path}` must be a list of integers, not {shape}")
        return values.tolist()

    def labels(self, name: str, n: int) -> np.ndarray:
        """The labels, int64 [N], or uint8 [N, K] for several classes at once."""
        with self._opened(name) as (_, shape, _, dtype):
            wrong = f"`{name}` in `{self.path}` must be labels of {n} images, not {dtype} of shape {shape}"
        if not 1 <= len(shape) <= 2 or shape[0] != n or dtype.kind not in "iub":
            raise UsageError(wrong, hint=LABEL_HINT)
        y = self._whole(name)
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.size and (y.min() < 0 or y.max() > (1 if y.ndim == 2 else MAX_CLASSES - 1)):
            wrong = f"`{name}` in `{self.path}` has labels from {y.min()} to {y.max()}"
            raise UsageError(wrong, hint=LABEL_HINT)
        return y.astype(np.int64 if y.ndim == 1 else np.uint8)

    def class_names(self, name: str, least: int) -> tuple[str, ...]:
        """The names of the classes."""
        texts = self._whole(name)
        if texts.dtype.kind == "S":
            with suppress(UnicodeDecodeError):
                texts = np.char.decode(texts, "utf-8")
        if texts.ndim != 1 or texts.dtype.kind != "U":
            hint = f"give an array of strings, one for each class: `{name}=np.array(['ant', 'bee'])`"
            shape = f"{texts.dtype} of shape {texts.shape}"
            raise UsageError(f"`{name}` in `{self.path}` must be a list of names, not {shape}", hint=hint)
        if len(texts) < least:
            raise UsageError(
                f"`{name}` in `{self.path}` names {len(texts)} classes, but its labels have {least}"
            )
        return tuple(map(str, texts))

    def _whole(self, name: str) -> np.ndarray:
        with self._opened(name) as (f, shape, _, dtype):
            if (size := math.prod(shape) * dtype.itemsize) > MAX_WHOLE_BYTES:
                hint = "save the images in C order with `np.ascontiguousarray`, which gz reads in parts"
                message = f"`{name}` in `{self.path}` takes {size / 1e9:,.0f} GB, too much to read at once"
                raise UsageError(message, hint=hint)
            f.seek(0)
            return np.lib.format.read_array(f, allow_pickle=False)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
        """The file of an array, positioned after its header, with the shape, whether it is in Fortran order,
        and the dtype. Raises MissingError, before it allocates memory, for a malformed header, and for one
        that declares more data than the file contains."""
        with self.zip.opened() as archive, archive.open(f"{name}.npy") as f:
            try:
                version = np.lib.format.read_magic(f)
                first = version == (1, 0)
                read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(f)
                if dtype.hasobject:
                    raise ValueError("it contains Python objects")
                if not all(type(side) is int and side > 0 for side in shape):
                    raise ValueError(f"its shape is {shape}")
            except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as e:
                raise MissingError(f"`{name}` in `{self.path}` is not a numpy array: {first_line(e)}") from e
            if f.tell() + math.prod(shape) * dtype.itemsize > archive.getinfo(f"{name}.npy").file_size:
                raise MissingError(f"`{self.path}` is truncated in `{name}`", hint=DOWNLOAD_HINT)
            yield f, shape, fortran, dtype
