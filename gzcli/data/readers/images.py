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
    captions: dict[str, list[str]] = field(default_factory=dict)  # by split, a text for each image
    names: dict[str, list[str]] = field(default_factory=dict)  # by split, the user's pictures at their path
    # further pictures of each image by kind, of FURTHER, as blocks in the same places
    further: dict[str, Blocks] = field(default_factory=dict)
    rule: str = "lanczos"  # how pictures are resized, as in `Decoding`
    notes: list[str] = field(default_factory=list)  # what was left out of the set, and why

    @property
    def multilabel(self) -> bool:
        """Whether an image may have any number of the classes."""
        return any(labels.ndim == 2 for labels in self.labels.values())


def from_arrays(spec: DataSpec, labels: dict[str, np.ndarray], blocks: Blocks) -> RawImages:
    """The images of a set whose blocks are arrays of the set's own shape."""
    counts = {split: len(y) for split, y in labels.items()}
    more: dict[str, Any] = {"shape": spec.shape, "levels": spec.levels}
    return RawImages(spec.title, spec.class_names, counts, labels, blocks, **more)


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
        self.names: dict[str, list[str]] = {}  # by split
        self._labels: dict[str, list[Any]] = {}
        self._parts: list[tuple[Members, dict[str, tuple[str, int]]]] = []  # name → (split, number in it)
        for members, places in parts:
            if lost := set(places).difference(members.names):
                raise MissingError(f"`{title}` lacks {len(lost):,} of its pictures, as `{min(lost)}`")
            rows = {}
            for name in sorted(places):
                split, label = places[name]
                names = self.names.setdefault(split, [])
                rows[name] = split, len(names)
                names.append(name)
                self._labels.setdefault(split, []).append(label)
            self._parts.append((members, rows))
        self.counts = {split: len(names) for split, names in self.names.items()}

    def labels(self) -> dict[str, np.ndarray]:
        """By split: int64 [N], or uint8 [N, K] (multi-label)."""
        return {
            split: np.asarray(rows, np.uint8 if isinstance(rows[0], np.ndarray) else np.int64)
            for split, rows in self._labels.items()
        }

    def blocks(self, other: Mapping[str, str] | None = None) -> Blocks:
        """The pictures as blocks, or in their places the other pictures whose names `other` gives."""

        def blocks() -> Iterator[Block]:
            for members, rows in self._parts:
                places: dict[str, list[tuple[str, int]]] = {}  # several images may share another picture
                for name, place in rows.items():
                    places.setdefault(name if other is None else other[name], []).append(place)
                for name, data in members.read(list(places)):
                    yield from (Block(*place, data, name) for place in places[name])

        return blocks

    def spans(self) -> dict[str, list[Span]]:
        """By split, the places of the pictures' bytes."""
        spans: dict[str, list[Any]] = {split: [None] * n for split, n in self.counts.items()}
        for members, rows in self._parts:
            of_members = members.spans()
            for name, (split, i) in rows.items():
                spans[split][i] = of_members[name]
        return spans

    def probe(self) -> Iterator[tuple[str, bytes]]:
        """A few pictures of the first part, evenly apart."""
        members, rows = self._parts[0]
        names = list(rows)
        return members.read(names[:: max(1, len(names) // PROBES)][:PROBES])
