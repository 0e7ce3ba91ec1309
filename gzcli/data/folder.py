"""The user's own images: a folder, zip, tar, npz or dataset folder, and what its layout says of splits and
classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

import numpy as np

from gzcli.data.archives import Members, open_members
from gzcli.data.build import Source
from gzcli.data.conditions import CAPTIONS, TARGETS, further_of
from gzcli.data.encoded import encoded
from gzcli.data.kinds import KINDS, LABEL, METADATA, Wanted, is_picture, may_be_picture
from gzcli.data.layout import placed, scored
from gzcli.data.pictures import decode
from gzcli.data.walk import is_regular, read_regular
from gzcli.errors import MissingError, UsageError


def open_path(path: Path, form: str | None = None, *, foreign: bool = False) -> Source:
    """The images at a path: folder, zip, tar, npz or dataset folder. `form`: how the folders of pictures are
    meant (of
    `layout.FORMS`); pictures that are only to be scored (`foreign`) lie in whatever folders. Raises
    UsageError or MissingError for what is not a set."""
    if path.suffix.lower() == ".npz" and is_regular(path):
        from gzcli.data.npz import npz

        source = npz(path)
    else:
        from gzcli.data.dataset_folder import dataset_folder, is_dataset_folder

        if not is_dataset_folder(path):
            wanted = Wanted()
            members = open_members(path, wanted)
            archives = [kind for kind in (".tar", ".zip", ".npz") if kind in wanted.others]
            if archives and not any(map(is_picture, members.names)):
                hint = "give one of them; what lies in several, unpack into one folder"
                raise MissingError(f"`{path}` holds archives ({' '.join(archives)}) and no images", hint=hint)
            source = pictures(str(path), members, form, foreign=foreign)
            return replace(source, notes=[*source.notes, *wanted.notes])
        source = dataset_folder(path)
    if form:
        raise UsageError(f"`{path}` has no folders of pictures", hint="leave `--layout` out")
    return source


def pictures(title: str, members: Members, form: str | None = None, *, foreign: bool = False) -> Source:
    """Encoded pictures in one of the layouts of `layout.py`. Captions are the lines of a `metadata.jsonl`
    ({"file_name": …,
    "text": …}, relative to it) or a `NAME.txt` beside the picture. A line may name further pictures of its
    image
    ("control": …, "before": …), which are then no images of the set themselves. A `NAME.cls` is its label, in
    the place of what the folders say."""
    names = [name for name in members.names if is_picture(name)]
    if not names:
        raise MissingError(f"`{title}` holds no images", hint=f"pictures are files of these kinds: {KINDS}")
    lines, beside = _told(title, members, names)
    further = {kind: {} for line in lines.values() for kind in line.further}
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
    labels = {} if foreign else _labels(title, members, names)
    found = scored(names) if foreign else placed(title, names, form, {} if labels else _annotated(members))
    if labels:
        found.places = {name: (split, labels[name]) for name, (split, _) in found.places.items()}
    every = {label for _, label in found.places.values() if label is not None}
    numbered = labels and all(label.isdecimal() and len(label) < 6 for label in every)
    classes = tuple(map(str, range(max(map(int, every)) + 1))) if numbered else tuple(sorted(every))
    number = (
        {label: int(label) for label in every} if numbered else {label: i for i, label in enumerate(classes)}
    )
    rows = {name: (split, number.get(label)) for name, (split, label) in found.places.items()}
    captions = beside | {name: line.caption for name, line in lines.items()}
    source = encoded(
        title, classes, [(members, rows)], captions=captions, further=further, probe=True, named=True
    )
    return replace(source, notes=[*members.notes, *found.notes])


def _labels(title: str, members: Members, names: list[str]) -> dict[str, str]:
    """The labels in `NAME.cls` files beside pictures, or {}. Raises UsageError where only some pictures have
    one."""
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
    """The classes that TinyImageNet's `SPLIT/SPLIT_annotations.txt` give to `SPLIT/images/…`: NAME, tab,
    class, tab, box."""
    wanted = [name for name in members.names if name.endswith("_annotations.txt") and "/" in name]
    found: dict[str, str] = {}
    for name, data in members.read(wanted) if wanted else ():
        rows = (line.split("\t") for line in data.decode("utf-8", "replace").splitlines())
        found |= {f"{PurePosixPath(name).parent}/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    return found


class _Line(NamedTuple):
    """What a line of `metadata.jsonl` says of a picture; names are relative to it."""

    picture: str
    caption: str
    further: dict[str, str]  # kind → name of that picture


def _told(title: str, members: Members, names: list[str]) -> tuple[dict[str, _Line], dict[str, str]]:
    """What the lines of `metadata.jsonl` say, by picture, and the captions of text files beside pictures;
    names in both are those of members."""
    beside = {str(PurePosixPath(name).with_suffix(".txt")): name for name in names}
    wanted = [name for name in members.names if name in beside or PurePosixPath(name).name == METADATA]
    lines, captions, known = {}, {}, set(names)
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
    """A line of `metadata.jsonl`. Keys may end in `_file_name`, as the `datasets` library has it; one that
    may name a picture but does not ("source": "flickr") says nothing."""
    hint = 'each line is like {"file_name": "0001.png", "text": "a red door"}'
    try:
        row = {key.removesuffix("_file_name"): value for key, value in json.loads(line).items()}
        named = {key: value for key, value in row.items() if isinstance(value, str) and may_be_picture(value)}
        targets = [named[key] for key in TARGETS if key in named]
        picture = str(row["file_name"]) if "file_name" in row or not targets else targets[0]
        caption = next(row[key] for key in CAPTIONS if isinstance(row.get(key), str))
    except (ValueError, KeyError, StopIteration, AttributeError) as e:
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


def read_pictures(path: Path, *, size: int, channels: int, limit: int | None) -> np.ndarray:
    """The picture at `path`, or the first `limit` (None: all) of a folder, zip or tar in order of names:
    uint8 [n, C, size, size].

    Raises MissingError where there are none, or one does not decode.
    """
    if not path.exists():
        raise MissingError(
            f"there is no `{path}`", hint="give a picture, or a folder, zip or tar of pictures"
        )
    if path.is_file() and is_picture(path.name):
        return np.stack([decode(read_regular(path), str(path), size=size, channels=channels)[0]])
    members = open_members(path, is_picture)
    if not members.names:
        raise MissingError(f"`{path}` holds no images", hint=f"pictures are files of these kinds: {KINDS}")
    read = members.read(sorted(members.names)[:limit])
    found = {name: decode(data, name, size=size, channels=channels)[0] for name, data in read}
    return np.stack([found[name] for name in sorted(found)])
