"""Packing: a source's images, in one pass, into a uint8 `.npy` file a split; a few blocks are in memory at a
time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gzcli.data.archives import Span
from gzcli.data.conditions import in_words
from gzcli.data.pictures import decode, fit_array, look, sides_of
from gzcli.data.rows import Rows, keep
from gzcli.data.splits import SPLITS, Plan, foreign_plan, rows_of, split_plan, without
from gzcli.data.workers import mapped
from gzcli.errors import MissingError, UsageError
from gzcli.store.files import checksum, need_space, write_json

LARGEST = 512  # pixels a side that are packed without being asked for by `data.size`
NAMED = 5  # unreadable pictures that a message names

Block = tuple[
    str, int, "np.ndarray | bytes", str
]  # split, first row, uint8 [n, C, H, W] or one encoded picture, its name
Report = Callable[[int, int], None]


class Fitted(NamedTuple):
    """A block as it is packed."""

    split: str
    start: int  # first row
    images: np.ndarray | MissingError  # uint8 [n, C, H, W], or why there is none
    resized: bool
    sides: tuple[int, int]  # (width, height) that it had; of use where another picture must fit to it
    name: str


@dataclass
class Source:
    """What is to be packed: labels and counts at once, images as blocks one after another.

    labels[split] is int64 [N] or uint8 [N, K] (multi-label). `further` are other pictures of each image
    (`conditions.py`).
    `shape` (C, H, W) is given where every block is an array;
    else `probe()` yields a few encoded pictures (name, bytes) that tell it (without it, size and channels
    must be asked for), and `spans()` tells where each one's bytes lie.
    """

    title: str
    classes: tuple[str, ...]
    counts: dict[str, int]  # the official splits: train, and val and test where there are
    labels: dict[str, np.ndarray]  # {} where there are no labels
    blocks: Callable[[], Iterator[Block]]
    shape: tuple[int, int, int] | None = None
    probe: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    spans: Callable[[], dict[str, list[Span]]] | None = None
    levels: int = 256
    multilabel: bool = False
    captions: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(
        default_factory=dict
    )  # what the user's pictures are called at their path
    further: dict[str, Callable[[], Iterator[Block]]] = field(
        default_factory=dict
    )  # name → blocks in the same places
    rule: str = "lanczos"  # of `pictures.decode`
    notes: list[str] = field(default_factory=list)  # what was left out of the set, and why


def build(
    source: Source,
    folder: Path,
    *,
    size: int | None,
    channels: int | None,
    extra: dict[str, Any],
    limit: int | None = None,
    skip_bad: bool = False,
    foreign: bool = False,
    progress: Report = lambda done, total: None,
) -> None:
    """Writes SPLIT.npy, SPLIT_labels.npy, SPLIT_captions.json, SPLIT_names.json, SPLIT_<name>.npy of further
    pictures, and meta.json into `folder`.

    `foreign`: only what such a set is scored on (`splits.foreign_plan`).
    `size` resizes (by the source's rule), `channels` converts. Beyond `limit` bytes only an index of where
    the pictures lie is written (`stream.py`), and they are decoded as they are needed. With `skip_bad`
    pictures that do not decode are left out and listed in meta.json. Raises UsageError for mixed sizes
    without `size`, and for further pictures that are too many to be packed or of another shape than their
    image; MissingError that names the pictures that do not decode.
    """
    plan = foreign_plan(source.counts) if foreign else split_plan(source.title, source.counts)
    source = _part(source, plan) if foreign else source
    native = source.shape or (_probe(source) if source.probe else (channels, size, size))
    shape, how = _target(source, native, size, channels)
    rows = rows_of(plan)
    total = sum(rows.values()) * (1 + len(source.further))
    streamed = limit is not None and total * int(np.prod(shape)) > limit
    skipped: list[str] = []
    if streamed:
        _index(source, plan, folder)
        resized = size is not None
    else:
        need_space(folder, total * int(np.prod(shape)))
        bad, resized = _pack(
            source, plan, folder, shape, how, _mixed(source, native), lambda n: progress(n, total)
        )
        if bad:
            skipped = _left_out(source, plan, bad, skip_bad, folder)
            rows = rows_of(plan)
    _write_labels(source, plan, rows, folder)
    files = sorted(path.name for path in folder.iterdir())
    meta = {
        "title": source.title,
        "shape": list(shape),
        "classes": list(source.classes),
        "multilabel": source.multilabel,
        "counts": rows,
        "levels": source.levels,
        "resized": resized,
        "streamed": how if streamed else None,
        "skipped": skipped,
        "notes": source.notes,
        "extras": [*(["caption"] if source.captions else []), *source.further],
        **extra,
        "source_channels": native[0],
        "sha256": {name: checksum(folder / name) for name in files},
    }
    write_json(folder / "meta.json", meta)


def _part(source: Source, plan: Plan) -> Source:
    """The images of the plan's official splits, without further pictures of them."""
    counts = {split: source.counts[split] for split in plan}
    chosen = partial(filter, lambda block: block[0] in counts)
    return replace(source, counts=counts, blocks=lambda: chosen(source.blocks()), further={})


def _target(
    source: Source, native: tuple[int, int, int], size: int | None, channels: int | None
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The packed shape (C, H, W), and the keywords of `decode` that lead to it."""
    if not size and native[1] != native[2]:
        hint = f"`--set data.size={_usual_size(native)}` crops them to squares and resizes them"
        raise UsageError(
            f"the images of `{source.title}` are not square ({native[2]}×{native[1]} pixels)", hint=hint
        )
    if not size and max(native[1:]) > LARGEST:
        hint = "`--set data.size=64` resizes them once, when they are packed"
        raise UsageError(
            f"the images of `{source.title}` are large ({native[2]}×{native[1]} pixels)", hint=hint
        )
    shape = (channels or native[0], size or native[1], size or native[2])
    grey_only = channels is None and shape[0] == 1
    return shape, {"size": size, "channels": shape[0], "grey_only": grey_only, "rule": source.rule}


def _fit(
    block: Block, *, want: tuple[int, int, int], how: dict[str, Any], mixed: tuple[str, str], measured: bool
) -> Fitted:
    """A block as uint8 [n, C, H, W] of the wanted shape, in whatever process."""
    split, start, data, name = block
    if not isinstance(data, bytes):
        return Fitted(
            split, start, fit_array(data, want), data.shape[2:] != want[1:], data.shape[:1:-1], name
        )
    try:
        image, resized = decode(data, name, **how)
    except MissingError as e:
        return Fitted(split, start, e, False, (0, 0), name)
    if image.shape != want:
        (_, h, w), (_, h0, w0) = image.shape, want
        raise UsageError(f"{mixed[0]}: `{name}` is {w}×{h}, others are {w0}×{h0}", hint=mixed[1])
    return Fitted(split, start, image[None], resized, sides_of(data) if measured else (0, 0), name)


def _mixed(source: Source, native: tuple[int, int, int]) -> tuple[str, str]:
    """Message and hint for images of mixed sizes."""
    hint = f"`--set data.size={_usual_size(native)}` crops them to squares and resizes them"
    return f"the images of `{source.title}` have mixed sizes", hint


def _usual_size(native: tuple[int, int, int]) -> int:
    """A size to propose: a usual one that these images fill."""
    return next((s for s in (64, 32) if s <= min(native[1:])), 16)


def _probe(source: Source) -> tuple[int, int, int]:
    """(C, H, W) by a few pictures: the first one's size; colour if any of them has colour."""
    seen, problem = [], None
    for name, data in source.probe():
        try:
            seen.append(look(data, name))
        except MissingError as e:  # packing names every one of them
            problem = e
    if not seen:
        raise MissingError(
            f"none of the pictures of `{source.title}` decodes that were looked at: {problem}"
        ) from problem
    return (3 if any(colour for _, _, colour in seen) else 1, *seen[0][:2])


Bad = dict[tuple[str, int], MissingError]  # by (official split, place)


def _pack(
    source: Source,
    plan: Plan,
    folder: Path,
    shape: tuple[int, int, int],
    how: dict[str, Any],
    mixed: tuple[str, str],
    report: Callable[[int], None],
) -> tuple[Bad, bool]:
    """Writes the images, then their further pictures by the same crop; returns those that did not decode, and
    whether any image was resized."""
    bad: Bad = {}
    resized, done = False, 0
    work = sum(source.counts.values()) if source.shape != shape else 0  # images that are more than copied
    sides = (
        {split: np.zeros((n, 2), np.int32) for split, n in source.counts.items()} if source.further else {}
    )
    for kind, blocks in {"": source.blocks, **source.further}.items():
        if kind:
            how = how | {"size": shape[1]}  # a map may be smaller than its image
        fit = partial(_fit, want=shape, how=how, mixed=mixed, measured=bool(sides))
        writers = {split: Rows(folder / _file(split, kind), n, shape) for split, n in rows_of(plan).items()}
        checked = _alike(mapped(fit, blocks(), work), sides, first=not kind)
        worse, changed = _write(checked, plan, writers, lambda n, done=done: report(done + n))
        bad = bad | {place: e for place, e in worse.items() if place not in bad}
        resized, done = resized or (changed and not kind), done + sum(source.counts.values())
        for split, writer in writers.items():
            if missing := int((~writer.seen).sum()):
                what = f"`{kind}` pictures" if kind else "images"
                raise MissingError(f"{missing} {what} of the {split} split are missing in `{source.title}`")
    return bad, resized


def _file(split: str, kind: str = "") -> str:
    return f"{split}_{kind}.npy" if kind else f"{split}.npy"


def _alike(fitted: Iterator[Fitted], sides: dict[str, np.ndarray], *, first: bool) -> Iterator[Fitted]:
    """Passes the blocks on. Those of the images, which come `first`, leave their `sides` [N, 2] there;
    further pictures are held against these: one of another shape would be cropped to another place. Raises
    UsageError."""
    for one in fitted:
        if sides and not isinstance(one.images, MissingError):
            of_image = sides[one.split][one.start : one.start + len(one.images)]
            if first:
                of_image[:] = one.sides
            elif of_image[0].all():  # else the image did not decode
                (w, h), (w0, h0) = one.sides, of_image[0].tolist()
                if abs(w * h0 / (h * w0) - 1) > max(
                    0.02, 1 / min(w, h, w0, h0)
                ):  # a pixel may be lost to rounding
                    hint = "crop both alike, before they become a set"
                    raise UsageError(
                        f"`{one.name}` is {w}×{h}, and its image {w0}×{h0}: another shape", hint=hint
                    )
        yield one


def _write(
    fitted: Iterator[Fitted], plan: Plan, writers: dict[str, Rows], report: Callable[[int], None]
) -> tuple[Bad, bool]:
    """Writes the images; returns those that did not decode, and whether any was resized."""
    bad: Bad = {}
    resized, done = False, 0
    try:
        for split, start, images, changed, *_ in fitted:
            resized |= changed
            to_split, to_row = plan[split]
            if isinstance(images, MissingError):
                bad[split, start] = images
                writers[SPLITS[to_split[start]]].seen[to_row[start]] = True
                continue
            for i, image in enumerate(images, start):
                writers[SPLITS[to_split[i]]].put(to_row[i], image)
            done += len(images)
            report(done)
    finally:
        for writer in writers.values():
            writer.close()
    return bad, resized


def _left_out(source: Source, plan: Plan, bad: Bad, skip_bad: bool, folder: Path) -> list[str]:
    """Takes pictures that did not decode out of the plan and the files; returns their messages. Raises
    MissingError that names them unless they may be skipped."""
    messages = [e.message for e in bad.values()]
    if not skip_bad:
        shown = "; ".join(messages[:NAMED]) + ("; …" if len(messages) > NAMED else "")
        count = f"{len(messages):,} pictures of `{source.title}` do not decode: " if len(messages) > 1 else ""
        hint = "replace them or take them out; `gz data import PATH --name NAME --skip-bad` leaves them out"
        raise MissingError(count + shown, hint=hint)
    again = without(source.title, plan, bad)
    for code, name in enumerate(SPLITS):
        kept = np.concatenate(
            [again[split][0][target == code] == code for split, (target, _) in plan.items()]
        )
        if not kept.all():
            for kind in ("", *source.further):
                keep(folder / _file(name, kind), np.flatnonzero(kept))
    plan.update(again)
    return messages


def _index(source: Source, plan: Plan, folder: Path) -> None:
    """Writes where the pictures lie instead of their pixels."""
    from gzcli.data.stream import write_index

    if source.further:
        names = in_words(source.further)
        hint = "set `GZ_PACK_LIMIT` to more bytes, or `data.size` to fewer pixels"
        raise UsageError(
            f"`{source.title}` is larger than `GZ_PACK_LIMIT` allows to pack, and {names} are not streamed",
            hint=hint,
        )
    if source.spans is None:
        hint = (
            "set `GZ_PACK_LIMIT` to more bytes, or bring the images as files: a folder, a zip or a plain tar"
        )
        raise UsageError(
            f"`{source.title}` is larger than `GZ_PACK_LIMIT` allows to pack, and cannot be streamed",
            hint=hint,
        )
    spans = source.spans()
    for code, name in enumerate(SPLITS):
        found = [
            s
            for split, (target, _) in plan.items()
            for s, t in zip(spans[split], target, strict=True)
            if t == code
        ]
        write_index(folder, name, found)


def _write_labels(source: Source, plan: Plan, rows: dict[str, int], folder: Path) -> None:
    for split, n in rows.items():
        code = SPLITS.index(split)
        if source.labels:
            first = next(iter(source.labels.values()))
            out = np.zeros((n, *first.shape[1:]), first.dtype)
            for official, (to_split, to_row) in plan.items():
                out[to_row[to_split == code]] = source.labels[official][to_split == code]
            np.save(folder / f"{split}_labels.npy", out)
        for kind, given in (("captions", source.captions), ("names", source.names)):
            if given:
                texts = [""] * n
                for official, (to_split, to_row) in plan.items():
                    for i in np.flatnonzero(to_split == code):
                        texts[to_row[i]] = given[official][i]
                write_json(folder / f"{split}_{kind}.json", texts)
