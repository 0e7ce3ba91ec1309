"""The form in which a recipe wants the images of its set. No heavy import."""

from __future__ import annotations

from typing import TypedDict

from gzcli.core.sections import DataSection, Fit
from gzcli.core.units import Size
from gzcli.data.packs.augment import patch_of


class Wanted(TypedDict):
    """Keywords of `open_pack` and `peek`.

    size: of the images; None: the set's own.
    channels: 1 or 3; None: the set's own.
    fit: how pictures of another shape come to the size.
    patch: side of the patches of the images that are used; None: whole images are.
    """

    size: Size | None
    channels: int | None
    fit: Fit
    patch: int | None


def wanted(data: DataSection) -> Wanted:
    """What the section `data` of a recipe says of the form of the images. Raises UsageError for an
    augmentation that there is not."""
    return Wanted(size=data.size, channels=data.channels, fit=data.fit, patch=patch_of(data.augment))


def size_of(data: DataSection) -> Size | None:
    """The size of the images that a model sees: that of the patches, where it is trained on patches."""
    return patch_of(data.augment) or data.size
