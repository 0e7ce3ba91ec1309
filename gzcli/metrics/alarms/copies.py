"""Copies of an image: images with the same pixels. An image that calibrates must not be a copy of one that
was used for fitting, because its score would be too low."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import numpy as np

from gzcli.core.units import counted


def hashes(images: Iterable[np.ndarray]) -> list[bytes]:
    """A hash of the pixels of each image."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def originals(images: Iterable[bytes], used: Collection[bytes] = ()) -> np.ndarray:
    """The positions, in ascending order, of the images that are copies neither of an earlier image nor of one
    of those used. All images are given by their hashes."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(images):
        if key not in used:
            first.setdefault(key, i)
    return np.array(list(first.values()), np.int64)


def in_words(n: int, title: str, *, fitting: bool) -> str:
    """A note on n images of a set that are left out. fitting: whether they may be copies of images for
    fitting."""
    kinds = ("a copy of another one", " or of an image") if n == 1 else ("copies of others", " or of images")
    what = kinds[0] + (f"{kinds[1]} for fitting" if fitting else "")
    return f"{counted(n, 'image')} of `{title}` left out, as {what}"
