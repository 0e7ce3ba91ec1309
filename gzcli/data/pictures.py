"""Decodes pictures to uint8 [C, H, W], by the same rules for every set."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from gzcli.data.forms import Decoding
from gzcli.data.kinds import FORMATS
from gzcli.errors import GzError, MissingError, UsageError

ORIENTATION = 0x0112  # number of this EXIF tag; its values 5 … 8 are quarter turns


def opened(data: bytes) -> Any:
    """An encoded picture as Pillow's image, by the readers of `kinds.FORMATS` alone."""
    from PIL import Image

    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def decode(data: bytes, name: str, how: Decoding) -> tuple[np.ndarray, bool]:
    """An encoded picture as uint8 [C, H, W], and whether it had another size.

    EXIF rotation is applied; transparency is laid over white; palettes become RGB; 16-bit grey is divided by
    257; RGB → grey is ITU-R 601 luma; of several frames the first is taken.

    data: the file's bytes.
    name: what messages call it.
    how: size, channels and the rule of resizing.

    Raises MissingError if it does not decode, UsageError if it has colour though only grey may come.
    """
    from PIL import ImageOps

    resized = False
    try:
        with opened(data) as image:
            image = plain(ImageOps.exif_transpose(image))
            if how.grey_only and is_colour(image):
                hint = "`--set data.channels=3` keeps the colours, `--set data.channels=1` drops them"
                raise UsageError(f"`{name}` has colour, the first images have none", hint=hint)
            image = image.convert("L" if how.channels == 1 else "RGB")
            if how.size and image.size != (how.size, how.size):
                image, resized = RULES[how.rule](image, how.size), True
            pixels = _pixels(image)
    except GzError:
        raise
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, …
        raise undecodable(name, e) from e
    return pixels, resized


def look(data: bytes, name: str) -> tuple[int, int, bool]:
    """Height and width of an encoded picture, and whether it has colour. Raises MissingError if it does not
    decode."""
    from PIL import ImageOps

    try:
        with opened(data) as image:
            image = plain(ImageOps.exif_transpose(image))
            return image.height, image.width, is_colour(image)
    except Exception as e:  # as in `decode`
        raise undecodable(name, e) from e


def sides_of(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded picture that decodes, as it is seen: after its EXIF rotation. Reads its
    header alone."""
    with opened(data) as image:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def fit_array(images: np.ndarray, want: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, C, H, W] in another size or number of channels, by the rules of `decode`."""
    from PIL import Image

    if images.shape[1:] == want:
        return images
    out = np.empty((len(images), *want), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(
            pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        )
        image = image.convert("L" if want[0] == 1 else "RGB")
        out[i] = _pixels(image if image.size == (want[2], want[1]) else lanczos(image, want[1]))
    return out


def plain(image: Any) -> Any:
    """A picture of Pillow's as L or RGB of 8 bits, without transparency."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no known range")
        return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def is_colour(image: Any) -> bool:
    """Whether any pixel of a picture (L or RGB) has colour."""
    if image.mode == "L":
        return False
    r, g, b = (np.asarray(c) for c in image.split())
    return bool((r != g).any() or (g != b).any())


def undecodable(name: str, e: Exception) -> MissingError:
    """The error for a picture that does not decode."""
    what = str(e) if "cannot identify" not in str(e) else "not a picture that can be read"
    return MissingError(
        f"`{name}` does not decode: {what or type(e).__name__}", hint="replace it or take it out"
    )


def lanczos(image: Any, size: int) -> Any:
    """The middle square of a picture, resized by Lanczos' filter with antialiasing."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def adm(image: Any, size: int) -> Any:
    """ImageNet's crop in the diffusion literature (Dhariwal & Nichol 2021, arXiv:2105.05233): halved by box
    averages while it is at least twice too large, then the shorter side brought to `size` by bicubic
    interpolation, then the middle square."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


RULES = {"lanczos": lanczos, "adm": adm}  # how a picture is cropped and resized, by `Decoding.rule`


def _pixels(image: Any) -> np.ndarray:
    """A picture (L or RGB) as uint8 [C, H, W]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
