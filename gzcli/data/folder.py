"""The user's own images: a folder, zip, tar, npz or dataset folder, and what its layout says of splits and classes."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

import numpy as np

from gzcli.data.archives import Members, open_members
from gzcli.data.build import Source
from gzcli.data.conditions import CAPTIONS, TARGETS, further_of
from gzcli.data.encoded import encoded
from gzcli.data.pictures import decode
from gzcli.errors import MissingError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KINDS = " ".join(suffix[1:] for suffix in SUFFIXES)
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PAIRED = {f"{split}{domain}": (split, domain) for split in ("train", "val", "test") for domain in "AB"}
METADATA = "metadata.jsonl"

LAYOUTS = "a flat folder, class folders, `train` and `test`, or `trainA`, `trainB`, `testA` and `testB`"


def open_path(path: Path) -> Source:
    """The images at a path: folder, zip, tar, npz or dataset folder. Raises UsageError or MissingError for what is not
    a set."""
    if path.suffix.lower() == ".npz":
        from gzcli.data.npz import npz

        return npz(path)
    from gzcli.data.dataset_folder import dataset_folder, is_dataset_folder

    if is_dataset_folder(path):
        return dataset_folder(path)
    return pictures(str(path), open_members(path, lambda name: _is_picture(name) or _is_text(name)))


def pictures(title: str, members: Members) -> Source:
    """Encoded pictures in one of the layouts: flat, class folders, `train/test` (each flat or of class folders), or
    `trainA trainB testA testB` (classes A and B). A lone folder around them all is passed through. Captions are the lines
    of a `metadata.jsonl` ({"file_name": …, "text": …}, relative to it) or a `NAME.txt` beside the picture. A line may name
    further pictures of its image ("control": …, "before": …), which are then no images of the set themselves."""
    names = [name for name in members.names if _is_picture(name)]
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
            raise UsageError(f"`{title}` has {len(lacking):,} images without `{kind}`, as `{lacking[0]}`", hint=hint)
    places = _places(title, names)
    classes = tuple(sorted({label for _, label in places.values() if label is not None}))
    number = {label: i for i, label in enumerate(classes)}
    numbered = {name: (split, number.get(label)) for name, (split, label) in places.items()}
    captions = beside | {name: line.caption for name, line in lines.items()}
    return encoded(title, classes, [(members, numbered)], captions=captions, further=further, probe=True)


class _Line(NamedTuple):
    """What a line of `metadata.jsonl` says of a picture; names are relative to it."""

    picture: str
    caption: str
    further: dict[str, str]  # kind → name of that picture


def _told(title: str, members: Members, names: list[str]) -> tuple[dict[str, _Line], dict[str, str]]:
    """What the lines of `metadata.jsonl` say, by picture, and the captions of text files beside pictures; names in both
    are those of members."""
    beside = {str(PurePosixPath(name).with_suffix(".txt")): name for name in names}
    wanted = [name for name in members.names if name in beside or PurePosixPath(name).name == METADATA]
    lines, captions, known = {}, {}, set(names)
    for name, data in members.read(wanted) if wanted else ():
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UsageError(f"`{name}` in `{title}` is not UTF-8 text", hint="captions are plain text in UTF-8") from e
        if name in beside:
            captions[beside[name]] = text.strip()
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                picture, caption, further = _metadata_line(line, f"line {number} of `{name}` in `{title}`")
                member = {file: normpath(f"{PurePosixPath(name).parent}/{file}") for file in (picture, *further.values())}
                if lost := next((file for file in member.values() if file not in known), None):
                    raise MissingError(f"line {number} of `{name}` names `{lost}`, which `{title}` does not hold")
                lines[member[picture]] = _Line(picture, caption, {kind: member[file] for kind, file in further.items()})
    return lines, captions


def _metadata_line(line: str, where: str) -> _Line:
    """A line of `metadata.jsonl`. Keys may end in `_file_name`, as the `datasets` library has it; one that may name a picture
    but does not ("source": "flickr") says nothing."""
    hint = 'each line is like {"file_name": "0001.png", "text": "a red door"}'
    try:
        row = {key.removesuffix("_file_name"): value for key, value in json.loads(line).items()}
        named = {key: value for key, value in row.items() if isinstance(value, str) and _may_be_picture(value)}
        targets = [named[key] for key in TARGETS if key in named]
        picture = str(row["file_name"]) if "file_name" in row or not targets else targets[0]
        caption = next(row[key] for key in CAPTIONS if isinstance(row.get(key), str))
    except (ValueError, KeyError, StopIteration, AttributeError) as e:
        raise UsageError(f"{where} has no `file_name` or no `text`", hint=hint) from e
    if any(target != picture for target in targets):
        hint = 'the image before an instruction is `before`, as in {"before": "in.png", "after": "out.png", "text": "make it snow"}'
        raise UsageError(f"{where} names two images, `{picture}` and `{targets[-1]}`", hint=hint)
    further: dict[str, str] = {}
    for key, value in named.items():
        if kind := further_of(key):
            further.setdefault(kind, value)
    return _Line(picture, caption, further)


def read_pictures(path: Path, *, size: int, channels: int, limit: int | None) -> np.ndarray:
    """The picture at `path`, or the first `limit` (None: all) of a folder, zip or tar in order of names: uint8 [n, C, size, size].

    Raises MissingError where there are none, or one does not decode.
    """
    if not path.exists():
        raise MissingError(f"there is no `{path}`", hint="give a picture, or a folder, zip or tar of pictures")
    if path.is_file() and _is_picture(path.name):
        return np.stack([decode(path.read_bytes(), str(path), size=size, channels=channels)[0]])
    members = open_members(path, _is_picture)
    if not members.names:
        raise MissingError(f"`{path}` holds no images", hint=f"pictures are files of these kinds: {KINDS}")
    read = members.read(sorted(members.names)[:limit])
    found = {name: decode(data, name, size=size, channels=channels)[0] for name, data in read}
    return np.stack([found[name] for name in sorted(found)])


def _places(title: str, names: list[str]) -> dict[str, tuple[str, str | None]]:
    """name → (split, class or None)"""
    parts = {name: PurePosixPath(name).parts for name in names}
    skip = 0  # lone folders around everything
    while True:
        heads = {p[skip] if len(p) > skip + 1 else None for p in parts.values()}
        if len(heads) > 1 or None in heads or _split_of(next(iter(heads))):
            break
        skip += 1
    placed: dict[str, tuple[str, tuple[str, ...]]] = {}
    split_heads = {h for h in heads if h and _split_of(h)}
    if not split_heads:
        placed = {name: ("train", p[skip:-1]) for name, p in parts.items()}
    else:
        if others := sorted(name for name, p in parts.items() if _split_of(p[skip]) is None or len(p) == skip + 1):
            raise UsageError(f"`{title}` mixes splits with other images, as `{others[0]}`", hint=f"a set is {LAYOUTS}")
        for name, p in parts.items():
            split, domain = _split_of(p[skip])
            placed[name] = (split, (domain,) if domain else p[skip + 1 : -1])
    if not any(split == "train" for split, _ in placed.values()):
        raise UsageError(f"`{title}` has no `train` folder beside its splits", hint=f"a set is {LAYOUTS}")
    classes = {name: folders[0] if folders else None for name, (_, folders) in placed.items()}
    if None in classes.values() and set(classes.values()) != {None}:
        loose = next(name for name, label in sorted(classes.items()) if label is None)
        raise UsageError(f"`{title}` has images beside its class folders, as `{loose}`", hint=f"a set is {LAYOUTS}")
    return {name: (split, classes[name]) for name, (split, _) in placed.items()}


def _split_of(folder: str) -> tuple[str, str] | None:
    """`test` → ("test", ""), `trainA` → ("train", "A"), else None"""
    if folder in PAIRED:
        return PAIRED[folder]
    split = SPLIT_NAMES.get(folder.lower())
    return (split, "") if split else None


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _may_be_picture(value: str) -> bool:
    """Whether a text may be the name of a picture here."""
    return PurePosixPath(value).suffix.lower() in SUFFIXES and "://" not in value


def _is_text(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name == METADATA or path.suffix == ".txt"
