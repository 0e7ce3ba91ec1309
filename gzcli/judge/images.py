"""The images of a split that a verb reads: their choice, their number within a budget, their treatment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.devices import synchronise
from gzcli.core.types import Batch
from gzcli.data.packs.batches import scan, scan_by_content
from gzcli.data.packs.pack import Pack
from gzcli.engine.trained import Trained
from gzcli.metrics.interval import subset

FEWEST, MOST = 500, 10_000  # images of a split that a budget of seconds pays for
FIT = FEWEST  # held-out images that scores are fitted on: as many as the smallest budget pays for
BANK = 10_000  # most training images that scores are fitted on or search for neighbours


@dataclass(frozen=True)
class Pick:
    """Some images of a split, as batches that can be read several times. `batches` sets grey levels and
    device to a run's. A slice `pick[i:j]` holds the batches i … j − 1."""

    pack: Pack
    split: str  # "train", "val" or "test"
    index: np.ndarray  # positions in the split, [N]
    by_content: bool = False  # whether an image's noise is seeded by its pixels, not by its position
    unbounded: bool = False  # whether scores may be infinite
    size: int = 1  # number of images of a batch
    levels: int | None = None  # number of grey levels; None: latents
    device: torch.device | str = "cpu"
    seed: int = 0

    def batches(self, run: Trained, *, size: int, seed: int) -> Pick:
        """Batches of `size` images, or of fewer so that every process has a share."""
        size = min(size, max(1, math.ceil(len(self.index) / ranks.world())))
        return replace(self, size=size, levels=run.images.levels, device=run.device, seed=seed)

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)

    def __getitem__(self, batches: slice) -> Pick:
        start, stop, _ = batches.indices(len(self))
        return replace(self, index=self.index[start * self.size : stop * self.size])

    def __iter__(self) -> Iterator[Batch]:
        options: dict[str, Any] = {"levels": self.levels, "device": self.device, "seed": self.seed}
        read = scan_by_content if self.by_content else scan
        return read(self.pack, self.split, batch_size=self.size, index=self.index, **options)


def held_out_split(pack: Pack) -> str:
    return "val" if pack.meta.counts["val"] else "train"


def fitting_index(pack: Pack) -> np.ndarray:
    return subset(pack.meta.counts[held_out_split(pack)], FIT)


def fitting_images(
    run: Trained, pack: Pack, *, size: int, seed: int, held_out: np.ndarray | None = None
) -> tuple[Pick, Pick]:
    """Held-out and training images of a run's set, in fixed numbers, that scores are fitted on."""
    index = fitting_index(pack) if held_out is None else held_out
    train = subset(pack.meta.counts["train"], BANK)
    picks = Pick(pack, held_out_split(pack), index), Pick(pack, "train", train)
    first, second = (pick.batches(run, size=size, seed=seed) for pick in picks)
    return first, second


def treatment(packs: Mapping[str, Pack], levels: int | None, *, but: str = "") -> list[str]:
    """Notes on how a figure's images were read, and how they differ from those of the set."""
    lines = []
    for name, pack in packs.items():
        lines += [f"`{name}`: {note}" for note in pack.meta.notes]
        channels, height, width = pack.meta.shape
        changes = [f"resized to {width}×{height}"] if pack.meta.resized else []
        if channels != pack.meta.source_channels:
            changes.append("made grey" if channels == 1 else "made RGB")
        if changes:
            lines.append(f"figures of `{name}` are of its images {' and '.join(changes)}")
    if levels == 2:
        draw = "figures of a binary model are of binarised images, one draw with a fixed seed"
        lines.append(f"{draw}; {but}" if but else draw)
    return lines


def affordable(seconds: float, budget: float, sets: int) -> int:
    """The number of images of each split that a budget pays for: 500 … 10,000, in steps of 100."""
    return int(np.clip(budget / max(seconds * sets, 1e-9) // 100 * 100, FEWEST, MOST))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """The seconds of a call, after one that warms up."""
    for _ in range(2):
        since = time.perf_counter()
        function()
        synchronise(device)
    return time.perf_counter() - since


def short_paths(names: Iterable[str]) -> dict[str, str]:
    """A short name for each path or set: the shortest ending of a path that no other path has."""
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, path in parts.items():
        others, depth = [other for key, other in parts.items() if key != name], 1
        while depth < len(path) and any(path[-depth:] == other[-depth:] for other in others):
            depth += 1
        short[name] = str(Path(*path[-depth:])) if path else name
    return short
