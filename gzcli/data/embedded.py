"""The sets that need no download: made here of scikit-learn's digits and its two sample photographs, or in
`glyphs.py` and `shapes.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from gzcli.data.readers.raw_images import Block, RawImages
from gzcli.data.sets.glyphs import glyphs
from gzcli.data.sets.shapes import shapes, shapes_factors
from gzcli.data.sets.specs import DataSpec

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(spec: DataSpec) -> RawImages:
    """1,797 digits, 8×8 with 17 levels, each pixel doubled; the last fifth of each class is the test
    split."""
    return _raw(spec, *_digits())


def digits_ab(spec: DataSpec) -> RawImages:
    """Two unpaired domains: every other digit as it is (A, white on black), the rest inverted (B, black on
    white)."""
    images, _ = _digits()
    for split, x in images.items():
        images[split] = np.where((np.arange(len(x)) % 2 == 1)[:, None, None, None], 255 - x, x)
    return _raw(spec, images, {split: np.arange(len(x)) % 2 for split, x in images.items()})


def digits_captioned(spec: DataSpec) -> RawImages:
    """Digits with a caption such as `a handwritten seven`."""
    images, labels = _digits()
    captions = {split: [f"a handwritten {_WORDS[i]}" for i in y] for split, y in labels.items()}
    return replace(_raw(spec, images, labels), captions=captions)


_EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of one digit, uint8 [1, 16, 16]
    "invert the colours": lambda x: 255 - x,
    "mirror it": lambda x: x[..., ::-1],
    "turn it upside down": lambda x: x[..., ::-1, ::-1],
    "make it bold": lambda x: _neighbours(x).max(0),
    "make it thin": lambda x: _neighbours(x).min(0),
    "make it smaller": lambda x: np.pad(x[..., ::2, ::2], ((0, 0), (4, 4), (4, 4))),
}


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Each pixel and the four beside it, [5, 1, 16, 16]; beyond the edge all is black."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    return np.stack(
        [padded[:, 1 + i : 17 + i, 1 + j : 17 + j] for i, j in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))]
    )


def digits_edited(spec: DataSpec) -> RawImages:
    """Digits that are changed as their captions say, by the instructions in turn; `before` are the unchanged
    digits."""
    before, labels = _digits()
    edits = list(_EDITS.items())
    chosen = {split: [edits[i % len(edits)] for i in range(len(x))] for split, x in before.items()}
    after = {
        split: np.stack([edit(x) for x, (_, edit) in zip(before[split], chosen[split], strict=True)])
        for split in before
    }
    captions = {split: [words for words, _ in rows] for split, rows in chosen.items()}
    further = {"before": _raw(spec, before, labels).blocks}
    return replace(_raw(spec, after, labels), captions=captions, further=further)


def patches(spec: DataSpec) -> RawImages:
    """32×32 patches: the left of each photograph (overlapping by half) is train, a strip beside it
    validation, the right fifth test; no two splits share a pixel."""
    from sklearn.datasets import load_sample_images

    side, images, labels = 32, {}, {}
    columns = {"train": range(0, 385, 16), "val": range(416, 481, 32), "test": range(512, 609, 32)}
    for split, lefts in columns.items():
        tops = range(0, 427 - side + 1, 16 if split == "train" else 32)
        cut = [
            [photo[y : y + side, x : x + side].transpose(2, 0, 1) for y in tops for x in lefts]
            for photo in load_sample_images().images  # uint8 [427, 640, 3]: china, flower
        ]
        images[split] = np.concatenate([np.stack(c) for c in cut])
        labels[split] = np.repeat(np.arange(2), len(cut[0]))
    return _raw(spec, images, labels)


MAKERS: dict[str, Callable[[DataSpec], RawImages]] = {
    "digits": digits,
    "digits-ab": digits_ab,
    "digits-captioned": digits_captioned,
    "digits-edited": digits_edited,
    "glyphs": glyphs,
    "patches": patches,
    "shapes": shapes,
    "shapes-factors": shapes_factors,
}


def _digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Level k of 17 is stored as the byte nearest to 255 k / 16, which (byte · 17) >> 8 takes back to k.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)[:, None]
    rank = np.empty(len(bunch.target), np.int64)  # position of an image within its class
    size = np.bincount(bunch.target)[bunch.target]
    for label in range(10):
        rank[bunch.target == label] = np.arange((bunch.target == label).sum())
    test = rank >= size - size // 5
    rows = {"train": ~test, "test": test}
    return {s: pixels[r] for s, r in rows.items()}, {
        s: bunch.target[r].astype(np.int64) for s, r in rows.items()
    }


def _raw(spec: DataSpec, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> RawImages:
    def blocks() -> Iterator[Block]:
        for split, x in images.items():
            yield Block(split, 0, x, split)

    counts = {split: len(x) for split, x in images.items()}
    return RawImages(
        spec.title, spec.class_names, counts, labels, blocks, shape=spec.shape, levels=spec.levels
    )
