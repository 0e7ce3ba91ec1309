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

from gzcli.core.errors import UsageError
from gzcli.core.units import counted
from gzcli.data.readers.hub import LABELS, NAMED_AS_IMAGES
from gzcli.data.readers.images import split_of
from gzcli.store import cache_files, files
from gzcli.store.paths import cache_dir

TAKEN = (
    "numpy arrays and tensors [N, H, W], [N, H, W, C] or [N, C, H, W], `(images, labels)`, data sets of "
    "torch or of `datasets`, lists of images, `{'train': …, 'test': …}`, and names and paths of data sets"
)
IMAGE_KEYS = ("images", "image", "x", "X", *NAMED_AS_IMAGES, "pixel_values")
WHOLE_RANGE = 1e-3  # tolerance of a float, in grey levels
PLAIN = ("L", "RGB")  # modes of Pillow that are arrays directly
IN_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")  # modes that PNG keeps
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
        raise UsageError("there are no images in `data`", hint=f"`data` accepts {TAKEN}")
    encoded = any(part.layout == "" for part in parts.values())
    return _zip(parts) if encoded else _npz(parts)


def _splits(data: Any) -> dict[str, Any]:
    """The parts of a mapping by official split; anything else is `train`."""
    if not isinstance(data, Mapping):
        return {"train": data}
    splits = {str(name): split_of(str(name)) for name in data}
    if data and all(splits.values()):
        parts = {split[0]: data[name] for name, split in splits.items() if split}
        if "train" in parts:
            return parts
        raise UsageError(
            "`data` has no split `train`", hint=f"name one of its splits `train`: {', '.join(splits)}"
        )
    image, label = _first(data, IMAGE_KEYS), _first(data, LABELS)
    if image is None:
        names = ", ".join(map(str, data)) or "none"
        raise UsageError(f"`data` has no images: its keys are {names}", hint=f"`data` accepts {TAKEN}")
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
        hint = f"pass its images and its labels as `(images, labels)`; `data` accepts {TAKEN}"
        raise UsageError(f"`data` is a {_kind(data)}, not images", hint=hint)
    if isinstance(data, str | bytes) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise UsageError(f"`data` is a {_kind(data)}, not images", hint=f"`data` accepts {TAKEN}")
    return _of_items(data)


def _labelled(images: Images, labels: Any, classes: Sequence[str] = ()) -> Images:
    _check_labels(labels)
    y = np.asarray(labels if not _is_tensor(labels) else labels.detach().cpu().numpy())
    n = len(images.pixels)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind == "f" and y.size and (y == np.round(y)).all():
        y = y.astype(np.int64)
    if y.ndim not in (1, 2) or len(y) != n or y.dtype.kind not in "iubUSO":
        message = f"`data` has labels of type {y.dtype} and shape {y.shape} for {counted(n, 'image')}"
        raise UsageError(message, hint="labels must be integers or strings [N], or 0s and 1s of shape [N, K]")
    if y.dtype.kind in "iu" and y.size and y.min() < 0:
        raise UsageError("`data` has a label below 0", hint="labels must be integers from 0, or strings")
    return images._replace(labels=y, classes=tuple(map(str, classes)))


def _check_labels(labels: Any) -> None:
    """Raises UsageError for a label that is None or NaN, which numpy would read as a class of that name."""
    if isinstance(labels, list | tuple) or getattr(labels, "dtype", None) == np.object_:
        for i, label in enumerate(labels):
            if label is None or (isinstance(label, float) and math.isnan(label)):
                hint = "label every image, or pass the images without labels"
                raise UsageError(f"item {i} of `data` has no label", hint=hint)


def _of_items(data: Any) -> Images:
    """The images of a sequence or an iterable of images, (image, label) or {"image": …, "label": …}."""
    from PIL import ImageOps

    pixels: list[Any] = []
    labels: list[Any] = []
    for item in range(len(data)) if _is_map(data) else data:
        row: Any = data[item] if _is_map(data) else item
        label = None
        if isinstance(row, Mapping):
            image, key = _first(row, IMAGE_KEYS), _first(row, LABELS)
            if image is None:
                hint = f"an item must be an image, `(image, label)`, or have a key of {', '.join(IMAGE_KEYS)}"
                raise UsageError(
                    f"an item of `data` has no image, only the keys {', '.join(map(str, row))}", hint=hint
                )
            row, label = row[image], None if key is None else row[key]
        elif isinstance(row, tuple | list) and len(row) == 2:
            row, label = row
        if not (_is_picture(row) or _is_array(row)):
            message = f"item {len(pixels)} of `data` is a {_kind(row)}, not an image"
            raise UsageError(message, hint=f"`data` accepts {TAKEN}")
        pixels.append(ImageOps.exif_transpose(row) if _is_picture(row) else row)
        labels.append(_as_numpy(label)[()] if _is_array(label) else label)
    images = _stacked(pixels)
    if not pixels or all(label is None for label in labels):
        return images
    _check_labels(labels)
    y = np.stack([np.asarray(label) for label in labels]) if _is_array(labels[0]) else np.asarray(labels)
    whole = data
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):  # a torch `Subset`
        whole = whole.dataset
    classes: Any = getattr(whole, "classes", ())
    numbered = isinstance(classes, list | tuple) and y.ndim == 1 and y.dtype.kind in "iu"
    return _labelled(images, y, classes if numbered and int(y.max()) < len(classes) else ())


def _stacked(pixels: list[Any]) -> Images:
    """Single images and arrays stacked into one array if they share a shape, otherwise as a list of
    images."""
    if not pixels:
        return Images(pixels)
    if all(map(_is_picture, pixels)):
        modes, sizes = {image.mode for image in pixels}, {image.size for image in pixels}
        opaque = modes <= {*PLAIN} and not any("transparency" in image.info for image in pixels)
        if len(modes) == len(sizes) == 1 and (opaque or modes <= {"F", "I;16"}):
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
    if pixels.ndim == 3:
        return Images(_levelled(pixels), "NHW")
    if pixels.ndim != 4:
        message = f"`data` is an array of type {pixels.dtype} and shape {pixels.shape}"
        raise UsageError(message, hint="images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W]")
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
        raise UsageError(f"`data` is an array of {pixels.dtype}", hint=f"`data` accepts {TAKEN}")
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
            buffer = io.BytesIO()
            mode = picture.mode if picture.mode in IN_PNG else TRANSPARENT.get(picture.mode, "RGB")
            picture.convert(mode).save(buffer, "PNG")
            members[f"{name}.png"] = buffer.getvalue()
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


def _members(path: Path) -> list[str]:
    """The names in a zip or npz file. Raises an error for any other file."""
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _numbered(parts: Mapping[str, Images]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split as numbers, and the names of the classes; () without names."""
    with_labels = {split: part.labels for split, part in parts.items() if part.labels is not None}
    if with_labels and len(with_labels) < len(parts):
        raise UsageError("`data` has labels for some splits only", hint="give them for all, or for none")
    texts = [y for y in with_labels.values() if y.dtype.kind in "USO"]
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
        files.sweep(path.parent)
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


def _as_numpy(data: Any) -> np.ndarray:
    if not _is_tensor(data):
        return np.asarray(data)
    tensor = data.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


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
