"""Sets of encoded pictures: the members of archives, with the split and label of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gzcli.core.errors import MissingError
from gzcli.data.readers.archives import Members
from gzcli.data.readers.raw_images import Block, Blocks, RawImages, Span

PROBES = 16  # pictures by which size and channels of a set are found

Place = tuple[str, Any]  # official split; label: a class's number, 0/1 for each class (multi-label), or None
PlacedMembers = tuple[Members, Mapping[str, Place]]  # an archive, and the place of each member that is used


def encoded(title: str, classes: Sequence[str], parts: Sequence[PlacedMembers]) -> RawImages:
    """The pictures of `parts` that have a place. Their size and channels must be asked for.

    title: what messages call the set.
    classes: names of the classes; empty without labels.
    parts: archives with the places of their members.

    Raises MissingError where a picture with a place is not among the members.
    """
    images = Encoded(title, parts)
    labels = images.labels() if classes else {}
    return RawImages(title, tuple(classes), images.counts, labels, images.blocks(), spans=images.spans)


class Encoded:
    """The pictures of `parts` that have a place, numbered in each split in the order of part and name.

    title: what messages call the set.
    parts: archives with the places of their members.

    Raises MissingError where a picture with a place is not among the members.
    """

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
        """The pictures as blocks.

        other: names of other pictures by those of the images, which are then read in their place.
        """

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
