"""Sheets of images in named rows and columns, with a caption below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gzcli.core.streams import in_a_line
from gzcli.core.units import duration
from gzcli.store.png import font_of, picture_of

if TYPE_CHECKING:
    from torch import Tensor

    from gzcli.engine.trained import Trained

CELL_SIDE = 96  # side in pixels up to which small images are enlarged, by integer factors
SMOOTH_FILTER = "BICUBIC"  # Pillow's filter for images that are looked at
PAPER_GREY = 236  # grey level of the background, against which white images have an edge
IMAGE_GAP, BLOCK_GAP, SHEET_MARGIN = 3, 14, 8  # pixels between images, between blocks of rows, around all
LETTER_HEIGHT = 13  # height of letters in pixels
HEADING_HEIGHT = LETTER_HEIGHT + SHEET_MARGIN  # pixels of a line of headings
TEXT_HEIGHT = LETTER_HEIGHT + 2  # pixels of a line of text below an image
CLASSES_PER_BAND = 12  # maximum number of classes side by side


@dataclass(frozen=True)
class Row:
    """A row of a sheet."""

    name: str  # the text on its left
    images: Sequence[np.ndarray] | np.ndarray  # its images, uint8 [C, H, W] each, or [n, C, H, W]
    marks: Sequence[str] = ()  # headings above the images
    exact: bool = False  # whether each pixel is shown as a square, as in masks and maps
    under: Sequence[Sequence[str]] = ()  # lines of text below each image, the same number for all


def sheet(blocks: Sequence[Sequence[Row]], caption: str = "") -> np.ndarray:
    """A sheet, uint8 [H, W, C], C = 1 or 3: blocks of rows of images, which all have one size."""
    from PIL import Image, ImageDraw

    blocks, caption = [list(map(_drawable, block)) for block in blocks], in_a_line(caption)
    rows = [row for block in blocks for row in block]
    channels, height, width = rows[0].images[0].shape
    scale = max(1, CELL_SIDE // max(height, width))
    high, wide = height * scale + IMAGE_GAP, width * scale + IMAGE_GAP
    font, small = font_of(LETTER_HEIGHT), font_of(LETTER_HEIGHT - 1)
    names = max(round(font.getlength(row.name)) for row in rows)
    left = SHEET_MARGIN + (names + SHEET_MARGIN if names else 0)
    across = left + max(len(row.images) for row in rows) * wide - IMAGE_GAP + SHEET_MARGIN
    parts = [math.ceil(small.getlength(part)) for part in caption.split(" · ")]
    across = max(across, max(parts) + 2 * SHEET_MARGIN)
    lines = wrap_text(caption, across - 2 * SHEET_MARGIN) if caption else []
    texts = sum(HEADING_HEIGHT for row in rows if row.marks) + sum(under(row) for row in rows)
    down = 2 * SHEET_MARGIN + texts + len(rows) * high - IMAGE_GAP + (len(blocks) - 1) * BLOCK_GAP
    size = (across, down + len(lines) * HEADING_HEIGHT)
    canvas = Image.new("L" if channels == 1 else "RGB", size, (PAPER_GREY,) * channels)
    draw = ImageDraw.Draw(canvas)
    y = SHEET_MARGIN
    for block in blocks:
        for row in block:
            if row.marks:
                for j, mark in enumerate(row.marks[: len(row.images)]):
                    middle = left + j * wide + (wide - IMAGE_GAP) // 2
                    draw.text(
                        (middle, y + LETTER_HEIGHT), fit_text(mark, wide - IMAGE_GAP), "black", font, "ms"
                    )
                y += HEADING_HEIGHT
            draw.text((left - SHEET_MARGIN, y + (high - IMAGE_GAP) // 2), row.name, "black", font, "rm")
            for j, image in enumerate(row.images):
                canvas.paste(enlarged(image, scale, exact=row.exact), (left + j * wide, y))
                for i, line in enumerate(row.under[j] if row.under else ()):
                    place = (
                        left + j * wide + (wide - IMAGE_GAP) // 2,
                        y + high + (i + 1) * TEXT_HEIGHT - IMAGE_GAP,
                    )
                    draw.text(place, fit_text(line, wide - IMAGE_GAP, end=True), "black", small, "ms")
            y += high + under(row)
        y += BLOCK_GAP
    for i, line in enumerate(lines):
        draw.text((SHEET_MARGIN, down + i * HEADING_HEIGHT + LETTER_HEIGHT), line, "dimgray", small, "ls")
    picture = np.asarray(canvas)
    return picture[:, :, None] if channels == 1 else picture


def _drawable(row: Row) -> Row:
    """The row with texts that can be drawn: classes and files may have any names."""
    under = [list(map(in_a_line, lines)) for lines in row.under]
    return replace(row, name=in_a_line(row.name), marks=tuple(map(in_a_line, row.marks)), under=under)


def enlarged(image: np.ndarray, scale: int, *, exact: bool = False) -> Any:
    """An image uint8 [C, H, W] as a Pillow image, enlarged by the integer `scale`."""
    from PIL import Image

    rule = Image.Resampling.NEAREST if exact else Image.Resampling[SMOOTH_FILTER]
    picture = picture_of(image.transpose(1, 2, 0))
    return picture if scale == 1 else picture.resize((picture.width * scale, picture.height * scale), rule)


def grid(images: np.ndarray, columns: int | None = None, caption: str = "") -> np.ndarray:
    """Images uint8 [N, C, H, W] as one image [H', W', C], as square as possible."""
    n, _, high, wide = images.shape
    return blocks([Row("", images)], columns or grid_columns(n, high / wide), caption=caption)


def of_samples(images: np.ndarray, labels: Tensor | None, classes: Sequence[str], caption: str) -> np.ndarray:
    """The sheet [H, W, C] of samples [n, C, H, W]. It has a column for each class, in several bands if there
    are many classes. Samples without classes make a sheet that is as square as possible."""
    n = len(images)
    turn = turn_of(labels, n)
    if labels is not None and turn > CLASSES_PER_BAND:
        broad = math.ceil(turn / math.ceil(turn / CLASSES_PER_BAND))
        names = [label_name(label, classes) for label in labels[:turn]]
        bands = []
        for first in range(0, turn, broad):
            last = min(first + broad, turn)
            rows = [Row("", images[i + first : min(i + last, n)]) for i in range(0, n, turn)]
            rows[0] = replace(rows[0], marks=names[first:last])
            bands.append([row for row in rows if len(row.images)])
        return sheet(bands, caption)
    columns, marks = by_class(labels, n, math.ceil(math.sqrt(n)), classes)
    return blocks([Row("", images)], columns, marks, caption) if marks else grid(images, caption=caption)


def blocks(kinds: Sequence[Row], columns: int, marks: Sequence[str] = (), caption: str = "") -> np.ndarray:
    """The sheet [H, W, C] of several kinds of the same n images, one kind below the other."""
    starts = range(0, len(kinds[0].images), columns)
    rows = [[replace(kind, images=kind.images[i : i + columns]) for kind in kinds] for i in starts]
    rows[0][0] = replace(rows[0][0], marks=marks)
    return sheet(rows if len(kinds) > 1 else [[row for (row,) in rows]], caption)


def by_class(labels: Tensor | None, n: int, about: int, classes: Sequence[str]) -> tuple[int, Sequence[str]]:
    """The number of columns for n images, close to `about`, such that each column contains one class, and the
    names of the columns. There are no names if the labels do not repeat in a short cycle."""
    turn = turn_of(labels, n)
    columns = min(n, turn * max(1, round(about / turn)))
    once = 2 * turn > n and n > about  # the labels do not repeat, unless every image has a different class
    if labels is None or columns > 3 * about or (once and len(labels[:turn].unique(dim=0)) < turn):
        return min(about, n), ()
    return columns, [label_name(label, classes) for label in labels[:columns]]


def label_name(label: Tensor, classes: Sequence[str]) -> str:
    """The name of a label, [] or [K]; for a multi-label set, the names of all its classes."""
    if label.ndim == 0:
        return classes[int(label)]
    return " + ".join(name for name, bit in zip(classes, label.tolist(), strict=True) if bit) or "none"


def turn_of(labels: Tensor | None, n: int) -> int:
    """The period of n labels, [n] or [n, K]; n without labels."""
    if labels is None:
        return n
    return next(k for k in range(1, n + 1) if (labels[k:] == labels[: n - k]).all())


def caption_of(
    trained: Trained, do: str | None, seed: int, options: Mapping[str, Any], step: int | None = None
) -> str:
    """The origin of an image: model, set, length of the training, application, seed and options."""
    words = [trained.title, trained.part.data.name.rpartition("/")[2], f"step {step or trained.step:,}"]
    owner = trained.run.owner
    what = "CPU time" if owner.clock == "cpu" else "training"
    words += [f"{duration(seconds)} of {what}"] if (seconds := owner.training_seconds) else []
    words += [do] if do else []
    if not do and trained.guidance not in (None, 1.0):
        options = {"guidance": f"{trained.guidance:g}", **options}
    return " · ".join([*words, f"seed {seed}", *(f"{key} {value}" for key, value in options.items())])


def grid_columns(n: int, ratio: float) -> int:
    """The number of images per row with which a grid of n images is about square."""
    ideal = math.sqrt(n * ratio)
    full = [k for k in range(1, n + 1) if n % k == 0 and 0.69 <= k / ideal <= 1.45]
    # of two that are equally close, the wider one
    far = {k: round(abs(math.log(k / ideal)), 9) for k in full}
    return min(full, key=lambda k: (far[k], -k), default=min(n, math.ceil(ideal)))


def under(row: Row) -> int:
    """The height in pixels of the text below the images of a row."""
    return len(row.under[0]) * TEXT_HEIGHT + SHEET_MARGIN // 2 if row.under else 0


def fit_text(text: str, width: int, *, end: bool = False) -> str:
    """The text, cut short with `…` if it is wider than `width` pixels."""
    length = font_of(LETTER_HEIGHT).getlength
    if length(text) <= width:
        return text
    shorter = [f"…{text[-k:]}" if end else f"{text[:k]}…" for k in range(len(text) - 1, 0, -1)]
    return next((cut for cut in shorter if length(cut) <= width), shorter[-1] if shorter else text)


def wrap_text(text: str, width: int) -> list[str]:
    """A text broken into lines at ` · `. No line is wider than `width` pixels, unless a single part is."""
    lines: list[str] = []
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines else part
        if lines and font_of(LETTER_HEIGHT - 1).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines
