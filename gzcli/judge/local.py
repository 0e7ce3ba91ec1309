"""The score `local` of a run: the largest value of its model's map relative to the maps of held-out images.

The scales, and whether maps are relative, are chosen so that it detects the most synthetic defects on these
images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.types import Batch
from gzcli.judge.images import Pick
from gzcli.metrics.alarms.choice import DEFECTS_PER_KIND, MIN_IMAGES_TO_CHOOSE, best_scales
from gzcli.metrics.alarms.defects import synthetic
from gzcli.metrics.alarms.local import Local, fit_local
from gzcli.metrics.interval import subset

MAX_MAPPED_IMAGES = 200  # held-out images whose maps count as normal
Maps = Callable[[Batch], np.ndarray]  # a batch → its maps, float32 [B, h, w]


@dataclass(frozen=True)
class RunLocal:
    """A fitted `local`. `detected` is the share of synthetic defects that it detects; None if there were too
    few images."""

    local: Local
    detected: float | None

    def score(self, maps: np.ndarray) -> np.ndarray:
        """float64 [B]; larger than every other score if a map is not finite."""
        tops = self.local.tops(maps).astype(np.float64)
        return np.where(np.isfinite(maps).all((1, 2)), tops, np.inf)


def few(held_out: Pick) -> Pick:
    """The held-out images that define normal maps and receive synthetic defects."""
    return replace(
        held_out, index=held_out.index[subset(len(held_out.index), MAX_MAPPED_IMAGES)], by_content=True
    )


def with_defects(good: Pick) -> tuple[Pick, np.ndarray]:
    """Images with one synthetic defect each, and the index of the good image on which each is drawn."""
    bad, _, source = synthetic(good.images(), each=DEFECTS_PER_KIND)
    order = np.argsort(source, kind="stable")
    return replace(good, index=good.index[source[order]], drawn=bad[order]), source[order]


def fit_run_local(held_out: Pick, maps_of: Maps) -> RunLocal:
    good = few(held_out)

    def work(batch: Batch) -> dict[str, np.ndarray]:
        return {"map": maps_of(batch)}

    maps = ranks.over(good, work)["map"]
    if len(maps) < MIN_IMAGES_TO_CHOOSE:
        return RunLocal(fit_local(maps), None)
    bad, source = with_defects(good)
    auroc, settings = best_scales(maps, ranks.over(bad, work)["map"], source)
    return RunLocal(fit_local(maps, **settings), auroc)


def enlarged(maps: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """Maps [N, h, w], enlarged to the size of the images."""
    tensor = torch.from_numpy(np.ascontiguousarray(maps))[:, None]
    return torch.nn.functional.interpolate(tensor, sides, mode="nearest")[:, 0].numpy()
