"""Packs a set: writes its images, in one pass, into a uint8 `.npy` file for each split. Only a few blocks
are in memory at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sizes import as_size, sides
from gzcli.core.types import Report, Say, unreported
from gzcli.data.packs.stream import mapped, write_index
from gzcli.data.readers.images import Block, RawImages
from gzcli.data.readers.pictures import Decoding, decode, fit_array, look, noted, sides_of, undecodable
from gzcli.data.sets.registry import Form, in_words
from gzcli.store.files import checksum, need_space, write_json

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # what arrays call them
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# For each official split, of each of its images: the number of its packed split in SPLITS (int8 [N], −1: left
# out), and the row there (int64 [N]).
Plan = dict[str, tuple[np.ndarray, np.ndarray]]


def split_plan(title: str, counts: Mapping[str, int]) -> Plan:
    """The plan of a set to train on. Where the publisher has no validation split, min(2000, 10 %) of train
    become it, and where there is no test split, 10 %: by a fixed seed, in their order. RandomState's stream
    is frozen, so that this choice never changes."""
    n = counts.get("train", 0)
    target = np.zeros(n, np.int8)
    order = np.random.RandomState(0).permutation(n)
    tenth = max(1, n // 10)
    if not counts.get("test"):
        target[order[:tenth]], order = 2, order[tenth:]
    if not counts.get("val"):
        target[order[: min(2000, tenth)]] = 1
    targets = {"train": target}
    targets |= {
        s: np.full(counts[s], code, np.int8) for code, s in ((1, "val"), (2, "test")) if counts.get(s)
    }
    return trainable(title, targets)


def foreign_plan(counts: Mapping[str, int]) -> Plan:
    """The plan of a set that is scored only: its official test images, or all where it has none, become the
    split `test`."""
    chosen = ("test",) if counts.get("test") else [split for split in SPLITS if counts.get(split)]
    return _in_rows({split: np.full(counts[split], SPLITS.index("test"), np.int8) for split in chosen})


def trainable(title: str, targets: dict[str, np.ndarray]) -> Plan:
    """The plan by the number of each image's packed split."""
    if not (targets["train"] == 0).any():
        n = len(targets["train"])
        raise MissingError(f"`{title}` holds too few images: {n} to train on", hint="give at least 3 images")
    return _in_rows(targets)


def without(title: str, plan: Plan, bad: Iterable[tuple[str, int]]) -> Plan:
    """The plan without some images, which are given as (official split, number in it)."""
    targets = {split: target.copy() for split, (target, _) in plan.items()}
    for split, i in bad:
        targets[split][i] = -1
    if rows_of(plan)["train"]:
        return trainable(title, targets)
    if not any((target >= 0).any() for target in targets.values()):
        raise MissingError(f"`{title}` holds no picture that decodes")
    return _in_rows(targets)


def _in_rows(targets: dict[str, np.ndarray]) -> Plan:
    """The plan by the number of each image's packed split, where images lie in their order."""
    plan, start = {}, [0, 0, 0]
    for split, target in targets.items():
        row = np.zeros(len(target), np.int64)
        for code in range(3):
            inside = target == code
            row[inside] = start[code] + np.arange(inside.sum())
            start[code] += int(inside.sum())
        plan[split] = target, row
    return plan


def rows_of(plan: Plan) -> dict[str, int]:
    """Images in each packed split."""
    return {
        split: sum(int((target == code).sum()) for target, _ in plan.values())
        for code, split in enumerate(SPLITS)
    }


class RowFile:
    """A file of rows that are written in any order. They are written, not mapped: so resident memory does not
    grow with the file."""

    def __init__(self, path: Path, n: int, shape: tuple[int, ...]):
        self.row = int(np.prod(shape))
        self.seen = np.zeros(n, bool)
        self.file = path.open("wb+")
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
        )
        self.start = self.file.tell()
        self.file.truncate(self.start + n * self.row)
        self.file.flush()

    def put(self, row: int, image: np.ndarray) -> None:
        os.pwrite(self.file.fileno(), np.ascontiguousarray(image).tobytes(), self.start + int(row) * self.row)
        self.seen[row] = True

    def close(self) -> None:
        self.file.close()


def keep_rows(path: Path, rows: np.ndarray) -> None:
    """Rewrites a `.npy` file with these rows only."""
    old, part = np.load(path, mmap_mode="r"), path.with_suffix(".part")
    new = RowFile(part, len(rows), old.shape[1:])
    for to, row in enumerate(rows):
        new.put(to, old[row])
    new.close()
    os.replace(part, path)


Sides = dict[str, np.ndarray]  # by official split: int32 [N, 2], width and height that each image had


class Fitted(NamedTuple):
    """A block in the shape in which it is packed."""

    split: str  # official split
    start: int  # number of the first image in it
    images: np.ndarray | MissingError  # uint8 [n, C, H, W], or why there is none
    resized: bool  # whether its size was changed
    sides: tuple[int, int]  # (width, height) that it had, in pixels; (0, 0) where they were not measured
    name: str  # file that held it, for messages
    notes: tuple[str, ...] = ()  # choices that its reading needed, as `pictures.decode` notes them


@dataclass(frozen=True)
class Fitter:
    """The function block → Fitted, which can be pickled."""

    title: str  # what messages call the set
    shape: tuple[int, int, int]  # (C, H, W) that is wanted
    how: Decoding  # how encoded pictures are decoded
    hint: str  # what to do about pictures of mixed sizes
    measured: bool  # whether the sides that a picture had are measured

    def __call__(self, block: Block) -> Fitted:
        split, start, data, name = block
        if not isinstance(data, bytes):
            height, width = data.shape[2:]
            resized = (height, width) != self.shape[1:]
            return Fitted(
                split, start, fit_array(data, self.shape, self.how.fit), resized, (width, height), name
            )
        notes: list[str] = []
        try:
            image, resized = decode(data, name, self.how, notes.append)
        except MissingError as e:
            return Fitted(split, start, e, False, (0, 0), name)
        if image.shape != self.shape:
            (_, h, w), (_, h0, w0) = image.shape, self.shape
            message = f"the images of `{self.title}` have mixed sizes: `{name}` is {w}×{h}"
            raise UsageError(f"{message}, others are {w0}×{h0}", hint=self.hint)
        sides = sides_of(data) if self.measured else (0, 0)
        return Fitted(split, start, image[None], resized, sides, name, tuple(notes))


def sides_in(images: RawImages) -> Sides:
    """The sides of encoded pictures, read from their headers."""
    had: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    for split, start, data, name in images.blocks():
        assert isinstance(data, bytes)
        try:
            had[split][start] = sides_of(data)
        except Exception as e:  # as in `decode`
            raise undecodable(name, e) from e
    return had


def measured(fitted: Iterator[Fitted], sides: Sides) -> Iterator[Fitted]:
    """Passes blocks of images on and notes the sides that they had in `sides`."""
    for one in fitted:
        if not isinstance(one.images, MissingError):
            sides[one.split][one.start : one.start + len(one.images)] = one.sides
        yield one


def alike(fitted: Iterator[Fitted], sides: Sides) -> Iterator[Fitted]:
    """Passes blocks of further pictures on, which must have the shape of their images: pictures of another
    shape would be cropped to another place."""
    for one in fitted:
        if not isinstance(one.images, MissingError):
            (w, h), (w0, h0) = one.sides, sides[one.split][one.start].tolist()
            if w0 and h0:  # else the image did not decode
                slack = max(0.02, 1 / min(w, h, w0, h0))  # a pixel may be lost to rounding
                if abs(w * h0 / (h * w0) - 1) > slack:
                    raise UsageError(
                        f"`{one.name}` is {w}×{h}, and its image {w0}×{h0}: another shape",
                        hint="crop both alike, before they become a set",
                    )
        yield one


def write_sides(had: Sides, plan: Plan, rows: dict[str, int], folder: Path) -> None:
    """Writes the sides of images of several sizes: SPLIT_sides.npy, int32 [N, 2] of width and height."""
    for code, split in enumerate(SPLITS):
        out = np.zeros((rows[split], 2), np.int32)
        for official, (to_split, to_row) in plan.items():
            out[to_row[to_split == code]] = had[official][to_split == code]
        np.save(folder / f"{split}_sides.npy", out)


def write_labels(images: RawImages, plan: Plan, rows: dict[str, int], folder: Path) -> None:
    """Writes labels, captions and names in the rows of their images."""
    for code, split in enumerate(SPLITS):
        n = rows[split]
        if images.labels:
            first = next(iter(images.labels.values()))
            out = np.zeros((n, *first.shape[1:]), first.dtype)
            for official, (to_split, to_row) in plan.items():
                out[to_row[to_split == code]] = images.labels[official][to_split == code]
            np.save(folder / f"{split}_labels.npy", out)
        for kind, given in (("captions", images.captions), ("names", images.names)):
            if given:
                texts = [""] * n
                for official, (to_split, to_row) in plan.items():
                    for i in np.flatnonzero(to_split == code):
                        texts[to_row[i]] = given[official][i]
                write_json(folder / f"{split}_{kind}.json", texts)


LARGEST = 512  # pixels a side that are packed without being asked for by `data.size`
NAMED = 5  # pictures that a message names

Shape = tuple[int, int, int]  # (C, H, W)
Bad = dict[tuple[str, int], MissingError]  # pictures that did not decode, by (official split, number in it)


def build(
    images: RawImages,
    folder: Path,
    form: Form,
    *,
    extra: dict[str, Any],
    limit: int | None = None,
    progress: Report = unreported,
) -> None:
    """Writes SPLIT.npy, SPLIT_labels.npy, SPLIT_captions.json, SPLIT_names.json, SPLIT_<kind>.npy of further
    pictures, and meta.json into `folder`. Pictures that were left out are listed in meta.json."""
    plan = foreign_plan(images.counts) if form.foreign else split_plan(images.title, images.counts)
    images = _scored(images, plan) if form.foreign else images
    notes: list[str] = []  # of how pictures were read
    native = _native(images, form, notes.append)
    rows = rows_of(plan)
    total = sum(rows.values()) * (1 + len(images.further))
    had = sides_in(images) if form.mixed and images.shape is None else None
    mixed = had is not None and _mixed(had, native[0] * total, limit)
    if had is not None:
        width, height = np.concatenate(list(had.values())).min(0).tolist()
        native = native[0], height, width
    shape, how = _target(images, native, form, mixed)
    streamed = mixed or (limit is not None and total * int(np.prod(shape)) > limit)
    skipped: list[str] = []
    if streamed:
        _index(images, plan, folder, mixed)
        notes = [f"of a few that were looked at, {note}" for note in noted(notes)]
        if mixed and had is not None:
            write_sides(had, plan, rows, folder)
        resized = form.size is not None
    else:
        need_space(folder, total * int(np.prod(shape)))
        fit = Fitter(images.title, shape, how, _crop_hint(native), measured=bool(images.further))
        bad, resized, notes = _pack(images, plan, folder, fit, lambda n: progress(n, total))
        if bad:
            skipped = _left_out(images, plan, bad, form.skip_bad, folder)
            rows = rows_of(plan)
    write_labels(images, plan, rows, folder)
    files = sorted(path.name for path in folder.iterdir())
    meta = {
        "title": images.title,
        "shape": list(shape),
        "classes": list(images.classes),
        "multilabel": images.multilabel,
        "counts": rows,
        "levels": images.levels,
        "resized": resized,
        "fit": form.fit,
        "mixed": mixed,
        "streamed": asdict(how) if streamed else None,
        "skipped": skipped,
        "notes": [*images.notes, *notes],
        "extras": [*(["caption"] if images.captions else []), *images.further],
        **extra,
        "source_channels": native[0],
        "sha256": {name: checksum(folder / name) for name in files},
    }
    write_json(folder / "meta.json", meta)


def _scored(images: RawImages, plan: Plan) -> RawImages:
    """The images of the plan's official splits, without further pictures of them."""
    counts = {split: images.counts[split] for split in plan}

    def blocks() -> Iterator[Block]:
        return (block for block in images.blocks() if block.split in counts)

    return replace(images, counts=counts, blocks=blocks, further={})


def _native(images: RawImages, form: Form, note: Say) -> Shape:
    """The shape of the images before packing, by a few of them: the size of the first one, and three channels
    if any has colour. Where none can be looked at it is the form's."""
    if images.shape:
        return images.shape
    if images.probe is None:
        if form.size is None or form.channels is None:
            raise ValueError(f"`{images.title}` is packed in a size and channels that must be asked for")
        return form.channels, *sides(form.size)
    seen, problem = [], None
    for name, data in images.probe():
        try:
            seen.append(look(data, name, note))
        except MissingError as e:  # packing names every one of them
            problem = e
    if not seen:
        raise MissingError(
            f"none of the pictures of `{images.title}` decodes that were looked at: {problem}"
        ) from problem
    height, width, _ = seen[0]
    return 3 if any(colour for _, _, colour in seen) else 1, height, width


def _mixed(had: Sides, planes: int, limit: int | None) -> bool:
    """Whether images of these sides cannot be packed, as they have several sizes or are too large."""
    every = np.concatenate(list(had.values()))  # [N, 2]
    width, height = every[0].tolist()
    too_many = limit is not None and planes * width * height > limit
    return too_many or max(width, height) > LARGEST or len(np.unique(every, axis=0)) > 1


def _target(images: RawImages, native: Shape, form: Form, mixed: bool) -> tuple[Shape, Decoding]:
    """The packed shape, and the decoding that leads to it."""
    c, h, w = native
    if not form.size and not mixed and max(h, w) > LARGEST:
        hint = "`--set data.size=64` resizes them once, when they are packed"
        raise UsageError(f"the images of `{images.title}` are large ({w}×{h} pixels)", hint=hint)
    shape = (form.channels or c, *(sides(form.size) if form.size else (h, w)))
    grey_only = form.channels is None and shape[0] == 1
    return shape, Decoding(form.size, shape[0], grey_only, images.rule, form.fit)


def _crop_hint(native: Shape) -> str:
    """Proposes a usual size that these images fill."""
    size = next((s for s in (64, 32) if s <= min(native[1:])), 16)
    return f"`--set data.size={size}` resizes them, cropped to squares"


def _pack(
    images: RawImages, plan: Plan, folder: Path, fit: Fitter, report: Callable[[int], None]
) -> tuple[Bad, bool, list[str]]:
    """Writes the images, then their further pictures by the same crop. Returns those that did not decode,
    whether any image was resized, and how pictures were read."""
    each = sum(images.counts.values())
    work = each if images.shape != fit.shape else 0  # number of images that are decoded or resized
    had: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    rows = rows_of(plan)
    notes: Counter[str] = Counter()

    def written(kind: str, fitted: Iterator[Fitted], done: int) -> tuple[Bad, bool]:
        writers = {split: RowFile(folder / _file(split, kind), n, fit.shape) for split, n in rows.items()}
        found = _write(fitted, plan, writers, lambda n: report(done + n), notes)
        for split, writer in writers.items():
            if missing := int((~writer.seen).sum()):
                what = f"`{kind}` pictures" if kind else "images"
                raise MissingError(f"{missing} {what} of the {split} split are missing in `{images.title}`")
        return found

    fitted = mapped(fit, images.blocks(), work)
    bad, resized = written("", measured(fitted, had) if fit.measured else fitted, 0)
    fit = replace(
        fit, how=replace(fit.how, size=as_size(*fit.shape[1:]))
    )  # a map may be smaller than its image
    for i, (kind, blocks) in enumerate(images.further.items(), 1):
        worse, _ = written(kind, alike(mapped(fit, blocks(), work), had), i * each)
        bad |= {place: e for place, e in worse.items() if place not in bad}
    return bad, resized, noted(notes)


def _file(split: str, kind: str = "") -> str:
    return f"{split}_{kind}.npy" if kind else f"{split}.npy"


def _write(
    fitted: Iterator[Fitted],
    plan: Plan,
    writers: dict[str, RowFile],
    report: Callable[[int], None],
    notes: Counter[str],
) -> tuple[Bad, bool]:
    """Writes blocks into the files of the splits and closes these, and counts in `notes` how pictures were
    read. Returns the pictures that did not decode, and whether any was resized."""
    bad: Bad = {}
    resized, done = False, 0
    try:
        for one in fitted:
            resized |= one.resized
            notes.update(one.notes)
            to_split, to_row = plan[one.split]
            if isinstance(one.images, MissingError):
                bad[one.split, one.start] = one.images
                writers[SPLITS[to_split[one.start]]].seen[to_row[one.start]] = True
                continue
            for i, image in enumerate(one.images, one.start):
                writers[SPLITS[to_split[i]]].put(to_row[i], image)
            done += len(one.images)
            report(done)
    finally:
        for writer in writers.values():
            writer.close()
    return bad, resized


def _left_out(images: RawImages, plan: Plan, bad: Bad, skip_bad: bool, folder: Path) -> list[str]:
    """Removes pictures that did not decode from the plan and the files. Returns their messages."""
    messages = [e.message for e in bad.values()]
    if not skip_bad:
        shown = "; ".join(messages[:NAMED]) + ("; …" if len(messages) > NAMED else "")
        count = f"{len(messages):,} pictures of `{images.title}` do not decode: " if len(messages) > 1 else ""
        hint = "replace them or take them out; `gz data import PATH --name NAME --skip-bad` leaves them out"
        raise MissingError(count + shown, hint=hint)
    again = without(images.title, plan, bad)
    for code, name in enumerate(SPLITS):
        kept = np.concatenate(
            [again[split][0][target == code] == code for split, (target, _) in plan.items()]
        )
        if not kept.all():
            for kind in ("", *images.further):
                keep_rows(folder / _file(name, kind), np.flatnonzero(kept))
    plan.update(again)
    return messages


def _index(images: RawImages, plan: Plan, folder: Path, mixed: bool) -> None:
    """Writes the places of the pictures instead of pixels."""
    why = f"`{images.title}` is larger than `GZ_PACK_LIMIT` allows to pack, and"
    more, less = "set `GZ_PACK_LIMIT` to more bytes", "`data.size` to fewer pixels"
    if mixed:
        why, more, less = (
            f"`{images.title}` has large or mixed sizes, and",
            "set `data.size`",
            "leave them out",
        )
    if images.further:
        raise UsageError(f"{why} {in_words(images.further)} are not streamed", hint=f"{more}, or {less}")
    if images.spans is None:
        ways = "bring the images as files: a folder, a zip or a plain tar"
        raise UsageError(f"{why} cannot be streamed", hint=f"{more}, or {ways}")
    spans = images.spans()
    for code, name in enumerate(SPLITS):
        found = [
            span
            for split, (target, _) in plan.items()
            for span, to_split in zip(spans[split], target, strict=True)
            if to_split == code
        ]
        write_index(folder, name, found)
