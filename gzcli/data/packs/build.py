"""Packs a set: writes its images, in one pass, into a uint8 `.npy` file for each split. Only a few blocks are
in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import as_size, sides
from gzcli.data.packs.beside import write_labels, write_sides
from gzcli.data.packs.fitted import Fit, Fitted, Sides, alike, measured, sides_in
from gzcli.data.packs.forms import Decoding, Form, Report, Say, unreported
from gzcli.data.packs.rows import Rows, keep
from gzcli.data.packs.splits import SPLITS, Plan, foreign_plan, rows_of, split_plan, without
from gzcli.data.packs.stream import write_index
from gzcli.data.packs.workers import mapped
from gzcli.data.readers.conditions import in_words
from gzcli.data.readers.pictures import look, noted
from gzcli.data.readers.raw_images import Block, RawImages
from gzcli.store.files import checksum, need_space, write_json

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
    pictures, and meta.json into `folder`. Pictures that were left out are listed in meta.json.

    images: the images.
    folder: the pack's folder.
    form: the form in which they are packed.
    extra: further keys of meta.json.
    limit: bytes beyond which no pixels are written but an index of the places of the pictures (`stream.py`),
      which are decoded as they are needed; None: no limit.
    progress: takes images done and in all.

    Raises UsageError for mixed sizes without a size asked for, and for further pictures that are too many to
    be packed or of another shape than their image; MissingError that names the pictures that do not decode.
    """
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
        fit = Fit(images.title, shape, how, _crop_hint(native), measured=bool(images.further))
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
    if any has colour. Where none can be looked at it is the form's.

    note: takes how each of the few was read, as in `pictures.decode`.
    """
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
    """Whether images of these sides cannot be packed, as they have several sizes or are too large.

    planes: number of their channels together.
    limit: bytes of a pack; None: no limit.
    """
    every = np.concatenate(list(had.values()))  # [N, 2]
    width, height = every[0].tolist()
    too_many = limit is not None and planes * width * height > limit
    return too_many or max(width, height) > LARGEST or len(np.unique(every, axis=0)) > 1


def _target(images: RawImages, native: Shape, form: Form, mixed: bool) -> tuple[Shape, Decoding]:
    """The packed shape, and the decoding that leads to it. Raises UsageError where a size must be given.

    mixed: whether images of any size are decoded as they are needed.
    """
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
    images: RawImages, plan: Plan, folder: Path, fit: Fit, report: Callable[[int], None]
) -> tuple[Bad, bool, list[str]]:
    """Writes the images, then their further pictures by the same crop. Returns those that did not decode,
    whether any image was resized, and how pictures were read."""
    each = sum(images.counts.values())
    work = each if images.shape != fit.shape else 0  # number of images that are decoded or resized
    had: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    rows = rows_of(plan)
    notes: Counter[str] = Counter()

    def written(kind: str, fitted: Iterator[Fitted], done: int) -> tuple[Bad, bool]:
        writers = {split: Rows(folder / _file(split, kind), n, fit.shape) for split, n in rows.items()}
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
    writers: dict[str, Rows],
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
    """Removes pictures that did not decode from the plan and the files. Returns their messages.

    Raises MissingError that names them unless `skip_bad`.
    """
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
                keep(folder / _file(name, kind), np.flatnonzero(kept))
    plan.update(again)
    return messages


def _index(images: RawImages, plan: Plan, folder: Path, mixed: bool) -> None:
    """Writes the places of the pictures instead of pixels. Raises UsageError where there are none.

    mixed: whether that is because they have several sizes.
    """
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
