"""The user's own images at a path, and the meaning of their folders: splits and classes. Ambiguous folders
are refused, and the error names them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from posixpath import normpath, splitext
from typing import NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, counted, middle
from gzcli.data.readers.archive import Files, open_members
from gzcli.data.readers.hub import LABELS, dataset_folder, is_dataset_folder
from gzcli.data.readers.images import (
    IMAGES,
    LABEL,
    MARKS,
    METADATA,
    PICTURE_KINDS,
    TABLES,
    Content,
    Encoded,
    Folders,
    Members,
    PictureFilter,
    RawImages,
    content_of,
    is_picture,
    is_regular,
    may_be_picture,
    split_of,
    without_outer,
)
from gzcli.data.readers.inspection import inspection, is_inspection
from gzcli.data.readers.npz import npz
from gzcli.data.readers.pictures import Decoding, decode, notes_in_words
from gzcli.data.readers.texts import lines_of, rows_of, text_of
from gzcli.data.readers.values import npy, of_files
from gzcli.data.sets.registry import CAPTIONS, TARGETS, Form, further_of, import_line

ARRAYS = {".npz": npz, ".npy": npy}  # readers of files that hold all images, by their ending
LAYOUTS = ("flat", "classes", "splits", "class-splits")  # values of `--layout`
DEFECTS = "defects"  # a layout that takes the images of an inspection set that have a defect, to score them
KINDS_HINT = f"give images in a format that gz reads: {PICTURE_KINDS}"

Places = dict[str, tuple[str, str | None]]  # name of an image → its split and its class, if any


def ask(title: str, layout: str | None = None) -> str:
    """The hint that shows how to choose the meaning of a set's folders, other than the chosen layout."""
    *others, last = [name for name in LAYOUTS if name not in ("flat", layout)]
    layouts = f"{', '.join(others)} or {last}"
    return f"choose a layout ({layouts} instead of flat): {import_line(title, '--layout flat')}"


def hint_of(title: str, layout: str | None = None) -> str:
    layouts = "a flat folder, class folders, `train` and `test` of these, or `trainA trainB testA testB`"
    return f"give {layouts}; or {ask(title, layout)}"


def open_path(path: Path, form: Form | None = None) -> RawImages:
    """The images at a path: a folder, zip, tar, npz, dataset folder, or a single image to score."""
    form = form or Form()
    ending = path.suffix.lower() if is_regular(path) and not path.is_dir() else ""
    if ending in ARRAYS or is_dataset_folder(path):
        images = ARRAYS.get(ending, dataset_folder)(path)
        if form.layout and not form.foreign:
            raise UsageError(f"`{path}` has no folders of images", hint="omit `--layout`")
        return images
    chosen = PictureFilter()
    single = form.foreign and is_picture(path.name) and path.is_file()
    members: Members = Files(path.parent, [path.name]) if single else open_members(path, chosen)
    archives = [kind for kind in (".tar", ".zip", ".npz") if kind in chosen.ignored]
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


# --- images and the files beside them ---


def pictures(title: str, members: Members, form: Form) -> RawImages:
    """The encoded images among the members of a folder or an archive.

    Files beside an image may describe it:
    - a line of a `metadata.jsonl`, {"file_name": …, "text": …}, with names relative to it. Further images
    in it ("control": …, "before": …) are not images of the set themselves.
    - `NAME.txt`, a caption
    - `NAME.cls`, a label, which overrides the folders
    - a row of a table `*.csv` with its name and its label, which override the folders, too
    """
    names = [name for name in members.names if is_picture(name)]
    if not names:
        raise MissingError(f"`{title}` contains no images", hint=KINDS_HINT)
    lines, captions = _descriptions(title, members, names)
    further: dict[str, dict[str, str]] = {}  # kind → image → its further image
    for name, line in lines.items():
        for kind, picture in line.further.items():
            further.setdefault(kind, {})[name] = picture
    hidden = {name for pairs in further.values() for name in pairs.values()}.difference(lines)
    names = [name for name in names if name not in hidden]
    for kind, pairs in further.items():
        if lacking := [name for name in names if name not in pairs]:
            hint = f"give every image a line in `{METADATA}` with its `{kind}`, or none"
            message = f"`{title}` has {len(lacking):,} images without `{kind}`, such as `{lacking[0]}`"
            raise UsageError(message, hint=hint)
    labels = {} if form.foreign else _label_files(title, members, names)
    layout: Places
    notes: list[str] = []
    listed, about = ({}, []) if form.foreign or labels else _listed(title, members, names)
    if form.layout == DEFECTS:
        inspected = inspection(title, names)
        layout = dict.fromkeys(inspected.kinds if inspected else (), ("test", None))
    elif form.foreign and form.layout != "flat":
        layout = scored(names)
    else:  # with `flat`, images that are scored are all of them, whatever their folders say
        annotated = {} if labels or listed else _annotated(title, members)
        layout, notes = places_of(title, names, form.layout, annotated)
    labels_of = labels or listed
    layout = {name: (split, labels_of.get(name, label)) for name, (split, label) in layout.items()}
    classes, number = _numbered({label for _, label in layout.values() if label is not None}, bool(labels))
    places = {name: (split, number.get(label)) for name, (split, label) in layout.items()}
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


def _texts(title: str, members: Members, names: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of some members. An archive is not opened for an empty list."""
    return ((name, text_of(data, name, title)) for name, data in (members.read(names) if names else ()))


def _label_files(title: str, members: Members, names: list[str]) -> dict[str, str]:
    """The labels in `NAME.cls` files by image, for all images or none."""
    files = [name for name in members.names if name.endswith(LABEL)]
    picture_of = {splitext(name)[0] + LABEL: name for name in names} if files else {}
    texts = _texts(title, members, [name for name in files if name in picture_of])
    labels = {picture_of[name]: text.strip() for name, text in texts}
    if labels and (lacking := next((name for name in names if not labels.get(name)), None)):
        hint = "give every image a label file, or none"
        raise UsageError(f"`{title}` has no label file (`{LABEL}`) for `{lacking}`", hint=hint)
    return labels


def _listed(title: str, members: Members, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The labels of images by the tables that list them, for all images or none, and notes on the tables."""
    tables = [name for name in members.names if splitext(name)[1].lower() in TABLES]
    labels: dict[str, str] = {}
    used: list[str] = []
    notes: list[str] = []
    for table, text in _texts(title, members, tables):
        try:
            rows, why = _labels_in(table, rows_of(text, table), names)
        except UsageError as e:
            notes.append(f"{e.message}; skipped")
            continue
        double = next((name for name, label in rows.items() if labels.get(name, label) != label), None)
        why = f"it has another label for `{double}` than `{used[0]}`" if double else why
        labels |= {} if why else rows
        (notes if why else used).append(f"`{table}` skipped: {why}" if why else table)
    if used and (lacking := [name for name in names if name not in labels]):
        few = f"{counted(len(lacking), 'image')}, such as `{lacking[0]}`"
        return {}, [*notes, f"`{used[0]}` skipped: it has no label for {few}"]
    return labels, [*notes, *(f"labels from `{table}`" for table in used)]


def _labels_in(table: str, rows: list[list[str]], names: list[str]) -> tuple[dict[str, str], str]:
    """The labels of images by a table, and why there are none. The column of names is the one that contains
    most images, possibly without ending or with other folders. Labels are in a column of LABELS, or in the
    only other column, if they repeat."""
    alike = Counter(key for name in names for key in {PurePosixPath(name).name, PurePosixPath(name).stem})
    image_of = {key: name for name in names for key in (PurePosixPath(name).stem, PurePosixPath(name).name)}
    image_of = {key: name for key, name in image_of.items() if alike[key] == 1}
    image_of |= {key: name for name in names for key in (splitext(name)[0], name)}

    @cache
    def image(cell: str) -> str | None:
        cell = cell.strip().replace("\\", "/")
        if cell.rstrip("/").rpartition("/")[2] not in alike:  # most cells of a wide table, soon
            return None
        places = (normpath(f"{PurePosixPath(table).parent}/{cell}"), normpath(cell), PurePosixPath(cell).name)
        return next((image_of[place] for place in places if place in image_of), None) if cell else None

    width = min(map(len, rows), default=0)
    counts = [len({image(row[i]) for row in rows} - {None}) for i in range(width)]
    if not any(counts):
        return {}, "it has no column of image files"
    at = counts.index(max(counts))
    heads = ["" if image(rows[0][at]) else cell.strip().lower() for cell in rows[0][:width]]
    column = next((heads.index(key) for key in LABELS if key in heads and heads.index(key) != at), None)
    if column is None and width == 2 and heads[1 - at] not in CAPTIONS:
        column = 1 - at
        if 2 * len({row[column] for row in rows if image(row[at])}) > counts[at]:
            return {}, "its labels do not repeat"
    if column is None:
        return {}, f"it has no column `{LABELS[0]}`"
    pairs = {(name, row[column].strip()) for row in rows if (name := image(row[at])) and row[column].strip()}
    if double := next((name for name, n in Counter(name for name, _ in pairs).items() if n > 1), None):
        return {}, f"it has several labels for `{double}`"
    return dict(pairs), ""


def _annotated(title: str, members: Members) -> dict[str, str]:
    """The classes of images `SPLIT/images/NAME` from TinyImageNet's `SPLIT/SPLIT_annotations.txt`, whose
    lines contain NAME, class and box, separated by tabs."""
    lists = [name for name in members.names if name.endswith("_annotations.txt") and "/" in name]
    classes: dict[str, str] = {}
    for name, text in _texts(title, members, lists):
        rows = (line.split("\t") for line in lines_of(text))
        classes |= {f"{PurePosixPath(name).parent}/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    return classes


class _Line(NamedTuple):
    """A line of `metadata.jsonl`."""

    picture: str  # name of the image
    caption: str
    further: dict[str, str]  # names of its further images by their kind


def _descriptions(title: str, members: Members, names: list[str]) -> tuple[dict[str, _Line], dict[str, str]]:
    """The lines of `metadata.jsonl`, and all captions, by image."""
    files = [name for name in members.names if name.endswith((".txt", METADATA))]
    picture_of = {splitext(name)[0] + ".txt": name for name in names} if files else {}
    texts = [name for name in files if name in picture_of or PurePosixPath(name).name == METADATA]
    lines: dict[str, _Line] = {}
    captions: dict[str, str] = {}
    pictures = set(names)
    for name, text in _texts(title, members, texts):
        if name in picture_of:
            captions[picture_of[name]] = text.strip()
            continue
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip():
                continue
            row = _metadata_line(line, f"line {number} of `{name}` in `{title}`")
            folder = PurePosixPath(name).parent
            member = {file: normpath(f"{folder}/{file}") for file in (row.picture, *row.further.values())}
            if lost := next((file for file in member.values() if file not in pictures), None):
                raise MissingError(
                    f"line {number} of `{name}` names `{lost}`, which `{title}` does not contain"
                )
            further = {kind: member[file] for kind, file in row.further.items()}
            lines[member[row.picture]] = row._replace(further=further)
    return lines, captions | {name: line.caption for name, line in lines.items()}


def _metadata_line(line: str, place: str) -> _Line:
    """Parses a line of `metadata.jsonl`. Keys may end in `_file_name`, as in the `datasets` library. A key of
    FURTHER is ignored if its value is not the name of an image, as in {"source": "flickr"}."""
    hint = 'write each line like {"file_name": "0001.png", "text": "a red door"}'
    try:
        row = {key.removesuffix("_file_name"): value for key, value in json.loads(line).items()}
        pictures = {k: v for k, v in row.items() if isinstance(v, str) and may_be_picture(v)}
        targets = [pictures[key] for key in TARGETS if key in pictures]
        picture = str(row["file_name"]) if "file_name" in row or not targets else targets[0]
        caption = next(row[key] for key in CAPTIONS if isinstance(row.get(key), str))
    except (ValueError, KeyError, StopIteration, AttributeError, RecursionError) as e:
        raise UsageError(f"{place} lacks `file_name` or `text`", hint=hint) from e
    if any(target != picture for target in targets):
        example = '{"before": "in.png", "after": "out.png", "text": "make it snow"}'
        hint = f"name the image to edit `before`, as in {example}"
        raise UsageError(f"{place} names two images, `{picture}` and `{targets[-1]}`", hint=hint)
    further: dict[str, str] = {}
    for key, value in pictures.items():
        if kind := further_of(key):
            further.setdefault(kind, value)
    return _Line(picture, caption, further)


# --- layouts ---


def places_of(
    title: str, names: Iterable[str], layout: str | None = None, annotated: Mapping[str, str] | None = None
) -> tuple[Places, list[str]]:
    """The splits and classes of images by their folders or by TinyImageNet's lists, and notes on omissions.
    Raises UsageError with the name of an ambiguous folder."""
    folders, chosen = without_outer(names, layout), layout
    layout = layout or _layout_of(title, folders)
    if layout == "flat":
        return dict.fromkeys(folders, ("train", None)), []
    notes: list[str] = []
    places: Places = {}
    if chosen:
        folders, notes = _in_folders(title, folders, chosen)
    if layout == "splits":
        places, more = _by_split(title, folders, annotated or {}, chosen)
        notes += more
    for name, f in folders.items() if layout == "classes" else ():
        if not f:
            raise beside_classes(title, name, layout)
        places[name] = "train", f[0]
    for name, f in folders.items() if layout == "class-splits" else ():
        if len(f) < 2 or not (split := split_of(f[1])):
            message = f"`{title}` contains `{name}`, which is in a class but not in a split"
            raise UsageError(message, hint=ask(title, chosen))
        places[name] = split[0], f[0]
    if not any(split == "train" for split, _ in places.values()):
        raise UsageError(f"`{title}` has splits but no `train`", hint=hint_of(title, chosen))
    if layout != "class-splits" and len({label for _, label in places.values()}) == 1:
        # a single folder, such as `train/images` or `train/good`, is not a class
        places = {name: (split, None) for name, (split, _) in places.items()}
    return places, notes


def _in_folders(title: str, folders: Folders, layout: str) -> tuple[Folders, list[str]]:
    """The images that are in folders, and a note on the others, which have no meaning in a chosen layout.
    Raises UsageError if no image is in a folder."""
    inside = {name: f for name, f in folders.items() if f}
    if not inside:
        message = f"`{title}` has no folders for the layout `{layout}`"
        raise UsageError(message, hint=f"omit `--layout`, or {ask(title, layout)}")
    loose = sorted(folders.keys() - inside.keys())
    return inside, [f"{counted(len(loose), 'image')} outside folders skipped (`{loose[0]}`)"] if loose else []


def beside_classes(title: str, name: str, layout: str) -> UsageError:
    """The error for an image beside class folders, in a layout that gz has inferred."""
    message = f"`{title}` has images beside its class folders, such as `{name}`"
    ways = f"move it into one, skip it with `--layout {layout}`, or ignore all folders"
    return UsageError(message, hint=f"{ways}: {import_line(title, '--layout flat')}")


def scored(names: Iterable[str]) -> Places:
    """The splits of images that are only scored, by their folders if all but masks are in split folders."""
    folders = without_outer(names, None)
    heads = {name: f[0] if f else "" for name, f in folders.items()}
    splits = {name: split_of(head) for name, head in heads.items() if not MARKS.fullmatch(head)}
    if not splits or not all(splits.values()):
        return dict.fromkeys(folders, ("train", None))
    return {name: (split[0], None) for name, split in splits.items() if split}


def _layout_of(title: str, folders: Folders) -> str:
    heads = sorted({f[0] for f in folders.values() if f})
    splits = [head for head in heads if split_of(head)]
    marks = [head for head in heads if MARKS.fullmatch(head)]
    if splits:
        strays = [head for head in heads if head not in (*splits, *marks)]
        mixes = f"`{title}` has images outside its splits"
        if strays:
            message = f"{mixes}: `{splits[0]}` is a split, or a class like `{strays[0]}`"
            raise UsageError(message, hint=hint_of(title))
        if loose := sorted(name for name, f in folders.items() if not f):
            raise UsageError(f"{mixes}, such as `{loose[0]}`", hint=hint_of(title))
        return "splits"
    if marks and any(map(IMAGES.fullmatch, heads)):
        message = f"`{title}` has `{marks[0]}` beside its images, which is either a class or annotations"
        raise UsageError(message, hint=f"give only the folder of images, or {ask(title)}")
    inside = [name for name, f in folders.items() if len(f) > 1 and split_of(f[1])]
    outside = next((name for name, f in folders.items() if len(f) <= 1 or not split_of(f[1])), None)
    if inside and outside:
        split = PurePosixPath(inside[0]).parent
        message = f"`{title}` has a split `{split}`, but `{outside}` is outside any split"
        raise UsageError(message, hint=ask(title))
    return "class-splits" if inside else "classes" if heads else "flat"


def _by_split(
    title: str, folders: Folders, annotated: Mapping[str, str], chosen: str | None
) -> tuple[Places, list[str]]:
    """The places in the layouts SPLIT/CLASS/…, SPLIT/… and SPLITA/…, without masks, and notes."""
    inside: dict[str, Folders] = {}  # by split folder
    masks: list[str] = []  # for each mask, its folder
    for name, f in folders.items():
        if f and split_of(f[0]):
            inside.setdefault(f[0], {})[name] = f[1:]
        elif f and MARKS.fullmatch(f[0]):
            masks.append(f[0])
        else:
            message = f"`{title}` contains `{name}`, which is not in a split"
            raise UsageError(message, hint=ask(title, chosen))
    notes, inspected = list[str](), is_inspection(list(folders))
    if masks:
        use = "kept for `gz ood`, as masks of defects" if inspected else "skipped: they annotate other images"
        notes.append(f"{counted(len(masks), 'image')} of `{masks[0]}` {use}")
    splits = {head: split for head in sorted(inside) if (split := split_of(head))}
    folder_of: dict[tuple[str, str], str] = {}
    for head, split in splits.items():
        if (first_head := folder_of.setdefault(split, head)) != head:
            message = f"`{title}` has `{first_head}` and `{head}`, which are the same split"
            raise UsageError(message, hint="merge them into one folder")
    inside = _without_meaningless(inside)
    of_train = (f for head in inside for f in inside[head].values() if splits[head][0] == "train")
    train = {f[0] if f else None for f in of_train}
    places: Places = {}
    for head, rows in inside.items():
        split_name, domain = splits[head]
        classes: dict[str, str | None] = dict.fromkeys(rows, domain)
        if not domain:
            classes = {name: annotated.get(name, f[0] if f else None) for name, f in rows.items()}
            loose = sorted(name for name, label in classes.items() if label is None)
            if loose and len(loose) < len(classes):  # beside class folders
                if not chosen:
                    raise beside_classes(title, loose[0], "splits")
                notes.append(f"{counted(len(loose), 'image')} outside folders skipped (`{loose[0]}`)")
                classes = {name: label for name, label in classes.items() if label is not None}
            classes, note = _of_split(title, head, classes, train, inspected)
            notes += [note] if note else []
        places |= {name: (split_name, label) for name, label in classes.items()}
    return places, notes


def _without_meaningless(inside: dict[str, Folders]) -> dict[str, Folders]:
    """Folders by split without two meaningless kinds: a folder of all images with the same name in every
    split (`train/images test/images`), and a repeated split name (`training_set/training_set`)."""
    while True:
        heads = {head: {f[0] if f else None for f in rows.values()} for head, rows in inside.items()}
        single = {head: next(iter(firsts)) for head, firsts in heads.items() if len(firsts) == 1}
        lone = {head: first for head, first in single.items() if first}
        is_shared = len(lone) == len(heads) and len(set(lone.values())) == 1
        strip = {head for head, first in lone.items() if is_shared or split_of(first) == split_of(head)}
        if not strip:
            return inside
        for head in strip:
            inside = inside | {head: {name: f[1:] for name, f in inside[head].items()}}


def _of_split(
    title: str, head: str, classes: dict[str, str | None], train: set[str | None], inspected: bool
) -> tuple[dict[str, str | None], str]:
    """The classes of a split's images that are also in train, and a note on the others."""
    labels = set(classes.values())
    if split_of(head) == ("train", ""):
        return classes, ""
    images = {label for label in labels if label and IMAGES.fullmatch(label)}
    if None not in train and (labels == {None} or (labels <= images and not labels & train)):
        return {}, f"{counted(len(classes), 'image')} of `{head}` skipped: they have no labels"
    unknown = sorted(label for label in labels - train if label is not None)
    if not unknown:
        return classes, ""
    if len(train) != 1 or None in train:
        message = f"`{head}/{unknown[0]}` of `{title}` is a class that `train` lacks"
        raise UsageError(message, hint=f"remove it, or rename it as in `train`; or {ask(title)}")
    used = {name: label for name, label in classes.items() if label in train}
    more = f" and {counted(len(unknown) - 1, 'other folder')}" if len(unknown) > 1 else ""
    left_out = f"{counted(len(classes) - len(used), 'image')} of `{head}/{unknown[0]}`{more}"
    use = "kept for `gz ood`, as images with defects"
    return used, f"{left_out} {use if inspected else f'skipped: `train` has only `{next(iter(train))}`'}"
