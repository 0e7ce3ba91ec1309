"""Packing: a source's images, in one pass, into a uint8 `.npy` file a split; a few blocks are in memory at a time."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.errors import GzError, MissingError, UsageError
from gzcli.store.files import checksum, need_space, write_json

SPLITS = ("train", "val", "test")
LARGEST = 512  # pixels a side that are packed without being asked for by `data.size`
WINDOW = 16  # pictures in flight between the reader and the workers

Block = tuple[str, int, "np.ndarray | bytes", str]  # split, first row, uint8 [n, C, H, W] or one encoded picture, its name


@dataclass
class Source:
    """What is to be packed: labels and counts at once, images as blocks one after another.

    labels[split] is int64 [N] or uint8 [N, K] (multi-label). `shape` (C, H, W) is given where every block is an array;
    else `probe()` yields a few encoded pictures (name, bytes) that tell it.
    """

    title: str
    classes: tuple[str, ...]
    counts: dict[str, int]  # the official splits: train, and val and test where there are
    labels: dict[str, np.ndarray]  # {} where there are no labels
    blocks: Callable[[], Iterator[Block]]
    shape: tuple[int, int, int] | None = None
    probe: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    levels: int = 256
    multilabel: bool = False
    captions: dict[str, list[str]] = field(default_factory=dict)


def build(source: Source, folder: Path, *, size: int | None, channels: int | None, extra: dict[str, Any]) -> None:
    """Writes SPLIT.npy, SPLIT_labels.npy, SPLIT_captions.json and meta.json into `folder`.

    `size` resizes (centre crop to a square, then antialiased Lanczos), `channels` converts. Raises UsageError for
    mixed sizes without `size`, MissingError for a picture that does not decode.
    """
    plan = split_plan(source)
    shape, fit = _fitting(source, size, channels)
    resized = False
    rows = dict.fromkeys(SPLITS, 0)
    for splits, _ in plan.values():
        for code, split in enumerate(SPLITS):
            rows[split] += int((splits == code).sum())
    need_space(folder, sum(rows.values()) * int(np.prod(shape)))
    writers = {split: _Rows(folder / f"{split}.npy", n, shape) for split, n in rows.items()}
    try:
        for split, start, images, changed in _mapped(fit, source.blocks()):
            resized |= changed
            to_split, to_row = plan[split]
            for i, image in enumerate(images, start):
                writers[SPLITS[to_split[i]]].put(to_row[i], image)
    finally:
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if writer.missing():
            raise MissingError(f"{writer.missing()} images of the {split} split are missing in `{source.title}`")
    _write_labels(source, plan, rows, folder)
    files = sorted(path.name for path in folder.iterdir())
    meta = {
        "title": source.title, "shape": list(shape), "classes": list(source.classes), "multilabel": source.multilabel,
        "counts": rows, "levels": source.levels, "resized": resized, **extra,
        "sha256": {name: checksum(folder / name) for name in files},
    }  # fmt: skip
    write_json(folder / "meta.json", meta)


def split_plan(source: Source) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each official split, of each of its images: the number of the packed split, and the row there.

    Validation is carved from train by a fixed seed (min(2000, 10 %)), and so is test (10 %) where there is none. Carved
    images keep their order. RandomState's stream is frozen, so that the carving never changes.
    """
    n = source.counts.get("train", 0)
    target = np.zeros(n, np.int8)
    order = np.random.RandomState(0).permutation(n)
    tenth = max(1, n // 10)
    if not source.counts.get("test"):
        target[order[:tenth]], order = 2, order[tenth:]
    if not source.counts.get("val"):
        target[order[: min(2000, tenth)]] = 1
    if not (target == 0).any():
        raise MissingError(f"`{source.title}` holds too few images: {n} to train on", hint="give at least 3 images")
    plan = {"train": (target, np.zeros(n, np.int64))}
    for code in range(3):
        plan["train"][1][target == code] = np.arange((target == code).sum())
    for code, split in ((1, "val"), (2, "test")):
        if k := source.counts.get(split):
            plan[split] = (np.full(k, code, np.int8), np.arange(k))
    return plan


def decode(data: bytes, name: str, size: int | None, channels: int, *, grey_only: bool = False) -> tuple[np.ndarray, bool]:
    """An encoded picture as uint8 [C, H, W], and whether it had another size.

    EXIF rotation is applied; transparency is laid over white; palettes become RGB; 16-bit grey is divided by 257;
    RGB → grey is ITU-R 601 luma. With `size`: centre crop to a square, then antialiased Lanczos. Raises MissingError
    if it does not decode, UsageError if it has colour though `grey_only`.
    """
    from PIL import Image, ImageOps

    resized = False
    try:
        with Image.open(io.BytesIO(data)) as image:
            image = _plain(ImageOps.exif_transpose(image))
            if grey_only and _is_colour(image):
                hint = "`--set data.channels=3` keeps the colours, `--set data.channels=1` drops them"
                raise UsageError(f"`{name}` has colour, the first images have none", hint=hint)
            image = image.convert("L" if channels == 1 else "RGB")
            if size and image.size != (size, size):
                image, resized = _resize(image, size), True
            pixels = _pixels(image)
    except GzError:
        raise
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, …
        raise _undecodable(name, e) from e
    return pixels, resized


def _resize(image: Any, size: int) -> Any:
    """Centre crop to a square, then antialiased Lanczos."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _pixels(image: Any) -> np.ndarray:
    """L or RGB as uint8 [C, H, W]"""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _plain(image: Any) -> Any:
    """L or RGB without transparency, of 8 bits."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no known range")
        return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _is_colour(plain: Any) -> bool:
    """Whether a picture (L or RGB) has colour: some pixel of it does."""
    if plain.mode == "L":
        return False
    r, g, b = (np.asarray(c) for c in plain.split())
    return bool((r != g).any() or (g != b).any())


def _undecodable(name: str, e: Exception) -> MissingError:
    what = str(e) if "cannot identify" not in str(e) else "not a picture that can be read"
    return MissingError(f"`{name}` does not decode: {what or type(e).__name__}", hint="replace it or take it out")


def _fitting(source: Source, size: int | None, channels: int | None):
    """The packed shape (C, H, W), and the function of a block that gives (split, first row, images, resized?)."""
    native = source.shape or _probe(source)
    want = (channels or native[0], size or native[1], size or native[2])
    if not size and native[1] != native[2]:
        hint = f"`--set data.size={_usual_size(native)}` crops them to squares and resizes them"
        raise UsageError(f"the images of `{source.title}` are not square ({native[2]}×{native[1]} pixels)", hint=hint)
    if not size and max(native[1:]) > LARGEST:
        hint = "`--set data.size=64` resizes them once, when they are packed"
        raise UsageError(f"the images of `{source.title}` are large ({native[2]}×{native[1]} pixels)", hint=hint)

    def fit(block: Block) -> tuple[str, int, np.ndarray, bool]:
        split, start, data, name = block
        if source.shape:
            return split, start, _fit_array(data, want), want[1:] != native[1:]
        image, resized = decode(data, name, size, want[0], grey_only=channels is None and want[0] == 1)
        if image.shape != want:
            (_, h, w), (_, h0, w0) = image.shape, want
            raise UsageError(
                f"the images of `{source.title}` have mixed sizes: `{name}` is {w}×{h}, others are {w0}×{h0}",
                hint=f"`--set data.size={_usual_size(native)}` crops them to squares and resizes them",
            )
        return split, start, image[None], resized

    return want, fit


def _usual_size(native: tuple[int, int, int]) -> int:
    """A size to propose: a usual one that these images fill."""
    return next((s for s in (64, 32) if s <= min(native[1:])), 16)


def _probe(source: Source) -> tuple[int, int, int]:
    """(C, H, W) by a few pictures: the first one's size; colour if any of them has colour."""
    from PIL import Image, ImageOps

    first, colour = None, False
    for name, data in source.probe():
        try:
            with Image.open(io.BytesIO(data)) as image:
                image = _plain(ImageOps.exif_transpose(image))
                first = first or (image.height, image.width)
                colour = colour or _is_colour(image)
        except Exception as e:  # as in `decode`
            raise _undecodable(name, e) from e
    return (3 if colour else 1, *first)


def _fit_array(images: np.ndarray, want: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, C, H, W] in another size or number of channels, by the rules of `decode`."""
    from PIL import Image

    if images.shape[1:] == want:
        return images
    out = np.empty((len(images), *want), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image = image.convert("L" if want[0] == 1 else "RGB")
        out[i] = _pixels(image if image.size == (want[2], want[1]) else _resize(image, want[1]))
    return out


def _mapped(fit: Callable[[Block], tuple[str, int, np.ndarray, bool]], blocks: Iterator[Block]) -> Iterator:
    """`fit` over the blocks, in order, by a few threads (PIL decodes and resizes without the interpreter's lock)."""
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        flying: deque = deque()
        try:
            for block in blocks:
                flying.append(pool.submit(fit, block))
                if len(flying) >= WINDOW:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


def _write_labels(source: Source, plan: dict, rows: dict[str, int], folder: Path) -> None:
    for split, n in rows.items():
        code = SPLITS.index(split)
        if source.labels:
            first = next(iter(source.labels.values()))
            out = np.zeros((n, *first.shape[1:]), first.dtype)
            for official, (to_split, to_row) in plan.items():
                out[to_row[to_split == code]] = source.labels[official][to_split == code]
            np.save(folder / f"{split}_labels.npy", out)
        if source.captions:
            texts = [""] * n
            for official, (to_split, to_row) in plan.items():
                for i in np.flatnonzero(to_split == code):
                    texts[to_row[i]] = source.captions[official][i]
            write_json(folder / f"{split}_captions.json", texts)


class _Rows:
    """A `.npy` file of uint8 rows, written in any order past the page table: resident memory does not grow with it."""

    def __init__(self, path: Path, n: int, shape: tuple[int, ...]):
        self.row = int(np.prod(shape))
        self.seen = np.zeros(n, bool)
        self.file = path.open("wb+")
        np.lib.format.write_array_header_1_0(self.file, {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)})
        self.start = self.file.tell()
        self.file.truncate(self.start + n * self.row)
        self.file.flush()

    def put(self, row: int, image: np.ndarray) -> None:
        os.pwrite(self.file.fileno(), np.ascontiguousarray(image).tobytes(), self.start + int(row) * self.row)
        self.seen[row] = True

    def missing(self) -> int:
        return int((~self.seen).sum())

    def close(self) -> None:
        self.file.close()
