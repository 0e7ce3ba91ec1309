"""How many images a verb can afford, which, and what was done to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data.batches import scan
from gzcli.data.pack import Pack
from gzcli.engine.devices import synchronise
from gzcli.engine.trained import Trained
from gzcli.types import Batch

FEWEST, MOST = 500, 10_000


def subset(total: int, n: int) -> np.ndarray:
    """Sorted positions of min(n, total) images of a split: always the same ones (seed 0), larger sets hold
    smaller."""
    return np.sort(np.random.default_rng(0).permutation(total)[:n])


@dataclass(frozen=True)
class Images:
    """Images of a split in batches, as a run sees them: to go through as often as need be; a slice is of
    batches."""

    pack: Pack
    split: str
    index: np.ndarray  # positions in the split
    size: int  # of a batch
    levels: int | None
    device: torch.device
    seed: int

    @classmethod
    def of(cls, run: Trained, pack: Pack, split: str, index: np.ndarray, *, size: int, seed: int) -> Images:
        """Batches of `size`; of fewer where there are more processes than such batches: each has its
        share."""
        size = min(size, max(1, math.ceil(len(index) / ranks.world())))
        return cls(pack, split, index, size, run.images.levels, run.device, seed)

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)

    def __getitem__(self, which: slice) -> Images:
        start, stop, _ = which.indices(len(self))
        return replace(self, index=self.index[start * self.size : stop * self.size])

    def __iter__(self) -> Iterator[Batch]:
        how = {"levels": self.levels, "device": self.device, "seed": self.seed}
        return scan(self.pack, self.split, batch_size=self.size, index=self.index, **how)


def treatment(packs: Mapping[str, Pack], levels: int | None, *, but: str = "") -> list[str]:
    """Lines that say where figures are of other images than the sets hold: resized, made grey or RGB,
    binarised.

    but: which figures of a binary model are of the sets' own bytes all the same.
    """
    said = []
    for name, pack in packs.items():
        channels, side, _ = pack.meta.shape
        done = [f"resized to {side}×{side}"] if pack.meta.resized else []
        if channels != pack.meta.source_channels:
            done.append("made grey" if channels == 1 else "made RGB")
        if done:
            said.append(f"figures of `{name}` are of its images {' and '.join(done)}")
    if levels == 2:
        draw = "figures of a binary model are of binarised images, one draw with a fixed seed"
        said.append(f"{draw}; {but}" if but else draw)
    return said


def affordable(seconds: float, budget: float, sets: int) -> int:
    """Images a split that `budget` seconds pay for at `seconds` an image: 500 … 10,000, in steps of 100."""
    return int(np.clip(budget / max(seconds * sets, 1e-9) // 100 * 100, FEWEST, MOST))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a second call takes; the first one warms up."""
    function()
    synchronise(device)
    since = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - since
