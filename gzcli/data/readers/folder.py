"""Pictures of a folder, zip or tar: their splits and classes, and the captions and labels beside them."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.units import Size
from gzcli.data.packs.forms import Decoding, Form, Say, silent
from gzcli.data.packs.pack import middle
from gzcli.data.readers.archives import Members, open_members
from gzcli.data.readers.conditions import CAPTIONS, TARGETS, further_of
from gzcli.data.readers.encoded import Encoded
from gzcli.data.readers.kinds import KINDS, LABEL, METADATA, is_picture, may_be_picture
from gzcli.data.readers.layout import placed, scored
from gzcli.data.readers.pictures import decode, noted
from gzcli.data.readers.raw_images import RawImages
from gzcli.data.readers.walk import read_regular


def pictures(title: str, members: Members, form: Form) -> RawImages:
    """The encoded pictures among the members of a folder or an archive, in one of the layouts of `layout.py`.

    Files beside a picture may describe it:
    - a line of a `metadata.jsonl`, {"file_name": …, "text": …}, whose names are relative to it. It may name
      further pictures ("control": …, "before": …), which then are no images of the set themselves.
    - `NAME.txt`, a caption
    - `NAME.cls`, a label in the place of what the folders say

    title: what messages call the set.
    form: the layout, and whether the images are scored only.

    Raises UsageError for what is ambiguous or incomplete, MissingError where there are no pictures.
    """
    names = [name for name in members.names if is_picture(name)]
    if not names:
        raise MissingError(f"`{title}` holds no images", hint=f"pictures are files of these kinds: {KINDS}")
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
    """The classes that labels make, and the number of each label (None of None).

    given: whether the labels stand in files: then numbers of up to five digits mean themselves.
    """
    texts = {label for label in labels if label is not None}
    if given and all(label.isdecimal() and len(label) < 6 for label in texts):
        return tuple(map(str, range(max(map(int, texts)) + 1))), {label: int(label) for label in texts}
    classes = tuple(sorted(texts))
    return classes, {None: None, **{label: i for i, label in enumerate(classes)}}


def _labels(title: str, members: Members, names: list[str]) -> dict[str, str]:
    """The labels in `NAME.cls` files beside pictures, by picture; {} without. Raises UsageError where only
    some pictures have one."""
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
    """A line of `metadata.jsonl`.

    picture: name of the image.
    caption: its text.
    further: names of its further pictures by their kind.
    """

    picture: str
    caption: str
    further: dict[str, str]


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
    """Pictures that are no data set, in order of their names: uint8 [n, C, H, W].

    path: a picture, or a folder, zip or tar of pictures.
    size: to which they are resized; None: they stay as they are.
    channels: 1 (grey) or 3 (RGB).
    limit: pictures at most; None: all.
    fit: how pictures of another shape come to the size.
    patch: side of the middle patches of them that are wanted; None: whole pictures are.
    say: takes a line about how pictures were read that are not plain grey or colour of 8 bits.

    Raises MissingError where there are none, or one does not decode; UsageError for one smaller than the
    patch.
    """
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
            hint = f"pictures are files of these kinds: {KINDS}"
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
