"""A contact sheet of a set with a row for each class. It shows whether images and labels match."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gzcli.core.streams import in_a_line
from gzcli.data.packs.pack import Pack
from gzcli.store.png import font_of, picture_of, save_png

IMAGES_PER_ROW, MAX_ROWS = 10, 40  # images per row, and maximum number of rows
MIN_SHOWN_SIDE = 64  # side in pixels to which smaller images are enlarged, by an integer factor
PAD, TEXT = 3, 14  # pixels between images, and of a line of text
MAX_NAME_LETTERS = 26  # maximum number of letters of a name

Row = tuple[str, str, np.ndarray]  # name, a remark below it, images uint8 [n, C, H, W]


def draw(pack: Pack, path: Path) -> Path:
    """Writes the sheet of a set as a PNG at `path`. There is a row for each class of the training images, or
    for each split if there are no classes. Then follow rows of images and their further images (`before`,
    `control`)."""
    every = list(_rows(pack))
    rows, omitted = every[:MAX_ROWS], len(every) - MAX_ROWS
    _, high, wide = pack.meta.shape
    scale = max(1, round(MIN_SHOWN_SIDE / max(high, wide)))
    cell = wide * scale + PAD
    font = font_of(TEXT - 2)
    margin = int(max(font.getlength(text) for name, remark, _ in rows for text in (name, remark))) + 4 * PAD
    width = margin + IMAGES_PER_ROW * cell
    letters = int(width / font.getlength("n"))
    titles = textwrap.wrap(in_a_line(f"{Path(pack.meta.title).name}: {pack.meta.words}"), letters)
    if omitted > 0:
        titles.append(f"the first {MAX_ROWS} of {len(every)} rows")
    top = len(titles) * (TEXT + PAD) + 2 * PAD
    height = max(high * scale + PAD, 2 * TEXT + 2 * PAD)
    sheet = Image.new("RGB", (width, top + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.text((2 * PAD, PAD + i * (TEXT + PAD)), title, "black", font)
    for i, (name, remark, images) in enumerate(rows):
        y = top + i * height
        pen.text((2 * PAD, y), name, "black", font)
        pen.text((2 * PAD, y + TEXT + PAD), remark, "gray", font)
        for j, image in enumerate(images):
            picture = picture_of(image.transpose(1, 2, 0))
            picture = picture.resize((wide * scale, high * scale), Image.Resampling.BICUBIC)
            sheet.paste(picture.convert("RGB"), (margin + j * cell, y))
    save_png(path, np.asarray(sheet), {"verb": "data show", "data": pack.meta.name})
    return path


def class_counts(pack: Pack) -> list[dict[str, Any]]:
    """How many images each class has in each split: [{name, train, val, test}]."""
    sums = {
        split: y.sum(0) if y.ndim == 2 else np.bincount(y, minlength=len(pack.meta.classes))
        for split in pack.meta.counts
        if (y := pack.labels(split)) is not None
    }
    return [
        {"name": c, **{split: int(n[i]) for split, n in sums.items()}}
        for i, c in enumerate(pack.meta.classes)
    ]


def _rows(pack: Pack) -> Iterator[Row]:
    y = pack.labels("train")
    if y is not None:
        for i, row in enumerate(class_counts(pack)):
            having = np.flatnonzero(y[:, i] if y.ndim == 2 else y == i)
            name = in_a_line(row["name"])
            name = name if len(name) <= MAX_NAME_LETTERS else f"{name[: MAX_NAME_LETTERS - 1]}…"
            yield name, f"{row['train']:,} train", pack.images("train")[_spread(having)]
    else:
        for split, n in pack.meta.counts.items():
            if n:
                yield split, f"{n:,} images", pack.images(split)[_spread(np.arange(n))]
    for kind, pictures in pack.further("train").items():
        chosen = _spread(np.arange(len(pictures)))
        yield "image", "train", pack.images("train")[chosen]
        yield kind, "same images", pictures[chosen]


def _spread(rows: np.ndarray) -> np.ndarray:
    """Evenly spaced rows, as many as the sheet has columns."""
    if not len(rows):
        return rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(IMAGES_PER_ROW, len(rows))).astype(int))]
