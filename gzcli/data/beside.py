"""What lies beside the pixels of a pack: sides, labels, captions and names, in the rows of their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gzcli.data.packs.fitted import Sides
from gzcli.data.packs.splits import SPLITS, Plan
from gzcli.data.readers.raw_images import RawImages
from gzcli.store.files import write_json


def write_sides(had: Sides, plan: Plan, rows: dict[str, int], folder: Path) -> None:
    """Writes the sides of images of several sizes: SPLIT_sides.npy, int32 [N, 2] of width and height."""
    for code, split in enumerate(SPLITS):
        out = np.zeros((rows[split], 2), np.int32)
        for official, (to_split, to_row) in plan.items():
            out[to_row[to_split == code]] = had[official][to_split == code]
        np.save(folder / f"{split}_sides.npy", out)


def write_labels(images: RawImages, plan: Plan, rows: dict[str, int], folder: Path) -> None:
    """Writes labels, captions and names in the rows of their images."""
    for code, split in enumerate(SPLITS):
        n = rows[split]
        if images.labels:
            first = next(iter(images.labels.values()))
            out = np.zeros((n, *first.shape[1:]), first.dtype)
            for official, (to_split, to_row) in plan.items():
                out[to_row[to_split == code]] = images.labels[official][to_split == code]
            np.save(folder / f"{split}_labels.npy", out)
        for kind, given in (("captions", images.captions), ("names", images.names)):
            if given:
                texts = [""] * n
                for official, (to_split, to_row) in plan.items():
                    for i in np.flatnonzero(to_split == code):
                        texts[to_row[i]] = given[official][i]
                write_json(folder / f"{split}_{kind}.json", texts)
