"""The images of a set before they are packed, as readers return them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from gzcli.core.errors import MissingError
from gzcli.data.sets.registry import DataSpec


class Block(NamedTuple):
    """Some images that follow one another in an official split."""

    split: str  # "train", "val" or "test"
    start: int  # number of the first image in the split
    data: np.ndarray | bytes  # uint8 [n, C, H, W], or one encoded picture
    name: str  # file that held it, for messages


class Span(NamedTuple):
    """Where the bytes of an encoded picture lie, to be read without opening the archive."""

    path: str  # absolute, of the file that holds them
    offset: int  # bytes before them
    length: int  # bytes as they lie there
    deflated: bool  # whether they are a raw deflate stream


class Members(Protocol):
    """The wanted files of a folder or an archive."""

    names: list[str]  # POSIX, relative, in the order of reading
    notes: list[str]  # what was left out, and why

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of all members, or of some."""

    def spans(self) -> dict[str, Span]:
        """Where the bytes of each member lie."""


Blocks = Callable[[], Iterator[Block]]


@dataclass
class RawImages:
    """The images of a set: labels and counts at once, pixels as blocks one after another."""

    title: str  # what messages call it
    classes: tuple[str, ...]  # names of the classes; () without labels
    counts: dict[str, int]  # images of the official splits: train, and val and test where there are
    # by split, int64 [N], or uint8 [N, K] where an image may have any number of the classes; {} without
    labels: dict[str, np.ndarray]
    blocks: Blocks  # the images, each once
    # (C, H, W) where every block is an array of it; None where they are encoded pictures
    shape: tuple[int, int, int] | None = None
    # a few encoded pictures (name, bytes) that tell size and channels; without it and `shape` these must be
    # asked for
    probe: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    # by split, where each encoded picture lies; without it the set cannot be streamed
    spans: Callable[[], dict[str, list[Span]]] | None = None
    levels: int = 256  # grey levels, 2 … 256
    # by split, a text for each image; {} without
    captions: dict[str, list[str]] = field(default_factory=dict)
    # by split, what each of the user's pictures is called at its path; {} without
    names: dict[str, list[str]] = field(default_factory=dict)
    # other pictures of each image by their kind (`conditions.FURTHER`), as blocks in the same places
    further: dict[str, Blocks] = field(default_factory=dict)
    rule: str = "lanczos"  # how pictures are resized, as in `forms.Decoding`
    notes: list[str] = field(default_factory=list)  # what was left out of the set, and why

    @property
    def multilabel(self) -> bool:
        """Whether an image may have any number of the classes."""
        return any(labels.ndim == 2 for labels in self.labels.values())


def in_arrays(spec: DataSpec, images: np.ndarray, labels: np.ndarray) -> RawImages:
    """The images of a set that is made in memory: the last `n_test` are its test split."""
    parts = {"train": slice(None, spec.n_train), "test": slice(spec.n_train, None)}

    def blocks() -> Iterator[Block]:
        for split, rows in parts.items():
            yield Block(split, 0, images[rows], split)

    return RawImages(
        spec.title,
        spec.class_names,
        {split: len(images[rows]) for split, rows in parts.items()},
        {split: labels[rows] for split, rows in parts.items()},
        blocks,
        shape=spec.shape,
        levels=spec.levels,
    )


PROBES = 16  # pictures by which size and channels of a set are found

Place = tuple[str, Any]  # official split; label: a class's number, 0/1 for each class (multi-label), or None
PlacedMembers = tuple[Members, Mapping[str, Place]]  # an archive, and the place of each member that is used


def encoded(title: str, classes: Sequence[str], parts: Sequence[PlacedMembers]) -> RawImages:
    """The pictures of `parts` that have a place. Their size and channels must be asked for."""
    images = Encoded(title, parts)
    labels = images.labels() if classes else {}
    return RawImages(title, tuple(classes), images.counts, labels, images.blocks(), spans=images.spans)


class Encoded:
    """The pictures of `parts` that have a place, numbered in each split in the order of part and name."""

    def __init__(self, title: str, parts: Sequence[PlacedMembers]):
        self.parts = parts
        self.counts: dict[str, int] = {}
        self.rows: list[dict[str, tuple[str, int]]] = []  # of each part: name → (split, number in it)
        for members, places in parts:
            if lost := set(places).difference(members.names):
                raise MissingError(f"`{title}` lacks {len(lost):,} of its pictures, as `{min(lost)}`")
            self.rows.append({})
            for name in sorted(places):
                split, _ = places[name]
                self.rows[-1][name] = split, self.counts.get(split, 0)
                self.counts[split] = self.counts.get(split, 0) + 1

    def labels(self) -> dict[str, np.ndarray]:
        """By split: int64 [N], or uint8 [N, K] (multi-label)."""
        found: dict[str, list[Any]] = {split: [] for split in self.counts}
        for (_, places), row in zip(self.parts, self.rows, strict=True):
            for name, (split, _) in row.items():
                found[split].append(places[name][1])
        return {
            split: np.asarray(rows, np.uint8 if isinstance(rows[0], np.ndarray) else np.int64)
            for split, rows in found.items()
        }

    def names(self) -> dict[str, list[str]]:
        """By split, the names of the pictures."""
        found: dict[str, list[str]] = {split: [] for split in self.counts}
        for row in self.rows:
            for name, (split, _) in row.items():
                found[split].append(name)
        return found

    def captions(self, by_name: Mapping[str, str]) -> dict[str, list[str]]:
        """By split, the text of each picture, "" where it has none; {} where no picture has one."""
        if not by_name:
            return {}
        return {split: [by_name.get(name, "") for name in names] for split, names in self.names().items()}

    def blocks(self, other: Mapping[str, str] | None = None) -> Blocks:
        """The pictures as blocks."""

        def blocks() -> Iterator[Block]:
            for (members, _), row in zip(self.parts, self.rows, strict=True):
                places: dict[str, list[tuple[str, int]]] = {}  # several images may share another picture
                for name, place in row.items():
                    places.setdefault(name if other is None else other[name], []).append(place)
                for name, data in members.read(list(places)):
                    yield from (Block(*place, data, name) for place in places[name])

        return blocks

    def spans(self) -> dict[str, list[Span]]:
        """By split, the places of the pictures' bytes."""
        found: dict[str, list[Any]] = {split: [None] * n for split, n in self.counts.items()}
        for (members, _), row in zip(self.parts, self.rows, strict=True):
            where = members.spans()
            for name, (split, i) in row.items():
                found[split][i] = where[name]
        return found

    def probe(self) -> Iterator[tuple[str, bytes]]:
        """A few pictures of the first part, evenly apart."""
        (members, _), row = self.parts[0], list(self.rows[0])
        return members.read(row[:: max(1, len(row) // PROBES)][:PROBES])
