"""The images of a set before they are packed: readers return them, and `build` packs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gzcli.data.sets.specs import DataSpec


class Block(NamedTuple):
    """Some images that follow one another in an official split.

    split: "train", "val" or "test".
    start: number of the first image in the split.
    data: uint8 [n, C, H, W], or one encoded picture.
    name: file that held it, for messages.
    """

    split: str
    start: int
    data: np.ndarray | bytes
    name: str


class Span(NamedTuple):
    """Where the bytes of an encoded picture lie, to be read without opening the archive.

    path: absolute, of the file that holds them.
    offset: bytes before them.
    length: bytes as they lie there.
    deflated: whether they are a raw deflate stream.
    """

    path: str
    offset: int
    length: int
    deflated: bool


Blocks = Callable[[], Iterator[Block]]


@dataclass
class RawImages:
    """The images of a set: labels and counts at once, pixels as blocks one after another.

    title: what messages call it.
    classes: names of the classes; () without labels.
    counts: images of the official splits: train, and val and test where there are.
    labels: by split, int64 [N], or uint8 [N, K] where an image may have any number of the classes; {}
      without.
    blocks: the images, each once.
    shape: (C, H, W) where every block is an array of it; None where they are encoded pictures.
    probe: a few encoded pictures (name, bytes) that tell size and channels; without it and `shape` these must
      be asked for.
    spans: by split, where each encoded picture lies; without it the set cannot be streamed.
    levels: grey levels, 2 … 256.
    captions: by split, a text for each image; {} without.
    names: by split, what each of the user's pictures is called at its path; {} without.
    further: other pictures of each image by their kind (`conditions.FURTHER`), as blocks in the same places.
    rule: how pictures are resized, as in `forms.Decoding`.
    notes: what was left out of the set, and why.
    """

    title: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    labels: dict[str, np.ndarray]
    blocks: Blocks
    shape: tuple[int, int, int] | None = None
    probe: Callable[[], Iterator[tuple[str, bytes]]] | None = None
    spans: Callable[[], dict[str, list[Span]]] | None = None
    levels: int = 256
    captions: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    further: dict[str, Blocks] = field(default_factory=dict)
    rule: str = "lanczos"
    notes: list[str] = field(default_factory=list)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have any number of the classes."""
        return any(labels.ndim == 2 for labels in self.labels.values())


def in_arrays(spec: DataSpec, images: np.ndarray, labels: np.ndarray) -> RawImages:
    """The images of a set that is made in memory: the last `n_test` are its test split.

    spec: the set.
    images: uint8 [n_train + n_test, C, H, W].
    labels: of each image, int64 [N] or uint8 [N, K].
    """
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
