"""`glyphs`: letters and digits of the fonts that matplotlib carries, made anew with each pack."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gzcli.data.readers.raw_images import RawImages, in_arrays
from gzcli.data.sets.outlines import SIDE, distance, matrices, pictures
from gzcli.data.sets.specs import DataSpec

# Faces with all 36 characters, each drawn as a reader expects it.
_DEJAVU = ("Sans", "SansMono", "Serif")
_SLANTED = {"Sans": "Oblique", "SansMono": "Oblique", "Serif": "Italic"}
FACES = (
    *(
        f"DejaVu{family}{style}"
        for family in _DEJAVU
        for style in ("", "-Bold", f"-{_SLANTED[family]}", f"-Bold{_SLANTED[family]}")
    ),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10"),
)
LETTERS = 88  # pixels of an em in the large drawing, so that the widest letter fits into it
CAPITAL, WIDEST = 18.5, 19.5  # pixels of a glyph's height and, at most, of its width


def glyphs(spec: DataSpec) -> RawImages:
    """Characters of 21 faces, slightly sheared, turned, enlarged, moved and bolder. Classes take turns, so
    that each has as many images in each split."""
    n, classes = spec.n_train + spec.n_test, len(spec.class_names)
    draw = np.random.RandomState(0).uniform  # its stream is frozen
    maps = matrices(draw(-0.17, 0.17, n), draw(-0.15, 0.2, n), draw(0.88, 1.1, (n, 2)))
    center, bolder = draw(-1.2, 1.2, (n, 2)), draw(-0.05, 0.55, n)
    face = np.random.RandomState(1).randint(len(FACES), size=n)
    label = np.arange(n) % classes
    images = np.empty((n, 1, spec.size, spec.size), np.uint8)
    for i, name in enumerate(FACES):
        for j, character in enumerate(spec.class_names):
            rows = np.flatnonzero((face == i) & (label == j))
            if not len(rows):
                continue
            form, high, wide = _form(name, character)
            scale = np.array([min(CAPITAL / high, WIDEST / wide), CAPITAL / high])
            drawn = pictures(form, maps[rows] * scale, center[rows], bolder[rows], spec.size)
            images[rows, 0] = np.rint(255 * drawn)
    return in_arrays(spec, images, label)


def _form(face: str, character: str) -> tuple[np.ndarray, float, float]:
    """The signed distance [SIDE, SIDE] to the outline of a character in the middle of the drawing, and its
    height and width in units of half the drawing's side."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    font = ImageFont.truetype(path, LETTERS, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (SIDE, SIDE))
    at = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(at, character, 255, font)
    inside = np.asarray(canvas) > 127
    return distance(inside), (bottom - top) * 2 / SIDE, (right - left) * 2 / SIDE
