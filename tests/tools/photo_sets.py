"""Writes inspection sets of photographs, whose objects turn, whose textures are rough, or whose pictures are
large, the same from the same seed:

    python tests/tools/photo_sets.py FOLDER [--only NAME …] [--seed 0] [--data ../shared/data/sets]

  coins, cup              one object of a photograph, turned by any angle and moved, 96 px
  gravel, grass, brick    crops of 96 px of one photograph
  faces                   64 px: spots, blur, upside down, and pictures of other things
  xrays                   28 px; the defects are pneumonia
  own                     one person's photographs of many sizes, and six pictures that do not belong
  big512, big1024         plates with pits of 5 px, scratches 2 px wide, and stains; 70 good ones

The layout is that of `inspection_sets.py`, without masks. `faces` and `xrays` need `--data`.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from inspection_sets import blot, line, rng_of, shifted, wander
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data as photographs

SIDE = 96  # pixels of objects and textures
TRAIN_IMAGES, TEST_IMAGES, KIND_IMAGES = 200, 200, 20
Rng = np.random.Generator
Picture = np.ndarray  # float64 [H, W] or [H, W, 3], 0 … 255
Entry = tuple[str, Picture]  # a path below the set, without suffix, and its picture


def places_of(
    train: int, test: int, kinds: tuple[str, ...], each: int = KIND_IMAGES
) -> Iterator[tuple[str, str, int]]:
    """The folder, the kind and the number of every picture of a set."""
    groups = [
        ("train/good", "", train),
        ("test/good", "", test),
        *((f"test/{kind}", kind, each) for kind in kinds),
    ]
    number = 0
    for folder, kind, count in groups:
        for _ in range(count):
            yield folder, kind, number
            number += 1


# ---------------------------------------------------------------------------- defects


def painted(image: Picture, mask: np.ndarray, colour: Picture | float) -> Picture:
    mask = mask[..., None] if image.ndim == 3 else mask
    return image + mask * (colour - image)


def scratch(image: Picture, rng: Rng, at: np.ndarray) -> Picture:
    points = wander(rng, at - rng.uniform(-8, 8, 2), rng.uniform(18, 30), 0.15)
    return painted(
        image, line(image.shape[:2], points, rng.uniform(1.0, 1.8)) * 0.8, rng.choice([20.0, 235.0])
    )


def spot(image: Picture, rng: Rng, at: np.ndarray) -> Picture:
    mask = shifted(blot(rng, image.shape[:2], rng.uniform(2.5, 4)), at[1], at[0])
    return painted(image, mask * 0.85, rng.choice([25.0, 230.0]))


def stain(image: Picture, rng: Rng, at: np.ndarray) -> Picture:
    mask = shifted(blot(rng, image.shape[:2], rng.uniform(6, 11)), at[1], at[0])
    return image * (1 - 0.45 * (mask[..., None] if image.ndim == 3 else mask))


def smear(image: Picture, rng: Rng, at: np.ndarray) -> Picture:
    mask = shifted(blot(rng, image.shape[:2], rng.uniform(9, 13)), at[1], at[0])
    sigma = (3.0, 3.0, 0.0)[: image.ndim]
    return painted(image, mask, ndimage.gaussian_filter(image, sigma))


def swap(image: Picture, rng: Rng, at: np.ndarray) -> Picture:
    """A piece of the picture is exchanged for one from elsewhere, turned by 90 degrees."""
    side = int(rng.integers(16, 24))
    y, x = (int(np.clip(each - side // 2, 0, SIDE - side)) for each in at[::-1])
    out, moved = image.copy(), np.rot90(np.roll(image, (SIDE // 3, SIDE // 4), (0, 1)))
    out[y : y + side, x : x + side] = moved[y : y + side, x : x + side]
    return out


DEFECTS: dict[str, Callable[[Picture, Rng, np.ndarray], Picture]] = {
    "scratch": scratch,
    "spot": spot,
    "stain": stain,
    "smear": smear,
    "swap": swap,
}


def hurt(image: Picture, kind: str, rng: Rng, reach: float) -> Picture:
    """The picture with a defect, at most `reach` from its middle."""
    if not kind:
        return image
    angle, far = rng.uniform(0, 2 * np.pi), reach * np.sqrt(rng.uniform())
    return DEFECTS[kind](image, rng, SIDE / 2 + far * np.array([np.cos(angle), np.sin(angle)]))


# ---------------------------------------------------------------------------- objects and textures


def turned(source: Picture, middle: tuple[float, float], radius: float, rng: Rng) -> Picture:
    """An object around a middle (y, x), on a background of its own edge, turned, moved and lit."""
    angle, scale = rng.uniform(0, 2 * np.pi), radius / 38
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 - rng.uniform(-3, 3, (2, 1, 1))
    v, u = (y * np.cos(angle) - x * np.sin(angle)) * scale, (y * np.sin(angle) + x * np.cos(angle)) * scale
    planes = source if source.ndim == 3 else source[..., None]
    out = np.stack(
        [
            ndimage.map_coordinates(planes[..., c], [v + middle[0], u + middle[1]], order=1, mode="reflect")
            for c in range(planes.shape[2])
        ],
        -1,
    )
    inside = np.clip((40 - np.hypot(y, x)) / 2, 0, 1)[..., None]
    table = 70 + ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE, 1)), (1.5, 1.5, 0)) * 12
    out = (inside * out + (1 - inside) * table) * rng.uniform(0.95, 1.05) + rng.normal(0, 2, out.shape)
    return out if source.ndim == 3 else out[..., 0]


def disc_without_piece(image: Picture, rng: Rng) -> Picture:
    angle = rng.uniform(0, 2 * np.pi)
    at = SIDE / 2 + 34 * np.array([np.cos(angle), np.sin(angle)])
    return painted(image, shifted(blot(rng, (SIDE, SIDE), rng.uniform(6, 9)), at[1], at[0]), 70.0)


def objects(source: Picture, middles: list[tuple[float, float]], radius: float, seed: int) -> Iterator[Entry]:
    for folder, kind, i in places_of(TRAIN_IMAGES, TEST_IMAGES, (*DEFECTS, "piece")):
        rng = rng_of(seed, i, "object")
        image = turned(source, middles[int(rng.integers(len(middles)))], radius, rng)
        if kind == "piece":
            image = disc_without_piece(image, rng)
        yield f"{folder}/{i:04}", hurt(image, "" if kind == "piece" else kind, rng, 28)


def coins(seed: int) -> Iterator[Entry]:
    """Six coins of a photograph."""
    image = photographs.coins().astype(float)
    marks, _ = ndimage.label(ndimage.binary_opening(ndimage.gaussian_filter(image, 2) > 115, iterations=3))
    boxes = [box for box in ndimage.find_objects(marks) if all(45 < s.stop - s.start < 75 for s in box)]
    middles = [tuple((s.start + s.stop) / 2 for s in box) for box in boxes[:6]]
    yield from objects(image, middles, 31, seed)


def cup(seed: int) -> Iterator[Entry]:
    yield from objects(photographs.coffee().astype(float), [(195.0, 310.0)], 150, seed)


def texture(name: str, seed: int) -> Iterator[Entry]:
    image = getattr(photographs, name)().astype(float)
    other = photographs.brick() if name != "brick" else photographs.grass()
    kinds = (*(kind for kind in DEFECTS if kind != "swap"), "foreign", "flat")
    for folder, kind, i in places_of(TRAIN_IMAGES, TEST_IMAGES, kinds):
        rng = rng_of(seed, i, "texture")
        crop = crop_of(image, rng, SIDE)
        if kind in ("foreign", "flat"):
            mask = shifted(blot(rng, (SIDE, SIDE), rng.uniform(9, 13)), *rng.uniform(24, 72, 2))
            piece = crop_of(other.astype(float), rng, SIDE) if kind == "foreign" else np.median(crop)
            crop = painted(crop, mask, piece)
        yield f"{folder}/{i:04}", hurt(crop, kind if kind in DEFECTS else "", rng, 36)


def crop_of(image: Picture, rng: Rng, side: int) -> Picture:
    y, x = (int(rng.integers(0, length - side + 1)) for length in image.shape[:2])
    return image[y : y + side, x : x + side].copy()


# ---------------------------------------------------------------------------- other pictures


def zipped(archive: Path, limit: int) -> list[Picture]:
    """Pictures of an archive, in an order of their own."""
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.endswith((".png", ".jpg")))
        names = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:limit]]
        return [np.asarray(Image.open(io.BytesIO(opened.read(name))).convert("RGB"), float) for name in names]


def faces(seed: int, data: Path) -> Iterator[Entry]:
    people, others = zipped(data / "faces64.zip", 560), zipped(data / "imagenette64.zip", 40)
    kinds = ("spots", "blur", "upside_down", "other")
    for folder, kind, i in places_of(TRAIN_IMAGES, TEST_IMAGES, kinds, each=40):
        rng, image = rng_of(seed, i, "face"), people[i]
        if kind == "spots":
            for _ in range(3):
                mask = shifted(blot(rng, (64, 64), rng.uniform(2, 4)), *rng.uniform(12, 52, 2))
                image = painted(image, mask, rng.choice([20.0, 240.0]))
        changed = {
            "blur": lambda image=image: ndimage.gaussian_filter(image, (2, 2, 0)),
            "upside_down": lambda image=image: image[::-1],
            "other": lambda i=i: others[i % 40],
        }
        yield f"{folder}/{i:04}", changed[kind]() if kind in changed else image


def xrays(seed: int, data: Path) -> Iterator[Entry]:
    with np.load(data / "pneumoniamnist.npz") as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"].ravel()
    good, ill = (np.random.default_rng(seed).permutation(images[labels == kind]) for kind in (0, 1))
    for i, image in enumerate(good[:500]):
        yield f"{'train' if i < 300 else 'test'}/good/{i:04}", image.astype(float)
    for i, image in enumerate(ill[:180]):
        yield f"test/pneumonia/{i:04}", image.astype(float)


def own(seed: int) -> Iterator[Entry]:
    """Views of photographs, at any scale; those that do not belong are drawn."""
    from sklearn.datasets import load_sample_images

    sources = [getattr(photographs, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    sources += [*load_sample_images().images, photographs.stereo_motorcycle()[0]]
    for i in range(322):
        rng = rng_of(seed, i, "own")
        source = Image.fromarray(sources[int(rng.integers(len(sources)))])
        height, width = (int(each) for each in rng.integers(150, 400, 2))
        scale = rng.uniform(0.35, min(source.height / height, source.width / width, 1.6))
        y, x = (
            rng.uniform(0, length - side * scale)
            for length, side in zip(source.size[::-1], (height, width), strict=True)
        )
        box = (x, y, x + width * scale, y + height * scale)
        image = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
        yield f"{'train' if i < 300 else 'test'}/good/{i:04}", np.asarray(image, float)
    for name, image in strange(rng_of(seed, "strange")).items():
        yield f"test/{name}/0", image


def strange(rng: Rng) -> dict[str, Picture]:
    """Pictures that are no photographs of things, 240 × 320 px."""
    out = {
        name: Image.new("RGB", (320, 240), colour)
        for name, colour in (
            ("receipt", (245, 243, 238)),
            ("screenshot", (236, 239, 243)),
            ("handwriting", (250, 249, 244)),
        )
    }
    draw = ImageDraw.Draw(out["receipt"])
    for row in range(14):
        draw.text(
            (70, 12 + 15 * row), f"ITEM {rng.integers(1000, 9999)}    {rng.uniform(1, 99):6.2f}", (40, 40, 40)
        )
    draw = ImageDraw.Draw(out["screenshot"])
    draw.rectangle((0, 0, 320, 22), (45, 90, 160))
    for row in range(7):
        draw.rectangle((10, 34 + 29 * row, 90, 54 + 29 * row), (200, 208, 220))
        draw.text((100, 38 + 29 * row), f"Option {row}   Enabled", (30, 30, 30))
    draw = ImageDraw.Draw(out["handwriting"])
    for row in range(6):
        points = np.cumsum(np.stack([rng.uniform(1, 4, 90), rng.normal(0, 4, 90)], 1), 0)
        points[:, 1] = 25 + 38 * row + 9 * np.sin(points[:, 1] / 5)
        draw.line([tuple(p + np.array([20, 0])) for p in points], (30, 40, 110), 2)
    stripes = np.broadcast_to(((np.arange(320) // 8) % 2 * 255.0)[None, :, None], (240, 320, 3))
    noise = rng.uniform(0, 255, (240, 320, 3))
    drawn = {name: np.asarray(image, float) for name, image in out.items()}
    return drawn | {"stripes": stripes, "black": np.zeros((240, 320, 3)), "noise": noise}


def plates(side: int, seed: int) -> Iterator[Entry]:
    """Brushed plates with four holes; the smallest defects are of the same size in pixels at any side."""
    y, x = np.mgrid[:side, :side]
    for folder, kind, i in places_of(70, 60, ("pit", "scratch", "stain")):
        rng = rng_of(seed, i, "plate")
        image = 140 + 6 * ndimage.gaussian_filter(rng.standard_normal((side, side)), (0.8, 6)) * 4
        dy, dx = rng.normal(0, 1.5, 2)
        for hole in ((0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)):
            r = np.hypot(y - hole[0] * side - dy, x - hole[1] * side - dx)
            image = image + (45 - image) * np.clip(side * 0.06 - r, 0, 1)
        image = image * rng.uniform(0.96, 1.04) + rng.normal(0, 2, image.shape)
        at = rng.uniform(0.12, 0.88, 2) * side
        if kind == "pit":
            image = painted(image, np.clip(3 - np.hypot(y - at[0], x - at[1]), 0, 1) * 0.55, 30.0)
        if kind == "scratch":
            points = wander(rng, at[::-1], rng.uniform(60, 120), 0.05)
            image = painted(image, line((side, side), points, 2) * 0.3, 225.0)
        if kind == "stain":
            mask = shifted(blot(rng, (side, side), rng.uniform(20, 40)), *at)
            image = image * (1 - 0.12 * mask)
        yield f"{folder}/{i:04}", image


SETS: dict[str, Callable[..., Iterator[Entry]]] = {
    "coins": coins,
    "cup": cup,
    **{name: partial(texture, name) for name in ("gravel", "grass", "brick")},
    "faces": faces,
    "xrays": xrays,
    "own": own,
    "big512": partial(plates, 512),
    "big1024": partial(plates, 1024),
}
FROM_DATA = ("faces", "xrays")  # sets of published pictures


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sets"))
    chosen = parser.parse_args()
    for name in chosen.only:
        more = (chosen.data,) if name in FROM_DATA else ()
        for path, image in SETS[name](chosen.seed, *more):
            file = chosen.folder / name / f"{path}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image).clip(0, 255).round().astype(np.uint8)).save(file)


if __name__ == "__main__":
    main()
