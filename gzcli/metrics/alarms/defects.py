"""Synthetic defects, with which methods and their settings are compared if no real defects are
available. A piece of an image is pasted elsewhere, whole or as a thin scar (after CutPaste: Li et al. 2021,
arXiv:2104.04015). A blot covers a region (after DRAEM: Zavrtanik et al. 2021, arXiv:2108.07610). A line is
scratched. A region is blurred, filled with its surroundings, or made brighter or darker.

Of larger changes, a large piece is moved, the image is turned upside down, or it is another picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

Rng = np.random.Generator
# the pixels of the defect, float32 [C, H, W], and its mask, 0 … 1 [H, W]
Change = tuple[np.ndarray, np.ndarray]
Drawer = Callable[[np.ndarray, Rng], Change]  # draws a defect for an image float32 [C, H, W], 0 … 255
MIN_DEFECT_SIDE, MAX_DEFECT_SIDE = 0.03, 0.16  # side of a defect as a share of the image's
MIN_OPACITY = 0.3  # least opacity of a defect; contrasts are drawn separately
PLAIN_CONTRAST = 1.5  # contrast of plain defects, relative to opaque ones
EDGE_BLUR = (
    0.003,
    0.012,
)  # standard deviation of the blur of its edges, like a lens's, as a share of the side
LOCAL_KINDS = ("paste", "scar", "scratch", "blot", "blur", "missing", "step")
DEFECT_KINDS = (*LOCAL_KINDS, "moved", "upside_down", "foreign")
MIN_DIFFERENCE = 6  # least difference of a pixel of a defect, in grey levels


def synthetic(
    images: np.ndarray,
    *,
    each: int = 1,
    seed: int = 0,
    plain: bool = False,
    kinds: Sequence[str] = LOCAL_KINDS,
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Draws `each` defects of every kind on images uint8 [N, C, H, W], one per image. Returns the images
    [kinds · each, C, H, W], their kinds, and the indices of the images on which they were drawn. An invisible
    defect is drawn again.

    kinds: of `DEFECT_KINDS`.

    plain: whether defects are opaque and differ from the image `PLAIN` times as much.
    """
    out, drawn_kinds, source = [], [], []
    for i in range(each * len(kinds)):
        kind = kinds[i % len(kinds)]
        rng = np.random.default_rng([seed, i])
        source.append(int(rng.integers(len(images))))
        image = images[source[-1]]
        for _ in range(8):
            if kind in WHOLE_DRAWERS:
                drawn = WHOLE_DRAWERS[kind](image, rng)
            else:
                drawn = changed(image.astype(np.float32), DRAWERS[kind], rng, plain=plain)
            if np.abs(drawn.astype(int) - image).max() >= MIN_DIFFERENCE:
                break
        out.append(drawn)
        drawn_kinds.append(kind)
    return np.stack(out), drawn_kinds, np.array(source)


def changed(image: np.ndarray, drawer: Drawer, rng: Rng, *, plain: bool = False) -> np.ndarray:
    """An image with a defect, uint8."""
    from scipy.ndimage import gaussian_filter

    target, mask = drawer(image, rng)
    mask = gaussian_filter(mask, rng.uniform(*EDGE_BLUR) * min(image.shape[1:])) * rng.uniform(MIN_OPACITY, 1)
    mask = PLAIN_CONTRAST * mask / max(MIN_OPACITY, float(mask.max())) if plain else mask
    return (image + mask * (target - image)).clip(0, 255).round().astype(np.uint8)


def _side(image: np.ndarray, rng: Rng, scale: float = 1.0) -> int:
    return max(2, round(scale * rng.uniform(MIN_DEFECT_SIDE, MAX_DEFECT_SIDE) * min(image.shape[1:])))


def _place(image: np.ndarray, h: int, w: int, rng: Rng) -> tuple[slice, slice]:
    """A random box of the image. In half of the cases, it is the one with the most structure out of three."""
    _, height, width = image.shape
    boxes = []
    for _ in range(3):
        y, x = rng.integers(0, max(1, height - h + 1)), rng.integers(0, max(1, width - w + 1))
        boxes.append((slice(y, y + h), slice(x, x + w)))
    if rng.random() < 0.5:
        return boxes[0]
    return max(boxes, key=lambda box: float(image[:, box[0], box[1]].std()))


def _level(image: np.ndarray, rng: Rng, strength: tuple[float, float]) -> np.ndarray:
    """A change of colour, [C, 1, 1], proportional to the contrast of the image."""
    contrast = max(20.0, float(np.quantile(image, 0.98) - np.quantile(image, 0.02)))
    tint = 1 + 0.4 * rng.uniform(-1, 1, (len(image), 1, 1)) * (len(image) > 1)
    return (rng.choice([-1, 1]) * rng.uniform(*strength) * contrast * tint).astype(np.float32)


def _mask(image: np.ndarray, box: tuple[slice, slice], *, oval: bool) -> np.ndarray:
    """1 in a box, or in the oval in it, [H, W]."""
    mask = np.zeros(image.shape[1:], np.float32)
    h, w = mask[box].shape
    y, x = np.mgrid[:h, :w]
    r = np.hypot((y - (h - 1) / 2) / (h / 2), (x - (w - 1) / 2) / (w / 2))
    mask[box] = np.clip((1 - r) * 3, 0, 1) if oval else 1
    return mask


def paste(image: np.ndarray, rng: Rng) -> Change:
    h, w = _side(image, rng), _side(image, rng)
    source, target = (_place(image, h, w, rng) for _ in range(2))
    out = image.copy()
    out[:, target[0], target[1]] = image[:, source[0], source[1]]
    return out, _mask(image, target, oval=False)


def scar(image: np.ndarray, rng: Rng) -> Change:
    """Pastes a long thin piece, rotated by 90 degrees."""
    long, thin = _side(image, rng, 2), max(1, _side(image, rng, 0.3))
    source, target = _place(image, thin, long, rng), _place(image, long, thin, rng)
    out = image.copy()
    out[:, target[0], target[1]] = image[:, source[0], source[1]].transpose(0, 2, 1)
    return out, _mask(image, target, oval=False)


def scratch(image: np.ndarray, rng: Rng) -> Change:
    """Draws a bent line, a pixel wide or slightly more."""
    _, height, width = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    top, left = _place(image, 2, 2, rng)
    angle, half = rng.uniform(0, np.pi), _side(image, rng, 1.2)
    dy, dx = y - top.start, x - left.start
    along = dy * np.sin(angle) + dx * np.cos(angle)
    bend = rng.uniform(-0.5, 0.5) * along**2 / max(half, 1) / 2
    across = np.abs(dx * np.sin(angle) - dy * np.cos(angle) + bend)
    thick = rng.uniform(0.2, 0.01 * min(height, width) + 0.3)
    mask = np.clip(thick + 0.5 - across, 0, 1) * (np.abs(along) <= half)
    return image + _level(image, rng, (0.15, 0.7)), mask


def blot(image: np.ndarray, rng: Rng) -> Change:
    box = _place(image, _side(image, rng, 1.3), _side(image, rng, 1.3), rng)
    return image + _level(image, rng, (0.1, 0.5)), _mask(image, box, oval=True)


def blur(image: np.ndarray, rng: Rng) -> Change:
    from scipy.ndimage import gaussian_filter

    box = _place(image, _side(image, rng, 2.5), _side(image, rng, 2.5), rng)
    sigma = rng.uniform(0.015, 0.04) * min(image.shape[1:])
    return gaussian_filter(image, (0, sigma, sigma)), _mask(image, box, oval=True)


def missing(image: np.ndarray, rng: Rng) -> Change:
    """Fills a region with the colour around it."""
    rows, columns = _place(image, _side(image, rng, 1.3), _side(image, rng, 1.3), rng)
    ring = image[:, max(0, rows.start - 2) : rows.stop + 2, max(0, columns.start - 2) : columns.stop + 2]
    colour = np.median(ring, (1, 2))[:, None, None]
    return np.broadcast_to(colour, image.shape), _mask(image, (rows, columns), oval=True)


def step(image: np.ndarray, rng: Rng) -> Change:
    """Makes a box brighter or darker."""
    box = _place(image, _side(image, rng, 1.5), _side(image, rng, 1.5), rng)
    return image + _level(image, rng, (0.08, 0.3)), _mask(image, box, oval=False)


def moved(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Moves a piece of a third to two thirds of the sides, and fills its place with the colour around it."""
    height, width = image.shape[1:]
    h, w = (int(side * rng.uniform(1 / 3, 2 / 3)) for side in (height, width))
    (y, x), (to_y, to_x) = rng.integers(0, (height - h + 1, width - w + 1), (2, 2))
    out, piece = image.copy(), image[:, y : y + h, x : x + w]
    out[:, y : y + h, x : x + w] = np.median(piece, (1, 2), keepdims=True)
    out[:, to_y : to_y + h, to_x : to_x + w] = piece
    return out


def upside_down(image: np.ndarray, rng: Rng) -> np.ndarray:
    return np.ascontiguousarray(image[:, ::-1])


def foreign(image: np.ndarray, rng: Rng) -> np.ndarray:
    """A picture of something else: a photograph, digits, noise or one colour."""
    from sklearn.datasets import load_digits

    channels, height, width = image.shape
    way = rng.integers(4)
    if way == 0:
        return rng.integers(0, 256, image.shape, np.uint8)
    if way == 1:
        return np.broadcast_to(rng.integers(0, 256, (channels, 1, 1), np.uint8), image.shape).copy()
    if way == 2:
        digit = load_digits().images[int(rng.integers(1797))] * (255 / 16)
        picture = Image.fromarray(digit.astype(np.uint8))
    else:
        source = photographs()[int(rng.integers(2))]
        side = int(rng.integers(100, 400))
        y, x = (int(rng.integers(0, length - side)) for length in source.shape[:2])
        picture = Image.fromarray(source[y : y + side, x : x + side])
    picture = picture.convert("L" if channels == 1 else "RGB").resize((width, height))
    array = np.asarray(picture)
    return array[None].copy() if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


@lru_cache(maxsize=1)
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    images: list[np.ndarray] = load_sample_images().images
    return images


DRAWERS: dict[str, Drawer] = {
    "paste": paste,
    "scar": scar,
    "scratch": scratch,
    "blot": blot,
    "blur": blur,
    "missing": missing,
    "step": step,
}
# of the whole image, uint8 → uint8
WHOLE_DRAWERS: dict[str, Callable[[np.ndarray, Rng], np.ndarray]] = {
    "moved": moved,
    "upside_down": upside_down,
    "foreign": foreign,
}
