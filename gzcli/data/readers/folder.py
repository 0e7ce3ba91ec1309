"""The user's own images at a path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.formats import ARCHIVE, ARRAY, SET, endings_of
from gzcli.core.sections import Fit
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, middle
from gzcli.data.readers import beside
from gzcli.data.readers.archive import Files, open_members
from gzcli.data.readers.hub import dataset_folder, is_dataset_folder
from gzcli.data.readers.images import (
    SUFFIXES,
    Content,
    Encoded,
    Members,
    PictureFilter,
    RawImages,
    content_of,
    is_picture,
    is_regular,
)
from gzcli.data.readers.layouts import places_of
from gzcli.data.readers.npz import npz
from gzcli.data.readers.pictures import Decoding, decode, notes_in_words
from gzcli.data.readers.values import npy, of_files
from gzcli.data.sets.registry import Form

# readers of files that contain all images, by their ending
SETS = {**dict.fromkeys(endings_of("npz"), npz), **dict.fromkeys(endings_of(ARRAY), npy)}
KINDS_HINT = f"give images in a format that gz reads: {' '.join(SUFFIXES).replace('.', '')}"


def open_path(path: Path, form: Form | None = None) -> RawImages:
    """The images at a path: a folder, zip, tar, npz, dataset folder, or a single image to score."""
    form = form or Form()
    ending = path.suffix.lower() if is_regular(path) and not path.is_dir() else ""
    if ending in SETS or is_dataset_folder(path):
        images = SETS.get(ending, dataset_folder)(path)
        if form.layout and not form.foreign:
            raise UsageError(f"`{path}` has no folders of images", hint="omit `--layout`")
        return images
    chosen = PictureFilter()
    single = form.foreign and is_picture(path.name) and path.is_file()
    members: Members = Files(path.parent, [path.name]) if single else open_members(path, chosen)
    archives = [ending for ending in endings_of(ARCHIVE, SET) if ending in chosen.ignored]
    if archives and not any(map(is_picture, members.names)):
        hint = "give one of them; if the set is in several archives, unpack them into one folder"
        raise MissingError(f"`{path}` contains archives ({' '.join(archives)}) but no images", hint=hint)
    images = pictures(str(path), members, form)
    files = [name for name in members.names if is_picture(name)]
    images = of_files(images, files, resized=form.size is not None)
    return replace(images, notes=[*images.notes, *chosen.notes])


def read_pictures(
    path: Path,
    *,
    size: Size | None,
    channels: int,
    limit: int | None,
    fit: Fit = "crop",
    patch: int | None = None,
    say: Say = silent,
) -> np.ndarray:
    """The first `limit` images at a path, or their middle patches, ordered by name: uint8 [n, C, H, W]."""
    if not path.exists():
        hint = "give an image, or a folder, zip or tar of images"
        raise MissingError(f"`{path}` does not exist", hint=hint)
    if path.is_file() and is_picture(path.name):
        encoded: Iterator[tuple[str, Content]] = iter([(str(path), content_of(path))])
    else:
        members = open_members(path, is_picture)
        if not members.names:
            raise MissingError(f"`{path}` contains no images", hint=KINDS_HINT)
        encoded = members.read(sorted(members.names)[:limit])
    decoding = Decoding(size, channels, fit=fit)
    notes: list[str] = []
    images = {}
    for name, data in encoded:
        image, _ = decode(data, name, decoding, notes.append)
        _, height, width = image.shape
        if patch and min(height, width) < patch:
            hint = "give larger images: the model was trained on patches of this size"
            message = f"`{name}` is {width}×{height}, smaller than the patch of {patch}×{patch}"
            raise UsageError(message, hint=hint)
        images[name] = image[:, middle(height, patch), middle(width, patch)] if patch else image
    if notes:
        say(f"`{path}`: {'; '.join(notes_in_words(notes))}")
    return np.stack([images[name] for name in sorted(images)])


def pictures(title: str, members: Members, form: Form) -> RawImages:
    """The encoded images among the members of a folder or an archive. Their folders, and files beside them,
    may describe them."""
    names = [name for name in members.names if is_picture(name)]
    if not names:
        raise MissingError(f"`{title}` contains no images", hint=KINDS_HINT)
    names, captions, further = beside.descriptions(title, members, names)
    labels, numbered, about = ({}, False, []) if form.foreign else beside.labels(title, members, names)
    annotated = {} if form.foreign or labels else beside.annotated(title, members)
    layout, notes = places_of(title, names, form, annotated)
    label_of = {name: labels.get(name, label) for name, (_, label) in layout.items()}
    classes, number = _numbered({label for label in label_of.values() if label is not None}, numbered)
    places = {name: (split, number.get(label_of[name])) for name, (split, _) in layout.items()}
    images = Encoded(title, [(members, places)])
    texts = {split: [captions.get(name, "") for name in of_split] for split, of_split in images.names.items()}
    return replace(
        images.images(classes),
        probe=images.probe,
        captions=texts if captions else {},
        names=images.names,
        further={kind: images.blocks(pairs) for kind, pairs in further.items()},
        notes=[*members.notes, *about, *notes],
    )


def _numbered(labels: set[str], in_files: bool) -> tuple[tuple[str, ...], dict[str | None, int]]:
    """The classes of these labels, and the class number of each label. Labels from files that are numbers of
    up to five digits are class numbers themselves."""
    if in_files and all(label.isdecimal() and len(label) < 6 for label in labels):
        return tuple(map(str, range(max(map(int, labels)) + 1))), {label: int(label) for label in labels}
    classes = tuple(sorted(labels))
    return classes, {label: i for i, label in enumerate(classes)}
