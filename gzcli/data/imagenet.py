"""ImageNet from the user's own copy: the three official archives, the folders `train` and `val`, or the
parquet files of the hub."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from gzcli.core.errors import MissingError
from gzcli.data.download.raw import HUB
from gzcli.data.readers.archives import Folder, Tar
from gzcli.data.readers.dataset_folder import dataset_folder
from gzcli.data.readers.encoded import Place, PlacedMembers, encoded
from gzcli.data.readers.raw_images import RawImages, Span
from gzcli.data.sets.specs import DataSpec


def imagenet(spec: DataSpec, folder: Path) -> RawImages:
    """The training and validation (here: test) pictures in a thousand classes, in the order of their WordNet
    numbers. Cropped as in the diffusion literature (`pictures.adm`)."""
    if (folder / HUB).is_dir():
        return replace(_from_hub((folder / HUB).resolve()), title=spec.title, rule="adm")
    train, test = _from_folders(folder) if (folder / "train").is_dir() else _from_archives(spec, folder)
    wnids = sorted({wnid for _, wnid in train[1].values()})
    if unknown := {wnid for _, wnid in test[1].values()}.difference(wnids):
        hint = f"`gz data verify {spec.name}` checks its files"
        raise MissingError(f"`{spec.name}` has no training pictures of `{min(unknown)}`", hint=hint)
    number = {wnid: i for i, wnid in enumerate(wnids)}
    parts = [
        (members, {name: (s, number[wnid]) for name, (s, wnid) in places.items()})
        for members, places in (train, test)
    ]
    return replace(encoded(spec.title, _class_names(wnids), parts), rule="adm")


def _from_hub(folder: Path) -> RawImages:
    """Parquet files whose labels are numbers in the order of the WordNet numbers; those of the test split are
    hidden."""
    found = dataset_folder(folder)
    if "test" in found.counts or "val" not in found.counts:
        return found

    def renamed(split: str) -> str:
        return "test" if split == "val" else split

    return replace(
        found,
        classes=tuple(_class_names(list(found.classes))),
        counts={renamed(split): n for split, n in found.counts.items()},
        labels={renamed(split): y for split, y in found.labels.items()},
        blocks=lambda: (block._replace(split=renamed(block.split)) for block in found.blocks()),
    )


def _class_names(wnids: list[str]) -> list[str]:
    """The usual short names of the classes; their WordNet numbers for a copy that lacks some classes."""
    if len(wnids) != 1000:
        return wnids
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def _from_folders(folder: Path) -> tuple[PlacedMembers, PlacedMembers]:
    """`train/n01440764/….JPEG` and `val/n01440764/….JPEG`; as labels WordNet numbers."""

    def part(top: str, split: str) -> PlacedMembers:
        members = Folder(folder / top, lambda name: name.lower().endswith((".jpeg", ".jpg", ".png")))
        if loose := [name for name in members.names if "/" not in name]:
            hint = "sort the validation pictures into class folders, or give the three official archives"
            raise MissingError(
                f"`{folder / top}` has pictures outside of class folders, as `{loose[0]}`", hint=hint
            )
        return members, {name: (split, name.split("/")[0]) for name in members.names}

    return part("train", "train"), part("val", "test")


def _from_archives(spec: DataSpec, folder: Path) -> tuple[PlacedMembers, PlacedMembers]:
    """Training pictures from a tar of one tar a class; validation pictures from a flat tar, whose classes are
    in the development kit. As labels WordNet numbers."""
    kit, val, train = (folder / file.name for file in spec.files)
    nested = Nested(train)
    flat = Tar(val, lambda name: name.endswith(".JPEG"))
    classes = _ground_truth(kit)
    if len(classes) != len(flat.names):
        raise MissingError(
            f"`{val}` holds {len(flat.names):,} pictures, the development kit labels {len(classes):,}"
        )
    truth: dict[str, Place] = {
        name: ("test", wnid) for name, wnid in zip(sorted(flat.names), classes, strict=True)
    }
    return (nested, {name: ("train", name.split("/")[0]) for name in nested.names}), (flat, truth)


def _ground_truth(kit: Path) -> list[str]:
    """The WordNet number of each validation picture. The kit lists numbers from 1 on, whose WordNet numbers
    are in its `meta.mat`."""
    from io import BytesIO

    from scipy.io import loadmat

    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    found = {
        PurePosixPath(name).name: data for name, data in Tar(kit, lambda name: name.endswith(wanted)).read()
    }
    synsets = loadmat(BytesIO(found[wanted[0]]), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [wnid_of[int(line)] for line in found[wanted[1]].split()]


class Nested:
    """The members of the tars in a tar, under names OUTER/INNER, read in place. No tar may be compressed.

    path: the outer tar.
    """

    notes: list[str] = []

    def __init__(self, path: Path):
        self.path = path
        self._outer = Tar(path, lambda name: name.endswith(".tar"))
        self._spans = {name: span for name, span, _ in self._walk()}
        self.names = list(self._spans)

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        want = set(self.names if some is None else some)
        for name, _, read in self._walk():
            if name in want:
                yield name, read()

    def spans(self) -> dict[str, Span]:
        return self._spans

    def _walk(self) -> Iterator[tuple[str, Span, Callable[[], bytes]]]:
        """(name, where it lies, a function that reads it) of each member of each tar."""

        def read(inner: tarfile.TarFile, picture: tarfile.TarInfo) -> bytes:
            file = inner.extractfile(picture)
            return file.read() if file else b""

        with self._outer.opened() as outer:
            for member in outer:
                if not member.name.endswith(".tar"):
                    continue
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for picture in inner:
                        if picture.isfile():
                            span = Span(
                                str(self.path), member.offset_data + picture.offset_data, picture.size, False
                            )
                            name = f"{PurePosixPath(member.name).stem}/{PurePosixPath(picture.name).name}"
                            yield name, span, partial(read, inner, picture)
