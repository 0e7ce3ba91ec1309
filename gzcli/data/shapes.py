"""`shapes`: flat forms on a soft background, all of whose factors are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gzcli.data.readers.raw_images import RawImages, in_arrays
from gzcli.data.sets.outlines import SIDE, distance, matrices, pictures
from gzcli.data.sets.specs import DataSpec

COLOURS = {
    "red": (222, 45, 45),
    "orange": (250, 140, 22),
    "yellow": (250, 219, 60),
    "green": (46, 174, 84),
    "turquoise": (32, 197, 205),
    "blue": (48, 90, 225),
    "violet": (140, 66, 200),
    "pink": (246, 120, 186),
}
SIZES = ("small", "medium", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
SMALLEST, LARGEST = 5.0, 11.0  # pixels from the middle of a form to its farthest point
ROUND = ("circle", "ring")  # these look the same at all angles
REACH = 0.8  # of half the large drawing: the outline stays off its edge

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x and y of points → whether a form covers them


@dataclass(frozen=True)
class Factors:
    """What is true of each image.

    kind: number in KINDS, [N].
    colour: number in COLOURS, [N].
    radius: pixels from the middle of the form to its farthest point, [N].
    center: pixels from the middle of the picture to that of the form, to the right and down, [N, 2].
    angle: by which the form is turned clockwise, in degrees, [N]; 0 where that shows nothing.
    """

    kind: np.ndarray
    colour: np.ndarray
    radius: np.ndarray
    center: np.ndarray
    angle: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """Number in SIZES, [N]: thirds of the radius."""
        return np.floor(3 * (self.radius - SMALLEST) / (LARGEST - SMALLEST)).clip(0, 2).astype(np.int64)

    @property
    def places(self) -> np.ndarray:
        """Which of PLACES hold, bool [N, 5]: left, right, top and bottom from two pixels off the middle."""
        x, y = self.center.T
        off = np.stack([x < -2, x > 2, y < -2, y > 2], 1)
        return np.concatenate([off, ~off.any(1, keepdims=True)], 1)


def factors(n: int) -> Factors:
    """The factors of the first n images: kinds and colours take turns, the others are uniform, such that the
    whole form is in the picture."""
    rng = np.random.RandomState(0)  # its stream is frozen
    radius, place, angle = np.split(rng.uniform(size=(n, 4)), [1, 3], 1)
    kind, colour = np.arange(n) % len(KINDS), np.arange(n) // len(KINDS) % len(COLOURS)
    radius = SMALLEST + (LARGEST - SMALLEST) * radius[:, 0]
    center = (2 * place - 1) * (15.5 - radius[:, None])
    turned = ~np.isin(kind, [KINDS.index(name) for name in ROUND])
    return Factors(kind, colour, radius, center, 360 * angle[:, 0] * turned)


def shapes(spec: DataSpec) -> RawImages:
    """Forms of 8 kinds and colours; the class is the kind, the caption states the factors in words."""
    known = factors(spec.n_train + spec.n_test)
    return replace(in_arrays(spec, _drawn(known, spec.size), known.kind), captions=_captions(known, spec))


def shapes_factors(spec: DataSpec) -> RawImages:
    """The same images, with a label for each factor in place of the class."""
    known = factors(spec.n_train + spec.n_test)
    labels = [
        np.eye(len(names), dtype=np.uint8)[which]
        for names, which in ((KINDS, known.kind), (COLOURS, known.colour), (SIZES, known.size))
    ]
    return in_arrays(
        spec, _drawn(known, spec.size), np.concatenate([*labels, known.places], 1).astype(np.uint8)
    )


def _captions(known: Factors, spec: DataSpec) -> dict[str, list[str]]:
    """By split, texts such as `a small red star at the top left`."""
    colours = list(COLOURS)
    words = [
        f"a {SIZES[size]} {colours[colour]} {KINDS[kind]} {_where(there)}"
        for size, colour, kind, there in zip(known.size, known.colour, known.kind, known.places, strict=True)
    ]
    return {"train": words[: spec.n_train], "test": words[spec.n_train :]}


def _where(there: np.ndarray) -> str:
    left, right, top, bottom, centre = there
    if centre:
        return "in the centre"
    high, wide = "top" if top else "bottom" if bottom else "", "left" if left else "right" if right else ""
    return f"at the {f'{high} {wide}'.strip()}"


def _drawn(known: Factors, side: int) -> np.ndarray:
    """The images, uint8 [N, 3, side, side]: a form of one colour on a background that goes from one pale
    colour to another."""
    n = len(known.kind)
    draw = np.random.RandomState(1).uniform
    first, last = draw(205, 250, (2, n, 3, 1, 1)).astype(np.float32)
    way = draw(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    across = np.linspace(-1, 1, side, dtype=np.float32) / np.sqrt(8, dtype=np.float32)
    ink = np.array(list(COLOURS.values()), np.float32)[known.colour][:, :, None, None]
    maps = matrices(np.deg2rad(known.angle), np.zeros(n), np.repeat(known.radius[:, None] / REACH, 2, 1))
    images = np.empty((n, 3, side, side), np.uint8)
    for i, name in enumerate(KINDS):
        rows = known.kind == i
        covered = pictures(_form(name), maps[rows], known.center[rows], 0.0, side)[:, None]
        share = 0.5 + (np.cos(way[rows]) * across + np.sin(way[rows]) * across[:, None])[:, None]
        background = first[rows] + (last[rows] - first[rows]) * share
        images[rows] = np.rint(background + (ink[rows] - background) * covered)
    return images


def _form(kind: str) -> np.ndarray:
    """The signed distance [SIDE, SIDE] to the outline of a form whose farthest point is `REACH` from the
    middle."""
    across = (2 * np.arange(SIDE) + 1) / SIDE - 1
    x, y = (axis / REACH for axis in np.meshgrid(across, -across))  # y upwards
    return distance(INSIDE[kind](x, y))


def _disc(x: np.ndarray, y: np.ndarray, radius: float = 1.0) -> np.ndarray:
    return np.hypot(x, y) < radius


def _corners(count: int, *radii: float) -> Inside:
    """The inside of a polygon whose corners lie evenly around the middle, the first above it, at the radii in
    turn."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        from matplotlib.path import Path

        angle = np.arange(count) * 2 * np.pi / count
        corners = np.stack([np.sin(angle), np.cos(angle)], 1) * np.resize(radii, count)[:, None]
        return Path(corners).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)

    return inside


# The inside of each form, at x and y (upwards) in units of the distance of its farthest point.
INSIDE: dict[str, Inside] = {
    "circle": _disc,
    "ring": lambda x, y: _disc(x, y) & ~_disc(x, y, 0.55),
    "moon": lambda x, y: _disc(x, y) & ~_disc(x - 0.5, y, 0.8),
    "heart": lambda x, y: ((1.35 * x) ** 2 + (1.35 * y) ** 2 - 1) ** 3 < (1.35 * x) ** 2 * (1.35 * y) ** 3,
    "triangle": _corners(3, 1.0),
    "square": _corners(4, 1.0),
    "star": _corners(10, 1.0, 0.45),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
}
KINDS = tuple(INSIDE)
FACTORS = (*KINDS, *COLOURS, *SIZES, *PLACES)  # the classes of `shapes-factors`
