"""Images other than 8-bit grey and RGB: any number of channels, 16 bits, floats. A model is trained on their
values, scaled to [-1, 1]. PNGs and judges use an 8-bit image of three bands."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import MissingError, UsageError, first_line, install_line
from gzcli.core.formats import ARRAY, endings_of, extra_of
from gzcli.core.sections import Fit
from gzcli.core.units import counted
from gzcli.data.readers.images import ARRAYS, Block, Content, RawImages, bytes_in, refuse_exhausted
from gzcli.data.readers.pictures import BITS, MAX_12_BIT, ORIENTATION, lanczos, opened, upright

VALUES_KIND = "values"  # the kind of a pack's arrays that contain values
PICTURE = (1, 3)  # channels of a picture
VALUE_ENDINGS = endings_of(ARRAY, "TIFF")  # endings of files that may contain values
SAMPLES_TAG, FORMAT_TAG = (
    277,
    339,
)  # numbers of TIFF's tags: channels of a pixel, and whether these are floats
SHAPE_HINT = "images must be numbers of shape [N, H, W], [N, H, W, C] or [N, C, H, W]"
Decoded = tuple[np.ndarray, int | None]  # the values [C, H, W] of an image, and their levels
INTEGERS = {np.dtype(np.uint8): 256, np.dtype(np.uint16): 65536}  # with their levels


@dataclass(frozen=True)
class Values:
    """The kind of a set's values, and how they map to x in [-1, 1] and to 8-bit images.

    channels: number of channels.
    levels: number of levels of each value. None: real numbers.
    low, high: smallest and largest value of each channel. For real numbers, they map to −1 and 1.
    bands: channels in 8-bit images: one as grey, or three as red, green and blue.
    """

    channels: int
    levels: int | None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    bands: tuple[int, ...] = ()

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Values:
        rows = (tuple(tree[key]) for key in ("low", "high", "bands"))
        return cls(tree["channels"], tree["levels"], *rows)

    @classmethod
    def like(cls, channels: int, levels: int | None) -> Values:
        """The values of an array. Of two channels, the first is shown as red, the second as green and
        blue."""
        bands = (0,) if channels == 1 else (0, 1, 1) if channels == 2 else (0, 1, 2)
        return cls(channels, levels, bands=bands)

    @property
    def is_picture(self) -> bool:
        """Whether 8-bit images show all channels."""
        return self.channels in PICTURE

    @property
    def words(self) -> str:
        most = max(self.high)
        if self.levels is None:
            kind = f"real numbers {min(self.low):.4g} … {most:.4g}"
        else:
            kind = f"{self.levels.bit_length() - 1} bits, read as 0 … {self.levels - 1:,}"
        dark = ""
        if self.levels == 65536 and 0 < most <= MAX_12_BIT:
            few = f"none has a value above {MAX_12_BIT:,}"
            dark = f": nearly black, as {few} (where 4,095 is white, multiply by 16)"
        if self.is_picture:
            return f"{kind}{dark}"
        shown = ", ".join(map(str, self.bands))
        return f"{self.channels} channels of {kind}{dark}; previews show channels {shown}"

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values [n, C, H, W] as float32 in [-1, 1]; bytes stay bytes, which batches scale."""
        if values.dtype == np.uint8 and self.levels == 256:
            return values
        if self.levels is not None:
            return (values * np.float32(2 / (self.levels - 1)) - 1).astype(np.float32)
        low, high = (np.asarray(side, np.float64)[:, None, None] for side in (self.low, self.high))
        return (2 * (values - low) / np.maximum(high - low, np.finfo(np.float64).tiny) - 1).astype(np.float32)

    def restored(self, x: np.ndarray) -> np.ndarray:
        """The values of x [n, C, H, W] in [-1, 1], restored to their original kind of numbers."""
        if self.levels is not None:
            kind = np.uint8 if self.levels <= 256 else np.uint16
            return np.clip(np.rint((x + 1.0) * ((self.levels - 1) / 2)), 0, self.levels - 1).astype(kind)
        low, high = (np.asarray(side, np.float64)[:, None, None] for side in (self.low, self.high))
        return (low + (x + 1.0) / 2 * (high - low)).astype(np.float32)

    def pictures(self, values: np.ndarray) -> np.ndarray:
        """8-bit images [n, 1 or 3, H, W] of values [n, C, H, W]."""
        x = self.scaled(values)[:, list(self.bands)]
        return x if x.dtype == np.uint8 else np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def fitted(values: np.ndarray, shape: Sequence[int], fit: Fit) -> np.ndarray:
    """Values [n, C, H, W] in another height and width, with each channel resized like an image."""
    from PIL import Image

    height, width = shape[1:]
    if values.shape[2:] == (height, width):
        return values
    out = np.empty((len(values), *shape), values.dtype)
    for row, channels in zip(out, values, strict=True):
        for target, plane in zip(row, channels, strict=True):
            image = Image.fromarray(plane.astype(np.float32))
            if fit == "stretch":
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            else:
                image = lanczos(image, height, width)
            pixels = np.asarray(image)
            whole = np.clip(np.rint(pixels), 0, 255) if values.dtype == np.uint8 else np.clip(pixels, -1, 1)
            target[:] = whole
    return out


def axis_of(shape: Sequence[int], name: str, *, layout: str = "") -> bool:
    """Whether the channels come first in images of shape [A, B, C]. Of the first and the last axis, the
    channels are the one with 1 or 3 entries, otherwise the smaller one. Raises UsageError if both are
    possible."""
    if layout:
        return layout == "NCHW"
    first, last = shape[0] in PICTURE, shape[-1] in PICTURE
    if first == last:
        first, last = shape[0] < shape[-1], shape[-1] < shape[0]
    if first == last or (shape[0] in PICTURE and shape[-1] in PICTURE):
        hint = "put the channels last, remove an axis of length 1, or add `layout=np.array('NHWC')`"
        raise UsageError(f"{name}: its channels may be first or last", hint=hint)
    return first


def kind_of(dtype: np.dtype, channels: int, name: str) -> Values | None:
    """The kind of values of an array; None for 8-bit images. Raises UsageError for anything but numbers."""
    if dtype.kind not in "iuf":
        raise UsageError(name, hint=SHAPE_HINT)
    if dtype == np.uint8 and channels in PICTURE:
        return None
    return Values.like(channels, INTEGERS.get(dtype))


def with_bands(values: Values, bands: Sequence[int], title: str) -> Values:
    """Values whose 8-bit images show other channels. Raises UsageError for channels that do not exist."""
    if len(bands) not in PICTURE or not all(0 <= band < values.channels for band in bands):
        message = (
            f"`{title}`: `bands` must be 1 or 3 of the channels 0 … {values.channels - 1}, not {list(bands)}"
        )
        raise UsageError(message)
    return replace(values, bands=tuple(bands))


def npy(path: Path) -> RawImages:
    """The images of a `.npy` file, [N, H, W], [N, H, W, C] or [N, C, H, W], read in parts."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as e:
        refuse_exhausted(e)
        raise MissingError(f"`{path}` is not a numpy array: {first_line(e)}", hint="save it again") from e
    title = f"`{path}` is {array.dtype} of shape {array.shape}"
    if array.ndim not in (3, 4) or not all(array.shape):
        raise UsageError(title, hint=SHAPE_HINT)
    first = array.ndim == 4 and axis_of(array.shape[1:], title)
    n, *sides = array.shape
    c, h, w = (1, *sides) if array.ndim == 3 else sides if first else (sides[2], *sides[:2])
    kind = kind_of(array.dtype, c, title)
    many = max(1, (1 << 22) // (c * h * w * array.dtype.itemsize))

    def blocks() -> Iterator[Block]:
        for start in range(0, n, many):
            rows = np.asarray(array[start : start + many])
            rows = rows.reshape(-1, 1, h, w) if array.ndim == 3 else rows
            rows = rows if first or array.ndim == 3 else rows.transpose(0, 3, 1, 2)
            yield Block("train", start, rows, path.name)

    return RawImages(str(path), (), {"train": n}, {}, blocks, shape=(c, h, w), values=kind)


# --- folders of files ---


def of_files(images: RawImages, names: Sequence[str], *, resized: bool) -> RawImages:
    """The values of encoded files if all are `.npy` or TIFF and the first is not an 8-bit image. Otherwise
    the unchanged images. `resized`: whether they will be resized to one size."""
    if images.probe is None or not all(name.lower().endswith(VALUE_ENDINGS) for name in names):
        return images
    name, first = _first_decoded(images.probe())
    if first is None:
        return images
    if images.further:
        raise UsageError(
            f"`{images.title}` has both values and further images", hint="remove the further images"
        )
    array, levels = first
    source, shape = images.blocks, array.shape
    images = replace(images, shape=shape, probe=None, spans=None, further={})
    if levels == 256 and shape[0] in PICTURE:
        kind = None
    else:
        kind = Values.like(shape[0], levels)

    def blocks() -> Iterator[Block]:
        for split, start, content, file in source():
            assert not isinstance(content, np.ndarray)
            try:
                decoding = decoded(content, file)
            except MissingError as e:
                yield Block(split, start, e, file)
                continue
            if decoding is None or decoding[1] != levels or decoding[0].shape[0] != shape[0]:
                kind = (
                    "an image of 8 bits" if decoding is None else f"{decoding[0].dtype} {decoding[0].shape}"
                )
                message = f"`{file}` of `{images.title}` is {kind}, but `{name}` is {array.dtype} {shape}"
                raise UsageError(message, hint="use one data type and one number of channels in a set")
            if decoding[0].shape != shape and not resized:
                raise UsageError(
                    f"the images of `{images.title}` have mixed sizes: `{file}` is {decoding[0].shape[1:]}, "
                    f"`{name}` is {shape[1:]}",
                    hint="use `--set data.size=64` to crop them to squares and resize them",
                )
            yield Block(split, start, decoding[0][None], file)

    return replace(images, blocks=blocks, values=kind)


def _first_decoded(pictures: Iterable[tuple[str, Content]]) -> tuple[str, Decoded | None]:
    """The name and the values of the first image that can be decoded. Raises the error of the last if none
    can."""
    problem = None
    for name, content in pictures:
        try:
            return name, decoded(content, name)
        except MissingError as e:
            problem = e
    if problem:
        raise problem
    return "", None


def decoded(content: Content, name: str) -> Decoded | None:
    """The values [C, H, W] of a `.npy` or a TIFF, and their levels; None for an 8-bit image. Raises
    MissingError for a file that cannot be read."""
    data = bytes_in(content)
    if name.lower().endswith(ARRAYS):
        return _npy(data, name)
    try:
        with opened(data) as image:
            bits, samples = image.tag_v2.get(BITS, (8,)), image.tag_v2.get(SAMPLES_TAG, 1)
            pages = getattr(image, "n_frames", 1)
            if max(bits) <= 8 and pages == 1:
                return None
            if samples == 1:
                planes = [np.asarray(_page(image, i)) for i in range(pages)]
                return _typed(np.stack(planes), min(16, max(bits)), name)
    except MissingError:
        raise
    except Exception as e:  # Pillow does not know the kind: many channels, or floats of 64 bits
        return _by_tifffile(data, name, first_line(e))
    if samples == 3 and pages == 1:
        try:
            return _by_tifffile(data, name, "")
        except MissingError:  # read as a picture, which notes its 16 bits
            return None
    return _by_tifffile(data, name, f"{samples} values per pixel, {counted(pages, 'page')}")


def _page(image: Any, number: int) -> Any:
    image.seek(number)
    return image


def _by_tifffile(data: bytes, name: str, why: str) -> Decoded:
    try:
        import tifffile
    except ImportError as e:
        hint = f"run `{install_line(extra_of('TIFF'))}` to read more kinds of TIFF"
        raise MissingError(f"`{name}` cannot be decoded: {why}", hint=hint) from e
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            first = file.pages.first
            if not (first.imagewidth and first.imagelength and first.bitspersample):
                raise ValueError("it has no pixels")
            series = file.series[0]
            array, axes = series.asarray(), series.axes
            bits, turn = first.bitspersample, first.tags.valueof(ORIENTATION, 1)
            if not array.size:
                raise ValueError("it has no pixels")
    except Exception as e:  # for a damaged file, it may raise anything
        raise MissingError(f"`{name}` cannot be decoded: {first_line(e)}", hint="replace or remove it") from e
    if not {"Y", "X"} <= set(axes):
        raise MissingError(f"`{name}` has the axes {axes}, but no height and width")
    planes = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    return _typed(upright(planes.reshape(-1, *planes.shape[-2:]), turn), bits, name)


def _npy(data: bytes, name: str) -> Decoded:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as e:
        raise MissingError(
            f"`{name}` is not a numpy array: {first_line(e)}", hint="replace or remove it"
        ) from e
    title = f"`{name}` is {array.dtype} of shape {array.shape}"
    if array.ndim not in (2, 3) or not all(array.shape) or array.dtype.kind not in "iuf":
        raise UsageError(
            title, hint="save one image per file: numbers of shape [H, W], [H, W, C] or [C, H, W]"
        )
    if array.ndim == 2:
        array = array[None]
    elif not axis_of(array.shape, title):
        array = array.transpose(2, 0, 1)
    return _typed(array, 8 * array.dtype.itemsize, name)


def _typed(array: np.ndarray, bits: int, name: str) -> Decoded:
    """Values as bytes, integers of 16 bits or floats, and their levels."""
    if array.dtype.kind == "i" and array.size and array.min() >= 0 and 8 < bits <= 16:
        array = array.astype(np.uint16)  # as in Pillow
    if array.dtype in INTEGERS:
        return array, 256 if array.dtype == np.uint8 else 1 << max(9, bits)
    if array.dtype.kind not in "iufb":
        raise UsageError(f"`{name}` has the data type {array.dtype}", hint=SHAPE_HINT)
    return array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32), None


# --- a set with values, as it is packed ---


def value_ranges(images: RawImages) -> Values:
    """The values of a set, with the smallest and largest of each channel. Raises UsageError for a value that
    is not finite."""
    kind = images.values
    assert kind is not None
    low, high = np.full(kind.channels, np.inf), np.full(kind.channels, -np.inf)
    for split, start, data, name in images.blocks():
        if not isinstance(data, np.ndarray):  # packing skips or names it
            continue
        rows = np.asarray(data, np.float64)
        if not np.isfinite(rows).all():
            first = start + int((~np.isfinite(rows)).any((1, 2, 3)).argmax())
            message = f"`{name}` of `{images.title}` has values that are not finite: image {first} of {split}"
            raise UsageError(message, hint="replace NaN and infinite values, or remove these images")
        low, high = np.minimum(low, rows.min((0, 2, 3))), np.maximum(high, rows.max((0, 2, 3)))
    return replace(kind, low=tuple(low.tolist()), high=tuple(high.tolist()))


def with_pictures(images: RawImages, kind: Values) -> RawImages:
    """The set with 8-bit images, and its values as a further kind of image."""
    assert images.shape is not None
    source, shape = images.blocks, (len(kind.bands), *images.shape[1:])

    def blocks_of(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Iterator[Block]]:
        return lambda: (
            block._replace(data=change(block.data)) if isinstance(block.data, np.ndarray) else block
            for block in source()
        )

    return replace(
        images,
        blocks=blocks_of(kind.pictures),
        shape=shape,
        values=None,
        further={VALUES_KIND: blocks_of(kind.scaled)},
    )
