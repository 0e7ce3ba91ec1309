"""The sets that need no download. They are made from scikit-learn's digits and photographs, Matplotlib's
fonts or a sheet of emoji, or are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gzcli.core.errors import MissingError
from gzcli.data.readers.images import RawImages, from_arrays
from gzcli.data.sets import registry
from gzcli.data.sets.registry import DataSpec

DRAWING_SIDE = 128  # pixels a side of the large drawing, which spans −1 … 1


def distance(drawing: np.ndarray) -> np.ndarray:
    """The signed distance, float32, to the outline of a drawing, bool [DRAWING_SIDE, DRAWING_SIDE], in units
    of half its side."""
    from scipy.ndimage import distance_transform_edt as edt

    return ((edt(drawing) - edt(~drawing)) * (2 / DRAWING_SIDE)).astype(np.float32)


def matrices(angle: np.ndarray, shear: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Matrices [N, 2, 2] of the form's plane (x to the right, y down) that shear, then rotate, then scale."""
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    sheared = np.stack([one, -shear, zero, one], -1).reshape(-1, 2, 2)
    turned = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    return turned @ (size[:, :, None] * sheared)


def pictures(
    form: np.ndarray, maps: np.ndarray, center: np.ndarray, bolder: np.ndarray | float, side: int
) -> np.ndarray:
    """Images [N, side, side] of one form, float32: the fraction of each pixel that the form covers."""
    from scipy.ndimage import map_coordinates

    back = np.linalg.inv(maps) * (
        DRAWING_SIDE / 2
    )  # maps pixels of the image to those of the drawing, (x, y)
    first = (DRAWING_SIDE - 1) / 2 - np.einsum("nij,nj->ni", back, center)
    across = np.arange(side) - (side - 1) / 2
    column, row = (  # coordinates in the drawing for each pixel of each image: [N, side, side]
        first[:, i, None, None]
        + back[:, i, 0, None, None] * across
        + back[:, i, 1, None, None] * across[:, None]
        for i in (0, 1)
    )
    depth = map_coordinates(form, [row, column], order=1, mode="nearest", output=np.float32)
    scale = np.sqrt(np.abs(np.linalg.det(maps))).astype(np.float32)  # pixels of a unit of the form's plane
    return (depth * scale[:, None, None] + np.reshape(bolder, (-1, 1, 1)) + 0.5).clip(0, 1)


ITALIC = Path(registry.__file__).with_name("cmti10.ttf")  # matplotlib has it from 3.11 on only
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
    *("cmr10", "cmb10", ITALIC.stem, "cmss10", "cmtt10"),
)
PIXELS_PER_EM = 88  # pixels of an em in the large drawing, so that the widest letter fits into it
GLYPH_HEIGHT, MAX_GLYPH_WIDTH = 18.5, 19.5  # pixels of a glyph's height and, at most, of its width


def glyphs(spec: DataSpec) -> RawImages:
    """Characters of 21 typefaces, slightly sheared, rotated, scaled, moved and emboldened; classes
    alternate."""
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
            form, high, wide = _glyph(name, character)
            scale = np.array([min(GLYPH_HEIGHT / high, MAX_GLYPH_WIDTH / wide), GLYPH_HEIGHT / high])
            glyph_images = pictures(form, maps[rows] * scale, center[rows], bolder[rows], spec.size)
            images[rows, 0] = np.rint(255 * glyph_images)
    return _halved(spec, images, label)


def _glyph(face: str, character: str) -> tuple[np.ndarray, float, float]:
    """The signed distance [DRAWING_SIDE, DRAWING_SIDE] to the outline of a character in the middle of the
    drawing, and its height and width in units of half the drawing's side."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = ITALIC if face == ITALIC.stem else Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    font = ImageFont.truetype(str(path), PIXELS_PER_EM, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (DRAWING_SIDE, DRAWING_SIDE))
    corner = ((DRAWING_SIDE - left - right) / 2, (DRAWING_SIDE - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, character, 255, font)
    inside = np.asarray(canvas) > 127
    return distance(inside), (bottom - top) * 2 / DRAWING_SIDE, (right - left) * 2 / DRAWING_SIDE


FORM_COLOURS = {
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
FORM_PLACES = ("left", "right", "top", "bottom", "centre")
MIN_FORM_RADIUS, MAX_FORM_RADIUS = 5.0, 11.0  # pixels from the middle of a form to its farthest point
ROUND_FORMS = ("circle", "ring")  # these look the same at all angles
FORM_REACH = 0.8  # of half the large drawing, to a form's farthest point: the outline stays off its edge

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x and y of points → whether a form covers them


@dataclass(frozen=True)
class Factors:
    """The factors of each image, as arrays."""

    kind: np.ndarray  # number in FORM_KINDS, [N]
    colour: np.ndarray  # number in FORM_COLOURS, [N]
    radius: np.ndarray  # pixels from the middle of the form to its farthest point, [N]
    center: np.ndarray  # pixels to the right of and below the middle of the image, [N, 2]
    angle: np.ndarray  # degrees clockwise, [N]; 0 if a rotation is invisible

    @property
    def size(self) -> np.ndarray:
        """Index in SIZES, [N]: thirds of the radius."""
        return (
            np.floor(3 * (self.radius - MIN_FORM_RADIUS) / (MAX_FORM_RADIUS - MIN_FORM_RADIUS))
            .clip(0, 2)
            .astype(np.int64)
        )

    @property
    def places(self) -> np.ndarray:
        """Which of FORM_PLACES apply, bool [N, 5]. Left, right, top and bottom begin two pixels from the
        middle."""
        x, y = self.center.T
        off = np.stack([x < -2, x > 2, y < -2, y > 2], 1)
        return np.concatenate([off, ~off.any(1, keepdims=True)], 1)


def factors(n: int) -> Factors:
    """The factors of the first n images: kinds and colours alternate, the others are uniform."""
    rng = np.random.RandomState(0)  # its stream is frozen
    radius, place, angle = np.split(rng.uniform(size=(n, 4)), [1, 3], 1)
    kind, colour = np.arange(n) % len(FORM_KINDS), np.arange(n) // len(FORM_KINDS) % len(FORM_COLOURS)
    radius = MIN_FORM_RADIUS + (MAX_FORM_RADIUS - MIN_FORM_RADIUS) * radius[:, 0]
    center = (2 * place - 1) * (15.5 - radius[:, None])
    turned = ~np.isin(kind, [FORM_KINDS.index(name) for name in ROUND_FORMS])
    return Factors(kind, colour, radius, center, 360 * angle[:, 0] * turned)


def shapes(spec: DataSpec) -> RawImages:
    """Shapes of 8 kinds and 8 colours. The class is the kind; the caption states the factors in words."""
    facts = factors(spec.n_train + spec.n_test)
    colours = list(FORM_COLOURS)
    words = []
    for size, colour, kind, there in zip(facts.size, facts.colour, facts.kind, facts.places, strict=True):
        height_first = " ".join(FORM_PLACES[i] for i in (2, 3, 0, 1) if there[i])
        where = f"at the {height_first}" if height_first else "in the centre"
        words.append(f"a {SIZES[size]} {colours[colour]} {FORM_KINDS[kind]} {where}")
    captions = {"train": words[: spec.n_train], "test": words[spec.n_train :]}
    return replace(_halved(spec, _draw_shapes(facts, spec.size), facts.kind), captions=captions)


def shapes_factors(spec: DataSpec) -> RawImages:
    """The images of `shapes`, with a label for each factor instead of the class."""
    facts = factors(spec.n_train + spec.n_test)
    labels = [
        np.eye(len(names), dtype=np.uint8)[index]
        for names, index in ((FORM_KINDS, facts.kind), (FORM_COLOURS, facts.colour), (SIZES, facts.size))
    ]
    every = np.concatenate([*labels, facts.places], 1).astype(np.uint8)
    return _halved(spec, _draw_shapes(facts, spec.size), every)


def _draw_shapes(facts: Factors, side: int) -> np.ndarray:
    """Images uint8 [N, 3, side, side]: a form in one colour on a gradient of pale colours."""
    n = len(facts.kind)
    draw = np.random.RandomState(1).uniform
    first, last = draw(205, 250, (2, n, 3, 1, 1)).astype(np.float32)
    way = draw(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    across = np.linspace(-1, 1, side, dtype=np.float32) / np.sqrt(8, dtype=np.float32)
    ink = np.array(list(FORM_COLOURS.values()), np.float32)[facts.colour][:, :, None, None]
    maps = matrices(np.deg2rad(facts.angle), np.zeros(n), np.repeat(facts.radius[:, None] / FORM_REACH, 2, 1))
    grid = (2 * np.arange(DRAWING_SIDE) + 1) / DRAWING_SIDE - 1
    x, y = (
        axis / FORM_REACH for axis in np.meshgrid(grid, -grid)
    )  # coordinates of the large drawing, y upwards
    images = np.empty((n, 3, side, side), np.uint8)
    for i, name in enumerate(FORM_KINDS):
        rows = facts.kind == i
        covered = pictures(distance(FORM_INSIDES[name](x, y)), maps[rows], facts.center[rows], 0.0, side)[
            :, None
        ]
        share = 0.5 + (np.cos(way[rows]) * across + np.sin(way[rows]) * across[:, None])[:, None]
        background = first[rows] + (last[rows] - first[rows]) * share
        images[rows] = np.rint(background + (ink[rows] - background) * covered)
    return images


def _disc(x: np.ndarray, y: np.ndarray, radius: float = 1.0) -> np.ndarray:
    return np.hypot(x, y) < radius


def _corners(count: int, *radii: float) -> Inside:
    """The inside of a polygon. Its corners are evenly spaced around the middle, beginning at the top, at
    `radii` in turn."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        from matplotlib.path import Path

        angle = np.arange(count) * 2 * np.pi / count
        corners = np.stack([np.sin(angle), np.cos(angle)], 1) * np.resize(radii, count)[:, None]
        return Path(corners).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)

    return inside


# The inside of each form, at x and y (upwards) in units of the distance of its farthest point.
FORM_INSIDES: dict[str, Inside] = {
    "circle": _disc,
    "ring": lambda x, y: _disc(x, y) & ~_disc(x, y, 0.55),
    "moon": lambda x, y: _disc(x, y) & ~_disc(x - 0.5, y, 0.8),
    "heart": lambda x, y: ((1.35 * x) ** 2 + (1.35 * y) ** 2 - 1) ** 3 < (1.35 * x) ** 2 * (1.35 * y) ** 3,
    "triangle": _corners(3, 1.0),
    "square": _corners(4, 1.0),
    "star": _corners(10, 1.0, 0.45),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
}
FORM_KINDS = tuple(FORM_INSIDES)
FACTORS = (*FORM_KINDS, *FORM_COLOURS, *SIZES, *FORM_PLACES)  # the classes of `shapes-factors`


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(spec: DataSpec) -> RawImages:
    """1,797 digits, 8×8 with 17 levels, doubled in size. The last fifth of each class is the test split."""
    return _raw(spec, *_digits())


def digits_ab(spec: DataSpec) -> RawImages:
    """Two unpaired domains: every second digit unchanged (A, white on black), the others inverted (B)."""
    images, _ = _digits()
    for split, x in images.items():
        images[split] = np.where((np.arange(len(x)) % 2 == 1)[:, None, None, None], 255 - x, x)
    return _raw(spec, images, {split: np.arange(len(x)) % 2 for split, x in images.items()})


def digits_captioned(spec: DataSpec) -> RawImages:
    """Digits with a caption such as `a handwritten seven`."""
    images, labels = _digits()
    captions = {split: [f"a handwritten {_WORDS[i]}" for i in y] for split, y in labels.items()}
    return replace(_raw(spec, images, labels), captions=captions)


_EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # edit of one digit, uint8 [1, 16, 16]
    "invert the colours": lambda x: 255 - x,
    "mirror it": lambda x: x[..., ::-1],
    "turn it upside down": lambda x: x[..., ::-1, ::-1],
    "make it bold": lambda x: _neighbours(x).max(0),
    "make it thin": lambda x: _neighbours(x).min(0),
    "make it smaller": lambda x: np.pad(x[..., ::2, ::2], ((0, 0), (4, 4), (4, 4))),
}


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Each pixel and its four neighbours, [5, 1, 16, 16]; pixels beyond the edge are black."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    shifts = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    return np.stack([padded[:, 1 + i : 17 + i, 1 + j : 17 + j] for i, j in shifts])


def digits_edited(spec: DataSpec) -> RawImages:
    """Digits that were edited by instructions, which cycle and are the captions; `before` are the unchanged
    digits."""
    before, labels = _digits()
    edits = list(_EDITS.items())
    chosen = {split: [edits[i % len(edits)] for i in range(len(x))] for split, x in before.items()}
    after = {
        split: np.stack([edit(x) for x, (_, edit) in zip(before[split], chosen[split], strict=True)])
        for split in before
    }
    captions = {split: [words for words, _ in rows] for split, rows in chosen.items()}
    further = {"before": _raw(spec, before, labels).blocks}
    return replace(_raw(spec, after, labels), captions=captions, further=further)


def patches(spec: DataSpec) -> RawImages:
    """32×32 patches of photographs. The left part of each (patches overlap by half) is train, a strip beside
    it validation, and the right fifth test. No two splits share a pixel."""
    from PIL import Image

    side, images, labels = 32, {}, {}
    # uint8 [427, 640, 3]
    photos = [np.asarray(Image.open(_of_sklearn(f"images/{name}.jpg"))) for name in ("china", "flower")]
    columns = {"train": range(0, 385, 16), "val": range(416, 481, 32), "test": range(512, 609, 32)}
    for split, lefts in columns.items():
        tops = range(0, 427 - side + 1, 16 if split == "train" else 32)
        cut = [
            [photo[y : y + side, x : x + side].transpose(2, 0, 1) for y in tops for x in lefts]
            for photo in photos
        ]
        images[split] = np.concatenate([np.stack(c) for c in cut])
        labels[split] = np.repeat(np.arange(2), len(cut[0]))
    return _raw(spec, images, labels)


EMOJI_SHEET, EMOJI_TABLE = (Path(registry.__file__).with_name(f"emoji.{kind}") for kind in ("webp", "tsv"))
EMOJI_SIDE = 32  # pixels a side in the sheet
STRIKE_SIZE, BITMAP = 109, (136, 128)  # the one size of Noto's bitmaps, and their width and height
EMOJI_FONT = "NotoColorEmoji.ttf"


def emoji(spec: DataSpec) -> RawImages:
    """Noto's emoji without skin tones, on white, with their names as captions. Up to 32 pixels they come from
    a sheet; above that, they are drawn with the installed font."""
    from PIL import Image

    rows = [line.split("\t") for line in EMOJI_TABLE.read_text("utf-8").splitlines()]
    groups, characters, names = zip(*rows, strict=True)
    if spec.size == EMOJI_SIDE:
        sheet = np.asarray(Image.open(EMOJI_SHEET).convert("RGB"))
        high, wide = (side // EMOJI_SIDE for side in sheet.shape[:2])
        cells = sheet.reshape(high, EMOJI_SIDE, wide, EMOJI_SIDE, 3).transpose(0, 2, 4, 1, 3)
        images = cells.reshape(high * wide, 3, EMOJI_SIDE, EMOJI_SIDE)
    else:
        images = draw_emoji(characters, spec.size, emoji_font())
    label = np.array([spec.class_names.index(group) for group in groups])
    val = spec.n_train + spec.n_val
    parts = {"train": slice(spec.n_train), "val": slice(spec.n_train, val), "test": slice(val, len(rows))}
    captions = {split: list(names[part]) for split, part in parts.items()}
    x, y = ({split: values[part] for split, part in parts.items()} for values in (images, label))
    return replace(_raw(spec, x, y), captions=captions)


def emoji_font() -> Path:
    """The installed font. Raises MissingError if there is none."""
    from matplotlib.font_manager import findSystemFonts

    if path := next((path for path in findSystemFonts() if Path(path).name == EMOJI_FONT), None):
        return Path(path)
    hint = "install it (Debian: `apt install fonts-noto-color-emoji`), or train at `data.size=32`"
    raise MissingError(
        f"`emoji` above 32 pixels is drawn with `{EMOJI_FONT}`, which is not installed", hint=hint
    )


def draw_emoji(texts: Sequence[str], side: int, font: Path) -> np.ndarray:
    """Images uint8 [N, 3, side, side] of emoji on white. Raises MissingError if no library is available that
    joins characters into one emoji."""
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        hint = "install `libfribidi0`, or train at `data.size=32`"
        raise MissingError("Pillow has no text shaping here: a flag would be drawn as letters", hint=hint)
    noto = ImageFont.truetype(str(font), STRIKE_SIZE, layout_engine=ImageFont.Layout.RAQM)
    wide, high = BITMAP
    left = (wide - high) // 2  # no bitmap has ink in the columns that are cut off
    images = np.empty((len(texts), 3, side, side), np.uint8)
    for i, text in enumerate(texts):
        canvas = Image.new("RGB", BITMAP, "white")
        ImageDraw.Draw(canvas).text((0, 0), text, font=noto, embedded_color=True)
        square = canvas.crop((left, 0, left + high, high)).resize((side, side), Image.Resampling.LANCZOS)
        images[i] = np.asarray(square).transpose(2, 0, 1)
    return images


MAKERS: dict[str, Callable[[DataSpec], RawImages]] = {
    "digits": digits,
    "digits-ab": digits_ab,
    "digits-captioned": digits_captioned,
    "digits-edited": digits_edited,
    "emoji": emoji,
    "glyphs": glyphs,
    "patches": patches,
    "shapes": shapes,
    "shapes-factors": shapes_factors,
}


def _of_sklearn(name: str) -> Path:
    """A file of scikit-learn's data sets. An import of the package takes as long as that of torch."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("datasets") / name


def _digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images uint8 [N, 1, 16, 16] and labels int64 [N], by split."""
    table = np.loadtxt(_of_sklearn("data/digits.csv.gz"), delimiter=",")  # 64 pixels and the label
    levels, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)
    # Level k of 17 is stored as the byte nearest to 255 k / 16, which (byte · 17) >> 8 takes back to k.
    pixels = np.rint(levels * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)[:, None]
    test = np.zeros(len(labels), bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        test[rows[len(rows) - len(rows) // 5 :]] = True
    return {"train": pixels[~test], "test": pixels[test]}, {"train": labels[~test], "test": labels[test]}


def _raw(spec: DataSpec, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> RawImages:
    """The images of a set by their splits, uint8 [N, C, H, W]."""
    return from_arrays(spec, labels, lambda: ((split, x, split) for split, x in images.items()))


def _halved(spec: DataSpec, images: np.ndarray, labels: np.ndarray) -> RawImages:
    """The images of a set, the last `n_test` of which are the test split."""
    n = spec.n_train
    return _raw(spec, {"train": images[:n], "test": images[n:]}, {"train": labels[:n], "test": labels[n:]})
