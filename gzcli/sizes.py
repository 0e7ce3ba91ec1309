"""Sizes of images in pixels: a side, `64`, or width and height, `48x32`, as programs for pictures have it."""

from __future__ import annotations

import re
from typing import TypeAlias

from gzcli.core.errors import UsageError

Size: TypeAlias = int | str  # as `as_size` writes it

SIDES = range(4, 1025)  # pixels a side of images that are packed
WORDS = "a number of pixels, or width and height as `48x32`"


def sides(size: Size) -> tuple[int, int]:
    """Height and width in pixels of a size. Raises UsageError for another text."""
    if isinstance(size, int):
        return size, size
    found = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", size, re.ASCII)
    if not found:
        raise UsageError(f"`data.size` is {WORDS}, not `{size}`", hint=f"`--set data.size={nearest(size)}`")
    return int(found[2] or found[1]), int(found[1])


def nearest(text: str) -> Size:
    """The size that a text probably means: that of the numbers in it."""
    found = [int(digits) for digits in re.findall(r"\d+", text) if int(digits)]
    return as_size(found[1], found[0]) if len(found) == 2 else found[0] if len(found) == 1 else "48x32"


def as_size(height: int, width: int) -> Size:
    """The size of these sides; `sides` reads it back."""
    return height if height == width else f"{width}x{height}"


def canonical_size(size: Size) -> Size:
    """A size written as `as_size` writes it: `64` for `64x64`. Raises UsageError for what is none."""
    return as_size(*sides(size))


def packable(size: Size) -> Size:
    """A size of images that may be packed, as `as_size` writes it. Raises UsageError for what is none."""
    if not all(side in SIDES for side in sides(size)):
        message = f"`data.size` is between {SIDES[0]} and {SIDES[-1]} pixels a side, not {size}"
        raise UsageError(message, hint="`--set data.size=64`")
    return canonical_size(size)
