"""The meaning of a set's folders: splits and classes. Ambiguous folders are refused, and the error names
them.

To add a layout, add an entry to LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import PurePosixPath
from typing import NamedTuple

from gzcli.core.errors import UsageError
from gzcli.core.units import counted
from gzcli.data.readers.images import IMAGE_FOLDERS, MASK_FOLDERS, Folders, split_of, without_outer
from gzcli.data.readers.inspection import inspection, is_inspection
from gzcli.data.sets.registry import Form, import_line

DEFECTS = "defects"  # a layout that takes the images of an inspection set that have a defect, to score them

Labels = dict[str, str | None]  # name of an image → its class, if any
Places = dict[str, tuple[str, str | None]]  # name of an image → its split and its class, if any
Placed = tuple[Places, list[str]]  # and notes on omissions


@dataclass(frozen=True)
class Tree:
    """The folders of a set's images."""

    title: str  # of the set, in messages
    folders: Folders  # by image, without the outer folders that all images share
    chosen: str | None  # the layout that the user has chosen
    annotated: Mapping[str, str]  # classes of images by TinyImageNet's lists

    @cached_property
    def heads(self) -> list[str]:
        """The outermost folders."""
        return sorted({f[0] for f in self.folders.values() if f})

    def refused(self, message: str, ways: str = "") -> UsageError:
        """The error for an ambiguous or unsuitable folder. Its hint shows how to choose another layout than
        the one that was chosen."""
        *others, last = [name for name in LAYOUTS if name not in ("flat", self.chosen)]
        layouts = f"{', '.join(others)} or {last}"
        hint = f"choose a layout ({layouts} instead of flat): {import_line(self.title, '--layout flat')}"
        return UsageError(message, hint=f"{ways}or {hint}" if ways else hint)


SHAPES = "give a flat folder, class folders, `train` and `test` of these, or `trainA trainB testA testB`; "


def places_of(title: str, names: Sequence[str], form: Form, annotated: Mapping[str, str]) -> Placed:
    """The splits and classes of images by their folders or by TinyImageNet's lists, and notes on omissions.
    Raises UsageError with the name of an ambiguous folder."""
    if form.layout == DEFECTS:
        inspected = inspection(title, names)
        return dict.fromkeys(inspected.kinds if inspected else (), ("test", None)), []
    if form.foreign and form.layout != "flat":  # with `flat`, all images are scored, whatever their folders
        return _scored(names), []
    tree = Tree(title, without_outer(names, form.layout), form.layout, annotated)
    if not form.layout:
        _refuse_annotations(tree)
    layout = form.layout or next(name for name in reversed(LAYOUTS) if LAYOUTS[name].recognises(tree))
    places, notes = LAYOUTS[layout].place(tree)
    if not any(split == "train" for split, _ in places.values()):
        raise tree.refused(f"`{title}` has splits but no `train`", SHAPES)
    return places, notes


def _scored(names: Sequence[str]) -> Places:
    """The splits of images that are only scored, by their folders if all but masks are in split folders."""
    folders = without_outer(names, None)
    heads = {name: f[0] if f else "" for name, f in folders.items()}
    splits = {name: split_of(head) for name, head in heads.items() if not MASK_FOLDERS.fullmatch(head)}
    if not splits or not all(splits.values()):
        return dict.fromkeys(folders, ("train", None))
    return {name: (split[0], None) for name, split in splits.items() if split}


def _refuse_annotations(tree: Tree) -> None:
    """Raises UsageError for a folder of masks beside one of images, unless the masks are in no split."""
    marks = [head for head in tree.heads if MASK_FOLDERS.fullmatch(head)]
    if marks and any(map(IMAGE_FOLDERS.fullmatch, tree.heads)) and not any(map(split_of, tree.heads)):
        message = f"`{tree.title}` has `{marks[0]}` beside its images, which is either a class or annotations"
        raise tree.refused(message, "give only the folder of images, ")


def _in_folders(tree: Tree, folders: Folders, where: str, layout: str) -> tuple[Folders, list[str]]:
    """The images that are in a folder. The others are skipped with a note if the layout is chosen. Raises
    UsageError if it is not, and if no image is in a folder."""
    inside = {name: f for name, f in folders.items() if f}
    if not inside:
        raise tree.refused(f"`{tree.title}` has no folders for the layout `{layout}`", "omit `--layout`, ")
    if not (loose := sorted(folders.keys() - inside.keys())):
        return folders, []
    if not tree.chosen:
        ways = f"move it into one, skip it with `--layout {layout}`, or ignore all folders"
        hint = f"{ways}: {import_line(tree.title, '--layout flat')}"
        raise UsageError(f"`{tree.title}` has images {where}, such as `{loose[0]}`", hint=hint)
    return inside, [f"{counted(len(loose), 'image')} outside folders skipped (`{loose[0]}`)"]


def _without_lone_class(places: Places) -> Places:
    """The places, without labels if all are the same: a single folder, such as `train/good`, is no class."""
    if len({label for _, label in places.values()}) > 1:
        return places
    return {name: (split, None) for name, (split, _) in places.items()}


# --- images in one folder, in class folders, and in split folders of these ---


def _in_one_folder(tree: Tree) -> Placed:
    return dict.fromkeys(tree.folders, ("train", None)), []


def _by_class(tree: Tree) -> Placed:
    folders, notes = _in_folders(tree, tree.folders, "beside its class folders", "classes")
    return _without_lone_class({name: ("train", f[0]) for name, f in folders.items()}), notes


def _by_class_split(tree: Tree) -> Placed:
    folders, notes = _in_folders(tree, tree.folders, "outside its class folders", "class-splits")
    splits = {name: split for name, f in folders.items() if len(f) > 1 and (split := split_of(f[1]))}
    if outside := next((name for name in folders if name not in splits), None):
        problem = f"contains `{outside}`, which is in a class but not in a split"
        if splits:
            split_folder = PurePosixPath(next(iter(splits))).parent
            problem = f"has a split `{split_folder}`, but `{outside}` is outside any split"
        raise tree.refused(f"`{tree.title}` {problem}")
    return {name: (split[0], folders[name][0]) for name, split in splits.items()}, notes


def _by_split(tree: Tree) -> Placed:
    """The layouts SPLIT/CLASS/…, SPLIT/… and SPLITA/…, without masks."""
    inside, notes = _split_folders(tree)
    labels: dict[str, Labels] = {}
    for head, rows in _without_meaningless(inside).items():
        labels[head], more = _in_classes(tree, rows, _split(head)[1])
        notes += more
    train = {label for head in labels if _split(head)[0] == "train" for label in labels[head].values()}
    places: Places = {}
    for head in labels:
        split, domain = _split(head)
        if split != "train" and not domain:
            labels[head], more = _known(tree, head, labels[head], train)
            notes += more
        places |= {name: (split, label) for name, label in labels[head].items()}
    return _without_lone_class(places), notes


def _split(head: str) -> tuple[str, str]:
    """The split and the domain of a split folder."""
    return split_of(head) or ("", "")


def _split_folders(tree: Tree) -> tuple[dict[str, Folders], list[str]]:
    """The folders of images inside each split folder, and a note on masks. Raises UsageError for a folder
    that is neither, and for a split that has two folders."""
    splits, marks = list(filter(split_of, tree.heads)), list(filter(MASK_FOLDERS.fullmatch, tree.heads))
    if strays := [head for head in tree.heads if head not in (*splits, *marks)]:
        problem = f"has `{strays[0]}`, which is not a split"
        if splits:
            which = f"`{splits[0]}` is a split, or a class like `{strays[0]}`"
            problem = f"has images outside its splits: {which}"
        raise tree.refused(f"`{tree.title}` {problem}", SHAPES)
    folders, notes = _in_folders(tree, tree.folders, "outside its splits", "splits")
    if masks := [f[0] for f in folders.values() if f[0] in marks]:
        use = "skipped: they annotate other images"
        if is_inspection(list(folders)):
            use = "kept for `gz ood`, as masks of defects"
        notes.append(f"{counted(len(masks), 'image')} of `{masks[0]}` {use}")
    for head, twin in combinations(splits, 2):
        if split_of(head) == split_of(twin):
            message = f"`{tree.title}` has `{head}` and `{twin}`, which are the same split"
            raise UsageError(message, hint="merge them into one folder")
    return {head: {name: f[1:] for name, f in folders.items() if f[0] == head} for head in splits}, notes


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


def _in_classes(tree: Tree, rows: Folders, domain: str) -> tuple[Labels, list[str]]:
    """The classes of a split's images: that of a domain, such as `trainA`, or those of lists and folders."""
    if domain:
        return dict.fromkeys(rows, domain), []
    named = {name: (tree.annotated[name],) if name in tree.annotated else f for name, f in rows.items()}
    if not any(named.values()):
        return dict.fromkeys(rows), []
    named, notes = _in_folders(tree, named, "beside its class folders", "splits")
    return {name: f[0] for name, f in named.items()}, notes


def _known(tree: Tree, head: str, labels: Labels, train: set[str | None]) -> tuple[Labels, list[str]]:
    """The classes of a split's images that are also in train, and a note on the others."""
    classes = set(labels.values())
    images = {label for label in classes if label and IMAGE_FOLDERS.fullmatch(label)}
    if None not in train and classes <= {None, *images} and not classes & train:
        return {}, [f"{counted(len(labels), 'image')} of `{head}` skipped: they have no labels"]
    unknown = sorted(label for label in classes - train if label is not None)
    if not unknown:
        return labels, []
    if len(train) != 1 or None in train:
        message = f"`{head}/{unknown[0]}` of `{tree.title}` is a class that `train` lacks"
        raise tree.refused(message, "remove it, or rename it as in `train`; ")
    known = {name: label for name, label in labels.items() if label in train}
    more = f" and {counted(len(unknown) - 1, 'other folder')}" if len(unknown) > 1 else ""
    use = f"skipped: `train` has only `{next(iter(train))}`"
    if is_inspection(list(tree.folders)):
        use = "kept for `gz ood`, as images with defects"
    return known, [f"{counted(len(labels) - len(known), 'image')} of `{head}/{unknown[0]}`{more} {use}"]


def _has_class_splits(tree: Tree) -> bool:
    in_split = any(len(f) > 1 and split_of(f[1]) for f in tree.folders.values())
    return in_split and not any(map(split_of, tree.heads))


class Layout(NamedTuple):
    """A meaning of folders."""

    recognises: Callable[[Tree], bool]  # whether folders may have it
    place: Callable[[Tree], Placed]  # the splits and classes of images


# by the values of `--layout`; the last one that recognises a set's folders is chosen
LAYOUTS = {
    "flat": Layout(lambda tree: True, _in_one_folder),
    "classes": Layout(lambda tree: bool(tree.heads), _by_class),
    "splits": Layout(lambda tree: any(map(split_of, tree.heads)), _by_split),
    "class-splits": Layout(_has_class_splits, _by_class_split),
}
