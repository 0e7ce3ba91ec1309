"""Sets of encoded pictures: archives and what is known of their members, as a source to pack or stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gzcli.data.archives import Members, Span
from gzcli.data.build import Block, Source
from gzcli.errors import MissingError

PROBES = 16

Place = tuple[
    str, Any
]  # official split, label: the class's number, 0 or 1 for each class (multi-label), or None
Part = tuple[Members, Mapping[str, Place]]


def encoded(
    title: str,
    classes: Sequence[str],
    parts: Sequence[Part],
    *,
    captions: Mapping[str, str] | None = None,
    further: Mapping[str, Mapping[str, str]] | None = None,
    multilabel: bool = False,
    probe: bool = False,
    named: bool = False,
    rule: str = "lanczos",
) -> Source:
    """The pictures of `parts` that have a place, in order of part and name. Without `probe` the packer must
    be told their size and channels. `named` ones keep the pictures' names. `further`: for each kind of
    further picture, its name among the members by that of the image. Raises MissingError where a picture with
    a place is not among them."""
    rows: list[dict[str, tuple[str, int]]] = []
    labels: dict[str, list[Any]] = {}
    texts: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for members, places in parts:
        if lost := set(places).difference(members.names):
            raise MissingError(f"`{title}` lacks {len(lost):,} of its pictures, as `{min(lost)}`")
        rows.append({})
        for name in sorted(places):
            split, label = places[name]
            rows[-1][name] = split, counts.get(split, 0)
            counts[split] = counts.get(split, 0) + 1
            labels.setdefault(split, []).append(label)
            texts.setdefault(split, []).append((captions or {}).get(name, ""))

    def blocks() -> Iterator[Block]:
        for (members, _), row in zip(parts, rows, strict=True):
            for name, data in members.read(list(row)):
                yield *row[name], data, name

    def blocks_of(names: Mapping[str, str]) -> Callable[[], Iterator[Block]]:
        def blocks() -> Iterator[Block]:
            for (members, _), row in zip(parts, rows, strict=True):
                places: dict[str, list[tuple[str, int]]] = {}  # several images may share a picture
                for name, place in row.items():
                    places.setdefault(names[name], []).append(place)
                for name, data in members.read(list(places)):
                    yield from ((*place, data, name) for place in places[name])

        return blocks

    def spans() -> dict[str, list[Span]]:
        found: dict[str, list[Any]] = {split: [None] * n for split, n in counts.items()}
        for (members, _), row in zip(parts, rows, strict=True):
            where = members.spans()
            for name, (split, i) in row.items():
                found[split][i] = where[name]
        return found

    def some() -> Iterator[tuple[str, bytes]]:
        members, row = parts[0][0], list(rows[0])
        return members.read(row[:: max(1, len(row) // PROBES)][:PROBES])

    kind = np.uint8 if multilabel else np.int64
    arrays = {split: np.asarray(y, kind) for split, y in labels.items()} if classes else {}
    names: dict[str, list[str]] = {split: [] for split in counts} if named else {}
    for row in rows if named else ():
        for name, (split, _) in row.items():
            names[split].append(name)
    return Source(
        title,
        tuple(classes),
        counts,
        arrays,
        blocks,
        probe=some if probe else None,
        spans=spans,
        names=names,
        multilabel=multilabel,
        captions=texts if captions else {},
        rule=rule,
        further={kind: blocks_of(names) for kind, names in (further or {}).items()},
    )
