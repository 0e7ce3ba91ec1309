"""Packs a set: writes its images, in one pass, into a uint8 `.npy` file for each split. Only a few blocks are
in memory at a time. Worker processes import this module, so it does not import torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.types import Report, Say, silent
from gzcli.core.units import as_size, counted, sides
from gzcli.data.packs.pack import SPLITS, PackFolder
from gzcli.data.packs.stream import map_blocks, write_index
from gzcli.data.readers import pictures
from gzcli.data.readers.images import Block, RawImages, size_of
from gzcli.data.readers.values import VALUES_KIND, Values, fitted, value_ranges, with_pictures
from gzcli.data.sets.registry import Form, extras_in_words, import_line, split_sizes
from gzcli.store.files import checksum, need_space, write_array, write_json

MAX_UNRESIZED_SIDE = 512  # largest side in pixels that is packed without `data.size`
ASPECT = "aspect"  # a further image of each image: itself, in a shape near its own (`pictures.bucket`)
SMALL_CLASS_IMAGES, CLASS_RATIO = (
    10,
    20,
)  # a class of fewer images is reported if another one has so many times more
MIN_TRAINING_IMAGES = 3  # images of a class that remain for training where validation or test takes one
MAX_DECODED_BYTES = 50_000_000  # bytes of images that are decoded again if sizes are mixed: seconds
MAX_NAMED = 5  # maximum number of images or classes that a message names

Shape = tuple[int, int, int]  # (C, H, W)
# by official split: int32 [N, 2], width and height of each image before packing
Sides = dict[str, np.ndarray]
Bad = dict[tuple[str, int], MissingError]  # images that did not decode, by (official split, number in it)
# By official split, the index in SPLITS of each image's packed split, int8 [N]; −1: left out. Images keep
# their order in the packed split.
Plan = dict[str, np.ndarray]


def build(
    images: RawImages, folder: Path, form: Form, *, extra: dict[str, Any], limit: int | None, progress: Report
) -> None:
    """Writes the files of a `PackFolder`, with the keys of `extra` in its `meta.json`. If `covered` is among
    them, each split that is drawn covers the classes. For more than `limit` bytes, or for images of several
    sizes, it writes an index of the images' places instead of pixels (see `stream.py`)."""
    files = PackFolder(folder)
    plan = foreign_plan(images.counts) if form.foreign else _plan(images, covered=bool(extra.get("covered")))
    images = _of_plan(images, plan) if form.foreign else images
    if form.fit == "aspect":
        _refuse_further(images)
        images = replace(images, further={ASPECT: images.blocks})
    notes: list[str] = []  # notes on how images were read
    images, values = _valued(images, form, sum(rows_of(plan).values()), limit)
    native = _native(images, form, notes.append)
    total = sum(rows_of(plan).values()) * (1 + len(images.further))
    sizes = _sides_in(images) if form.mixed and images.shape is None else {}
    mixed = bool(sizes) and _must_stay_mixed(sizes, native[0] * total, limit)
    if sizes:
        width, height = np.concatenate(list(sizes.values())).min(0).tolist()
        native = native[0], height, width
    shape, decoding = _target(images, native, form, mixed)
    pixels = total * int(np.prod(shape)) * (_times(values) if values else 1)
    streamed = mixed or (limit is not None and pixels > limit)
    bad: Bad = {}
    if streamed:
        _write_index(images, plan, folder, mixed)
        resized = form.size is not None
        notes = [f"in a sample of the set: {note}" for note in pictures.notes_in_words(notes)]
    else:
        need_space(folder, pixels)
        fit = Fit(images.title, shape, decoding, _crop_hint(native), bool(images.further), values)
        with _naming_unreadable(images, form):
            bad, resized, notes, sizes = _write_images(images, plan, files, fit, lambda n: progress(n, total))
        if bad:
            _leave_out(images, plan, bad, form, files)
        if ASPECT in images.further:
            shapes = Counter(f"{w}×{h}" for rows in sizes.values() for w, h in rows.tolist() if w)
            notes.append("sizes: " + ", ".join(f"{shape} ({n:,})" for shape, n in shapes.most_common()))
    _write_values(images, sizes if mixed or ASPECT in images.further else {}, plan, files)
    meta = {
        "title": images.title,
        "shape": list(shape),
        "classes": list(images.classes),
        "multilabel": images.multilabel,
        "counts": rows_of(plan),
        "levels": images.levels,
        "resized": resized,
        "fit": form.fit,
        "mixed": mixed,
        "streamed": asdict(decoding) if streamed else None,
        "skipped": [e.message for e in bad.values()],
        "notes": [*_untested(images, plan), *_uneven(images, plan), *images.notes, *notes],
        "extras": [kind for kind in images.extras if kind not in (ASPECT, VALUES_KIND)],
        "values": asdict(values) if values else None,
        **extra,
        "source_channels": native[0],
        "sha256": {path.name: checksum(path) for path in sorted(folder.iterdir())},
    }
    write_json(files.meta_file, meta)


def crops(images: RawImages, form: Form) -> list[str]:
    """The notes of `build` on the images that it crops, from their headers. Raises UsageError as `build` does
    for images that need a size."""
    if form.foreign:
        images = _of_plan(images, foreign_plan(images.counts))
    native, notes = _native(images, form, silent), list[str]()
    (_, height, width), _ = _target(images, native, form, mixed=False)
    for _, _, data, name in images.blocks():
        try:
            w, h = data.shape[:1:-1] if isinstance(data, np.ndarray) else pictures.sides_of(data)
        except Exception:  # as in `decode`; `build` names every one of them
            continue
        if form.size is None and (w, h) != (width, height):
            with _naming_unreadable(images, form):
                raise _mixed(images.title, name, (w, h), (width, height), _crop_hint(native))
        n = len(data) if isinstance(data, np.ndarray) else 1
        notes += n * pictures.cropping((h, w), (height, width))
    return pictures.notes_in_words(notes)


def _valued(images: RawImages, form: Form, n: int, limit: int | None) -> tuple[RawImages, Values | None]:
    """The images as 8-bit images with their values as a further kind, and the description of these values.
    Values of one or three channels are omitted, with a note, if the form or their size requires 8-bit
    images."""
    if images.values is None or images.shape is None:
        return images, None
    values = value_ranges(images)
    pictured, words = with_pictures(images, values), f"{counted(n, 'image')} of {values.words}"
    channels, height, width = images.shape
    fits = form.size is None or form.fit in ("crop", "stretch")
    reshaped = form.channels not in (None, len(values.bands)) or not fits
    size = sides(form.size) if form.size else (height, width)
    large = limit is not None and n * size[0] * size[1] * 4 * channels > limit
    if not reshaped and not large:
        return replace(pictured, notes=[*images.notes, words]), values
    key = "`data.channels`" if fits else "`data.fit`"
    why = "its values exceed `GZ_PACK_LIMIT`" if large else f"{key} requires grey or RGB images"
    if values.is_picture:
        notes = [*images.notes, f"{words}; packed with 8 bits, as {why}"]
        return replace(pictured, further={}, notes=notes), None
    hint = (
        "raise `GZ_PACK_LIMIT`, or set `data.size`"
        if large
        else advice("omit it, or use {}", setting("data.fit", "crop"))
    )
    raise UsageError(f"`{images.title}` has {channels} channels and cannot be packed, as {why}", hint=hint)


def _of_plan(images: RawImages, plan: Plan) -> RawImages:
    """The images of the plan's official splits, without their further images."""
    counts = {split: images.counts[split] for split in plan}
    blocks = lambda: (block for block in images.blocks() if block.split in counts)  # noqa: E731
    return replace(images, counts=counts, blocks=blocks, further={})


def _write_values(images: RawImages, sizes: Sides, plan: Plan, files: PackFolder) -> None:
    """Writes the data of the images other than pixels: labels, sides, captions and names."""
    for kind, values in (("labels", images.labels), ("sides", sizes)):
        for split, rows in _in_plan(values, plan).items():
            write_array(files.array(split, kind), rows)
    for kind, texts in (("captions", images.captions), ("names", images.names)):
        for split, rows in _in_plan({s: np.array(t, object) for s, t in texts.items()}, plan).items():
            write_json(files.texts(split, kind), rows.tolist())


def _untested(images: RawImages, plan: Plan) -> list[str]:
    """A note on the classes with too few images for each split that is drawn."""
    labels, target = images.labels.get("train"), plan.get("train")
    if labels is None or labels.ndim > 1 or target is None:
        return []
    splits = [labels[target == code] for code in np.unique(target[target > 0])]
    few = [row for row, n in enumerate(np.bincount(labels)) if 0 < n < MIN_TRAINING_IMAGES + len(splits)]
    rare = [row for row in few if any(row not in split for split in splits)]
    if not rare:
        return []
    return [f"too few images for validation and test: {_named(images, rare)}"]


def _named(images: RawImages, rows: list[int]) -> str:
    """The names of the first of these classes, and the number of the others."""
    names = ", ".join(f"`{images.classes[row]}`" for row in rows[:MAX_NAMED])
    return f"{names} and {len(rows) - MAX_NAMED:,} more" if len(rows) > MAX_NAMED else names


def _uneven(images: RawImages, plan: Plan) -> list[str]:
    """Notes on classes without training images, and on the smallest other class if it has a handful of them
    and another class has far more."""
    labels = _in_plan(images.labels, plan).get("train")
    if labels is None or labels.ndim > 1 or not len(labels):
        return []
    counts = np.bincount(labels, minlength=len(images.classes)).tolist()
    empty = [row for row, n in enumerate(counts) if not n]
    notes = [f"no training images: {_named(images, empty)}"] if empty else []
    low, high = min(filter(None, counts)), max(counts)
    if low >= SMALL_CLASS_IMAGES or high < CLASS_RATIO * low:
        return notes
    small, large = (images.classes[counts.index(n)] for n in (low, high))
    return [*notes, f"`{small}` has {counted(low, 'training image')}, `{large}` has {high:,}"]


def _in_plan(values: Mapping[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """Values of images by official split, rearranged by packed split."""
    return {
        split: np.concatenate([values[official][target == code] for official, target in plan.items()])
        for code, split in enumerate(SPLITS if values else ())
    }


# --- splits ---


def split_plan(title: str, counts: Mapping[str, int]) -> Plan:
    """The plan of a set to train on. Missing splits are drawn with RandomState, whose stream never changes,
    and keep the order of the images."""
    n, sizes = counts.get("train", 0), split_sizes(counts)
    if sizes["train"] < 1:
        raise MissingError(
            f"`{title}` contains too few images: {n} to train on", hint="give at least 3 images"
        )
    target = np.zeros(n, np.int8)
    order = np.random.RandomState(0).permutation(n)
    for code, split in ((2, "test"), (1, "val")):
        if not counts.get(split):
            target[order[: sizes[split]]], order = code, order[sizes[split] :]
    official = {s: np.full(counts[s], i, np.int8) for i, s in enumerate(SPLITS) if i and counts.get(s)}
    return {"train": target, **official}


def _plan(images: RawImages, *, covered: bool) -> Plan:
    """The plan of a set to train on; `covered`: whether its splits cover the classes, if an image has one."""
    plan, labels = split_plan(images.title, images.counts), images.labels.get("train")
    if covered and labels is not None and labels.ndim == 1:
        plan["train"] = covering(plan["train"], labels)
    return plan


def covering(target: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The codes of a plan, int8 [N], of splits of the same sizes that cover the classes. Each split that is
    drawn contains an image of each class of which MIN_TRAINING_IMAGES more are in training. A class with
    fewer images is only trained on. A plan that covers the classes is not changed."""
    target, drawn = target.copy(), np.unique(target[target > 0])[::-1]

    def counts(code: int) -> np.ndarray:
        """Images of each class in a split."""
        return np.bincount(labels[target == code], minlength=labels.max() + 1)

    def join(image: int, code: int) -> None:
        """Exchanges an image with the last one of the split's most frequent class, if that class then still
        has as many images there as the image's class."""
        if counts(code).max() > counts(code)[labels[image]] + 1:
            last = np.flatnonzero((labels == counts(code).argmax()) & (target == code))[-1]
            target[[image, last]] = target[[last, image]]

    lacking = sum(counts(code) == 0 for code in drawn)
    for label in np.flatnonzero(counts(0) < MIN_TRAINING_IMAGES + lacking):
        for image in np.flatnonzero((labels == label) & (target > 0)).tolist():
            join(image, 0)
    for code in drawn:
        for label in np.setdiff1d(labels, labels[target == code]):
            spare = np.flatnonzero((labels == label) & (target == 0))
            if len(spare) > MIN_TRAINING_IMAGES:
                join(int(spare[0]), code)
    return target


def foreign_plan(counts: Mapping[str, int]) -> Plan:
    """The plan of a set that is only scored: its official test images, or all if there are none, become the
    split `test`."""
    official = ("test",) if counts.get("test") else [split for split in SPLITS if counts.get(split)]
    return {split: np.full(counts[split], SPLITS.index("test"), np.int8) for split in official}


def rows_of(plan: Plan) -> dict[str, int]:
    """Images in each packed split."""
    return {split: sum(int((t == code).sum()) for t in plan.values()) for code, split in enumerate(SPLITS)}


def _places(plan: Plan) -> dict[str, np.ndarray]:
    """For each official split, the row of each of its images in the packed split, int64 [N]."""
    every = np.concatenate(list(plan.values()))
    rows = np.zeros(len(every), np.int64)
    for code in range(len(SPLITS)):
        rows[every == code] = np.arange((every == code).sum())
    return dict(zip(plan, np.split(rows, np.cumsum([len(t) for t in plan.values()])[:-1]), strict=True))


# --- shape ---


def _native(images: RawImages, form: Form, note: Say) -> Shape:
    """The shape before packing: the size of the first of a few images, with 3 channels if any has colour."""
    if images.shape:
        return images.shape
    if images.probe is None:
        if form.size is None or form.channels is None:
            raise ValueError(f"`{images.title}` cannot be packed until a size and channels are given")
        return form.channels, *sides(form.size)
    shapes, problem = [], None
    for name, data in images.probe():
        try:
            shapes.append(pictures.look(data, name, note))
        except MissingError as e:  # packing names every one of them
            problem = e
    if not shapes:
        message = f"none of the sampled images of `{images.title}` can be decoded: {problem}"
        raise MissingError(message) from problem
    height, width, _ = shapes[0]
    return 3 if any(colour for _, _, colour in shapes) else 1, height, width


def _sides_in(images: RawImages) -> Sides:
    """The sides of encoded images, read from their headers."""
    sizes: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    for split, start, data, name in images.blocks():
        assert not isinstance(data, np.ndarray)
        try:
            sizes[split][start] = pictures.sides_of(data)
        except Exception as e:  # as in `decode`
            raise pictures.undecodable(name, e, data) from e
    return sizes


def _must_stay_mixed(sizes: Sides, planes: int, limit: int | None) -> bool:
    """Whether images with `planes` channels in total have several sizes or are too large to pack."""
    every = np.concatenate(list(sizes.values()))  # [N, 2]
    width, height = every[0].tolist()
    too_many = limit is not None and planes * width * height > limit
    return too_many or max(width, height) > MAX_UNRESIZED_SIDE or len(np.unique(every, axis=0)) > 1


def _target(images: RawImages, native: Shape, form: Form, mixed: bool) -> tuple[Shape, pictures.Decoding]:
    """The packed shape, and the decoding to it. Raises UsageError if the user must set a size."""
    c, h, w = native
    if not form.size and not mixed and max(h, w) > MAX_UNRESIZED_SIDE:
        hint = advice("use {} to resize them when they are packed", setting("data.size", 64))
        raise UsageError(
            f"the images of `{images.title}` are too large to use without resizing ({w}×{h} pixels)",
            hint=hint,
        )
    shape = (form.channels or c, *(sides(form.size) if form.size else (h, w)))
    grey_only = form.channels is None and shape[0] == 1
    return shape, pictures.Decoding(form.size, shape[0], grey_only, images.rule, form.fit)


def _times(values: Values) -> int:
    """The size of a set's values as a multiple of the size of its 8-bit images, rounded up."""
    return 1 + 4 * values.channels // len(values.bands)


class MixedError(UsageError):
    """Images of several sizes, which need `data.size`."""


def _mixed(title: str, name: str, sides: tuple[int, int], others: tuple[int, int], hint: str) -> MixedError:
    """The error for an image of other sides (width, height) than the others."""
    (w, h), (w0, h0) = sides, others
    message = f"the images of `{title}` have mixed sizes: `{name}` is {w}×{h}, but others are {w0}×{h0}"
    return MixedError(message, hint=hint)


@contextmanager
def _naming_unreadable(images: RawImages, form: Form) -> Iterator[None]:
    """Adds images that do not decode to an error for mixed sizes within the block."""
    try:
        yield
    except MixedError as error:
        bad = [] if form.skip_bad else _damaged(images)
        if not bad:
            raise
        hint = f"{error.hint}, and replace or remove those that cannot be decoded"
        message = f"{error.message}. Also, {_unreadable(images.title, bad)}"
        raise UsageError(message, hint=hint) from error


def _damaged(images: RawImages) -> list[MissingError]:
    """The errors of images that do not decode. Of the images after the first `LOADED` bytes, only the headers
    are read."""
    bad, room = [], MAX_DECODED_BYTES
    for _, _, data, name in images.blocks():
        if isinstance(data, np.ndarray):
            continue
        room -= size_of(data)
        try:
            with pictures.opened(data) as image:
                if room >= 0:
                    image.load()
        except Exception as e:  # as in `decode`
            bad.append(pictures.undecodable(name, e, data))
    return bad


def _unreadable(title: str, bad: Collection[MissingError]) -> str:
    """The message for images that did not decode."""
    messages = [e.message for e in bad]
    listed = "; ".join(messages[:MAX_NAMED]) + ("; …" if len(messages) > MAX_NAMED else "")
    return (
        f"{len(messages):,} images of `{title}` cannot be decoded: " if len(messages) > 1 else ""
    ) + listed


def _crop_hint(native: Shape) -> str:
    """Proposes a usual size that is not larger than these images."""
    size = next((s for s in (64, 32) if s <= min(native[1:])), 16)
    return f"use `--set data.size={size}` to crop them to squares and resize them"


class Fitted(NamedTuple):
    """A block in the shape in which it is packed."""

    split: str  # official split
    start: int  # number of the first image in it
    name: str  # file that held it, for messages
    images: np.ndarray | MissingError  # uint8 [n, C, H, W], or the reason why there are none
    resized: bool = False
    # original (width, height) in pixels, (0, 0) if not measured; of `aspect`, those of its images
    sides: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()  # choices in reading it, noted by `pictures.decode`


@dataclass(frozen=True)
class Fit:
    """The function Block → Fitted, which can be pickled."""

    title: str  # name of the set in messages
    shape: Shape
    decoding: pictures.Decoding
    hint: str  # remedy for images of mixed sizes
    with_sides: bool  # whether the original sides of an image are measured
    values: Values | None = None  # values of the arrays, if the set has any
    of_values: bool = False  # whether these are what is packed

    def __call__(self, block: Block) -> Fitted:
        split, start, data, name = block
        if isinstance(data, np.ndarray):
            height, width = data.shape[2:]
            if self.of_values:
                rows = fitted(data, self.shape, self.decoding.fit)
                return Fitted(split, start, name, rows, data.shape != rows.shape, (width, height))
            if self.decoding.bucketed:
                height, width = pictures.bucket((height, width), self.shape[1:])
                images = pictures.fit_array(data, (self.shape[0], height, width), "crop")
                return Fitted(split, start, name, self._rows(images), sides=(width, height))
            images, (_, h, w) = pictures.fit_array(data, self.shape, self.decoding.fit), self.shape
            cropped = pictures.cropping((height, width), (h, w)) if self.decoding.fit == "crop" else ()
            notes = len(images) * cropped
            return Fitted(split, start, name, images, (height, width) != (h, w), (width, height), notes)
        messages: list[str] = []
        try:
            image, resized = pictures.decode(data, name, self.decoding, messages.append)
        except MissingError as e:
            return Fitted(split, start, name, e)
        (_, h, w), (_, h0, w0) = image.shape, self.shape
        if self.decoding.bucketed:
            return Fitted(split, start, name, self._rows(image[None]), resized, (w, h))
        if image.shape != self.shape:
            raise _mixed(self.title, name, (w, h), (w0, h0), self.hint)
        before = pictures.sides_of(data) if self.with_sides else (0, 0)
        return Fitted(split, start, name, image[None], resized, before, tuple(messages))

    def _rows(self, images: np.ndarray) -> np.ndarray:
        """Rows [n, C, H, W] that begin with the bytes of images of any shape; the rest is zero."""
        rows = np.zeros((len(images), *self.shape), np.uint8)
        rows.reshape(len(images), -1)[:, : images[0].size] = images.reshape(len(images), -1)
        return rows


# --- writing ---


class RowFile:
    """A `.npy` file of n rows of bytes or floats, which may be written in any order. It is not memory-mapped,
    so resident memory does not grow with the file."""

    def __init__(self, path: Path, n: int, shape: tuple[int, ...], dtype: Any = np.uint8):
        self.row = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.seen = np.zeros(n, bool)
        self.file = path.open("wb+")
        head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, *shape)}
        np.lib.format.write_array_header_1_0(self.file, head)
        self.start = self.file.tell()
        self.file.truncate(self.start + n * self.row)
        self.file.flush()

    def write_row(self, row: int, image: np.ndarray) -> None:
        os.pwrite(self.file.fileno(), np.ascontiguousarray(image).tobytes(), self.start + int(row) * self.row)
        self.seen[row] = True


def _write_images(
    images: RawImages, plan: Plan, files: PackFolder, fit: Fit, report: Callable[[int], None]
) -> tuple[Bad, bool, list[str], Sides]:
    """Writes the images, then their further images with the same crop. Returns the images that did not
    decode, whether any was resized, notes on reading, and the sides of the images."""
    count = sum(images.counts.values())
    work = count if images.shape != fit.shape else 0  # number of images that are decoded or resized
    sizes: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    bad: Bad = {}
    notes: Counter[str] = Counter()
    any_resized, places = False, _places(plan)
    for i, (kind, blocks) in enumerate({"": images.blocks, **images.further}.items()):
        dtype: Any = np.uint8
        if kind == ASPECT:
            fit = replace(fit, decoding=replace(fit.decoding, bucketed=True))
        if kind == VALUES_KIND and (values := fit.values):
            fit = replace(fit, of_values=True, shape=(values.channels, *fit.shape[1:]))
            dtype = np.uint8 if values.levels == 256 else np.float32
        row_files: dict[str, RowFile] = {}
        progress = i * count
        with ExitStack() as opened:
            for split, n in rows_of(plan).items():
                row_files[split] = RowFile(files.array(split, kind), n, fit.shape, dtype)
                opened.callback(row_files[split].file.close)
            for block in map_blocks(fit, blocks(), work):
                notes.update(block.notes)
                any_resized |= block.resized and not kind
                target, row = plan[block.split], places[block.split]
                if isinstance(block.images, MissingError):
                    bad.setdefault((block.split, block.start), block.images)
                    row_files[SPLITS[target[block.start]]].seen[row[block.start]] = True
                    continue
                if kind and kind not in (ASPECT, VALUES_KIND):
                    _check_sides(block, sizes[block.split][block.start].tolist())
                else:
                    sizes[block.split][block.start : block.start + len(block.images)] = block.sides
                for k, image in enumerate(block.images, block.start):
                    row_files[SPLITS[target[k]]].write_row(row[k], image)
                progress += len(block.images)
                report(progress)
        for split, file in row_files.items():
            if missing := int((~file.seen).sum()):
                name = f"`{kind}` images" if kind else "images"
                raise MissingError(f"{missing} {name} of the {split} split are missing from `{images.title}`")
        # a map may be smaller than its image
        fit = replace(fit, decoding=replace(fit.decoding, size=as_size(*fit.shape[1:])))
    return bad, any_resized, pictures.notes_in_words(notes), sizes


def _refuse_further(images: RawImages) -> None:
    """Raises UsageError for images with further images, because further images would need the same shapes."""
    if images.further:
        extras = extras_in_words(images.further)
        message = f"`{images.title}` has {extras}, which `data.fit: aspect` does not support"
        raise UsageError(
            message, hint=advice("use {} or {}", setting("data.fit", "crop"), setting("data.fit", "pad"))
        )


def _check_sides(further: Fitted, image: list[int]) -> None:
    """Raises UsageError if a further image and its image have different aspect ratios."""
    (w, h), (w0, h0) = further.sides, image
    if w0 and h0:  # otherwise the image did not decode
        slack = max(0.02, 1 / min(w, h, w0, h0))  # a pixel may be lost to rounding
        if abs(w * h0 / (h * w0) - 1) > slack:
            message = f"`{further.name}` is {w}×{h}, but its image is {w0}×{h0}: their aspect ratios differ"
            raise UsageError(message, hint="crop both to the same region")


def _leave_out(images: RawImages, plan: Plan, bad: Bad, form: Form, files: PackFolder) -> None:
    """Removes images that did not decode from plan and files, or raises MissingError with their names."""
    title, options = images.title, f"--size {form.size} --skip-bad" if form.size else "--skip-bad"
    if not form.skip_bad:
        hint = f"replace or remove them, or import the others: {import_line(title, options)}"
        raise MissingError(_unreadable(title, bad.values()), hint=hint)
    targets = {split: target.copy() for split, target in plan.items()}
    for split, i in bad:
        targets[split][i] = -1
    if rows_of(plan)["train"] and not (targets["train"] == 0).any():
        n = len(targets["train"])
        raise MissingError(
            f"`{title}` contains too few images: {n} to train on", hint="give at least 3 images"
        )
    if not any((target >= 0).any() for target in targets.values()):
        raise MissingError(f"`{title}` contains no image that can be decoded")
    for code, split in enumerate(SPLITS):
        stays = np.concatenate([targets[s][target == code] == code for s, target in plan.items()])
        for kind in () if stays.all() else ("", *images.further):
            path = files.array(split, kind)
            old, part = np.load(path, mmap_mode="r"), path.with_suffix(".part")
            file = RowFile(part, int(stays.sum()), old.shape[1:], old.dtype)
            for to, row in enumerate(np.flatnonzero(stays)):
                file.write_row(to, old[row])
            file.file.close()
            os.replace(part, path)
    plan.update(targets)


def _write_index(images: RawImages, plan: Plan, folder: Path, mixed: bool) -> None:
    """Writes the places of the images instead of pixels. Raises UsageError if they have no places."""
    why = f"`{images.title}` exceeds `GZ_PACK_LIMIT`, and"
    first_remedy, second_remedy = "raise `GZ_PACK_LIMIT`", "lower `data.size`"
    if mixed:
        why = f"`{images.title}` has images of large or mixed sizes, and"
        first_remedy, second_remedy = "set `data.size`", "remove them"
    if images.further:
        message = f"{why} {extras_in_words(images.further)} cannot be streamed"
        raise UsageError(message, hint=f"{first_remedy}, or {second_remedy}")
    if images.spans is None:
        ways = "provide the images as a folder, a zip or an uncompressed tar"
        raise UsageError(f"{why} its images cannot be streamed", hint=f"{first_remedy}, or {ways}")
    spans = images.spans()
    for code, split in enumerate(SPLITS):
        pairs = (pair for s, target in plan.items() for pair in zip(spans[s], target, strict=True))
        write_index(folder, split, [span for span, target in pairs if target == code])
