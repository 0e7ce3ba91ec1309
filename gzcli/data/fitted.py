"""Brings blocks of images to the shape in which they are packed. Worker processes import this module, so it
does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.forms import Decoding
from gzcli.data.readers.pictures import decode, fit_array, sides_of, undecodable
from gzcli.data.readers.raw_images import Block, RawImages

Sides = dict[str, np.ndarray]  # by official split: int32 [N, 2], width and height that each image had


class Fitted(NamedTuple):
    """A block in the shape in which it is packed.

    split: official split.
    start: number of the first image in it.
    images: uint8 [n, C, H, W], or why there is none.
    resized: whether its size was changed.
    sides: (width, height) that it had, in pixels; (0, 0) where they were not measured.
    name: file that held it, for messages.
    notes: choices that its reading needed, as `pictures.decode` notes them.
    """

    split: str
    start: int
    images: np.ndarray | MissingError
    resized: bool
    sides: tuple[int, int]
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The function block → Fitted, which can be pickled.

    title: what messages call the set.
    shape: (C, H, W) that is wanted.
    how: how encoded pictures are decoded.
    hint: what to do about pictures of mixed sizes.
    measured: whether the sides that a picture had are measured.
    """

    title: str
    shape: tuple[int, int, int]
    how: Decoding
    hint: str
    measured: bool

    def __call__(self, block: Block) -> Fitted:
        split, start, data, name = block
        if not isinstance(data, bytes):
            height, width = data.shape[2:]
            resized = (height, width) != self.shape[1:]
            return Fitted(
                split, start, fit_array(data, self.shape, self.how.fit), resized, (width, height), name
            )
        notes: list[str] = []
        try:
            image, resized = decode(data, name, self.how, notes.append)
        except MissingError as e:
            return Fitted(split, start, e, False, (0, 0), name)
        if image.shape != self.shape:
            (_, h, w), (_, h0, w0) = image.shape, self.shape
            message = f"the images of `{self.title}` have mixed sizes: `{name}` is {w}×{h}"
            raise UsageError(f"{message}, others are {w0}×{h0}", hint=self.hint)
        sides = sides_of(data) if self.measured else (0, 0)
        return Fitted(split, start, image[None], resized, sides, name, tuple(notes))


def sides_in(images: RawImages) -> Sides:
    """The sides of encoded pictures, read from their headers. Raises MissingError for one that does not
    decode."""
    had: Sides = {split: np.zeros((n, 2), np.int32) for split, n in images.counts.items()}
    for split, start, data, name in images.blocks():
        assert isinstance(data, bytes)
        try:
            had[split][start] = sides_of(data)
        except Exception as e:  # as in `decode`
            raise undecodable(name, e) from e
    return had


def measured(fitted: Iterator[Fitted], sides: Sides) -> Iterator[Fitted]:
    """Passes blocks of images on and notes the sides that they had in `sides`."""
    for one in fitted:
        if not isinstance(one.images, MissingError):
            sides[one.split][one.start : one.start + len(one.images)] = one.sides
        yield one


def alike(fitted: Iterator[Fitted], sides: Sides) -> Iterator[Fitted]:
    """Passes blocks of further pictures on, which must have the shape of their images: pictures of another
    shape would be cropped to another place.

    sides: those of the images.

    Raises UsageError.
    """
    for one in fitted:
        if not isinstance(one.images, MissingError):
            (w, h), (w0, h0) = one.sides, sides[one.split][one.start].tolist()
            if w0 and h0:  # else the image did not decode
                slack = max(0.02, 1 / min(w, h, w0, h0))  # a pixel may be lost to rounding
                if abs(w * h0 / (h * w0) - 1) > slack:
                    raise UsageError(
                        f"`{one.name}` is {w}×{h}, and its image {w0}×{h0}: another shape",
                        hint="crop both alike, before they become a set",
                    )
        yield one
