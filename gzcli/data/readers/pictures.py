"""Decodes images to uint8 [C, H, W], by the same rules for every set."""

from __future__ import annotations

import io
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gzcli.core.errors import GzError, MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, counted, sides
from gzcli.data.readers.images import PILLOW_FORMATS, Content, bytes_in, refuse_exhausted
from gzcli.store.png import picture_of

ORIENTATION = 0x0112  # number of this EXIF tag; its values 5 … 8 are quarter turns
BITS = 258  # number of TIFF's tag of the bits of a value
SIDE_TAGS = (256, 257)  # numbers of TIFF's tags of the width and the height
MAX_12_BIT = 4095  # largest value of 12 bits
HEIC_HEADER = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)  # how a photo of many phones begins
FRAMES = ("GIF", "WEBP", "PNG")  # formats of animations
FAINT_GREY = 240  # grey level from which ink is invisible on white


CROPPED = "cropped to {}, which cuts away {} %"
CROP = re.compile(CROPPED.format("(.+)", r"(\d+)"))
CROP_PERCENT = 5  # per cent: a smaller crop is not reported, and shares are rounded to it


@dataclass(frozen=True)
class Decoding:
    """How an encoded image becomes an array uint8 [channels, height, width]."""

    size: Size | None  # size after resizing; None: unchanged
    channels: int  # 1 (grey) or 3 (RGB)
    grey_only: bool = False  # whether an image with colour is an error
    rule: str = "lanczos"  # rule of cropping and resizing: "lanczos", or "adm" (see `adm`)
    fit: Fit = "crop"  # how an image of another shape is resized; "aspect": like "crop"
    bucketed: bool = False  # whether the size is that of the image's `bucket`


def decode(data: Content, name: str, decoding: Decoding, note: Say = silent) -> tuple[np.ndarray, bool]:
    """An encoded image as uint8 [C, H, W], and whether it had another size. `note` is called with each choice
    made in reading it, for `notes_in_words`.

    EXIF rotation is applied; transparency is placed on white, or on black if the image would be white on
    white; palettes become RGB; grey of more than 8 bits is scaled from the range of `white_of`; RGB → grey is
    ITU-R 601 luma; only the first of several frames is read.

    Raises MissingError if it does not decode, UsageError if it has colour although only grey is allowed.
    """
    try:
        image = _plain(bytes_in(data), note)
        if decoding.grey_only and is_colour(image):
            hint = "use `--set data.channels=3` to keep the colours, or `--set data.channels=1` to drop them"
            raise UsageError(f"`{name}` has colours, but the first images are grey", hint=hint)
        height, width = sides(decoding.size) if decoding.size else (image.height, image.width)
        if decoding.bucketed:
            height, width = bucket((image.height, image.width), (height, width))
        resized = image.size != (width, height)
        if decoding.fit == "crop":
            for text in cropping((image.height, image.width), (height, width)):
                note(text)
        return _fitted(image, (decoding.channels, height, width), decoding.fit, decoding.rule), resized
    except GzError:
        raise
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, …
        raise undecodable(name, e, data) from e


def look(data: Content, name: str, note: Say = silent) -> tuple[int, int, bool]:
    """Height and width of an encoded image, and whether it has colour; `note` as in `decode`."""
    try:
        image = _plain(bytes_in(data), note)
        return image.height, image.width, is_colour(image)
    except Exception as e:  # as in `decode`
        raise undecodable(name, e, data) from e


def sides_of(data: Content) -> tuple[int, int]:
    """(width, height) of an encoded image after its EXIF rotation. Only the header is read."""
    with opened(data) as image:
        # some versions of Pillow turn the size of a TIFF already
        width, height = map(image.tag_v2.get, SIDE_TAGS) if image.format == "TIFF" else image.size
        return (height, width) if image.getexif().get(ORIENTATION) in (5, 6, 7, 8) else (width, height)


def upright(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Planes [..., H, W] after the rotation of their EXIF tag."""
    planes = planes.swapaxes(-1, -2) if orientation in (5, 6, 7, 8) else planes
    planes = planes[..., ::-1] if orientation in (2, 3, 6, 7) else planes
    return planes[..., ::-1, :] if orientation in (3, 4, 7, 8) else planes


def cropping(before: tuple[int, int], after: tuple[int, int]) -> tuple[str, ...]:
    """The note on the share of an image that a crop removes, if any; both shapes are (height, width)."""
    ratio = before[1] * after[0] / (before[0] * after[1])
    share = CROP_PERCENT * round(100 / CROP_PERCENT * (1 - min(ratio, 1 / ratio)))
    return (CROPPED.format(f"{after[1]}×{after[0]}", share),) if share else ()


def fit_array(images: np.ndarray, shape: tuple[int, int, int], fit: Fit) -> np.ndarray:
    """Images uint8 [n, C, H, W], converted to another size or number of channels by the rules of `decode`."""
    if images.shape[1:] == shape:
        return images
    out = np.empty((len(images), *shape), np.uint8)
    for i, image in enumerate(images):
        out[i] = _fitted(picture_of(image.transpose(1, 2, 0)), shape, fit)
    return out


def notes_in_words(notes: Iterable[str] | Mapping[str, int]) -> list[str]:
    """The counts of `decode`'s notes in words: `24 images of 12 bits, read as 0 … 4,095`. Crops to the same
    size are one note with the range of what they cut away."""
    words: Counter[str] = Counter()
    crops: dict[str, Counter[int]] = {}  # by size, how many images lose which share
    for note, n in Counter(notes).items():
        if crop := CROP.fullmatch(note):
            crops.setdefault(crop[1], Counter())[int(crop[2])] += n
        else:
            words[note] = n
    for size, shares in crops.items():
        n, low, high = shares.total(), min(shares), max(shares)
        share = f"{low}–{high}" if low < high else low
        words[f"{CROPPED.format(size, share)} of {'each' if n > 1 else 'it'}"] = n
    return [f"{counted(n, 'image')} {note}" for note, n in words.most_common()]


def is_crop(note: str) -> bool:
    """Whether a note of `notes_in_words` says that images are cropped."""
    return CROPPED.partition("{")[0] in note


def undecodable(name: str, e: Exception, data: Content) -> MissingError:
    """The error for an image that does not decode: that of reading its file if there is one."""
    refuse_exhausted(e)
    if isinstance(data, MissingError):
        return data
    reason = str(e) if "cannot identify" not in str(e) else "not a readable image"
    hint = "replace or remove it"
    if HEIC_HEADER.match(data):
        reason, hint = "it is in HEIC, whatever its name says", "convert it to JPEG or PNG"
    return MissingError(f"`{name}` cannot be decoded: {reason or type(e).__name__}", hint=hint)


def is_colour(image: Any) -> bool:
    """Whether any pixel of an image (L or RGB) has colour."""
    if image.mode == "L":
        return False
    r, g, b = (np.asarray(c) for c in image.split())
    return bool((r != g).any() or (g != b).any())


# --- any image as one of 8 bits, grey or RGB ---


def opened(data: Content) -> Any:
    """An encoded image as a Pillow image. Only PILLOW_FORMATS are accepted."""
    from PIL import Image

    Image.init()
    return Image.open(
        io.BytesIO(bytes_in(data)), formats=[name for name in PILLOW_FORMATS if name in Image.OPEN]
    )


def _plain(data: bytes, note: Say) -> Any:
    """An encoded image as L or RGB of 8 bits, without rotation and transparency."""
    from PIL import Image, ImageOps

    with opened(data) as encoded:
        white = white_of(encoded, data, note)
        if encoded.format in FRAMES and getattr(encoded, "is_animated", False):
            note("animated, of which the first frame is read")
        if encoded.mode == "CMYK":
            note("in CMYK, converted to RGB")
        image = ImageOps.exif_transpose(encoded)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > white:
            raise ValueError(f"the range of pixels of mode {image.mode} is unknown")
        return Image.fromarray(((pixels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _opaque(image.convert("RGBA"), note)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _opaque(image: Any, note: Say) -> Any:
    """An RGBA image placed on white, or on black if nothing would be visible on white."""
    from PIL import Image

    faintest, strongest = image.getchannel("A").getextrema()
    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if faintest == 255:
        return over
    if strongest and np.asarray(over).min() >= FAINT_GREY:
        note("in white on a transparent background, placed on black")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    note("with transparency, placed on white")
    return over


def white_of(image: Any, data: bytes, note: Say) -> int:
    """The value of white in an image of more than 8 bits.

    It is the largest value of the bits that the file declares (a TIFF in its tag, a PNG in its chunk sBIT).
    It is 65,535 if the values were scaled to 16 bits, as the PNG standard requires, or if nothing is
    declared. The largest value in the image is ignored, because dark and bright images of one set would
    otherwise look alike.
    """
    bits, most = 16, 65535
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS, (8,))[0]
    elif image.format == "PNG":
        bits = data[24]  # byte of the header, which comes first
    if not image.mode.startswith("I"):
        if bits == 16 and image.format in ("TIFF", "PNG"):
            note("of 16 bits, read as 0 … 65,535")
        return most
    pixels = np.asarray(image)
    if image.format == "PNG":
        bits = _significant(data)
        spare = (1 << 16 - bits) - 1
        bits = bits if pixels.max() < 1 << bits and (pixels & spare).any() else 16
    white = (1 << bits) - 1 if 8 < bits < 16 else most
    dark = ""
    if white == most and 0 < pixels.max() <= MAX_12_BIT:
        dark = (
            f": nearly black, as none has a value above {MAX_12_BIT:,} (where 4,095 is white, multiply by 16)"
        )
    note(f"of {bits if white < most else 16} bits, read as 0 … {white:,}{dark}")
    return white


def _significant(png: bytes) -> int:
    """The significant bits of a PNG's first channel, from its chunk sBIT; 16 if it is missing."""
    at = 8
    while at + 8 < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"sBIT":
            return min(max(png[at + 8], 1), 16)
        if kind == b"IDAT":
            break
        at += length + 12
    return 16


# --- to a size ---


def _fitted(image: Any, shape: tuple[int, int, int], fit: Fit, rule: str = "lanczos") -> np.ndarray:
    """An image (L or RGB) as uint8 of `shape`, resized by the rule `fit` of `data.fit`; crops follow
    `rule`."""
    from PIL import Image

    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        pass
    elif fit in ("crop", "aspect"):
        image = RULES[rule](image, height, width)
    elif fit == "stretch":
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    else:
        image = padded(image, height, width)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def bucket(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The height and width whose aspect ratio, within [1/2, 2], is closest to that of an image of `shape`.
    They are multiples of a step, and have as many pixels as possible but no more than `size`."""
    pixels = size[0] * size[1]
    step = min(64, max(16, 1 << math.isqrt(pixels).bit_length() - 4))  # an eighth of the side, or more
    longer = ((side, pixels // side // step * step) for side in range(step, math.isqrt(2 * pixels) + 1, step))
    buckets = [size, *(sides for a, b in longer for sides in ((a, b), (b, a)))]
    buckets = [(h, w) for h, w in buckets if h <= 2 * w and w <= 2 * h]
    return min(buckets, key=lambda b: abs(math.log(b[1] * shape[0] / (b[0] * shape[1]))))


def lanczos(image: Any, height: int, width: int) -> Any:
    """The largest central part with the requested aspect ratio, resized with an antialiased Lanczos
    filter."""
    from PIL import Image

    w = min(image.width, round(image.height * width / height))
    h = min(image.height, round(image.width * height / width))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    box = (left, top, left + max(1, w), top + max(1, h))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def adm(image: Any, height: int, width: int) -> Any:
    """ImageNet's crop in the diffusion literature (Dhariwal & Nichol 2021, arXiv:2105.05233). The image is
    halved by box averages while it is at least twice too large. Bicubic interpolation then resizes it to the
    smallest size that contains the requested one, and the middle is kept."""
    from PIL import Image

    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def padded(image: Any, height: int, width: int) -> Any:
    """The whole image, resized with a Lanczos filter until it fits, centred on the mean colour of its border.
    A flat background thus continues, and a model does not learn black bars from photographs."""
    from PIL import Image

    scale = min(height / image.height, width / image.width)
    w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize((w, h), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(h, w, -1).astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # [pixels, C]
    canvas = Image.new(image.mode, (width, height), tuple(int(c) for c in border.mean(0).round()))
    canvas.paste(image, ((width - w) // 2, (height - h) // 2))
    return canvas


RULES = {"lanczos": lanczos, "adm": adm}  # how an image is cropped and resized, by `Decoding.rule`
