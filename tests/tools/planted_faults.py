"""Plants faults in real pictures, and measures how many `gz data audit` reports:

    python tests/tools/planted_faults.py make FOLDER --data ../shared/data [--sets cifar10 …] [--seed 0]
    python tests/tools/planted_faults.py measure SET… [--csv FILE]      # SET: a folder that `make` has written
    python tests/tools/planted_faults.py peers SET… [--csv FILE]        # cleanlab and imagededup, if installed

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
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import inspection_sets
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    make = verbs.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--data", type=Path, required=True)
    make.add_argument("--sets", nargs="*", default=list(READERS), choices=list(READERS))
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(do=lambda args: make_sets(args.folder, args.data, args.sets, args.seed))
    args = parser.parse_args(arguments)
    args.do(args)


def make_sets(folder: Path, data: Path, names: Sequence[str], seed: int) -> None:
    for name in names:
        plant(data, name, folder / f"{name}-{seed}", seed)


if __name__ == "__main__":
    main()
