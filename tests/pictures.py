"""Small pictures, folders and archives for the tests of data."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from gzcli.core.types import Noise
from gzcli.data.packs.augment import augmenter
from gzcli.store.paths import cache_dir

SPLITS = ("train", "val", "test")
RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (10, 40, 220)
COLOURS = {"red": RED, "green": GREEN, "blue": BLUE}


def png(colour, size=(8, 8), mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, options.pop("format", "PNG"), **options)
    return out.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def as_deflated(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    return as_deflated(path, files, zipfile.ZIP_STORED)


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def nothing_half_written() -> bool:
    packs = cache_dir("packs")
    return not packs.exists() or all(p.name.endswith(".lock") or p.is_dir() for p in packs.rglob("*"))


CLASSES = ("blue", "green", "red")
SIDES = (("A", RED), ("B", BLUE))
LAYOUTS = {  # files, and the classes that are read from their folders
    "flat": ({f"{i:02}.png": png(RED) for i in range(20)}, ()),
    "classes": ({f"{c}/{i}.png": png(v) for c, v in COLOURS.items() for i in range(8)}, CLASSES),
    "splits": (
        {f"{s}/{c}/{i}.png": png(v) for s in ("train", "test") for c, v in COLOURS.items() for i in range(6)},
        CLASSES,
    ),
    "flat splits": (
        {f"{s}/{i}.png": png(BLUE) for s in ("train", "validation", "test") for i in range(6)},
        (),
    ),
    "pairs": (
        {f"{s}{d}/{i}.png": png(v) for s in ("train", "test") for d, v in SIDES for i in range(5)},
        ("A", "B"),
    ),
}


def augmented(names: list[str], u8: Tensor, noise: Noise) -> Tensor:
    """Images without further pictures, uint8 [B, C, H, W], after the augmentations of these names."""
    return augmenter(names)({"x": u8}, noise)["x"]
