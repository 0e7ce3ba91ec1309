"""Images in Python's memory: arrays, tensors, data sets of torch or of the hub's library, lists of images.
They are written once into the cache, to a file that is named by a hash of its content."""

from __future__ import annotations

import hashlib
import io
import math
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gzcli.core.errors import UsageError, first_line
from gzcli.core.units import counted
from gzcli.core.units import size as size_in_words
from gzcli.data.readers.hub import LABEL_COLUMNS, NAMED_AS_IMAGES
from gzcli.data.readers.images import split_of
from gzcli.store import cache_files, files
from gzcli.store.paths import cache_dir

ACCEPTED_TYPES = (
    "numpy arrays and tensors [N, H, W], [N, H, W, C] or [N, C, H, W], `(images, labels)`, data sets of "
    "torch or of `datasets`, lists of images, `{'train': …, 'test': …}`, and names and paths of data sets"
)
IMAGE_KEYS = ("images", "image", "x", "X", *NAMED_AS_IMAGES, "pixel_values")
LABELS_HINT = "labels must be integers or strings [N], or 0s and 1s of shape [N, K]"
MAX_ITEMS, MAX_BYTES = 1_000_000, 8_000_000_000  # images, and their bytes, of data without a length
WHOLE_RANGE = 1e-3  # tolerance of a float, in grey levels
ARRAY_MODES = ("L", "RGB")  # modes of Pillow that are arrays directly
NUMBERS = ("F", "I")  # modes of 32 bits, which PNG does not have
IN_PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # modes that PNG keeps
TRANSPARENT = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # modes with alpha → those of a PNG


class Images(NamedTuple):
    """The images of a split."""

    pixels: Any  # an array [N, …], or a list of images of several sizes
    layout: str = ""  # "NHW", "NHWC" or "NCHW"; "" of a list
    labels: Any = None  # integers [N], 0/1 [N, K] or texts [N]
    classes: tuple[str, ...] = ()  # names of the classes, if the data contain them


def reference_of(data: Any) -> Any:
    """The form in which verbs accept a data set. Texts and None are unchanged. A `Path` becomes absolute, so
    that it is never the name of a set. A `Data` becomes its name, and anything else the path of a file in the
    cache.

    Raises UsageError for an object that does not contain images.
    """
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, Path):
        return data.expanduser().absolute()
    if hasattr(data, "meta") and hasattr(data, "folder"):  # a `Data`
        return data.reference
    return stored(data)


def stored(data: Any) -> Path:
    """The cached file of some images; it is written if it is missing."""
    if _is_table(data) or (isinstance(data, Mapping) and data and all(map(_is_table, data.values()))):
        return _tables(data)
    parts = {split: _images_of(part) for split, part in _splits(data).items()}
    if any(not len(part.pixels) for part in parts.values()):
        raise UsageError("there are no images in `data`", hint=f"`data` accepts {ACCEPTED_TYPES}")
    encoded = any(part.layout == "" for part in parts.values())
    return _zip(parts) if encoded else _npz(parts)


def _splits(data: Any) -> dict[str, Any]:
    """The parts of a mapping by official split; anything else is `train`."""
    if not isinstance(data, Mapping):
        return {"train": data}
    splits = {str(name): split_of(str(name)) for name in data}
    if data and all(splits.values()):
        parts = {split[0]: data[name] for name, split in splits.items() if split}
        if len(parts) < len(splits):
            names = ", ".join(f"`{name}`" for name in splits)
            raise UsageError(f"`data` has a split twice: {names}", hint="omit one of them")
        if "train" in parts:
            return parts
        raise UsageError(
            "`data` has no split `train`", hint=f"name one of its splits `train`: {', '.join(splits)}"
        )
    image, label = _first(data, IMAGE_KEYS), _first(data, LABEL_COLUMNS)
    if image is None:
        names = ", ".join(map(str, data)) or "none"
        raise UsageError(
            f"`data` has no images: its keys are {names}", hint=f"`data` accepts {ACCEPTED_TYPES}"
        )
    return {"train": data[image] if label is None else (data[image], data[label])}


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


# --- one split ---


def _images_of(data: Any) -> Images:
    if _is_array(data):
        return _of_array(data)
    if isinstance(data, tuple) and len(data) == 2 and not _is_picture(data[0]) and _is_labels(data[1]):
        images = _images_of(data[0])
        return _labelled(images, data[1], images.classes)
    if hasattr(data, "batch_sampler") and hasattr(data, "dataset"):
        message = "`data` is a data loader, which returns batches in random order"
        raise UsageError(message, hint="pass its data set: `data=loader.dataset`")
    if hasattr(data, "iloc"):  # a table of pandas
        hint = f"pass its images and its labels as `(images, labels)`; `data` accepts {ACCEPTED_TYPES}"
        raise UsageError(f"`data` is a {_kind(data)}, not images", hint=hint)
    has_items = hasattr(data, "__getitem__") or hasattr(data, "__iter__")
    if isinstance(data, str | bytes | type) or not has_items:
        raise UsageError(f"`data` is a {_kind(data)}, not images", hint=f"`data` accepts {ACCEPTED_TYPES}")
    return _of_items(data)


def _labelled(images: Images, labels: Any, classes: Sequence[str] = ()) -> Images:
    y, n = _as_labels(labels), len(images.pixels)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.round(y)).all():
        y = y.astype(np.int64)
    if y.ndim not in (1, 2) or len(y) != n or y.dtype.kind not in "iubU":
        message = f"`data` has labels of type {y.dtype} and shape {y.shape} for {counted(n, 'image')}"
        raise UsageError(message, hint=LABELS_HINT)
    if y.dtype.kind in "iu" and y.size and y.min() < 0:
        raise UsageError("`data` has a label below 0", hint="labels must be integers from 0, or strings")
    return images._replace(labels=y, classes=tuple(map(str, classes)))


def _as_labels(labels: Any) -> np.ndarray:
    """Labels as one array. Raises UsageError for a label that is None or NaN, which numpy would read as a
    class of that name, and for labels of several lengths."""
    if not _is_array(labels) or labels.dtype == np.object_:
        labels = list(labels)  # of an array of objects, numpy looks at the objects
        for i, label in enumerate(labels):
            if label is None or (isinstance(label, float) and math.isnan(label)):
                hint = "label every image, or pass the images without labels"
                raise UsageError(f"item {i} of `data` has no label", hint=hint)
    try:
        return _as_numpy(labels, "the array of labels")
    except ValueError as e:
        raise UsageError("the labels of `data` have several lengths", hint=LABELS_HINT) from e


def _of_items(data: Any) -> Images:
    """The images of a sequence or an iterable of images, (image, label) or {"image": …, "label": …}."""
    pixels: list[Any] = []
    labels: list[Any] = []
    size, endless = 0, not hasattr(data, "__len__")
    for item in range(len(data)) if _is_map(data) else data:
        image, label = _parted(data[item] if _is_map(data) else item, f"item {len(pixels)} of `data`")
        pixels.append(image)
        labels.append(label)
        size += math.prod(image.size) * len(image.getbands()) if _is_picture(image) else image.nbytes
        if endless and (len(pixels) > MAX_ITEMS or size > MAX_BYTES):
            most = f"more than {MAX_ITEMS:,} images or {size_in_words(MAX_BYTES)}"
            hint = "use part of it, as in `list(itertools.islice(data, 10_000))`, or save it in a folder"
            raise UsageError(f"`data` has no length and returns {most}; it may be endless", hint=hint)
    images = _stacked(pixels)
    if not pixels or all(label is None for label in labels):
        return images
    y, whole = _as_labels(labels), data
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):  # a torch `Subset`
        whole = whole.dataset
    classes: Any = getattr(whole, "classes", ())
    numbered = isinstance(classes, list | tuple) and y.ndim == 1 and y.dtype.kind in "iu"
    return _labelled(images, y, classes if numbered and int(y.max()) < len(classes) else ())


def _parted(item: Any, title: str) -> tuple[Any, Any]:
    """The image and the label of an item; None without a label."""
    from PIL import ImageOps

    image, label = item, None
    if isinstance(item, Mapping):
        key, named = _first(item, IMAGE_KEYS), _first(item, LABEL_COLUMNS)
        if key is None:
            hint = f"an item must be an image, `(image, label)`, or have a key of {', '.join(IMAGE_KEYS)}"
            raise UsageError(f"{title} has no image, only the keys {', '.join(map(str, item))}", hint=hint)
        image, label = item[key], None if named is None else item[named]
    elif isinstance(item, tuple | list) and len(item) == 2:
        image, label = item
    label = _as_numpy(label, f"the label of {title}")[()] if _is_array(label) else label
    if _is_array(image):
        _as_numpy(image, title)
        return image, label
    if not _is_picture(image):
        raise UsageError(
            f"{title} is a {_kind(image)}, not an image", hint=f"`data` accepts {ACCEPTED_TYPES}"
        )
    try:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return ImageOps.exif_transpose(image), label
    except Exception as e:  # of a truncated or closed image, Pillow may raise anything
        message = f"{title} cannot be decoded: {first_line(e)}"
        raise UsageError(message, hint="replace or remove it") from e


def _stacked(pixels: list[Any]) -> Images:
    """Single images and arrays stacked into one array if they share a shape, otherwise as a list of
    images."""
    if not pixels:
        return Images(pixels)
    if all(map(_is_picture, pixels)):
        modes, sizes = {image.mode for image in pixels}, {image.size for image in pixels}
        opaque = modes <= {*ARRAY_MODES} and not any("transparency" in image.info for image in pixels)
        if len(modes) == len(sizes) == 1 and (opaque or modes <= {*NUMBERS, "I;16"}):
            return _of_array(np.stack([np.asarray(image) for image in pixels]))
        return Images(pixels)
    arrays = [_as_numpy(image) for image in pixels if _is_array(image)]
    if len(arrays) < len(pixels) or len({(a.shape, a.dtype) for a in arrays}) > 1:
        return Images([image if _is_picture(image) else _picture(image) for image in pixels])
    first = pixels[0]
    return _of_array(np.stack(arrays), tensor=_is_tensor(first))


def _of_array(data: Any, *, tensor: bool = False) -> Images:
    """The images [N, H, W], [N, H, W, C] or [N, C, H, W] of an array. If the layout is ambiguous, the
    channels are first in a tensor and last in an array."""
    pixels, tensor = _as_numpy(data), tensor or _is_tensor(data)
    if pixels.ndim not in (3, 4) or not all(pixels.shape[1:]):
        message = f"`data` is an array of type {pixels.dtype} and shape {pixels.shape}"
        raise UsageError(message, hint="images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if pixels.ndim == 3:
        return Images(_levelled(pixels), "NHW")
    first, last = (pixels.shape[axis] in (1, 3) for axis in (1, 3))
    return Images(_levelled(pixels), "NCHW" if (first and not last) or (tensor and first == last) else "NHWC")


def _levelled(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8 or uint16 if these represent every value: integers in their range, and floats that are
    multiples of 1/255 in [0, 1], the same scaled to [-1, 1], or whole numbers from 0 to exactly 255. Other
    pixels stay real numbers."""
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind in "iu":
        low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
        kind = np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.float64
        return pixels.astype(kind if low >= 0 else np.float64)
    if pixels.dtype.kind != "f":
        raise UsageError(f"`data` is an array of {pixels.dtype}", hint=f"`data` accepts {ACCEPTED_TYPES}")
    if pixels.size and pixels.min() >= 0 and pixels.max() == 255 and (pixels == np.round(pixels)).all():
        return pixels.astype(np.uint8)
    for scale, shift in ((255.0, 0.0), (127.5, 127.5)):
        levels = pixels.astype(np.float32) * np.float32(scale) + np.float32(shift)
        whole = levels.round()
        fits = levels.size and levels.min() > -0.5 and levels.max() < 255.5 and levels.max() > 1.5
        if fits and float(np.abs(levels - whole).max()) < WHOLE_RANGE:
            return whole.astype(np.uint8)
    return pixels


# --- files ---


def _npz(parts: Mapping[str, Images]) -> Path:
    arrays: dict[str, np.ndarray] = {}
    labels, classes = _numbered(parts)
    for split, part in parts.items():
        arrays[f"{split}_images"] = np.ascontiguousarray(part.pixels)
        if part.layout == "NHW":
            arrays[f"{split}_images"] = arrays[f"{split}_images"][..., None]
        if split in labels:
            arrays[f"{split}_labels"] = labels[split]
    layouts = {part.layout.replace("NHW", "NHWC").replace("CC", "C") for part in parts.values()}
    if len(layouts) > 1:
        raise UsageError("`data` has channels first in one split and last in another", hint="use one layout")
    arrays["layout"] = np.array(layouts.pop())
    if classes:
        arrays["class_names"] = np.array(classes)
    digest = hashlib.blake2b(digest_size=8)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes() if array.dtype.kind == "U" else np.ascontiguousarray(array).data)
    path = _place(digest, ".npz")
    if cache_files.read(path, _members) != [f"{name}.npy" for name in arrays]:
        files.make_folder(path.parent)
        with files.replacing(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **dict[str, Any](arrays))  # not compressed: they are packed once, from here
    return path


def _zip(parts: Mapping[str, Images]) -> Path:
    """A zip of images of several sizes as PNGs, with their labels."""
    labels, classes = _numbered(parts)
    digest, members = hashlib.blake2b(digest_size=8), {}
    for split, part in parts.items():
        pictures = part.pixels if part.layout == "" else [_picture(image) for image in part.pixels]
        for i, picture in enumerate(pictures):
            name = f"{split}/{i:08d}"
            members[f"{name}.png"] = _as_png(picture, f"item {i} of `data`")
            if split in labels:
                label = int(labels[split][i])
                members[f"{name}.cls"] = (classes[label] if classes else str(label)).encode()
    for name, data in members.items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    path = _place(digest, ".zip")
    if cache_files.read(path, _members) != [*members]:
        files.make_folder(path.parent)
        with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data)
    return path


def _as_png(picture: Any, title: str) -> bytes:
    """A PNG of an image. Raises UsageError for a mode that no PNG has."""
    buffer = io.BytesIO()
    mode = picture.mode if picture.mode in IN_PNG else TRANSPARENT.get(picture.mode, "RGB")
    try:
        if picture.mode in NUMBERS:  # Pillow would cut off what exceeds 8 bits
            raise ValueError("its numbers have 32 bits")
        picture.convert(mode).save(buffer, "PNG")
    except ValueError as e:
        message = f"{title} has the mode `{picture.mode}`, and other images another size or mode"
        raise UsageError(message, hint="convert it to mode `L`, `I;16` or `RGB`, or resize all images") from e
    return buffer.getvalue()


def _members(path: Path) -> list[str]:
    """The names in a zip or npz file. Raises an error for any other file."""
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _numbered(parts: Mapping[str, Images]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split as numbers, and the names of the classes; () without names."""
    with_labels = {split: part.labels for split, part in parts.items() if part.labels is not None}
    if with_labels and len(with_labels) < len(parts):
        raise UsageError("`data` has labels for some splits only", hint="give them for all, or for none")
    texts = [y for y in with_labels.values() if y.dtype.kind == "U"]
    if not texts:
        return with_labels, next((part.classes for part in parts.values() if part.classes), ())
    if len(texts) < len(with_labels) or any(y.ndim > 1 for y in texts):
        raise UsageError("`data` has both strings and numbers as labels", hint="use one kind of label")
    classes = sorted({str(label) for y in texts for label in y})
    number = {label: i for i, label in enumerate(classes)}
    return {s: np.array([number[str(label)] for label in y]) for s, y in with_labels.items()}, tuple(classes)


def _tables(data: Any) -> Path:
    """A `Dataset` of the hub's library, or several by split, written as parquet files for the reader of
    those."""
    splits = _splits(data)
    digest, written = hashlib.blake2b(digest_size=8), {}
    for split, table in splits.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer)
        written[split] = buffer.getvalue()
        digest.update(f"{split} {len(written[split])} ".encode() + written[split])
    path = _place(digest, "")
    if not all((path / f"{split}.parquet").is_file() for split in written):
        files.remove_leftovers(path.parent)
        with suppress(FileExistsError), files.new_dir(path) as part:
            for split, content in written.items():
                (part / f"{split}.parquet").write_bytes(content)
    return path


def _place(digest: Any, ending: str) -> Path:
    return cache_dir("arrays", f"array-{digest.hexdigest()}{ending}")


# --- kinds of objects, recognized without importing their libraries ---


def _is_tensor(data: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.Tensor)


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray) or _is_tensor(data)


def _is_picture(data: Any) -> bool:
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(data, module.Image)


def _is_table(data: Any) -> bool:
    """Whether it is a `datasets.Dataset` with a column of encoded images."""
    features = getattr(data, "features", None)
    has_pictures = isinstance(features, Mapping) and any(
        type(kind).__name__ == "Image" for kind in features.values()
    )
    return has_pictures and hasattr(data, "to_parquet") and hasattr(data, "__len__")


def _is_map(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _is_labels(data: Any) -> bool:
    """Whether it is a list or a tuple of labels, an array, or a column of pandas."""
    listed = isinstance(data, list | tuple) and not any(map(_is_array, data[:1]))
    return listed or hasattr(data, "__array__")


def _as_numpy(data: Any, title: str = "`data`") -> np.ndarray:
    """The values of an array or a tensor. Raises UsageError for a mask, which would be ignored, and for a
    tensor of a kind that numpy does not have."""
    if np.ma.is_masked(data):
        raise UsageError(f"{title} is a masked array", hint="fill masked values, as by `.filled(0)`")
    if not _is_tensor(data):
        return np.asarray(data)
    try:
        tensor = data.detach().cpu()
        return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor.resolve_neg()).numpy()
    except (TypeError, RuntimeError) as e:
        kind = f"{data.dtype} with the layout {data.layout}, on the device {data.device}"
        hint = "pass a dense tensor of plain numbers, as by `.to_dense()`, `.dequantize()` or `.float()`"
        raise UsageError(f"{title} is a tensor that numpy cannot read: {kind}", hint=hint) from e


def _picture(data: Any) -> Any:
    """An array or tensor of a list as an image."""
    from PIL import Image

    images = _of_array(_as_numpy(data)[None], tensor=_is_tensor(data))
    pixels = images.pixels[0]
    pixels = pixels.transpose(1, 2, 0) if images.layout == "NCHW" else pixels
    pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        message = f"`data` has arrays of mixed sizes that are not 8-bit images: {pixels.dtype}"
        raise UsageError(f"{message} {pixels.shape}", hint="resize them to one size, and stack them")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _kind(data: Any) -> str:
    return f"`{type(data).__module__}.{type(data).__qualname__}`".replace("`builtins.", "`")
