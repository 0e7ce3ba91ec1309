"""Plants faults in real pictures, and measures how many `gz data audit` reports:

    python tests/tools/planted_faults.py make FOLDER --data ../shared/data [--sets cifar10 …] [--seed 0]
    python tests/tools/planted_faults.py measure SET… [--csv FILE]      # folders that `make` has written
    python tests/tools/planted_faults.py describe SET…                  # features of gz, for `peers`
    python tests/tools/planted_faults.py peers SET… [--csv FILE]        # cleanlab and imagededup

`peers` runs in an environment of its own, with both packages. cleanlab reads gz's features and out-of-fold
probabilities, imagededup the files.

A set has about 2,000 pictures in `train` and `test`. The faults are 30 wrong labels, 60 near-duplicates (20
moved by a pixel, 20 mirrored, 20 compressed again as JPEG), 20 foreign pictures, 3 truncated files, 2 empty
ones, 3 blank pictures and 3 of odd sizes. `SET.csv` beside the folder lists them. With an even seed foreign
pictures come from all other sources, and some are drawn; with an odd seed, all come from one source.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SET_IMAGES = 2000  # pictures that are drawn of a source
TEST_SHARE = 0.2
FAULTS = {"label": 30, "copy": 60, "foreign": 20, "truncated": 3, "empty": 2, "blank": 3, "size": 3}
COPY_KINDS = ("moved", "mirrored", "compressed")
DRAWN = ("receipt", "screenshot", "stripes", "noise")  # kinds of foreign pictures besides those of other sets
JPEG_QUALITIES = (30, 75)  # lowest and highest quality of a copy that is compressed again


# ---------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Pictures uint8 [N, H, W] or [N, H, W, 3], and the name of each one's class."""

    images: np.ndarray
    classes: np.ndarray


def of_zip(path: Path, names: Callable[[str], str], rng: np.random.Generator) -> Source:
    """Some pictures of a zip, whose class is that of their name."""
    with zipfile.ZipFile(path) as archive:
        files = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png", ".jpeg")))
        files = [files[i] for i in np.sort(rng.permutation(len(files))[:SET_IMAGES])]
        images = [np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in files]
    return Source(np.stack(images), np.array([names(name) for name in files]))


def of_idx(folder: Path, rng: np.random.Generator) -> Source:
    """Some pictures of MNIST's files."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes()), np.uint8, offset=at)
        for name, at in (("images-idx3", 16), ("labels-idx1", 8))
    )
    some = np.sort(rng.permutation(len(labels))[:SET_IMAGES])
    return Source(images.reshape(-1, 28, 28)[some], np.array([f"class{label}" for label in labels[some]]))


def of_npz(path: Path, rng: np.random.Generator) -> Source:
    """Some training pictures of a set of MedMNIST."""
    with np.load(path) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"].ravel()
    some = np.sort(rng.permutation(len(labels))[:SET_IMAGES])
    return Source(images[some], np.array([f"class{label}" for label in labels[some]]))


def of_parts(rng: np.random.Generator, images: int = 1000) -> Source:
    """Drawn plates and brackets, which are all alike: none is a copy of another."""
    import inspection_sets  # needs scipy, which the environment of `peers` may lack

    kinds = ("plate", "bracket")
    drawn = [
        inspection_sets.rounded(inspection_sets.part(int(seed), None, inspection_sets.SHAPES[kinds[i % 2]]))
        for i, seed in enumerate(rng.integers(10**6, 10**8, images))
    ]
    return Source(np.stack(drawn), np.array([kinds[i % 2] for i in range(images)]))


def parent(name: str) -> str:
    return name.split("/")[-2]


READERS: dict[str, Callable[[Path, np.random.Generator], Source]] = {
    "cifar10": lambda data, rng: of_zip(data / "sets/cifar10_jpeg.zip", parent, rng),
    "imagenette64": lambda data, rng: of_zip(data / "sets/imagenette64.zip", parent, rng),
    "mnist": lambda data, rng: of_idx(data / "mirror/mnist", rng),
    "textures64": lambda data, rng: of_zip(data / "sets/textures64.zip", parent, rng),
    "faces64": lambda data, rng: of_zip(data / "sets/faces64.zip", parent, rng),
    "fashionmnist": lambda data, rng: of_idx(data / "mirror/fashionmnist", rng),
    "pneumoniamnist": lambda data, rng: of_npz(data / "sets/pneumoniamnist.npz", rng),
    "orange2lemon32": lambda data, rng: of_zip(
        data / "sets/orange2lemon32.zip", lambda name: parent(name)[-1], rng
    ),
    "parts": lambda _, rng: of_parts(rng),
}


PHOTOGRAPHS = {"cifar10", "imagenette64", "orange2lemon32"}  # show any thing, so none is foreign to another
TEXT = "Total 17.90 EUR\nVAT 19 %\nThank you\n12:41 Cash\nNo. 4471"


def drawn(kind: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A picture that no camera takes of a thing: a receipt, a screenshot, stripes or noise."""
    canvas = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(canvas)
    if kind == "receipt":
        pen.multiline_text((rng.integers(4), rng.integers(-8, 8)), TEXT, "black", font_size=side // 6)
    elif kind == "screenshot":
        pen.rectangle((0, 0, side, side // 7), tuple(rng.integers(0, 200, 3).tolist()))
        for _ in range(4):
            x, y = rng.integers(0, side, 2).tolist()
            box = (x, y, x + side // 2, y + side // 6)
            pen.rectangle(box, tuple(rng.integers(90, 255, 3).tolist()), "grey")
            pen.text((x + 2, y), "Open file", "black", font_size=side // 9)
    elif kind == "stripes":
        step, turned = int(rng.integers(3, 9)), rng.random() < 0.5
        for at in range(0, side, 2 * step):
            box = (0, at, side, at + step) if turned else (at, 0, at + step, side)
            pen.rectangle(box, tuple(rng.integers(0, 160, 3).tolist()))
    else:
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    return canvas


@cache
def pictures_of(data: Path, source: str, seed: int) -> np.ndarray:
    return READERS[source](data, np.random.default_rng([seed, 4])).images


def foreign(data: Path, name: str, seed: int, like: np.ndarray) -> list[np.ndarray]:
    """Pictures of other sources, in the size and channels of a picture of the set: with an even seed of all
    sources and drawn ones, else of one source."""
    rng = np.random.default_rng([seed, 3])
    others = [other for other in READERS if other != name and not {other, name} <= PHOTOGRAPHS]
    sources: list[str] = [*others, *DRAWN] if seed % 2 == 0 else [others[seed // 2 % len(others)]]
    pictures = []
    for i in range(FAULTS["foreign"]):
        source = sources[i % len(sources)]
        if source in DRAWN:
            picture = drawn(source, 96, rng)
        else:
            images = pictures_of(data, source, seed)
            picture = Image.fromarray(images[rng.integers(len(images))])
        picture = picture.convert("L" if like.ndim == 2 else "RGB")
        pictures.append(np.array(picture.resize(like.shape[1::-1], Image.Resampling.LANCZOS)))
    return pictures


# ---------------------------------------------------------------------------- faults


@dataclass
class Planted:
    """The files of a set and its faults: rows (file, kind, detail)."""

    folder: Path
    rng: np.random.Generator
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kind: str, content: bytes, detail: str = "", ending: str = "png", at: str = "") -> str:
        """Adds a file under the next name in a random split, and the fault that it is, if any. at: class."""
        split = "test" if self.rng.random() < TEST_SHARE else "train"
        name = f"{split}/{at}/{len(self.files):05d}.{ending}"
        self.files[name] = content
        if kind:
            self.faults.append((name, kind, detail))
        return name

    def write(self) -> None:
        for name, content in self.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with self.folder.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "kind", "detail"), *self.faults])


def encoded(picture: np.ndarray, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind, **options)
    return stream.getvalue()


def moved(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture moved by a pixel in one of eight directions; its border is repeated."""
    y, x = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x][rng.integers(8)]
    pad = [(1, 1), (1, 1)] + [(0, 0)] * (picture.ndim - 2)
    height, width = picture.shape[:2]
    return np.pad(picture, pad, mode="edge")[1 + y : 1 + y + height, 1 + x : 1 + x + width]


def plant(data: Path, name: str, folder: Path, seed: int) -> None:
    """Writes a set with faults."""
    rng = np.random.default_rng([seed, 1])
    source = READERS[name](data, np.random.default_rng([seed, 2]))
    images, classes = source.images, source.classes
    planted, every = Planted(folder, rng), np.unique(classes)
    order = rng.permutation(len(images))
    wrong, copied = order[: FAULTS["label"]], order[FAULTS["label"] :][: FAULTS["copy"]]
    names = {}
    for i, picture in enumerate(images):
        label = classes[i]
        if i in wrong:
            label = rng.choice(every[every != label])
        names[i] = planted.add("label" * (i in wrong), encoded(picture), classes[i], at=label)
    for k, i in enumerate(copied):
        kind, picture = COPY_KINDS[k % 3], images[i]
        if kind == "compressed":
            quality = int(rng.integers(*JPEG_QUALITIES))
            content, ending = encoded(picture, "JPEG", quality=quality), "jpg"
        else:
            content, ending = encoded(moved(picture, rng) if kind == "moved" else picture[:, ::-1]), "png"
        planted.add(f"copy {kind}", content, names[i], ending, at=classes[i])
    for picture in foreign(data, name, seed, images[0]):
        planted.add("foreign", encoded(picture), at=rng.choice(every))
    for kind, content, ending in other_faults(images, rng):
        planted.add(kind, content, ending=ending, at=rng.choice(every))
    planted.write()


def other_faults(images: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, bytes, str]]:
    """Files that are truncated or empty, and pictures that are blank or of odd sizes."""
    for _ in range(FAULTS["truncated"]):
        content = encoded(images[rng.integers(len(images))], "JPEG")
        yield "truncated", content[: len(content) // 2], "jpg"
    for _ in range(FAULTS["empty"]):
        yield "empty", b"", "png"
    for level in (0, 128, 255)[: FAULTS["blank"]]:
        yield "blank", encoded(np.full_like(images[0], level)), "png"
    height, width = images.shape[1:3]
    for size in ((3 * width, height), (width // 2, height // 2), (4 * width, 4 * height))[: FAULTS["size"]]:
        picture = Image.fromarray(images[rng.integers(len(images))])
        yield "size", encoded(np.array(picture.resize(size, Image.Resampling.BICUBIC))), "png"


# ---------------------------------------------------------------------------- measures

# kinds of planted faults → kinds that the audit reports, and how many of its list count
MEASURED = {
    "label": (("label",), 45),
    "copy": (("copy", "split-copy"), None),
    "foreign": (("foreign",), 25),
    "truncated": (("unreadable",), None),
    "empty": (("unreadable",), None),
    "blank": (("blank",), None),
    "size": (("size",), None),
}


def planted_in(folder: Path) -> list[dict[str, str]]:
    with folder.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measured(folder: Path) -> dict[str, float | str]:
    """How many faults of a set the audit reports, its lists, and the CPU seconds of the whole command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "gzcli", "--json", "data", "audit", str(folder)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    planted = planted_in(folder)
    row: dict[str, float | str] = {"set": folder.name, "images": result["images"]}
    for kind, (kinds, first) in MEASURED.items():
        reported = [fault for fault in result["faults"] if fault["kind"] in kinds]
        if kind == "copy":  # of a pair, either may be called the copy
            pairs = {frozenset((fault["file"], fault["of"])) for fault in reported}
            row[kind] = sum(
                joined(pairs, fault["file"], fault["detail"])
                for fault in planted
                if fault["kind"].startswith(kind)
            )
        else:
            files = {fault["file"] for fault in reported[:first]}
            row[kind] = sum(fault["file"] in files for fault in planted if fault["kind"] == kind)
        row[f"{kind} list"] = len(reported)
    return row | {"cpu_s": round(seconds, 1)}


def joined(pairs: Collection[frozenset[str]], first: str, second: str) -> bool:
    """Whether two files are in one group of copies."""
    group = {first}
    while more := {name for pair in pairs if pair & group for name in pair} - group:
        group |= more
    return second in group


# ---------------------------------------------------------------------------- peers


def by_peers(folder: Path) -> dict[str, float | str]:
    """What cleanlab and imagededup report at their defaults."""
    planted, row = planted_in(folder), dict[str, float | str]({"set": folder.name})
    copies = [(fault["file"], fault["detail"]) for fault in planted if fault["kind"].startswith("copy")]
    readable = {str(file.relative_to(folder)) for file in folder.glob("*/*/*") if is_readable(file)}
    row |= by_imagededup(folder, readable, copies)
    return row | by_cleanlab(folder, sorted(readable), planted)


def is_readable(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:
        return False
    return True


def by_imagededup(
    folder: Path, readable: Collection[str], copies: Sequence[tuple[str, str]]
) -> dict[str, float | str]:
    """The planted copies among the pairs that imagededup reports at its defaults, and the number of pairs."""
    from imagededup.methods import PHash

    began = time.process_time()
    hasher = PHash(verbose=False)
    hashes = {name: hasher.encode_image(str(folder / name)) for name in sorted(readable)}
    matches = hasher.find_duplicates(encoding_map=hashes)
    pairs = {frozenset((name, other)) for name, others in matches.items() for other in others}
    hits = sum(frozenset(pair) in pairs for pair in copies)
    seconds = round(time.process_time() - began, 1)
    return {"phash copy": hits, "phash pairs": len(pairs), "phash cpu_s": seconds}


def by_cleanlab(
    folder: Path, names: Sequence[str], planted: Sequence[dict[str, str]]
) -> dict[str, float | str]:
    """Planted faults among the lists of cleanlab's Datalab, from gz's own features and out-of-fold
    probabilities, so that the judges alone differ."""
    from cleanlab import Datalab

    began = time.process_time()
    with np.load(folder.with_suffix(".features.npz")) as arrays:
        place = {name: i for i, name in enumerate(arrays["names"].tolist())}
        order = [place[name] for name in names if name in place]
        files = arrays["names"][order].tolist()
        features, probabilities = arrays["features"][order].astype(np.float32), arrays["probabilities"][order]
    labels = [file.split("/")[1] for file in files]
    lab = Datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(features=features, pred_probs=probabilities)
    row: dict[str, float | str] = {}
    for kind, issue, first in (("label", "label", 45), ("foreign", "outlier", 25)):
        table = lab.get_issues(issue)
        order = np.argsort(table[f"{issue}_score"].to_numpy(), kind="stable")[:first]
        wanted = {fault["file"] for fault in planted if fault["kind"] == kind}
        row[f"cleanlab {kind}"] = sum(files[i] in wanted for i in order)
        row[f"cleanlab {kind} list"] = int(table[f"is_{issue}_issue"].sum())
    near = lab.get_issues("near_duplicate")
    sets = [set(map(int, some)) for some in near["near_duplicate_sets"]]
    at = {file: i for i, file in enumerate(files)}
    copies = [fault for fault in planted if fault["kind"].startswith("copy")]
    row["cleanlab copy"] = sum(
        at[fault["detail"]] in sets[at[fault["file"]]]
        for fault in copies
        if fault["file"] in at and fault["detail"] in at
    )
    row["cleanlab copy list"] = int(near["is_near_duplicate_issue"].sum())
    return row | {"cleanlab cpu_s": round(time.process_time() - began, 1)}


def describe(folder: Path) -> dict[str, float | str]:
    """Writes gz's features and out-of-fold probabilities of a set for `peers`, which runs without gz."""
    import torch

    from gzcli.data.readers.folder import open_path
    from gzcli.judge.audit import chosen_places, surveyed
    from gzcli.metrics import audit

    images = open_path(folder)
    rows = chosen_places(images, None)
    survey = surveyed(images, rows, audit.describer(torch.device("cpu")), lambda *_: None)
    features, labels = audit.Features.joined(survey.features), survey.labels[survey.described]
    probabilities = audit.class_probabilities(features, labels, np.arange(len(labels)))
    names = np.array([survey.names[i] for i in survey.described])
    arrays = {"names": names, "features": features.objects, "probabilities": probabilities}
    np.savez(folder.with_suffix(".features.npz"), **arrays)
    return {"set": folder.name, "described": len(names)}


# ---------------------------------------------------------------------------- the command line


def make_sets(args: argparse.Namespace) -> None:
    for name in args.sets:
        plant(args.data, name, args.folder / f"{name}-{args.seed}", args.seed)


def write_rows(args: argparse.Namespace) -> None:
    """A line of CSV for each set, written as soon as it is measured."""
    stream = args.csv.open("a", newline="") if args.csv else sys.stdout
    writer = None
    for folder in args.folders:
        row = args.measure(folder)
        if writer is None:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
        writer.writerow(row)
        stream.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    make = verbs.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--data", type=Path, required=True)
    make.add_argument("--sets", nargs="*", default=list(READERS), choices=list(READERS))
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(do=make_sets)
    for name, measure in (("measure", measured), ("describe", describe), ("peers", by_peers)):
        verb = verbs.add_parser(name)
        verb.add_argument("folders", type=Path, nargs="+", metavar="SET")
        verb.add_argument("--csv", type=Path)
        verb.set_defaults(do=write_rows, measure=measure)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
