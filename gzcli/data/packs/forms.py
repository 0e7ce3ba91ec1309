"""Options of how the images of a set are read, packed and decoded, and callbacks. No heavy import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gzcli.core.sections import Fit
from gzcli.core.units import Size

Say = Callable[[str], None]  # say(text): a line for the user
Report = Callable[[int, int], None]  # report(done, in all), of images or bytes


def silent(text: str) -> None:
    """A `say` that prints nothing."""


def unreported(done: int, total: int) -> None:
    """A `report` that shows nothing."""


@dataclass(frozen=True)
class Form:
    """How the images of a set are read and packed.

    size: to which the images are resized; None: as they are.
    channels: 1 (grey) or 3 (RGB) to which they are converted; None: as they are.
    skip_bad: whether pictures that do not decode are left out; if not, they are an error.
    layout: what the folders of pictures mean, of `layout.LAYOUTS`; None: what their names say.
    foreign: whether the images are scored only: one split `test`, in whatever folders, without classes.
    fit: how pictures of another shape come to the size.
    mixed: whether the images may have any sizes, as patches of them are used.
    """

    size: Size | None = None
    channels: int | None = None
    skip_bad: bool = False
    layout: str | None = None
    foreign: bool = False
    fit: Fit = "crop"
    mixed: bool = False

    def asked(
        self, size: Size | None, channels: int | None, fit: Fit = "crop", patch: int | None = None
    ) -> Form:
        """This form with the size, channels and fit asked for, where any are.

        patch: side of the patches that are used; None: whole images are.
        """
        form = replace(self, size=size or self.size, channels=channels or self.channels, fit=fit)
        return replace(form, mixed=patch is not None and form.size is None)


@dataclass(frozen=True)
class Decoding:
    """How an encoded picture becomes an array uint8 [channels, height, width].

    size: to which the picture is resized; None: it keeps its height and width.
    channels: 1 (grey) or 3 (RGB).
    grey_only: whether a picture with colour is an error.
    rule: by which a picture is cropped and resized: "lanczos", or "adm", ImageNet's in the diffusion
      literature (`pictures.adm`).
    fit: how a picture of another shape comes to the size.
    """

    size: Size | None
    channels: int
    grey_only: bool = False
    rule: str = "lanczos"
    fit: Fit = "crop"
