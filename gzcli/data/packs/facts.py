"""The facts of a set that determine the settings of models: its shape class, and whether it has few images.
The facts of known sets are declared. The user's own images are measured once, when they are packed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from gzcli.core.errors import MissingError
from gzcli.data.sets.registry import SPECS

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.readers.images import RawImages

# Shape classes above 32 pixels, with the side up to which one reaches: the geometric mean of it and the next.
SHAPE_CLASSES = {"64px": 90, "128px": 181, "256px": math.inf}
MAX_SMALL_SIDE = 45  # the side up to which images are in the class `grey` or `colour`
SHAPES = ("grey", "colour", *SHAPE_CLASSES)
FEW_IMAGES, MAX_FEW_IMAGES = (
    "few",
    5_000,
)  # the section of small sets, and the training images up to which a set is one
LOOKED_AT = 64  # images that are measured
ONE_CHANNEL = "to train on one channel instead of three, use `--set data.channels=1`"


@dataclass(frozen=True)
class Facts:
    """The facts of a set that determine its settings."""

    height: int  # side of an image in pixels
    width: int  # side of an image in pixels
    channels: int  # channels: 1 or 3, or those of the values
    n: int  # number of training images
    grey: bool = False  # whether the images are grey and stored as colour
    classes: int | None = None  # number of classes; 0: no labels, None: not known
    multilabel: bool = False  # whether an image may have any number of the classes
    extras: tuple[str, ...] = ()  # extras of each image, from EXTRAS
    name: str = ""  # of the set
    levels: int | None = 256  # grey levels; None: real numbers
    valued: bool = False  # whether they are not 8-bit images

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def shape_class(self) -> str:
        """The name of the set's shape class, a key of SHAPES."""
        side = math.sqrt(self.height * self.width)
        if side <= MAX_SMALL_SIDE:
            return "colour" if self.channels > 1 and not self.grey else "grey"
        return next(name for name, most in SHAPE_CLASSES.items() if side <= most)

    @property
    def traits(self) -> tuple[str, ...]:
        """The sections of settings for the set, in addition to its shape class."""
        return (FEW_IMAGES,) if self.n <= MAX_FEW_IMAGES else ()

    @property
    def words(self) -> str:
        """The facts in words: `1,600 colour training images of 64×64, few`."""
        kind = "grey" if self.channels == 1 else "grey (stored as colour)" if self.grey else "colour"
        kind = kind if self.channels in (1, 3) else f"{self.channels}-channel"
        return ", ".join([f"{self.n:,} {kind} training images of {self.width}×{self.height}", *self.traits])


def settings_lines(facts: Facts | None) -> list[str]:
    """Lines on the facts of a set and the settings that they select; [] for an embedded set or unknown
    facts."""
    if facts is None or (facts.name in SPECS and SPECS[facts.name].embedded):
        return []
    settings = " ".join((facts.shape_class, *facts.traits))
    lines = [f"{facts.words}; models use their settings for `{settings}`"]
    if facts.grey:
        lines.append(ONE_CHANNEL)
    return lines


def measure(images: RawImages) -> Facts | None:
    """The facts of images before packing, measured on a few of them; None if none can be read."""
    import numpy as np

    from gzcli.data.packs.build import rows_of, split_plan

    looked_at = list(_few_of(images))
    if not looked_at:
        return None
    pixels = np.concatenate([image.reshape(image.shape[0], -1) for image in looked_at], 1)  # [C, pixels]
    _, height, width = looked_at[0].shape
    grey = bool((pixels == pixels[:1]).all())
    # encoded images without colour are packed as grey, arrays as they are
    channels = images.shape[0] if images.shape else 1 if grey else 3
    n = rows_of(split_plan(images.title, images.counts))["train"]
    grey = channels == 3 and grey
    labels = (len(images.classes), images.multilabel)
    facts = Facts(height, width, channels, n, grey, *labels, images.extras)
    return replace(facts, levels=images.values.levels, valued=True) if images.values else facts


def _few_of(images: RawImages) -> Iterator[np.ndarray]:
    """The first `LOOKED_AT` images of arrays, or a few encoded images: [C, H, W]."""
    import numpy as np

    if images.probe is None:
        blocks = (block.data for block in images.blocks() if isinstance(block.data, np.ndarray))
        yield from islice(chain.from_iterable(blocks), LOOKED_AT)
        return
    from gzcli.data.readers.pictures import Decoding, decode

    for name, data in images.probe():
        with contextlib.suppress(MissingError):  # packing names those that do not decode
            yield decode(data, name, Decoding(None, 3))[0]
