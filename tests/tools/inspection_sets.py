"""Writes three inspection sets in MVTec's layout, with drawn defects and their masks, the same from the same
seed:

    python tests/tools/inspection_sets.py FOLDER [--set parts|textures|digits] [--good 70 --good 500]
        [--textures textures64.zip] [--canvas NAME] [--part plate|bracket] [--mnist DIR] [--seed 0]
        [--kinds 20] [--test 200]

  parts     a plate with a bore and four holes, 96 px, turned, shifted, lit and noisy; or a square bracket of
            cast metal with six
  textures  crops of a canvas, 96 px, which is quilted from one picture of a zip of textures
  digits    handwritten digits, 28 px of MNIST, or of scikit-learn where `--mnist` is absent

FOLDER then contains a set for each number of good training pictures, such as `parts-70` and `parts-500`.
Their test pictures are the same: 200 good ones, and 20 of each kind of defect. A mask is white where a pixel
differs from the picture without the defect by more than noise; gaps are closed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SIDE = 96  # pixels of a part or a texture
CANVAS = "train/008/00007.png"  # a woven one, among the textures; an embossed one is train/004/00062.png
SEEN = 12  # grey levels by which a pixel of a defect differs at least
Rng = np.random.Generator
Picture = np.ndarray  # float64 [H, W, 3] or [H, W], 0 … 255
# a drawer makes a picture of a seed, with a kind of defect or None; the rest of the picture is the same
Drawer = Callable[[int, "str | None"], Picture]


def rng_of(*key: int | str) -> Rng:
    """A generator of its own for each key."""
    words = (k if isinstance(k, int) else int.from_bytes(k.encode()[:8], "big") for k in key)
    return np.random.default_rng(list(words))


def blot(rng: Rng, shape: tuple[int, int], radius: float) -> np.ndarray:
    """An uneven blot of about a radius, 0 … 1, at a place whose rest is left to the caller."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), radius / 2)
    field /= field.std()
    y, x = np.mgrid[: shape[0], : shape[1]] - (np.array(shape)[:, None, None] - 1) / 2
    return np.clip((1 + 0.35 * field - np.hypot(y, x) / radius) * 4, 0, 1)


def shifted(mask: np.ndarray, y: float, x: float) -> np.ndarray:
    """A mask around the middle, moved to (y, x)."""
    middle = (np.array(mask.shape) - 1) / 2
    return ndimage.shift(mask, np.array([y, x]) - middle, order=1)


def line(shape: tuple[int, int], points: np.ndarray, width: float) -> np.ndarray:
    """A line through points (x, y), 0 … 1, drawn at four times the size."""
    image = Image.new("L", (shape[1] * 4, shape[0] * 4))
    draw = ImageDraw.Draw(image)
    draw.line([tuple(p) for p in points * 4], fill=255, width=max(1, round(width * 4)), joint="curve")
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BOX), np.float64) / 255


def wander(rng: Rng, start: np.ndarray, length: float, bend: float, steps: int = 8) -> np.ndarray:
    """Points (x, y) of a line that turns by `bend` radians a step."""
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    return start + np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1), 0) * length / steps


# ---------------------------------------------------------------------------- parts

PARTS = ("missing_hole", "wide_hole", "scratch", "stain", "chip", "crack")


@dataclass(frozen=True)
class Shape:
    """The shape of a part, and its metal.

    holes: their middles (x, y) from that of the part.
    power: of its outline |x|^p + |y|^p = 40^p; 2 is a circle.
    bore: the radius of the hole in the middle.
    grain: deviations by which the noise of the metal is blurred, along y and x.
    """

    holes: tuple[tuple[float, float], ...] = ((24, 0), (0, 24), (-24, 0), (0, -24))
    power: float = 2
    bore: float = 11
    shade: float = 150
    grain: tuple[float, float] = (0.7, 8)
    tint: tuple[float, float, float] = (1.0, 0.99, 0.95)


SIX = ((26, 0), (-26, 0), (25, 25), (-25, 25), (25, -25), (-25, -25))
SHAPES = {
    "plate": Shape(),
    "bracket": Shape(SIX, power=6, bore=8, shade=105, grain=(1.6, 1.6), tint=(0.9, 0.97, 1.05)),
}


def part(seed: int, kind: str | None, shape: Shape = SHAPES["plate"]) -> Picture:
    """A part from above. Its place, turn, light, grain and noise go by the seed."""
    rng, hurt = rng_of(seed, "part"), rng_of(seed, "hurt")
    fine = SIDE * 2
    centre, turn = SIDE / 2 - 0.5 + rng.normal(0, 0.8, 2), rng.normal(0, np.deg2rad(2))
    y, x = (np.mgrid[:fine, :fine] + 0.5) / 2 - 0.5
    x, y = x - centre[0], y - centre[1]
    u, v = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    p, radius_of = shape.power, np.hypot(u, v)
    r = (np.abs(u) ** p + np.abs(v) ** p) ** (1 / p) if p != 2 else radius_of
    inside = lambda distance: np.clip(0.5 - distance * 2, 0, 1)  # noqa: E731
    chosen, size = int(hurt.integers(len(shape.holes))), hurt.uniform(0.8, 1.2)
    plate, rim = inside(r - 40), np.exp(-(((r - 38.5) / 1.2) ** 2))
    holes = np.stack([np.hypot(u - hx, v - hy) for hx, hy in shape.holes])
    radii = np.full(len(shape.holes), 4.5)
    if kind == "wide_hole":
        radii[chosen] += 1.3 * size
    if kind == "missing_hole":
        radii[chosen] = -2
    angle = hurt.uniform(0, 2 * np.pi)
    if kind == "chip":
        way = np.array([np.cos(angle), np.sin(angle)])
        rim_x, rim_y = 41 * way / ((np.abs(way) ** p).sum() ** (1 / p) if p != 2 else 1)
        plate = plate * (1 - inside(np.hypot(u - rim_x, v - rim_y) - 3.2 * size))
    brush = ndimage.gaussian_filter(rng.standard_normal((fine, fine)), shape.grain)
    ring = np.exp(-(((radius_of - shape.bore - 3) / 1.5) ** 2))
    metal = shape.shade + 7 * brush / brush.std() + 35 * rim + 6 * ring
    bevel = np.exp(-(((holes - radii[:, None, None] - 1) / 1.2) ** 2)).sum(0).clip(0, 1)
    metal = metal * (1 - 0.2 * bevel)
    cut = inside(radius_of - shape.bore) + sum(
        inside(d - radius) for d, radius in zip(holes, radii, strict=True)
    )
    where = np.array([centre[0], centre[1]]) + hurt.uniform(17, 33) * np.array([np.cos(angle), np.sin(angle)])
    if kind == "stain":
        mark = shifted(blot(hurt, (fine, fine), 6.5 * size), *(2 * where[::-1]))
        metal = metal - mark * hurt.uniform(22, 34)
    if kind == "scratch":
        mark = line((fine, fine), 2 * wander(hurt, where, 13 * size, 0.08), 1.5)
        metal = metal + mark * hurt.uniform(45, 70)
    if kind == "crack":
        start = np.array(centre) + 13 * np.array([np.cos(angle), np.sin(angle)])
        out = np.array([np.cos(angle), np.sin(angle)])
        swerve = hurt.normal(0, 1.4, 8).cumsum()[:, None] * out[::-1] * [-1, 1]
        points = start + np.linspace(0, 15 * size, 8)[:, None] * out + swerve
        metal = metal - line((fine, fine), 2 * points, 1.5) * hurt.uniform(60, 85)
    floor = 40 + 3 * ndimage.gaussian_filter(rng.standard_normal((fine, fine)), 3) * 6
    ground = plate * (1 - np.clip(cut, 0, 1))
    image = ground * metal + (1 - ground) * floor
    tilt = rng.normal(0, 0.05, 2)
    light = rng.normal(1, 0.04) * (1 + tilt[0] * x / 48 + tilt[1] * y / 48)
    image = (image * light).reshape(SIDE, 2, SIDE, 2).mean((1, 3))
    return image[..., None] * np.array(shape.tint) + rng.normal(0, 2.5, (SIDE, SIDE, 3))


# ---------------------------------------------------------------------------- textures

TEXTURES = ("cut", "hole", "colour", "thread", "blur", "fold")


def quilt(source: np.ndarray, side: int, rng: Rng, block: int = 24, overlap: int = 8) -> np.ndarray:
    """A larger picture of a texture: blocks that fit to what is there, joined along the least seam (Efros &
    Freeman 2001)."""
    step, h = block - overlap, len(source) - block + 1
    n = -(-(side - overlap) // step)
    out = np.zeros((n * step + overlap,) * 2 + (3,))
    patches = np.lib.stride_tricks.sliding_window_view(source, (block, block), (0, 1)).transpose(
        0, 1, 3, 4, 2
    )
    patches = patches.reshape(h * h, block, block, 3)
    for i in range(n):
        for j in range(n):
            y, x = i * step, j * step
            there = out[y : y + block, x : x + block]
            error = np.zeros(len(patches))
            if j:
                error += ((patches[:, :, :overlap] - there[:, :overlap]) ** 2).sum((1, 2, 3))
            if i:
                error += ((patches[:, :overlap] - there[:overlap]) ** 2).sum((1, 2, 3))
            best = np.argsort(error)[:12] if i or j else np.arange(len(patches))
            new = patches[rng.choice(best)]
            keep = np.zeros((block, block), bool)
            if j:
                keep[:, :overlap] |= seam(((new - there)[:, :overlap] ** 2).sum(2))
            if i:
                keep[:overlap] |= seam(((new - there)[:overlap] ** 2).sum(2).T).T
            out[y : y + block, x : x + block] = np.where(keep[..., None], there, new)
    return out[:side, :side]


def seam(cost: np.ndarray) -> np.ndarray:
    """What lies left of the cheapest path from top to bottom, bool [H, W]."""
    total = cost.copy()
    for y in range(1, len(cost)):
        total[y] += ndimage.minimum_filter1d(total[y - 1], 3, mode="nearest")
    path = [int(total[-1].argmin())]
    for y in range(len(cost) - 2, -1, -1):
        low = max(0, path[-1] - 1)
        path.append(low + int(total[y, low : path[-1] + 2].argmin()))
    return np.arange(cost.shape[1]) < np.array(path[::-1])[:, None]


def texture_drawer(cloth: Picture) -> Drawer:
    def draw(seed: int, kind: str | None) -> Picture:
        """A crop of the cloth at a place, by a mirror, light and noise of the seed."""
        rng, hurt = rng_of(seed, "cloth"), rng_of(seed, "hurt")
        y, x = rng.integers(0, len(cloth) - SIDE, 2)
        image = cloth[y : y + SIDE, x : x + SIDE].copy()
        image = image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        at, size = hurt.uniform(18, SIDE - 18, 2), hurt.uniform(0.8, 1.2)
        shape = (SIDE, SIDE)
        if kind == "cut":
            mark = line(shape, wander(hurt, at, 20 * size, 0.15), 1.6)
            image = image * (1 - 0.7 * mark[..., None])
        if kind == "hole":
            mark = shifted(blot(hurt, shape, 5 * size), *at)
            image = image + mark[..., None] * (35 - image)
        if kind == "colour":
            mark = shifted(blot(hurt, shape, 8 * size), *at)
            tint = np.array([[0.2, -0.12, -0.3], [-0.25, 0.05, 0.3]])[hurt.integers(2)]
            image = image * (1 + mark[..., None] * tint)
        if kind == "thread":
            mark = line(shape, wander(hurt, at, 26 * size, 0.5), 1.3)
            image = image + mark[..., None] * (hurt.choice([225, 230]) - image) * 0.8
        if kind == "blur":
            mark = shifted(blot(hurt, shape, 10 * size), *at)
            flat = ndimage.gaussian_filter(image, (4, 4, 0))
            image = image + mark[..., None] * (flat - image)
        if kind == "fold":
            ends = np.array([[at[0], -2], [at[0] + hurt.normal(0, 12), SIDE + 2]])
            mark = line(shape, ends, 3 * size)
            soft = ndimage.gaussian_filter(mark, 0.8)
            image = image * (1 + 0.3 * soft[..., None] - 0.3 * np.roll(soft, 3, 1)[..., None])
        return image * rng.normal(1, 0.03) + rng.normal(0, 2.5, image.shape)

    return draw


# ---------------------------------------------------------------------------- digits

DIGITS = ("erased", "stroke", "gap", "blot", "thick", "speckle")


def digit_drawer(digits: np.ndarray) -> Drawer:
    def draw(seed: int, kind: str | None) -> Picture:
        """The digit with a number; the number is the seed."""
        image, hurt = digits[seed % len(digits)].astype(np.float64), rng_of(seed, "hurt")
        shape, ink = image.shape, np.argwhere(image > 128)
        scale = shape[0] / 28
        at = ink[hurt.integers(len(ink))].astype(np.float64)  # (y, x)
        y, x = np.mgrid[: shape[0], : shape[1]]
        near = np.hypot(y - at[0], x - at[1])
        if kind == "erased":
            image = image * (near > 4.5 * scale)
        if kind == "stroke":
            mark = line(shape, wander(hurt, hurt.uniform(6, 22, 2) * scale, 13 * scale, 0.2), 2 * scale)
            image = np.maximum(image, 255 * mark)
        if kind == "gap":
            angle = hurt.uniform(0, np.pi)
            way = np.array([np.cos(angle), np.sin(angle)]) * 6 * scale
            image = image * (1 - line(shape, np.stack([at[::-1] - way, at[::-1] + way]), 2.5 * scale))
        if kind == "blot":
            image = np.maximum(image, 255 * np.clip(1.5 + (3 * scale - near), 0, 1))
        if kind == "thick":
            image = np.where(near < 6 * scale, ndimage.grey_dilation(image, size=(3, 3)), image)
        if kind == "speckle":
            spots = hurt.uniform(2, shape[0] - 3, (5, 2)).round().astype(int)
            image[spots[:, 0], spots[:, 1]] = np.where(image[spots[:, 0], spots[:, 1]] > 128, 0, 255)
        return image

    return draw


def mnist(folder: Path) -> np.ndarray:
    """The training and test digits of a folder with MNIST's files, uint8 [70000, 28, 28]."""
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
    data = (gzip.decompress((folder / name).read_bytes()) for name in names)
    return np.concatenate([np.frombuffer(each, np.uint8, offset=16) for each in data]).reshape(-1, 28, 28)


def small_digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    eights = (load_digits().images * 255 / 16).round().astype(np.uint8)
    return eights.repeat(2, 1).repeat(2, 2)


# ---------------------------------------------------------------------------- files


def write(
    draw: Drawer, kinds: tuple[str, ...], folder: Path, *, good: int, test: int, each: int, seed: int
) -> None:
    """Writes a set. Its pictures are numbered in the order test/good, defects, train/good, so that sets with
    more training pictures share the others."""
    first = seed * 10_000
    numbers = iter(range(first, first + test + each * len(kinds) + good))
    save = {name: folder / name for name in ("train/good", "test/good")}
    for i in range(test):
        store(draw(next(numbers), None), save["test/good"] / f"{i:03d}.png")
    for kind in kinds:
        for i in range(each):
            number, key = next(numbers), 0
            while True:  # another place where this one shows nothing
                plain, hurt = draw(number + key, None), draw(number + key, kind)
                differs = np.abs(rounded(plain).astype(int) - rounded(hurt)) > SEEN
                mask = closed(differs.reshape(*plain.shape[:2], -1).any(2))
                if mask.sum() >= 5:
                    break
                key += 5_000
            store(hurt, folder / "test" / kind / f"{i:03d}.png")
            store(mask * 255.0, folder / "ground_truth" / kind / f"{i:03d}_mask.png")
    for i in range(good):
        store(draw(next(numbers), None), save["train/good"] / f"{i:03d}.png")


def closed(mask: np.ndarray) -> np.ndarray:
    """A mask without gaps of up to a twelfth of the side, as a person draws it."""
    radius = len(mask) // 24
    ball = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), radius)
    return ndimage.binary_closing(np.pad(mask, radius), ball)[radius:-radius, radius:-radius]


def rounded(image: Picture) -> np.ndarray:
    return image.round().clip(0, 255).astype(np.uint8)


def store(image: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rounded(image)).save(path)


Sets = Mapping[str, tuple[Drawer, tuple[str, ...]]]  # of each set its drawer and its kinds of defects


def drawers(
    textures: Path | None, digits: Path | None, seed: int, *, canvas: str = CANVAS, shape: str = "plate"
) -> Sets:
    """The sets by name. Textures are among them only if there is a zip of them."""
    rows: dict[str, tuple[Drawer, tuple[str, ...]]] = {"parts": (partial(part, shape=SHAPES[shape]), PARTS)}
    if textures:
        with zipfile.ZipFile(textures) as archive:
            source = Image.open(io.BytesIO(archive.read(canvas))).convert("RGB")
        cloth = quilt(np.asarray(source, np.float64), 640, rng_of(seed, "quilt"))
        rows["textures"] = texture_drawer(cloth), TEXTURES
    numbers = mnist(digits) if digits else small_digits()
    rows["digits"] = digit_drawer(numbers[rng_of(seed, "digits").permutation(len(numbers))]), DIGITS
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of what is drawn, for `drawers_of`."""
    parser.add_argument("--textures", type=Path, help="the zip of textures; without it no textures")
    parser.add_argument("--canvas", default=CANVAS, help="the picture in the zip that is quilted")
    parser.add_argument("--part", choices=list(SHAPES), default="plate")
    parser.add_argument("--mnist", type=Path, help="a folder of MNIST's files; else scikit-learn's digits")
    parser.add_argument("--seed", type=int, default=0)


def drawers_of(chosen: argparse.Namespace) -> Sets:
    how = {"canvas": chosen.canvas, "shape": chosen.part}
    return drawers(chosen.textures, chosen.mnist, chosen.seed, **how)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", dest="sets", help="parts, textures or digits; else all")
    parser.add_argument("--good", type=int, action="append", help="good training pictures; else 70 and 500")
    add_options(parser)
    parser.add_argument("--kinds", type=int, default=20, help="pictures of each kind of defect")
    parser.add_argument("--test", type=int, default=200, help="good test pictures")
    chosen = parser.parse_args()
    for name, (draw, kinds) in drawers_of(chosen).items():
        for good in chosen.good or (70, 500):
            if name in (chosen.sets or (name,)):
                folder = chosen.folder / f"{name}-{good}"
                write(draw, kinds, folder, good=good, test=chosen.test, each=chosen.kinds, seed=chosen.seed)
                print(folder)


if __name__ == "__main__":
    main()
