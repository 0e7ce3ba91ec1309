"""Arrays of one row an image, filled by all ranks, in a folder that appears when all rows are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.types import Batch
from gzcli.engine.log import Log
from gzcli.store.files import fsync, need_space, part_path, sweep

Rows = Callable[[str, range], Iterator[Batch]]  # (split, positions) → its images in batches
Make = Callable[[str, Batch], Mapping[str, Tensor]]  # (split, batch of B) → {key: rows [B, …]}


def write_maps(
    folder: Path, counts: Mapping[str, int], rows: Rows, make: Make, *, log: Log, title: str
) -> None:
    """Writes `folder/<key>.npy` [N, …] of what `make` makes of the images; a call of every rank.

    Each rank fills its rows of shared files, which are renamed to `folder` when all are done.

    folder: of the maps; not there yet.
    counts: number of images N of each split.
    rows: reads the images of a split.
    make: makes the rows of the maps from a batch of images.
    log: shows the progress.
    title: title of the progress bar.
    """
    part = ranks.agree(part_path(folder))  # another run may write the same folder at the same time
    if ranks.rank() == 0:
        sweep(folder.parent)
        part.mkdir(parents=True)
    with torch.inference_mode():
        for split, n in counts.items():
            if ranks.rank() == 0 and n:
                _reserve(part, n, make(split, next(rows(split, range(1)))))
            ranks.wait()
            first, end = (n * r // ranks.world() for r in (ranks.rank(), ranks.rank() + 1))
            _fill(part, range(first, end), split, rows, make, log, title)
    ranks.wait()
    if ranks.rank() == 0:
        for path in part.iterdir():
            fsync(path)
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(part)  # another run has made the same meanwhile
    ranks.wait()


def _reserve(part: Path, n: int, first: Mapping[str, Tensor]) -> None:
    """Empty maps of n rows like those of the first image, [1, …]. Raises MissingError without the space."""
    for key, value in first.items():
        row = value.cpu().numpy()
        need_space(part.parent, n * row.nbytes)
        np.lib.format.open_memmap(part / f"{key}.npy", "w+", row.dtype, (n, *row.shape[1:])).flush()


def _fill(part: Path, index: range, split: str, rows: Rows, make: Make, log: Log, title: str) -> None:
    """This rank's rows, those at `index`, of the maps of a split."""
    maps: dict[str, np.memmap] = {}
    if not any(part.glob("*.npy")):  # nothing was made of the first image
        return
    with log.bar(title) as progress:
        for batch in rows(split, index) if len(index) else ():
            where = batch.index.cpu().numpy()
            for key, value in make(split, batch).items():
                if key not in maps:
                    maps[key] = np.lib.format.open_memmap(part / f"{key}.npy", "r+")
                maps[key][where] = value.cpu().numpy()
            progress(int(where[-1]) + 1 - index.start, len(index))
    for array in maps.values():
        array.flush()
