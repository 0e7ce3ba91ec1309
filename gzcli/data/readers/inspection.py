"""Inspection sets: good training images, images with each kind of defect, and masks of the defects.

    train/good · test/good · test/scratch · ground_truth/scratch/000_mask.png      as MVTec's
    Data/Images/Normal · Data/Images/Anomaly · Data/Masks/Anomaly/000.png          as VisA's
    good · scratch · masks/scratch/000.png                                         plain folders

Masks are optional. A mask has the name of its image, with or without a suffix such as `_mask`. If an image
has several masks, they are in a folder of that name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import TYPE_CHECKING

from gzcli.core.errors import UsageError
from gzcli.core.formats import ARRAY, IMAGE, SET, endings_of
from gzcli.core.sections import Fit
from gzcli.core.units import as_size, by_sides, counted
from gzcli.data.readers.archive import open_members
from gzcli.data.readers.images import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    Folders,
    Members,
    is_picture,
    is_regular,
    split_of,
    without_outer,
)
from gzcli.data.readers.texts import rows_of, text_of

if TYPE_CHECKING:
    import numpy as np

GOOD_FOLDERS = re.compile(
    r"(good|normal|ok|no[_-]?defects?|defect[_-]?free|non[_-]?defective)", re.IGNORECASE
)
MASK_ENDING = re.compile(r"[_-](mask|gt|label|seg(mentation)?|ground_?truth)$", re.IGNORECASE)
MASK_GREY = 127  # the brightest pixel of a mask that is not a defect, if any is brighter
MAX_MAP_SIDE = 256  # pixels a side at most at which maps are compared with masks
VISA_TABLE = "image_anno.csv"  # VisA's kinds of defects, with the columns image, label, mask
MASK_NAME_HINT = "name each mask after its image, such as `ground_truth/scratch/000_mask.png`"


@dataclass(frozen=True)
class Inspection:
    """The defects of an inspection set.

    good: the folder of the good images; None if they are the split `train`.
    kinds: the kind of defect of each defective image, in the order of kinds and images.
    masks: the mask images of each defective image.
    notes: omitted files, and why.
    """

    good: str | None
    kinds: dict[str, str]
    masks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_inspection(path: Path) -> Inspection | None:
    """The defects of a set at a path; None if it is not an inspection set. Raises UsageError if no mask
    matches an image."""
    if not is_regular(path) or (path.is_file() and path.name.lower().endswith(endings_of(IMAGE, ARRAY, SET))):
        return None
    members = open_members(path, lambda name: is_picture(name) or PurePosixPath(name).name == VISA_TABLE)
    lists = [name for name in members.names if PurePosixPath(name).name == VISA_TABLE]
    layout = inspection(str(path), [name for name in members.names if name not in lists])
    if not layout or not lists:
        return layout
    listed = _listed(str(path), members, lists)
    kinds = {name: listed.get(PurePosixPath(name).name, kind) for name, kind in layout.kinds.items()}
    return replace(layout, kinds=_sorted(kinds))


def _listed(title: str, members: Members, lists: list[str]) -> dict[str, str]:
    """VisA's kinds of defects by image name; of several, the first (`bent` for `bent,stain`)."""
    kinds: dict[str, str] = {}
    for name, data in members.read(lists):
        heads, *rows = rows_of(text_of(data, name, title), name) or [[]]
        for cells in rows:
            row = dict(zip(heads, cells, strict=False))
            if (image := row.get("image")) and (label := row.get("label")):
                kinds[PurePosixPath(image).name] = label.split(",")[0].strip()
    return kinds


def inspection(title: str, names: Sequence[str]) -> Inspection | None:
    """The defects among images, found by their folders; see `open_inspection`."""
    good, kinds, masks = _parted(names)
    if not kinds:
        return None
    by_key: dict[tuple[str, str], list[str]] = {}
    for name, inside in masks.items():
        by_key.setdefault(_key(name, inside, set(kinds.values())), []).append(name)
    fitting: dict[str, tuple[str, ...]] = {}
    for name, kind in kinds.items():
        stem = PurePosixPath(name).stem
        if several := by_key.pop((kind, stem), None) or by_key.pop(("", stem), None):
            fitting[name] = tuple(several)
    lost = sorted(name for several in by_key.values() for name in several)
    if lost and not fitting:
        raise UsageError(
            f"no mask of `{title}` matches an image, for example `{lost[0]}`", hint=MASK_NAME_HINT
        )
    notes = (f"{counted(len(lost), 'mask')} without an image, such as `{lost[0]}`",) if lost else ()
    return Inspection(good, kinds, fitting, notes)


def is_inspection(names: Sequence[str]) -> bool:
    """Whether the folders of images are those of an inspection set."""
    return bool(_parted(names)[1])


def _parted(names: Sequence[str]) -> tuple[str | None, dict[str, str], Folders]:
    """The folder of good images, the kinds of defects by image, {} if there are none, and the folders of
    masks."""
    folders = {
        name: tuple(folder for folder in f if not IMAGE_FOLDERS.fullmatch(folder))
        for name, f in without_outer(names, "splits").items()
    }
    if not all(folders.values()):
        return None, {}, {}
    masks = {name: f[1:] for name, f in folders.items() if MASK_FOLDERS.fullmatch(f[0])}
    pictures = {name: f for name, f in folders.items() if name not in masks}
    stems = {splitext(name)[0] for name in pictures}
    beside = {name: f for name, f in pictures.items() if _marks_neighbour(name, stems)}
    good, kinds = _kinds({name: f for name, f in pictures.items() if name not in beside})
    return good, kinds, masks | beside


def _stem(name: str) -> str:
    """The name of a mask's image."""
    return MASK_ENDING.sub("", PurePosixPath(name).stem)


def _marks_neighbour(name: str, stems: set[str]) -> bool:
    """Whether an image is the mask of a neighbour, such as `000_mask.png` of `000.png`. `stems`: the images
    without their endings."""
    path, stem = PurePosixPath(name), _stem(name)
    return stem != path.stem and str(path.parent / stem) in stems


def _key(name: str, inside: tuple[str, ...], kinds: set[str]) -> tuple[str, str]:
    """The kind of defect and the image of a mask, by its folders."""
    kind = next((folder for folder in inside if folder in kinds), "")
    deeper = inside[inside.index(kind) + 1 :] if kind else ()
    return kind, deeper[0] if deeper else _stem(name)


def _kinds(pictures: Folders) -> tuple[str | None, dict[str, str]]:
    """The folder of good images, and the kinds of defects by image, {} if there are none."""
    splits = {name: split_of(f[0]) for name, f in pictures.items()}
    if all(splits.values()):
        rows = [(name, splits[name], f[1] if len(f) > 1 else "") for name, f in pictures.items()]
        good = {label for _, split, label in rows if split == ("train", "")}
        kinds = {name: label for name, split, label in rows if split == ("test", "") and label not in good}
        is_inspection = len(good) == 1 and all(label for _, _, label in rows)
        return None, _sorted(kinds) if is_inspection else {}
    heads = {f[0] for f in pictures.values()}
    good = {head for head in heads if GOOD_FOLDERS.fullmatch(head)}
    if any(splits.values()) or len(good) != 1:
        return None, {}
    head = good.pop()
    parts = PurePosixPath(next(name for name, f in pictures.items() if f[0] == head)).parts
    folder = PurePosixPath(*parts[: parts.index(head) + 1])
    return str(folder), _sorted({name: f[0] for name, f in pictures.items() if f[0] != head})


def _sorted(kinds: dict[str, str]) -> dict[str, str]:
    return dict(sorted(kinds.items(), key=lambda item: (item[1], item[0])))


def read_masks(
    path: Path, layout: Inspection, names: Sequence[str], size: tuple[int, int], fit: Fit
) -> dict[str, np.ndarray]:
    """The masks of the images that have one, for images that are scored at `size` (H, W). A mask is cropped
    like its image and kept at about its own size: bool [kH, kW] with an integer k. The values of a dark mask
    are labels, as VisA's 1 … 9, so all but 0 are a defect. Raises UsageError if a mask and its image differ
    in size."""
    from gzcli.data.readers.pictures import Decoding, decode, sides_of

    marked = [name for name in names if name in layout.masks]
    if not marked:
        return {}
    members = open_members(path, is_picture)
    sizes = {name: sides_of(data) for name, data in members.read(marked)}
    k = max(1, min(min(sizes[marked[0]]), MAX_MAP_SIDE) // min(size))
    decoding = Decoding(as_size(k * size[0], k * size[1]), 1, fit=fit)
    picture_of = {mask: name for name in marked for mask in layout.masks[name]}
    masks: dict[str, np.ndarray] = {}
    for mask, data in members.read(list(picture_of)):
        name = picture_of[mask]
        image, _ = decode(data, mask, decoding)
        if (sides := sides_of(data)) != sizes[name]:
            message = f"the mask `{mask}` is {by_sides(sides)}, but its image is {by_sides(sizes[name])}"
            raise UsageError(message, hint="replace or remove it")
        masks[name] = masks.get(name, False) | (image[0] > (MASK_GREY if image.max() > MASK_GREY else 0))
    return masks
