"""Pictures of results: sheets of images with names of rows and columns, histograms of scores, rows of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CELL = 64  # pixels of an image on a sheet, about: small ones are enlarged by whole numbers
PAPER = 224  # the grey of a sheet, on which white images have an edge
GAP, BETWEEN, MARGIN, FONT = 3, 14, 8, 13  # pixels between images, between blocks, around all; of the letters


@dataclass(frozen=True)
class Row:
    """A row of a sheet: its name and its images, uint8 [C, H, W] each."""

    name: str
    images: Sequence[np.ndarray]


def sheet(blocks: Sequence[Sequence[Row]], marks: Sequence[str] = ()) -> np.ndarray:
    """uint8 [H, W, C], C = 1 or 3: blocks of rows of images of one size, the rows' names on the left, `marks` above
    the columns."""
    from PIL import Image, ImageDraw

    rows = [row for block in blocks for row in block]
    channels, height, width = rows[0].images[0].shape
    scale = max(1, CELL // width)
    high, wide = height * scale + GAP, width * scale + GAP
    names = max(round(_font().getlength(row.name)) for row in rows)
    left = MARGIN + (names + MARGIN if names else 0)
    top = MARGIN + (FONT + MARGIN if marks else 0)
    size = (
        left + max(len(row.images) for row in rows) * wide + MARGIN,
        top + len(rows) * high + (len(blocks) - 1) * BETWEEN + MARGIN,
    )
    canvas = Image.new("L" if channels == 1 else "RGB", size, (PAPER,) * channels)
    draw = ImageDraw.Draw(canvas)
    for j, mark in enumerate(marks):
        middle = left + j * wide + (wide - GAP) // 2
        draw.text((middle, top - MARGIN // 2), fitting(mark, wide - GAP), "black", _font(), "ms")
    y = top
    for block in blocks:
        for row in block:
            draw.text((left - MARGIN, y + (high - GAP) // 2), row.name, "black", _font(), "rm")
            for j, image in enumerate(row.images):
                pixels = image.repeat(scale, 1).repeat(scale, 2).transpose(1, 2, 0)
                pixels = pixels.squeeze(2) if channels == 1 else pixels
                canvas.paste(Image.fromarray(pixels), (left + j * wide, y))
            y += high
        y += BETWEEN
    found = np.asarray(canvas)
    return found[:, :, None] if channels == 1 else found


def fitting(text: str, width: int) -> str:
    """The text, cut short with `…` where it would be wider than so many pixels."""
    if _font().getlength(text) <= width:
        return text
    kept = next((k for k in range(len(text) - 1, 0, -1) if _font().getlength(text[:k] + "…") <= width), 1)
    return text[:kept] + "…"


@cache
def _font() -> Any:
    """The letters of matplotlib's figures, which has more of them than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT)


def histograms(
    path: Path, tables: Mapping[str, Mapping[str, np.ndarray]], inside: str, results: Sequence[Mapping[str, Any]]
) -> None:
    """One panel a score: its density on each set, with the AUROC against `inside` in the legend."""
    auroc = {(row["out"], row["score"]): row["auroc"] for row in results}
    scores = list(dict.fromkeys(row["score"] for row in results))
    baseline = {row["score"] for row in results if row["baseline"]}
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = _pyplot().subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained")
    for ax, score in zip(axes.flat, scores, strict=False):
        values = np.concatenate([table[score] for table in tables.values()])
        low, high = np.quantile(values, [0.005, 0.995])  # a few far scores would leave one bar; the edge bins keep them
        bins = np.linspace(low, high if high > low else low + 1, 51)
        for i, (name, table) in enumerate(tables.items()):
            label = f"{name} (in)" if name == inside else f"{name}, AUROC {auroc[name, score]:.3f}"
            ax.hist(table[score].clip(bins[0], bins[-1]), bins, density=True, alpha=0.55, color=f"C{i}", label=label)
        ax.set_title(f"{score} (baseline)" if score in baseline else score)
        ax.set_yticks([])
        ax.legend(fontsize=7)
    for ax in axes.flat[len(scores) :]:
        ax.set_axis_off()
    _save(figure, path)


def sample_rows(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """One row of images a title: uint8 [N, C, H, W] each, the first 16 shown; every set of images has one size."""
    shown = 16
    figure, axes = _pyplot().subplots(len(rows), 1, figsize=(0.6 * shown, 0.95 * len(rows)), squeeze=False, layout="constrained")
    for ax, (title, images) in zip(axes.flat, rows, strict=True):
        strip = np.concatenate([np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=255) for image in images[:shown]], 2)
        strip = strip.transpose(1, 2, 0)
        ax.imshow(strip.repeat(3, 2) if strip.shape[2] == 1 else strip, interpolation="nearest")
        ax.set_title(title, fontsize=8, loc="left")
        ax.set_axis_off()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part, dpi=110)
    _pyplot().close(figure)
    part.replace(path)
