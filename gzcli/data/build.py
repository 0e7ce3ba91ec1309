"""Packing: a source's images, in one pass, into a uint8 `.npy` file a split; a few blocks are in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.data.archives import Span
from gzcli.data.pictures import decode, fit_array, look
from gzcli.data.workers import mapped
from gzcli.errors import MissingError, UsageError
from gzcli.store.files import checksum, need_space, write_json

SPLITS = ("train", "val", "test")
LARGEST = 512  # pixels a side that are packed without being asked for by `data.size`
NAMED = 5  # unreadable pictures that a message names

Block = tuple[str, int, "np.ndarray | bytes", str]  # split, first row, uint8 [n, C, H, W] or one encoded picture, its name
Fitted = tuple[str, int, "np.ndarray | MissingError", bool]  # split, first row, images or why there is none, resized?
Report = Callable[[int, int], None]


@dataclass
class Source:
    """What is to be packed: labels and counts at once, images as blocks one after another.

    labels[split] is int64 [N] or uint8 [N, K] (multi-label). `shape` (C, H, W) is given where every block is an array;
    else `probe()` yields a few encoded pictures (name, bytes) that tell it (without it, size and channels must be asked
    for), and `spans()` tells where each one's bytes lie.
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
    rule: str = "lanczos"  # of `pictures.decode`


def build(
    source: Source,
    folder: Path,
    *,
    size: int | None,
    channels: int | None,
    extra: dict[str, Any],
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Report = lambda done, total: None,
) -> None:
    """Writes SPLIT.npy, SPLIT_labels.npy, SPLIT_captions.json and meta.json into `folder`.

    `size` resizes (by the source's rule), `channels` converts. Beyond `limit` bytes only an index of where the pictures
    lie is written (`stream.py`), and they are decoded as they are needed. With `skip_bad` pictures that do not decode
    are left out and listed in meta.json. Raises UsageError for mixed sizes without `size`, MissingError that names the
    pictures that do not decode.
    """
    plan = split_plan(source)
    native = source.shape or (_probe(source) if source.probe else (channels, size, size))
    shape, how = _target(source, native, size, channels)
    rows = _rows(plan)
    total = sum(rows.values())
    streamed = limit is not None and total * int(np.prod(shape)) > limit
    skipped: list[str] = []
    if streamed:
        _index(source, plan, folder)
        resized = size is not None
    else:
        need_space(folder, total * int(np.prod(shape)))
        work = total if source.shape != shape else 0  # images that are more than copied
        fitted = mapped(partial(_fit, want=shape, how=how, mixed=_mixed(source, native)), source.blocks(), work)
        writers = {split: _Rows(folder / f"{split}.npy", n, shape) for split, n in rows.items()}
        bad, resized = _write(fitted, plan, writers, lambda n: progress(n, total))
        for split, writer in writers.items():
            if missing := int((~writer.seen).sum()):
                raise MissingError(f"{missing} images of the {split} split are missing in `{source.title}`")
        if bad:
            skipped = _left_out(source, plan, bad, skip_bad, folder)
            rows = _rows(plan)
    _write_labels(source, plan, rows, folder)
    files = sorted(path.name for path in folder.iterdir())
    meta = {
        "title": source.title, "shape": list(shape), "classes": list(source.classes), "multilabel": source.multilabel,
        "counts": rows, "levels": source.levels, "resized": resized, "streamed": how if streamed else None,
        "skipped": skipped, **extra, "sha256": {name: checksum(folder / name) for name in files},
    }  # fmt: skip
    write_json(folder / "meta.json", meta)


Plan = dict[str, tuple[np.ndarray, np.ndarray]]


def split_plan(source: Source) -> Plan:
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
    targets = {"train": target}
    targets |= {s: np.full(source.counts[s], code, np.int8) for code, s in ((1, "val"), (2, "test")) if source.counts.get(s)}
    return _placed(source, targets)


def _placed(source: Source, targets: dict[str, np.ndarray]) -> Plan:
    """The rows in the packed splits of images with these targets (−1: left out), in order. Each packed split has images
    of one official split only."""
    if not (targets["train"] == 0).any():
        n = len(targets["train"])
        raise MissingError(f"`{source.title}` holds too few images: {n} to train on", hint="give at least 3 images")
    plan = {}
    for split, target in targets.items():
        row = np.zeros(len(target), np.int64)
        for code in range(3):
            row[target == code] = np.arange((target == code).sum())
        plan[split] = target, row
    return plan


def _rows(plan: Plan) -> dict[str, int]:
    """Images in each packed split."""
    return {split: sum(int((target == code).sum()) for target, _ in plan.values()) for code, split in enumerate(SPLITS)}


def _target(
    source: Source, native: tuple[int, int, int], size: int | None, channels: int | None
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The packed shape (C, H, W), and the keywords of `decode` that lead to it."""
    if not size and native[1] != native[2]:
        hint = f"`--set data.size={_usual_size(native)}` crops them to squares and resizes them"
        raise UsageError(f"the images of `{source.title}` are not square ({native[2]}×{native[1]} pixels)", hint=hint)
    if not size and max(native[1:]) > LARGEST:
        hint = "`--set data.size=64` resizes them once, when they are packed"
        raise UsageError(f"the images of `{source.title}` are large ({native[2]}×{native[1]} pixels)", hint=hint)
    shape = (channels or native[0], size or native[1], size or native[2])
    grey_only = channels is None and shape[0] == 1
    return shape, {"size": size, "channels": shape[0], "grey_only": grey_only, "rule": source.rule}


def _fit(block: Block, *, want: tuple[int, int, int], how: dict[str, Any], mixed: tuple[str, str]) -> Fitted:
    """A block as uint8 [n, C, H, W] of the wanted shape, in whatever process."""
    split, start, data, name = block
    if not isinstance(data, bytes):
        return split, start, fit_array(data, want), data.shape[2:] != want[1:]
    try:
        image, resized = decode(data, name, **how)
    except MissingError as e:
        return split, start, e, False
    if image.shape != want:
        (_, h, w), (_, h0, w0) = image.shape, want
        raise UsageError(f"{mixed[0]}: `{name}` is {w}×{h}, others are {w0}×{h0}", hint=mixed[1])
    return split, start, image[None], resized


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
        raise MissingError(f"none of the pictures of `{source.title}` decodes that were looked at: {problem}") from problem
    return (3 if any(colour for _, _, colour in seen) else 1, *seen[0][:2])


def _write(
    fitted: Iterator[Fitted], plan: Plan, writers: dict[str, _Rows], report: Callable[[int], None]
) -> tuple[dict[tuple[str, int], MissingError], bool]:
    """Writes the images; returns those that did not decode, by (official split, place), and whether any was resized."""
    bad: dict[tuple[str, int], MissingError] = {}
    resized, done = False, 0
    try:
        for split, start, images, changed in fitted:
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


def _left_out(source: Source, plan: Plan, bad: dict[tuple[str, int], MissingError], skip_bad: bool, folder: Path) -> list[str]:
    """Takes pictures that did not decode out of the plan and the files; returns their messages. Raises MissingError
    that names them unless they may be skipped."""
    messages = [e.message for e in bad.values()]
    if not skip_bad:
        shown = "; ".join(messages[:NAMED]) + ("; …" if len(messages) > NAMED else "")
        count = f"{len(messages):,} pictures of `{source.title}` do not decode: " if len(messages) > 1 else ""
        hint = "replace them or take them out; `gz data import PATH --name NAME --skip-bad` leaves them out"
        raise MissingError(count + shown, hint=hint)
    targets = {split: target.copy() for split, (target, _) in plan.items()}
    for split, i in bad:
        targets[split][i] = -1
    placed = _placed(source, targets)
    for code, name in enumerate(SPLITS):
        kept = np.concatenate([placed[split][0][target == code] == code for split, (target, _) in plan.items()])
        if not kept.all():
            _keep(folder / f"{name}.npy", np.flatnonzero(kept))
    plan.update(placed)
    return messages


def _keep(path: Path, rows: np.ndarray) -> None:
    """Rewrites a `.npy` file with these rows only."""
    old, part = np.load(path, mmap_mode="r"), path.with_suffix(".part")
    new = _Rows(part, len(rows), old.shape[1:])
    for to, row in enumerate(rows):
        new.put(to, old[row])
    new.close()
    os.replace(part, path)


def _index(source: Source, plan: Plan, folder: Path) -> None:
    """Writes where the pictures lie instead of their pixels."""
    from gzcli.data.stream import write_index

    if source.spans is None:
        hint = "set `GZ_PACK_LIMIT` to more bytes, or bring the images as files: a folder, a zip or a plain tar"
        raise UsageError(f"`{source.title}` is larger than `GZ_PACK_LIMIT` allows to pack, and cannot be streamed", hint=hint)
    spans = source.spans()
    for code, name in enumerate(SPLITS):
        found = [s for split, (target, _) in plan.items() for s, t in zip(spans[split], target, strict=True) if t == code]
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

    def close(self) -> None:
        self.file.close()
