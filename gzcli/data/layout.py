"""The splits and classes that the folders around pictures mean. Ambiguous folders are refused, with a message
that names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from gzcli.core.errors import UsageError
from gzcli.data.readers.kinds import counted

LAYOUTS = ("flat", "classes", "splits", "class-splits")  # what `--layout` takes
HINT = "a set is a flat folder, class folders, `train` and `test` of these, or `trainA trainB testA testB`"
ASK = "`gz data import PATH --name NAME --layout flat|classes|splits|class-splits` says what is meant"

_SPLIT = re.compile(r"(train|val|test)(ing|id|idation)?(set|images?|imgs?|data|split)?|dev(set)?")
_IMAGES = re.compile(r"(images?|imgs?|pictures?|photos?|jpe?g(images)?|rgb|png)")
_MARKS = re.compile(r"(ground_?truth|gt|masks?|segmentations?|annotations?|labels?)", re.IGNORECASE)


@dataclass
class Placed:
    """Where each picture belongs.

    places: (split, class or None) of each picture by its name.
    notes: what was left out of the set, and why.
    """

    places: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_of(folder: str | None) -> tuple[str, str] | None:
    """The split and the domain that a folder's name means: `test`, `testing`, `Test Images` → ("test", "");
    `trainA` → ("train", "A"); None for another name."""
    if folder is None:
        return None
    if pair := re.fullmatch(r"(train|val|test)([AB])", folder):
        return pair[1], pair[2]
    word = re.sub(r"[\s._-]", "", folder.lower())
    found = _SPLIT.fullmatch(word)
    if not found:
        return None
    split, ending = found[1], found[2]
    odd = ending == "ing" if split == "val" else ending in ("id", "idation")  # `valing`, `trainid`
    return None if odd else (split or "val", "")


def placed(
    title: str, names: Iterable[str], layout: str | None = None, annotated: Mapping[str, str] | None = None
) -> Placed:
    """The splits and classes of pictures by their folders.

    title: what messages call the set.
    names: of the pictures, relative to the set.
    layout: what the folders mean, of LAYOUTS; None: what their names say.
    annotated: classes of pictures by a list beside them (TinyImageNet's `val_annotations.txt`).

    Raises UsageError that names a folder which is ambiguous.
    """
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
    """The layout of the folders. Raises UsageError where it is ambiguous."""
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
    """Adds the places of one split's pictures to `out`. Its classes must be among those of train.

    head: the split's folder.
    split: the split.
    rows: the folders inside it of each picture, by name.
    train: the classes of train; None among them for pictures outside of class folders.
    annotated: classes of pictures by a list beside them.
    """
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
    """The class of a picture in class folders. Raises UsageError for one beside them."""
    if not folders:
        raise UsageError(f"`{title}` has images beside its class folders, as `{name}`", hint=f"{HINT}; {ASK}")
    return folders[0]


def _checked(title: str, out: Placed) -> Placed:
    """`out`, which has a split train. Raises UsageError where it has none."""
    if not any(split == "train" for split, _ in out.places.values()):
        raise UsageError(f"`{title}` has no `train` folder beside its splits", hint=f"{HINT}; {ASK}")
    return out


def _without_one_class(out: Placed) -> Placed:
    """Places without their class where there is only one: `train/images`, `train/good`."""
    if len({label for _, label in out.places.values()}) == 1:
        out.places = {name: (split, None) for name, (split, _) in out.places.items()}
    return out
