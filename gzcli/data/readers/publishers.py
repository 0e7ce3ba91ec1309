"""Readers of the publishers' own files: a function for each layout, a line in PARSERS for each set."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from gzcli.core.errors import MissingError
from gzcli.data.readers.archive import Tar, Zip, open_folder
from gzcli.data.readers.folder import pictures
from gzcli.data.readers.hub import dataset_folder
from gzcli.data.readers.images import (
    Arrays,
    Encoded,
    Members,
    Place,
    PlacedMembers,
    RawImages,
    Span,
    bytes_in,
    from_arrays,
    read_span,
)
from gzcli.data.readers.npz import npz
from gzcli.data.readers.pictures import look
from gzcli.data.sets.registry import HUB, MEDMNIST, DataSpec, Form

# --- arrays ---


def idx(spec: DataSpec, folder: Path) -> RawImages:
    """MNIST's layout, gzipped: a header (0, 0, type 8 = uint8, dimensions, sizes), big-endian, then bytes."""

    def read(name: str) -> np.ndarray:
        with gzip.open(folder / name) as f:
            zeros, kind, dims = struct.unpack(">HBB", f.read(4))
            if zeros != 0 or kind != 8:
                raise MissingError(f"`{folder / name}` is not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{dims}I", f.read(4 * dims))
            return np.frombuffer(f.read(), np.uint8).reshape(shape)

    stems = {"train": "train", "test": "t10k"}
    labels = {s: read(f"{stem}-labels-idx1-ubyte.gz").astype(np.int64) for s, stem in stems.items()}

    def arrays() -> Arrays:
        for split, stem in stems.items():
            images = read(name := f"{stem}-images-idx3-ubyte.gz")
            n, h, w = images.shape
            if (n, h, w) != (len(labels[split]), *spec.shape[1:]):
                hint = f"run `gz data verify {spec.name}`"
                raise MissingError(
                    f"`{folder / name}` contains {n} images of {h}×{w}, which does not match its labels",
                    hint=hint,
                )
            yield split, images[:, None], name

    return from_arrays(spec, labels, arrays)


def cifar(spec: DataSpec, folder: Path) -> RawImages:
    """CIFAR's Python layout: a tar of pickled batches {data: uint8 [n, 3072] channel by channel, labels:
    list}. CIFAR-100 has one batch per split, with `fine_labels`, and the class names in `meta`."""
    key, root = b"labels", "cifar-10-batches-py"
    batches = [("train", f"data_batch_{i}") for i in range(1, 6)] + [("test", "test_batch")]
    if spec.name == "cifar100":
        key, root = b"fine_labels", "cifar-100-python"
        batches = [("train", "train"), ("test", "test")]

    def read(tar: tarfile.TarFile, name: str) -> dict[bytes, Any]:
        if (file := tar.extractfile(f"{root}/{name}")) is None:
            raise MissingError(f"`{cast(str, tar.name)}` has no `{root}/{name}`")
        return _Arrays(io.BytesIO(file.read()), encoding="bytes").load()

    rows: dict[str, list[int]] = {"train": [], "test": []}
    with tarfile.open(folder / spec.files[0].name) as tar:
        for split, name in batches:
            rows[split] += read(tar, name)[key]
        if spec.name == "cifar100":
            names = read(tar, "meta")[b"fine_label_names"]
            spec = replace(spec, classes=tuple(text.decode() for text in names))

    def arrays() -> Arrays:
        with tarfile.open(folder / spec.files[0].name) as tar:
            for split, name in batches:
                yield split, np.asarray(read(tar, name)[b"data"], np.uint8).reshape(-1, *spec.shape), name

    return from_arrays(spec, {split: np.asarray(y, np.int64) for split, y in rows.items()}, arrays)


class _Arrays(pickle.Unpickler):
    """Unpickles dicts, lists, numbers and numpy arrays only. Nothing else can be named, so no code can be
    run."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            hint = "use the publisher's own file"
            raise MissingError(f"a pickle refers to `{module}.{name}`, which gz does not load", hint=hint)
        if module.startswith(("numpy.core", "numpy._core")):
            core = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"
            module = f"{core}.{module.rpartition('.')[2]}"
        return super().find_class(module, name)


def svhn(spec: DataSpec, folder: Path) -> RawImages:
    """MATLAB files of X, uint8 [32, 32, 3, N], and y, [N, 1], where 10 is the digit 0."""
    from scipy.io import loadmat

    paths = {split: folder / f"{split}_32x32.mat" for split in ("train", "test")}
    labels = {s: loadmat(p, variable_names=["y"])["y"][:, 0].astype(np.int64) % 10 for s, p in paths.items()}

    def arrays() -> Arrays:
        for split, path in paths.items():
            yield split, loadmat(path, variable_names=["X"])["X"].transpose(3, 2, 0, 1), path.name

    return from_arrays(spec, labels, arrays)


def medmnist(spec: DataSpec, folder: Path) -> RawImages:
    """An npz of MedMNIST's, which lacks the names of the classes."""
    return replace(npz(folder / spec.files[0].name), title=spec.title, classes=spec.class_names)


# --- encoded images ---


def dtd(spec: DataSpec, folder: Path) -> RawImages:
    """`dtd/images/CLASS/CLASS_0001.jpg`, and the first of ten splits in `dtd/labels/train1.txt` …."""
    archive, splits = folder / spec.files[0].name, ("train", "val", "test")
    members = Tar(archive, lambda name: name.startswith("dtd/") and name.endswith((".jpg", ".txt")))
    lists = dict(zip(splits, _lines(members, *(f"dtd/labels/{split}1.txt" for split in splits)), strict=True))
    classes = sorted({line.split("/")[0] for lines in lists.values() for line in lines})
    places: dict[str, Place] = {}
    for split, lines in lists.items():
        places |= {f"dtd/images/{line}": (split, classes.index(line.split("/")[0])) for line in lines}
    return Encoded(spec.title, [(members, places)]).images(classes)


def places365(spec: DataSpec, folder: Path) -> RawImages:
    """`data_256/a/abbey/00000001.jpg` in one tar, `val_256/Places365_val_00000001.jpg` in another; a third
    lists them with their classes, `/a/abbey/00000001.jpg 2`."""
    lists, train, test = (folder / file.name for file in spec.files)
    names = ("categories_places365.txt", "places365_train_standard.txt", "places365_val.txt")
    categories, *rows = _lines(Tar(lists, lambda name: name in names), *names)
    classes = [line.split()[0].split("/", 2)[2] for line in categories]
    parts = []
    archives = zip((train, test), ("data_256", "val_256"), ("train", "test"), rows, strict=True)
    for path, root, split, lines in archives:
        pairs = (line.rsplit(maxsplit=1) for line in lines)
        places: dict[str, Place] = {f"{root}/{name.lstrip('/')}": (split, int(y)) for name, y in pairs}
        parts.append((Tar(path, lambda name: name.endswith(".jpg")), places))
    return Encoded(spec.title, parts).images(classes)


def notmnist(spec: DataSpec, folder: Path) -> RawImages:
    """`notMNIST_small/A/….png`, one folder per letter. Two of the files are not images and are skipped. There
    are no official splits. Of each letter's images, ordered by name, every fifth is a test image."""
    members = Tar(folder / spec.files[0].name, lambda name: name.endswith(".png"))
    of_letter: dict[str, list[str]] = {}
    for name, data in members.read():
        with suppress(MissingError):
            look(data, name)
            of_letter.setdefault(PurePosixPath(name).parts[-2], []).append(name)
    places: dict[str, Place] = {}
    for number, letter in enumerate(spec.class_names):
        names = sorted(of_letter.get(letter, ()))
        places |= {name: ("test" if i % 5 == 4 else "train", number) for i, name in enumerate(names)}
    return Encoded(spec.title, [(members, places)]).images(spec.class_names)


def celeba(spec: DataSpec, folder: Path) -> RawImages:
    """A zip of `img_align_celeba/000001.jpg`, and two files with a line per image. One contains 0, 1 or 2 for
    the split. The other contains −1 or 1 for each of forty attributes, which its second line names."""
    partition, attributes, archive = (folder / file.name for file in spec.files)
    _, header, *lines = attributes.read_text().splitlines()
    attribute = {name: np.asarray(values, np.int8) > 0 for name, *values in map(str.split, lines)}
    places: dict[str, Place] = {}
    for name, code in map(str.split, partition.read_text().splitlines()):
        places[f"img_align_celeba/{name}"] = ("train", "val", "test")[int(code)], attribute[name]
    members = Zip(archive, lambda name: name.endswith(".jpg"))
    return Encoded(spec.title, [(members, places)]).images(header.split())


def imagenette(spec: DataSpec, folder: Path) -> RawImages:
    """`imagenette2-320/train/n01440764/….JPEG`, `val/…`; classes in the order of their WordNet numbers."""
    members = Tar(folder / spec.files[0].name, lambda name: name.endswith(".JPEG"))
    wnids = sorted({PurePosixPath(name).parts[-2] for name in members.names})
    places: dict[str, Place] = {}
    for name in members.names:
        split, wnid = PurePosixPath(name).parts[-3:-1]
        places[name] = ("test" if split == "val" else "train", wnids.index(wnid))
    return Encoded(spec.title, [(members, places)]).images(spec.class_names)


def tinyimagenet(spec: DataSpec, folder: Path) -> RawImages:
    """`train/n01443537/images/….JPEG`; `val/images/val_0.JPEG` with its class in `val_annotations.txt`;
    classes are the sorted lines of `wnids.txt`, with their names from `words.txt`. The test images have no
    labels and are not read."""
    root = "tiny-imagenet-200"
    members = Zip(folder / spec.files[0].name, lambda name: name.endswith((".JPEG", ".txt")))
    lists = (f"{root}/{name}.txt" for name in ("wnids", "words", "val/val_annotations"))
    wnids, words, val = _lines(members, *lists)
    wnids = sorted(set(wnids))
    number = {wnid: i for i, wnid in enumerate(wnids)}
    name_of = dict(line.split("\t", 1) for line in words)
    places: dict[str, Place] = {}
    for row in map(str.split, val):
        places[f"{root}/val/images/{row[0]}"] = "test", number[row[1]]
    for name in members.names:
        if name.startswith(f"{root}/train/") and name.endswith(".JPEG"):
            places[name] = "train", number[PurePosixPath(name).parts[2]]
    return Encoded(spec.title, [(members, places)]).images([name_of[wnid] for wnid in wnids])


def paired(spec: DataSpec, folder: Path) -> RawImages:
    """CycleGAN's layout: folders `trainA trainB testA testB`, which become classes."""
    members = Zip(folder / spec.files[0].name, lambda name: name.endswith(".jpg"))
    return replace(pictures(spec.title, members, Form()), probe=None)


def _lines(members: Members, *names: str) -> list[list[str]]:
    """The lines of some text members, without empty lines, in the order of `names`."""
    texts = {name: bytes_in(data).decode().splitlines() for name, data in members.read(list(names))}
    if lost := [name for name in names if name not in texts]:
        raise MissingError(f"the archive has no `{lost[0]}`")
    return [[line for line in texts[name] if line.strip()] for name in names]


# --- ImageNet, in one of three forms ---


def imagenet(spec: DataSpec, folder: Path) -> RawImages:
    """The training and validation (here: test) images of a thousand classes, which are ordered by WordNet
    number. Images are cropped as in the diffusion literature (`pictures.adm`)."""
    if (folder / HUB).is_dir():
        return replace(_from_hub((folder / HUB).resolve()), title=spec.title, rule="adm")
    parts = _from_folders(folder) if (folder / "train").is_dir() else _from_archives(spec, folder)
    train, test = ({wnid for _, wnid in places.values()} for _, places in parts)
    if unknown := test - train:
        hint = f"run `gz data verify {spec.name}` to check its files"
        raise MissingError(f"`{spec.name}` has no training images of `{min(unknown)}`", hint=hint)
    wnids = sorted(train)
    number = {wnid: i for i, wnid in enumerate(wnids)}
    numbered = [
        (members, {name: (split, number[wnid]) for name, (split, wnid) in places.items()})
        for members, places in parts
    ]
    return replace(Encoded(spec.title, numbered).images(_class_names(wnids)), rule="adm")


def _class_names(wnids: list[str]) -> list[str]:
    """The usual short names of the classes; their WordNet numbers for a copy that lacks some classes."""
    if len(wnids) != 1000:
        return wnids
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def _from_hub(folder: Path) -> RawImages:
    """Parquet files whose labels are numbers in the order of the WordNet numbers; the test split has none."""
    images = dataset_folder(folder)
    if "test" in images.counts or "val" not in images.counts:
        return images
    renamed = {"train": "train", "val": "test"}
    return replace(
        images,
        classes=tuple(_class_names(list(images.classes))),
        counts={renamed[split]: n for split, n in images.counts.items()},
        labels={renamed[split]: y for split, y in images.labels.items()},
        blocks=lambda: (block._replace(split=renamed[block.split]) for block in images.blocks()),
    )


def _from_folders(folder: Path) -> list[PlacedMembers]:
    """`train/n01440764/….JPEG` and `val/n01440764/….JPEG`; labels are WordNet numbers."""
    parts: list[PlacedMembers] = []
    for top, split in (("train", "train"), ("val", "test")):
        members = open_folder(folder / top, lambda name: name.lower().endswith((".jpeg", ".jpg", ".png")))
        if loose := [name for name in members.names if "/" not in name]:
            hint = "sort the validation images into class folders, or give the three official archives"
            message = f"`{folder / top}` has images outside class folders, such as `{loose[0]}`"
            raise MissingError(message, hint=hint)
        parts.append((members, {name: (split, name.split("/")[0]) for name in members.names}))
    return parts


def _from_archives(spec: DataSpec, folder: Path) -> list[PlacedMembers]:
    """For training, a tar of one tar per class; for validation, a flat tar whose classes are in the
    development kit."""
    from scipy.io import loadmat

    kit, val, train = (folder / file.name for file in spec.files)
    nested, flat = Nested(train), Tar(val, lambda name: name.endswith(".JPEG"))
    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    files = {PurePosixPath(name).name: data for name, data in Tar(kit, lambda n: n.endswith(names)).read()}
    synsets = loadmat(io.BytesIO(files[names[0]]), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    classes = [wnid_of[int(line)] for line in files[names[1]].split()]  # by the kit's own numbers
    if len(classes) != len(flat.names):
        counts = f"{len(flat.names):,} images, but the development kit labels {len(classes):,}"
        raise MissingError(f"`{val}` contains {counts}")
    truth = {name: ("test", wnid) for name, wnid in zip(sorted(flat.names), classes, strict=True)}
    return [(nested, {name: ("train", name.split("/")[0]) for name in nested.names}), (flat, truth)]


class Nested:
    """The members of the tars in a tar, under names OUTER/INNER, read in place. No tar may be compressed."""

    notes: list[str] = []

    def __init__(self, path: Path):
        self._spans: dict[str, Span] = {}
        with Tar(path, lambda name: name.endswith(".tar")).opened() as outer:
            for tar in outer:
                if not tar.name.endswith(".tar"):
                    continue
                with tarfile.open(fileobj=outer.extractfile(tar), mode="r:") as inner:
                    for picture in filter(tarfile.TarInfo.isfile, inner):
                        name = f"{PurePosixPath(tar.name).stem}/{PurePosixPath(picture.name).name}"
                        at = tar.offset_data + picture.offset_data
                        self._spans[name] = Span(str(path), at, picture.size, False)
        self.names = list(self._spans)

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name in self.names if some is None else some:
            yield name, read_span(self._spans[name])

    def spans(self) -> dict[str, Span]:
        return self._spans


PARSERS: dict[str, Callable[[DataSpec, Path], RawImages]] = {
    "mnist": idx,
    "fashionmnist": idx,
    "notmnist": notmnist,
    "cifar10": cifar,
    "cifar100": cifar,
    "svhn": svhn,
    "dtd": dtd,
    "places365": places365,
    "celeba": celeba,
    "imagenette": imagenette,
    **dict.fromkeys((spec.name for spec in MEDMNIST), medmnist),
    "tinyimagenet": tinyimagenet,
    "horse2zebra": paired,
    "imagenet": imagenet,
}
