"""The images of a split that a verb reads: their selection, their number and their treatment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.devices import synchronise
from gzcli.core.types import Batch
from gzcli.core.units import MIN_SCORED_IMAGES
from gzcli.data.packs.batches import scan, scan_by_content
from gzcli.data.packs.pack import Pack
from gzcli.engine.trained import Trained
from gzcli.metrics.interval import subset

FITTED_IMAGES = (
    MIN_SCORED_IMAGES  # held-out images on which scores are fitted: as many as the smallest budget allows
)
MAX_BANK_IMAGES = (
    10_000  # maximum number of training images on which scores are fitted, or searched for neighbours
)


@dataclass(frozen=True)
class Pick:
    """Some images of a split, as batches that can be read several times. `batches` applies a run's grey
    levels and device. A slice `pick[i:j]` contains the batches i … j − 1."""

    pack: Pack
    split: str  # "train", "val" or "test"; or "val+test", one after the other
    index: np.ndarray  # positions in the split, or in the splits together, ascending, [N]
    by_content: bool = False  # whether an image's noise is seeded by its pixels, not by its position
    unbounded: bool = False  # whether scores may be infinite
    # uint8 [N, C, H, W] instead of the images at these positions; their pixels then seed the noise
    drawn: np.ndarray | None = None
    size: int = 1  # number of images per batch
    levels: int | None = None  # number of grey levels; None: latents
    device: torch.device | str = "cpu"
    seed: int = 0

    def batches(self, run: Trained, *, size: int, seed: int) -> Pick:
        """Batches of `size` images, or of fewer if some process would otherwise get none."""
        size = min(size, max(1, math.ceil(len(self.index) / ranks.world())))
        levels = run.images.levels if run.values is None else run.info.levels
        pack = run.seen(self.pack)
        return replace(self, pack=pack, size=size, levels=levels, device=run.device, seed=seed)

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)

    def __getitem__(self, batches: slice) -> Pick:
        start, stop, _ = batches.indices(len(self))
        rows = slice(start * self.size, stop * self.size)
        return replace(self, index=self.index[rows], drawn=None if self.drawn is None else self.drawn[rows])

    def __iter__(self) -> Iterator[Batch]:
        options: dict[str, Any] = {"levels": self.levels, "device": self.device, "seed": self.seed}
        read = scan_by_content if self.by_content else scan
        for split, index, rows in self._splits():
            if self.drawn is not None:
                read = partial(scan_by_content, drawn=self.drawn[rows])
            yield from read(self.pack, split, batch_size=self.size, index=index, **options)

    def images(self) -> np.ndarray:
        """The images, uint8 [N, C, H, W]."""
        if self.drawn is not None:
            return self.drawn
        parts = [np.asarray(self.pack.images(split)[index]) for split, index, _ in self._splits()]
        return np.concatenate(parts) if parts else np.empty((0, *self.pack.meta.shape), np.uint8)

    def _splits(self) -> Iterator[tuple[str, np.ndarray, slice]]:
        """For each split with some of the images: the split, their positions in it, and their places among
        all of them."""
        splits, start = self.split.split("+"), 0
        if len(splits) == 1:
            yield self.split, self.index, slice(None)
            return
        for split in splits:
            end = start + self.pack.meta.counts[split]
            rows = slice(*np.searchsorted(self.index, (start, end)).tolist())
            if rows.start < rows.stop:
                yield split, self.index[rows] - start, rows
            start = end


def count_of(pack: Pack, split: str) -> int:
    """The number of images of a split, or of several."""
    return sum(pack.meta.counts[each] for each in split.split("+"))


def fitting_pick(pack: Pack) -> Pick:
    """The held-out images to fit scores on if nothing is calibrated; training images if there are none."""
    split = "val" if pack.meta.counts["val"] else "train"
    return Pick(pack, split, subset(pack.meta.counts[split], FITTED_IMAGES))


def fitting_images(run: Trained, held_out: Pick, *, size: int, seed: int) -> tuple[Pick, Pick]:
    """The images on which scores are fitted: these held-out images of a run's set, and a fixed number of
    training images."""
    pack = held_out.pack
    train = Pick(pack, "train", subset(pack.meta.counts["train"], MAX_BANK_IMAGES))
    first, second = (pick.batches(run, size=size, seed=seed) for pick in (held_out, train))
    return first, second


def treatment(packs: Mapping[str, Pack], levels: int | None, *, but: str = "") -> list[str]:
    """Notes on how images were read for metrics, and on how they differ from those of the data set."""
    lines = []
    for name, pack in packs.items():
        lines += [f"`{name}`: {note}" for note in pack.meta.notes]
        channels, height, width = pack.meta.shape
        changes = [f"resized to {width}×{height}"] if pack.meta.resized else []
        if channels != pack.meta.source_channels:
            changes.append("converted to grey" if channels == 1 else "converted to RGB")
        if changes:
            lines.append(f"for all metrics, `{name}` was {' and '.join(changes)}")
    if levels == 2:
        draw = "for a binary model, images are binarized, by one draw with a fixed seed"
        lines.append(f"{draw}; {but}" if but else draw)
    return lines


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """The seconds of a call, after a warm-up call."""
    for _ in range(2):
        since = time.perf_counter()
        function()
        synchronise(device)
    return time.perf_counter() - since


def short_paths(names: Iterable[str]) -> dict[str, str]:
    """A short name for each path or set. For a path, it is the shortest ending that no other path has."""
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, path in parts.items():
        remaining, depth = [path_b for key, path_b in parts.items() if key != name], 1
        while depth < len(path) and any(path[-depth:] == path_b[-depth:] for path_b in remaining):
            depth += 1
        short[name] = str(Path(*path[-depth:])) if path else name
    return short
