"""The form in which a recipe wants the images of its set. No heavy import."""

from __future__ import annotations

from typing import TypedDict

from gzcli.sections import DataSection, Fit, Size


class Wanted(TypedDict):
    """Keywords of `open_pack` and `peek`.

    size: of the images; None: the set's own.
    channels: 1 or 3; None: the set's own.
    fit: how pictures of another shape come to the size.
    """

    size: Size | None
    channels: int | None
    fit: Fit


def wanted(data: DataSection) -> Wanted:
    """What the section `data` of a recipe says of the form of the images."""
    return Wanted(size=data.size, channels=data.channels, fit=data.fit)
