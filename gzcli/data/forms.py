"""Options of how the images of a set are read, packed and decoded, and callbacks. No heavy import."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from gzcli.errors import UsageError

Say = Callable[[str], None]  # say(text): a line for the user
Report = Callable[[int, int], None]  # report(done, in all), of images or bytes


def silent(text: str) -> None:
    """A `say` that prints nothing."""


def unreported(done: int, total: int) -> None:
    """A `report` that shows nothing."""


def number(variable: str, unit: str) -> int | None:
    """The whole number in an environment variable; None where it is not set. Raises UsageError for a text.

    unit: of the number, for the message.
    """
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise UsageError(f"`{variable}` is a number of {unit}, not `{text}`")
    return int(text) if text else None


def sides(size: int | str) -> tuple[int, int]:
    """Height and width in pixels of a size: `64`, or `48x32`, width first as programs for pictures have it.

    Raises UsageError for another text.
    """
    if isinstance(size, int):
        return size, size
    width, x, height = size.lower().partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise UsageError(
            f"`data.size` is a number of pixels, or width and height as `48x32`, not `{size}`",
            hint="--set data.size=48x32",
        )
    return int(height), int(width)


def as_size(height: int, width: int) -> int | str:
    """The size of these sides, as `data.size` has it; `sides` reads it back."""
    return height if height == width else f"{width}x{height}"


@dataclass(frozen=True)
class Form:
    """How the images of a set are read and packed.

    size: pixels a side to which the images are resized; None: as they are.
    channels: 1 (grey) or 3 (RGB) to which they are converted; None: as they are.
    skip_bad: whether pictures that do not decode are left out; if not, they are an error.
    layout: what the folders of pictures mean, of `layout.LAYOUTS`; None: what their names say.
    foreign: whether the images are scored only: one split `test`, in whatever folders, without classes.
    """

    size: int | None = None
    channels: int | None = None
    skip_bad: bool = False
    layout: str | None = None
    foreign: bool = False

    def asked(self, size: int | None, channels: int | None) -> Form:
        """This form with the size and channels asked for, where any are."""
        return replace(self, size=size or self.size, channels=channels or self.channels)


@dataclass(frozen=True)
class Decoding:
    """How an encoded picture becomes an array uint8 [channels, size, size].

    size: pixels a side; None: the picture keeps its height and width.
    channels: 1 (grey) or 3 (RGB).
    grey_only: whether a picture with colour is an error.
    rule: "lanczos" crops the middle to a square and resizes it; "adm" is ImageNet's in the diffusion
      literature (`pictures.adm`).
    """

    size: int | None
    channels: int
    grey_only: bool = False
    rule: str = "lanczos"
