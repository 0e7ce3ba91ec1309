"""The files of `gz ood --input`: scores of all pictures, maps, a sheet of those flagged and of others."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.data.packs.pack import Pack
from gzcli.engine.sheets import Row, sheet
from gzcli.judge.judged import Judged
from gzcli.store import files
from gzcli.store.png import save_images, save_png

SHOWN, COLUMNS = 16, 8  # pictures of each kind on the sheet, and in a row of it


@dataclass(frozen=True)
class Maps:
    """Heat maps of the strangest pictures."""

    index: np.ndarray  # the pictures, strangest first
    heat: np.ndarray  # their maps in false colours, uint8 [n, 3, H, W]


def written(
    folder: Path,
    pictures: Pack,
    labels: Sequence[str],
    order: np.ndarray,
    found: Judged,
    maps: Maps | None,
) -> dict[str, Any]:
    """Writes the CSV of all pictures, strangest first, the sheet of some, and the maps; returns the paths."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*found.scores.values(), *found.spread.values()]
    writer.writerow(["file", "p", "flagged", *found.scores, *(f"{name} ±" for name in found.spread)])
    for i in order:
        values = (repr(float(column[i])) for column in columns)
        writer.writerow([labels[i], repr(float(found.p[i])), int(found.flagged[i]), *values])
    files.write_atomic(folder / "alarm.csv", text.getvalue())
    save_png(folder / "alarm.png", overview(pictures, labels, order, found, maps))
    outputs: dict[str, Any] = {"scores": str(folder / "alarm.csv"), "picture": str(folder / "alarm.png")}
    if maps:
        paths = save_images(folder / "maps", maps.heat)
        outputs["maps"] = {labels[i]: path for i, path in zip(maps.index, paths, strict=True)}
    return outputs


def overview(
    pictures: Pack, labels: Sequence[str], order: np.ndarray, found: Judged, maps: Maps | None
) -> np.ndarray:
    """A sheet of the flagged pictures and of the others, the strangest of each first, with their names and
    p-values, and with their maps below them."""
    heat = dict(zip(maps.index.tolist(), maps.heat, strict=True)) if maps else {}

    def rows(kind: str, every: np.ndarray) -> list[Row]:
        made, index = [], every[:SHOWN]
        count = f"{len(index)} of {len(every):,}" if len(every) > SHOWN else f"{len(every)}"
        for start in range(0, len(index), COLUMNS):
            some = index[start : start + COLUMNS]
            images = pictures.images("test")[some]
            words = [(labels[i], f"p {found.p[i]:.2g}") for i in some]
            name = "" if start else f"{kind}: {count}"
            made.append(Row(name, list(in_colour(images) if maps else images), under=words))
            if mapped := [heat[i] for i in some.tolist() if i in heat]:
                made.append(Row("map", mapped, exact=True))
        return made

    flagged = found.flagged[order]
    blocks = [rows("flagged", order[flagged]), rows("not flagged", order[~flagged])]
    return sheet([block for block in blocks if block])


def in_colour(images: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] with three channels."""
    return images.repeat(3, 1) if images.shape[1] == 1 else images
