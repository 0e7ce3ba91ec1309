"""Writes seven inspection sets in MVTec's layout, with drawn defects and their masks, the same from the same
seed:

    python tests/tools/inspection_sets.py FOLDER [--good 70 …]
        [--set parts|textures|digits|labels|meshes|gears|wood] [--textures textures64.zip]
        [--canvas NAME] [--part plate|bracket] [--mnist DIR] [--seed 0] [--kinds 20] [--test 200]

  parts     a plate with a bore and four holes, 96 px, turned, shifted, lit and noisy; or a square bracket of
            cast metal with six
  textures  crops of a canvas, 96 px, which is quilted from one picture of a zip of textures
  digits    handwritten digits, 28 px of MNIST, or of scikit-learn where `--mnist` is absent
  labels    printed labels, 96 px, whose ink, place and turn vary; most defects are misprints
  meshes    wire meshes, 96 px, of any phase; most defects are out of shape
  gears     gears of twelve teeth, 96 px, turned by up to 4 degrees, under a light from any side
  wood      planed boards, 96 px, whose grain is never the same

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
from PIL import Image, ImageChops, ImageDraw, ImageFont
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


# ---------------------------------------------------------------------------- labels

LABELS = ("letter", "turned", "dropped", "faded", "double", "skewed")
LINES, BARS = ("KERN", "8250", "LOT7"), 14
FINE = 4  # the multiple of the size at which labels and meshes are drawn


def label(seed: int, kind: str | None) -> Picture:
    """A label of three lines of text and a bar code. Its place, turn, light, paper and ink go by the seed."""
    rng, hurt = rng_of(seed, "label"), rng_of(seed, "hurt")
    fine, font = SIDE * FINE, ImageFont.load_default(19 * FINE)
    place, turn = rng.normal(0, 0.6 * FINE, 2), rng.normal(0, 1)
    ink, paper, light = rng.normal(0.85, 0.03), rng.standard_normal((SIDE, SIDE)), rng.normal(1, 0.03)
    row, column = int(hurt.integers(3)), int(hurt.integers(4))
    sheet = Image.new("L", (fine, fine))
    for i, j in np.ndindex(3, 4):
        chosen = (i, j) == (row, column)
        letter = LINES[i][j]
        if chosen and kind == "letter":
            letter = str(hurt.choice([c for c in "ABDGHMPUWXZ3469" if c != letter]))
        glyph = Image.new("L", (17 * FINE, 22 * FINE))
        ImageDraw.Draw(glyph).text((8 * FINE, 11 * FINE), letter, 255, font, "mm")
        if chosen and kind == "turned":
            glyph = glyph.rotate(180)
        x, y = (13 + 18 * j) * FINE, (8 + 19 * i) * FINE
        if chosen and kind == "dropped":
            y += round(hurt.uniform(2.5, 4) * FINE)
        sheet.paste(ImageChops.lighter(glyph, sheet.crop((x, y, x + 17 * FINE, y + 22 * FINE))), (x, y))
    widths = rng_of("bars").integers(1, 4, BARS)
    for at, width in zip(np.cumsum(widths + 2) - 2, widths, strict=True):
        ImageDraw.Draw(sheet).rectangle(
            [(13 + at) * FINE, 70 * FINE, (13 + at + width) * FINE, 86 * FINE], 255
        )
    if kind == "double":
        ghost = Image.blend(Image.new("L", sheet.size), sheet, hurt.uniform(0.25, 0.5))
        sheet = ImageChops.lighter(sheet, ImageChops.offset(ghost, 2 * FINE, FINE))
    if kind == "skewed":
        turn += hurt.choice([-1, 1]) * hurt.uniform(5, 7)
    printed = np.asarray(
        sheet.rotate(turn, Image.Resampling.BILINEAR, translate=tuple(map(float, place))), np.float64
    )
    if kind == "faded":
        ramp = np.linspace(hurt.uniform(0.35, 0.5), 1, fine)
        printed = printed * (ramp if hurt.random() < 0.5 else ramp[::-1, None])
    printed = printed.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)) / 255
    grain = 5 * ndimage.gaussian_filter(paper, 1) / 0.28
    image = (225 + grain - 200 * ink * printed) * light
    return image[..., None] * np.array([1.0, 0.98, 0.9]) + rng.normal(0, 3, (SIDE, SIDE, 3))


# ---------------------------------------------------------------------------- meshes

MESHES = ("broken", "bent", "spacing", "twist", "thin", "dirt")


def mesh(seed: int, kind: str | None) -> Picture:
    """A mesh of wires 8 px apart. Its phase, turn, light and noise go by the seed."""
    rng, hurt = rng_of(seed, "mesh"), rng_of(seed, "hurt")
    phase, turn, light = rng.uniform(0, 8, 2), rng.normal(0, np.deg2rad(1.5)), rng.normal(1, 0.04)
    middle, size = hurt.uniform(24, SIDE - 24, 2), hurt.uniform(0.85, 1.2)
    fine = SIDE * 2
    y, x = (np.mgrid[:fine, :fine] + 0.5) / 2 - 0.5
    near = np.exp(-((y - middle[0]) ** 2 + (x - middle[1]) ** 2) / (2 * (7 * size) ** 2))
    if kind == "bent":
        y, x = y + hurt.choice([-1, 1]) * 3 * near, x + hurt.choice([-1, 1]) * 2 * near
    if kind == "twist":
        angle, dy, dx = hurt.choice([-1, 1]) * 0.45 * near, y - middle[0], x - middle[1]
        y, x = (
            middle[0] + dy * np.cos(angle) - dx * np.sin(angle),
            middle[1] + dy * np.sin(angle) + dx * np.cos(angle),
        )
    u, v = x * np.cos(turn) + y * np.sin(turn) + phase[0], y * np.cos(turn) - x * np.sin(turn) + phase[1]
    wire = np.round(middle / 8)
    if kind == "spacing":
        v = v + np.where(np.round(v / 8) == wire[0], hurt.choice([-1, 1]) * hurt.uniform(1.8, 2.6), 0)
    thick = 1.1 - (0.45 * np.clip(2 * near, 0, 1) if kind == "thin" else 0)
    across, along = (np.abs(each - 8 * np.round(each / 8)) for each in (u, v))
    rows, columns = (np.clip(0.5 + 2 * (thick - each), 0, 1) for each in (along, across))
    if kind == "broken":
        gone = (np.round(v / 8) == wire[0]) & (np.abs(x - middle[1]) < 4 * size)
        rows = np.where(gone, 0, rows)
    over = (np.round(u / 8) + np.round(v / 8)) % 2
    shade = np.maximum(rows * (150 + 45 * over), columns * (195 - 45 * over))
    image = 45 + np.maximum(rows, columns) * (shade - 45)
    if kind == "dirt":
        image = image + np.clip(1.5 * near, 0, 1) * hurt.uniform(22, 34)
    image = (image * light).reshape(SIDE, 2, SIDE, 2).mean((1, 3))
    return image[..., None] * np.array([0.95, 1.0, 1.04]) + rng.normal(0, 4, (SIDE, SIDE, 3))


# ---------------------------------------------------------------------------- gears

GEARS = ("tooth", "burr", "crack", "rust", "pit", "keyway")


def gear(seed: int, kind: str | None) -> Picture:
    """A gear from above. Its place, turn, light and noise go by the seed."""
    rng, hurt = rng_of(seed, "gear"), rng_of(seed, "hurt")
    centre, turn, side = SIDE / 2 - 0.5 + rng.normal(0, 1, 2), rng.uniform(-4, 4), rng.uniform(0, 2 * np.pi)
    light, steel = rng.normal(1, 0.04), rng.normal(165, 4)
    fine = SIDE * 2
    y, x = (np.mgrid[:fine, :fine] + 0.5) / 2 - 0.5
    x, y = x - centre[0], y - centre[1]
    r, angle = np.hypot(x, y), np.arctan2(y, x) - np.deg2rad(turn)
    tooth = hurt.integers(12)
    phase = angle * 12 / (2 * np.pi)
    at_tooth = np.round(phase) % 12 == tooth
    profile = np.clip(np.cos(2 * np.pi * phase) * 3, -1, 1)  # 1 on a tooth, -1 between two
    outer = 36 + 4 * profile
    if kind == "tooth":
        outer = np.where(at_tooth & (profile > -1), 32 + hurt.uniform(0, 3), outer)
    if kind == "burr":
        near = np.abs(phase - np.round(phase)) < 0.25
        outer = outer + np.where(at_tooth & near, hurt.uniform(1.2, 2.2), 0)
    metal = np.clip(0.5 + 2 * (outer - r), 0, 1) * np.clip(0.5 + 2 * (r - 9), 0, 1)
    if kind != "keyway":
        u, v = r * np.cos(angle), r * np.sin(angle)
        slot = np.clip(0.5 + 2 * (2.5 - np.abs(v)), 0, 1) * np.clip(0.5 + 2 * (12.5 - u), 0, 1) * (u > 0)
        metal = metal * (1 - slot)
    ring = 14 * np.exp(-np.square((r - 26) / 2)) * np.cos(np.arctan2(y, x) - side)  # a turned groove
    gloss = 10 * np.cos(2 * (np.arctan2(y, x) - side))
    image = 40 + metal * (steel + ring + gloss - 40)
    image = (image * light).reshape(SIDE, 2, SIDE, 2).mean((1, 3))
    colour = image[..., None] * np.array([1.0, 1.0, 0.98])
    radius, way = hurt.uniform(15, 30), hurt.uniform(0, 2 * np.pi)
    at = centre[::-1] + radius * np.array([np.sin(way), np.cos(way)])  # (y, x) on the metal
    shape, size = (SIDE, SIDE), hurt.uniform(0.8, 1.2)
    if kind == "crack":
        mark = line(shape, wander(hurt, at[::-1], 15 * size, 0.35), 0.9)
        colour = colour * (1 - 0.35 * mark[..., None])
    if kind == "rust":
        mark = shifted(blot(hurt, shape, 5 * size), *at)
        colour = colour * (1 - mark[..., None] * np.array([0.06, 0.2, 0.34]))
    if kind == "pit":
        mark = shifted(blot(hurt, shape, 2.2 * size), *at)
        colour = colour * (1 - 0.4 * mark[..., None])
    return colour + rng.normal(0, 3, colour.shape)


# ---------------------------------------------------------------------------- wood

WOOD = ("knot", "scratch", "stain", "hole", "dent", "glue")


def wood(seed: int, kind: str | None) -> Picture:
    """A board. Its grain, light and noise go by the seed."""
    rng, hurt = rng_of(seed, "wood"), rng_of(seed, "hurt")
    shape, size = (SIDE, SIDE), hurt.uniform(0.8, 1.2)
    at = hurt.uniform(16, SIDE - 16, 2)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    bend = ndimage.gaussian_filter(rng.standard_normal(shape), (20, 30))
    across = x + 5 * bend / bend.std() + rng.uniform(0, 40)
    if kind == "knot":
        dy, dx = y - at[0], x - at[1]
        far = np.hypot(dy / 2, dx) / (5 * size)
        across = across + np.sign(dx) * 6 * np.exp(-far)
    rings = np.sin(2 * np.pi * across / rng.uniform(8, 11)) + 0.5 * np.sin(2 * np.pi * across / 3.7)
    fibre = ndimage.gaussian_filter(rng.standard_normal(shape), (9, 0.6))
    image = 150 + 12 * rings + 9 * fibre / fibre.std()
    if kind == "knot":
        image = image - 70 * np.exp(-np.square(far))
    if kind == "dent":
        mark = shifted(blot(hurt, shape, 6 * size), *at)
        image = image + 45 * (np.roll(mark, 2, 0) - np.roll(mark, -2, 0))
    colour = image[..., None] * np.array([1.12, 0.88, 0.62])
    if kind == "scratch":
        mark = line(shape, wander(hurt, at[::-1], 26 * size, 0.1), 1.0)
        colour = colour * (1 + hurt.choice([-1, 1]) * 0.22 * mark[..., None])
    if kind == "stain":
        mark = shifted(blot(hurt, shape, 9 * size), *at)
        colour = colour * (1 - mark[..., None] * np.array([0.14, 0.12, 0.06]))
    if kind == "hole":
        mark = shifted(blot(hurt, shape, 2 * size), *at)
        colour = colour * (1 - 0.7 * mark[..., None])
    if kind == "glue":
        mark = shifted(blot(hurt, shape, 7 * size), *at)
        smooth = ndimage.gaussian_filter(colour, (3, 3, 0)) * 1.06
        colour = colour + 0.8 * mark[..., None] * (smooth - colour)
    return colour * rng.normal(1, 0.03) + rng.normal(0, 3, colour.shape)


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
    rows |= {"labels": (label, LABELS), "meshes": (mesh, MESHES)}
    return rows | {"gears": (gear, GEARS), "wood": (wood, WOOD)}


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
    parser.add_argument("--set", action="append", dest="sets", help="one of the seven; else all")
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
