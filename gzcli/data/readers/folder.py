"""The user's own images at a path, and what the folders around pictures mean: splits and classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.sizes import Size
from gzcli.core.types import Say, silent
from gzcli.core.units import counted
from gzcli.data.packs.pack import middle
from gzcli.data.readers.archive import open_members
from gzcli.data.readers.files import (
    LABEL,
    METADATA,
    PICTURE_KINDS,
    PictureFilter,
    is_picture,
    is_regular,
    may_be_picture,
    read_regular,
    split_of,
)
from gzcli.data.readers.hub import dataset_folder, is_dataset_folder
from gzcli.data.readers.images import Encoded, Members, RawImages, Span
from gzcli.data.readers.npz import npz
from gzcli.data.readers.pictures import Decoding, decode, noted
from gzcli.data.sets.registry import CAPTIONS, TARGETS, Form, further_of

LAYOUTS = ("flat", "classes", "splits", "class-splits")  # what `--layout` takes
HINT = "a set is a flat folder, class folders, `train` and `test` of these, or `trainA trainB testA testB`"
ASK = "`gz data import PATH --name NAME --layout flat|classes|splits|class-splits` says what is meant"

_IMAGES = re.compile(r"(images?|imgs?|pictures?|photos?|jpe?g(images)?|rgb|png)")
_MARKS = re.compile(r"(ground_?truth|gt|masks?|segmentations?|annotations?|labels?)", re.IGNORECASE)


@dataclass
class Placed:
    """Where each picture belongs."""

    # (split, class or None) of each picture by its name
    places: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was left out of the set, and why


def placed(
    title: str, names: Iterable[str], layout: str | None = None, annotated: Mapping[str, str] | None = None
) -> Placed:
    """The splits and classes of pictures by their folders."""
    folders = _without_lone(names, layout)
    layout = layout or _layout(title, folders)
    if layout == "flat":
        return Placed(dict.fromkeys(folders, ("train", None)))
    if layout == "classes":
        return _without_one_class(
            Placed({name: ("train", _class(title, name, f)) for name, f in folders.items()})
        )
    out = Placed()
    if layout == "class-splits":
        for name, f in folders.items():
            if len(f) < 2 or not (found := split_of(f[1])):
                raise UsageError(f"`{title}` has `{name}`, which is in no split of a class", hint=ASK)
            out.places[name] = found[0], f[0]
        return _checked(title, out)
    return _without_one_class(_checked(title, _by_split(title, folders, annotated or {}, out)))


def scored(names: Iterable[str]) -> Placed:
    """The splits of pictures that are only scored, in any layout and without classes.

    They are those of their folders where all pictures, but for masks, lie in folders of splits; else all
    pictures are of one split.
    """
    folders = _without_lone(names, None)
    heads = {name: f[0] if f else "" for name, f in folders.items()}
    splits = {name: split_of(head) for name, head in heads.items() if not _MARKS.fullmatch(head)}
    found = {name: (split[0], None) for name, split in splits.items() if split}
    if not found or len(found) < len(splits):
        return Placed(dict.fromkeys(folders, ("train", None)))
    return Placed({**found})


def _without_lone(names: Iterable[str], layout: str | None) -> dict[str, tuple[str, ...]]:
    """The folders in which each picture lies, by its name, without outer folders that hold all pictures."""
    folders = {name: PurePosixPath(name).parts[:-1] for name in names}
    while True:
        heads = {f[0] if f else None for f in folders.values()}
        head = next(iter(heads), None)
        if len(heads) != 1 or head is None or (layout in (None, "splits") and split_of(head)):
            return folders
        inner = {name: f[1:] for name, f in folders.items()}
        if layout == "classes" and not all(inner.values()):
            return folders
        if layout == "class-splits" and all(f and split_of(f[0]) for f in inner.values()):
            return folders
        folders = inner


def _layout(title: str, folders: Mapping[str, tuple[str, ...]]) -> str:
    """The layout of the folders."""
    heads = sorted({f[0] for f in folders.values() if f})
    splits = [head for head in heads if split_of(head)]
    loose = sorted(name for name, f in folders.items() if not f)
    if not splits:
        marks = [head for head in heads if _MARKS.fullmatch(head)]
        if marks and any(_IMAGES.fullmatch(head.lower()) for head in heads):
            hint = f"give the folder of the pictures alone; or {ASK}"
            raise UsageError(
                f"`{title}` has `{marks[0]}` beside its pictures: a class, or what marks them?", hint=hint
            )
        below = {name: len(f) > 1 and split_of(f[1]) is not None for name, f in folders.items()}
        if any(below.values()) and not all(below.values()):
            inside, outside = (
                next(name for name, is_below in below.items() if is_below is wanted)
                for wanted in (True, False)
            )
            message = (
                f"`{title}` has `{PurePosixPath(inside).parent}`, a split by its name, and "
                f"`{outside}` outside of any"
            )
            raise UsageError(message, hint=ASK)
        return "class-splits" if below and all(below.values()) else "classes" if heads else "flat"
    others = [head for head in heads if head not in splits and not _MARKS.fullmatch(head)]
    if others:
        message = (
            f"`{title}` mixes splits with other images: is `{splits[0]}` a split, or a class as "
            f"`{others[0]}`?"
        )
        raise UsageError(message, hint=f"{HINT}; {ASK}")
    if loose:
        raise UsageError(f"`{title}` mixes splits with other images, as `{loose[0]}`", hint=f"{HINT}; {ASK}")
    return "splits"


def _by_split(
    title: str, folders: Mapping[str, tuple[str, ...]], annotated: Mapping[str, str], out: Placed
) -> Placed:
    """Places in the layouts SPLIT/CLASS/…, SPLIT/… and SPLITA/…; folders of masks (`ground_truth`) are left
    out."""
    inside: dict[str, dict[str, tuple[str, ...]]] = {}  # split folder → name → folders in it
    for name, f in folders.items():
        if f and split_of(f[0]):
            inside.setdefault(f[0], {})[name] = f[1:]
        elif not f or not _MARKS.fullmatch(f[0]):
            raise UsageError(f"`{title}` has `{name}`, which is in no split", hint=ASK)
    if masks := [name for name, f in folders.items() if not split_of(f[0])]:
        out.notes.append(
            f"{counted(len(masks), 'picture')} of `{folders[masks[0]][0]}` skipped: they mark others"
        )
    by_split: dict[tuple[str, str], str] = {}
    splits = {head: found for head in sorted(inside) if (found := split_of(head))}
    for head, meant in splits.items():
        if (other := by_split.setdefault(meant, head)) != head:
            raise UsageError(
                f"`{title}` has `{other}` and `{head}`, which are one split", hint="put them into one folder"
            )
    inside = _without_lone_inside(inside)
    train = {
        f[0] if f else None for head in inside for f in inside[head].values() if splits[head][0] == "train"
    }
    for head, rows in inside.items():
        split, domain = splits[head]
        if domain:
            out.places |= dict.fromkeys(rows, (split, domain))
        else:
            _place_split(title, head, split, rows, train, annotated, out)
    return out


def _without_lone_inside(
    inside: dict[str, dict[str, tuple[str, ...]]],
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Folders by split and picture without two kinds that mean nothing: one of the same name in every split
    that holds all pictures (`train/images test/images`), and a split's own name inside it
    (`training_set/training_set`)."""
    while True:
        heads = {head: {f[0] if f else None for f in rows.values()} for head, rows in inside.items()}
        lone = {
            head: next(iter(firsts))
            for head, firsts in heads.items()
            if len(firsts) == 1 and None not in firsts
        }
        same = len(lone) == len(heads) and len(set(lone.values())) == 1
        strip = {head for head, first in lone.items() if same or split_of(first) == split_of(head)}
        if not strip:
            return inside
        inside = {
            h: {n: f[1:] for n, f in rows.items()} if h in strip else rows for h, rows in inside.items()
        }


def _place_split(
    title: str,
    head: str,
    split: str,
    rows: Mapping[str, tuple[str, ...]],
    train: set[str | None],
    annotated: Mapping[str, str],
    out: Placed,
) -> None:
    """Adds the places of one split's pictures to `out`. Its classes must be among those of train."""
    classes = {name: annotated.get(name, f[0] if f else None) for name, f in rows.items()}
    found = set(classes.values())
    if None in found and len(found) > 1:
        loose = next(name for name, label in sorted(classes.items()) if label is None)
        raise UsageError(
            f"`{title}` has images beside its class folders, as `{loose}`", hint=f"{HINT}; {ASK}"
        )
    images = {label for label in found if label and _IMAGES.fullmatch(label.lower())}
    unlabelled = found == {None} or (found <= images and not found & train)
    if split != "train" and None not in train and unlabelled:
        out.notes.append(f"{counted(len(rows), 'picture')} of `{head}` skipped: they have no labels")
        return
    unknown = sorted(label for label in found - train if label is not None)
    if split != "train" and unknown:
        known = sorted(label for label in train if label is not None)
        if len(train) != 1 or not known:
            message = f"`{head}/{unknown[0]}` of `{title}` is a class that `train` has not"
            raise UsageError(message, hint=f"take it out, or name it as in `train`; {ASK}")
        named = f"`{head}/{unknown[0]}`" + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
        count = sum(label in unknown for label in classes.values())
        out.notes.append(f"{counted(count, 'picture')} of {named} skipped: `train` has only `{known[0]}`")
        classes = {name: label for name, label in classes.items() if label in train}
    out.places |= {name: (split, label) for name, label in classes.items()}


def _class(title: str, name: str, folders: tuple[str, ...]) -> str:
    """The class of a picture in class folders."""
    if not folders:
        raise UsageError(f"`{title}` has images beside its class folders, as `{name}`", hint=f"{HINT}; {ASK}")
    return folders[0]


def _checked(title: str, out: Placed) -> Placed:
    """`out`, which has a split train."""
    if not any(split == "train" for split, _ in out.places.values()):
        raise UsageError(f"`{title}` has no `train` folder beside its splits", hint=f"{HINT}; {ASK}")
    return out


def _without_one_class(out: Placed) -> Placed:
    """Places without their class where there is only one: `train/images`, `train/good`."""
    if len({label for _, label in out.places.values()}) == 1:
        out.places = {name: (split, None) for name, (split, _) in out.places.items()}
    return out


def pictures(title: str, members: Members, form: Form) -> RawImages:
    """The encoded pictures among the members of a folder or an archive, in one of the layouts of `layout.py`.

    Files beside a picture may describe it:
    - a line of a `metadata.jsonl`, {"file_name": …, "text": …}, whose names are relative to it. It may name
      further pictures ("control": …, "before": …), which then are no images of the set themselves.
    - `NAME.txt`, a caption
    - `NAME.cls`, a label in the place of what the folders say
    """
    names = [name for name in members.names if is_picture(name)]
    if not names:
        raise MissingError(
            f"`{title}` holds no images", hint=f"pictures are files of these kinds: {PICTURE_KINDS}"
        )
    lines, captions = _descriptions(title, members, names)
    captions |= {name: line.caption for name, line in lines.items()}
    further: dict[str, dict[str, str]] = {kind: {} for line in lines.values() for kind in line.further}
    for kind, given in further.items():
        given |= {name: line.further[kind] for name, line in lines.items() if kind in line.further}
    hidden = {name for given in further.values() for name in given.values()}.difference(lines)
    names = [name for name in names if name not in hidden]
    for kind, given in further.items():
        if lacking := [name for name in names if name not in given]:
            hint = f"each image has a line in `{METADATA}` with its `{kind}`, or none has"
            raise UsageError(
                f"`{title}` has {len(lacking):,} images without `{kind}`, as `{lacking[0]}`", hint=hint
            )
    labels = {} if form.foreign else _labels(title, members, names)
    annotated = {} if labels else _annotated(members)
    flat = form.layout == "flat"  # images that are scored are then all of them, whatever their folders say
    found = scored(names) if form.foreign and not flat else placed(title, names, form.layout, annotated)
    if labels:
        found.places = {name: (split, labels[name]) for name, (split, _) in found.places.items()}
    classes, number = _numbered({label for _, label in found.places.values()} - {None}, bool(labels))
    places = {name: (split, number[label]) for name, (split, label) in found.places.items()}
    images = Encoded(title, [(members, places)])
    return RawImages(
        title,
        classes,
        images.counts,
        images.labels() if classes else {},
        images.blocks(),
        probe=images.probe,
        spans=images.spans,
        captions=images.captions(captions),
        names=images.names(),
        further={kind: images.blocks(given) for kind, given in further.items()},
        notes=[*members.notes, *found.notes],
    )


def _numbered(labels: set[str | None], given: bool) -> tuple[tuple[str, ...], dict[str | None, int | None]]:
    """The classes that labels make, and the number of each label (None of None)."""
    texts = {label for label in labels if label is not None}
    if given and all(label.isdecimal() and len(label) < 6 for label in texts):
        return tuple(map(str, range(max(map(int, texts)) + 1))), {label: int(label) for label in texts}
    classes = tuple(sorted(texts))
    return classes, {None: None, **{label: i for i, label in enumerate(classes)}}


def _labels(title: str, members: Members, names: list[str]) -> dict[str, str]:
    """The labels in `NAME.cls` files beside pictures, by picture; {} without."""
    beside = {str(PurePosixPath(name).with_suffix(LABEL)): name for name in names}
    wanted = [name for name in members.names if name in beside]
    found = (
        {beside[name]: data.decode("utf-8", "replace").strip() for name, data in members.read(wanted)}
        if wanted
        else {}
    )
    if found and (lacking := next((name for name in names if not found.get(name)), None)):
        raise UsageError(
            f"`{title}` has no label `{LABEL}` beside `{lacking}`",
            hint="give one beside each picture, or none",
        )
    return found


def _annotated(members: Members) -> dict[str, str]:
    """The classes of pictures `SPLIT/images/NAME` by TinyImageNet's `SPLIT/SPLIT_annotations.txt`, whose
    lines are NAME, class and box with tabs between."""
    wanted = [name for name in members.names if name.endswith("_annotations.txt") and "/" in name]
    found: dict[str, str] = {}
    for name, data in members.read(wanted) if wanted else ():
        rows = (line.split("\t") for line in data.decode("utf-8", "replace").splitlines())
        found |= {f"{PurePosixPath(name).parent}/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    return found


class _Line(NamedTuple):
    """A line of `metadata.jsonl`."""

    picture: str  # name of the image
    caption: str  # its text
    further: dict[str, str]  # names of its further pictures by their kind


def _descriptions(title: str, members: Members, names: list[str]) -> tuple[dict[str, _Line], dict[str, str]]:
    """The lines of `metadata.jsonl`, and the captions of text files beside pictures, both by the picture's
    name."""
    beside = {str(PurePosixPath(name).with_suffix(".txt")): name for name in names}
    wanted = [name for name in members.names if name in beside or PurePosixPath(name).name == METADATA]
    lines: dict[str, _Line] = {}
    captions: dict[str, str] = {}
    known = set(names)
    for name, data in members.read(wanted) if wanted else ():
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UsageError(
                f"`{name}` in `{title}` is not UTF-8 text", hint="captions are plain text in UTF-8"
            ) from e
        if name in beside:
            captions[beside[name]] = text.strip()
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                picture, caption, further = _metadata_line(line, f"line {number} of `{name}` in `{title}`")
                member = {
                    file: normpath(f"{PurePosixPath(name).parent}/{file}")
                    for file in (picture, *further.values())
                }
                if lost := next((file for file in member.values() if file not in known), None):
                    raise MissingError(
                        f"line {number} of `{name}` names `{lost}`, which `{title}` does not hold"
                    )
                lines[member[picture]] = _Line(
                    picture, caption, {kind: member[file] for kind, file in further.items()}
                )
    return lines, captions


def _metadata_line(line: str, where: str) -> _Line:
    """A line of `metadata.jsonl`, read. Keys may end in `_file_name`, as the `datasets` library has it. A key
    of `conditions.FURTHER` whose value names no picture, as {"source": "flickr"}, says nothing."""
    hint = 'each line is like {"file_name": "0001.png", "text": "a red door"}'
    try:
        row = {key.removesuffix("_file_name"): value for key, value in json.loads(line).items()}
        named = {key: value for key, value in row.items() if isinstance(value, str) and may_be_picture(value)}
        targets = [named[key] for key in TARGETS if key in named]
        picture = str(row["file_name"]) if "file_name" in row or not targets else targets[0]
        caption = next(row[key] for key in CAPTIONS if isinstance(row.get(key), str))
    except (ValueError, KeyError, StopIteration, AttributeError, RecursionError) as e:
        raise UsageError(f"{where} has no `file_name` or no `text`", hint=hint) from e
    if any(target != picture for target in targets):
        hint = (
            'the image before an instruction is `before`, as in {"before": "in.png", "after": '
            '"out.png", "text": "make it snow"}'
        )
        raise UsageError(f"{where} names two images, `{picture}` and `{targets[-1]}`", hint=hint)
    further: dict[str, str] = {}
    for key, value in named.items():
        if kind := further_of(key):
            further.setdefault(kind, value)
    return _Line(picture, caption, further)


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
    """Pictures that are no data set, in order of their names: uint8 [n, C, H, W]."""
    if not path.exists():
        raise MissingError(
            f"there is no `{path}`", hint="give a picture, or a folder, zip or tar of pictures"
        )
    how = Decoding(size, channels, fit=fit)
    notes: list[str] = []
    if path.is_file() and is_picture(path.name):
        found = {str(path): _middle(read_regular(path), str(path), how, patch, notes.append)}
    else:
        members = open_members(path, is_picture)
        if not members.names:
            hint = f"pictures are files of these kinds: {PICTURE_KINDS}"
            raise MissingError(f"`{path}` holds no images", hint=hint)
        read = members.read(sorted(members.names)[:limit])
        found = {name: _middle(data, name, how, patch, notes.append) for name, data in read}
    if notes:
        say(f"`{path}`: {'; '.join(noted(notes))}")
    return np.stack([found[name] for name in sorted(found)])


def _middle(data: bytes, name: str, how: Decoding, patch: int | None, note: Say) -> np.ndarray:
    """The middle patch of a picture, or all of it: uint8 [C, H, W]."""
    image, _ = decode(data, name, how, note)
    if patch is None:
        return image
    _, height, width = image.shape
    if min(height, width) < patch:
        raise UsageError(
            f"`{name}` is {width}×{height}, smaller than the patch of {patch}×{patch}",
            hint="the model was trained on such patches; give larger pictures",
        )
    return image[:, middle(height, patch), middle(width, patch)]


def open_path(path: Path, form: Form | None = None) -> RawImages:
    """The images at a path: folder, zip, tar, npz or dataset folder."""
    form = form or Form()
    if path.suffix.lower() == ".npz" and is_regular(path):
        images = npz(path)
    elif is_dataset_folder(path):
        images = dataset_folder(path)
    else:
        return _read_members(path, form)
    if form.layout and not form.foreign:
        raise UsageError(f"`{path}` has no folders of pictures", hint="leave `--layout` out")
    return images


def _read_members(path: Path, form: Form) -> RawImages:
    """Encoded pictures in a folder or an archive; `notes` count files of other kinds."""
    wanted = PictureFilter()
    alone = form.foreign and is_picture(path.name) and path.is_file()
    members: Members = Alone(path) if alone else open_members(path, wanted)
    archives = [kind for kind in (".tar", ".zip", ".npz") if kind in wanted.others]
    if archives and not any(map(is_picture, members.names)):
        hint = "give one of them; what lies in several, unpack into one folder"
        raise MissingError(f"`{path}` holds archives ({' '.join(archives)}) and no images", hint=hint)
    images = pictures(str(path), members, form)
    return replace(images, notes=[*images.notes, *wanted.notes])


class Alone:
    """A single picture that is scored, as the only member of a folder."""

    def __init__(self, path: Path):
        self.path = path
        self.names, self.notes = [path.name], list[str]()

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name in self.names if some is None else some:
            yield name, read_regular(self.path)

    def spans(self) -> dict[str, Span]:
        path = self.path.absolute()
        return {self.path.name: Span(str(path), 0, path.stat().st_size, False)}
