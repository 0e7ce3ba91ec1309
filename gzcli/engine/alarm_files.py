"""The files of `gz ood --input`: scores of all pictures, maps, a sheet of the strangest and most usual."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.data.pack import Pack
from gzcli.engine.sheets import Row, sheet
from gzcli.store import files
from gzcli.store.png import save_images, save_png

SHOWN, COLUMNS = 16, 8  # pictures of each kind on the sheet, and in a row of it


@dataclass(frozen=True)
class Maps:
    """Heat maps of the strangest pictures.

    index: the pictures, strangest first.
    heat: their maps in false colours, uint8 [n, 3, H, W].
    """

    index: np.ndarray
    heat: np.ndarray


def written(
    folder: Path,
    pictures: Pack,
    labels: Sequence[str],
    order: np.ndarray,
    p: np.ndarray,
    flagged: np.ndarray,
    scores: Mapping[str, np.ndarray],
    maps: Maps | None,
) -> dict[str, Any]:
    """Writes the CSV of all pictures, strangest first, the sheet of some, and the maps; returns the paths.

    folder: where they are written.
    pictures: the pictures.
    labels: what each is called.
    order: of the pictures, strangest first.
    p: p-values [N].
    flagged: which are flagged, [N].
    scores: float64 [N] of each score, by name.
    maps: maps of the strangest; None: none are asked for.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "p", "flagged", *scores])
    for i in order:
        values = (repr(float(values[i])) for values in scores.values())
        writer.writerow([labels[i], repr(float(p[i])), int(flagged[i]), *values])
    files.write_atomic(folder / "alarm.csv", text.getvalue())
    save_png(folder / "alarm.png", overview(pictures, order, p, maps))
    outputs: dict[str, Any] = {"scores": str(folder / "alarm.csv"), "picture": str(folder / "alarm.png")}
    if maps:
        paths = save_images(folder / "maps", maps.heat)
        outputs["maps"] = {labels[i]: path for i, path in zip(maps.index, paths, strict=True)}
    return outputs


def overview(pictures: Pack, order: np.ndarray, p: np.ndarray, maps: Maps | None) -> np.ndarray:
    """A sheet of the strangest pictures, with their maps below them, and of the most usual ones."""
    strange = order[:SHOWN]
    usual = order[max(len(order) - SHOWN, len(strange)) :][::-1]

    def rows(index: np.ndarray, kind: str) -> list[Row]:
        made = []
        for start in range(0, len(index), COLUMNS):
            some = index[start : start + COLUMNS]
            images = in_colour(pictures.images("test")[some]) if maps else pictures.images("test")[some]
            ends = dict.fromkeys(f"{p[i]:.3g}" for i in (some[0], some[-1]))
            made.append(Row(f"{kind}, p {' … '.join(ends)}", list(images)))
            if maps and kind == "strange":
                made.append(Row("map", list(maps.heat[start : start + COLUMNS]), exact=True))
        return made

    return sheet([block for block in (rows(strange, "strange"), rows(usual, "usual")) if block])


def in_colour(images: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] with three channels."""
    return images.repeat(3, 1) if images.shape[1] == 1 else images
