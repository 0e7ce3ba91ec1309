"""The order in which the images of a set are trained on: a function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import BatchNoise, mix
from gzcli.data.packs.pack import Pack


def domains(pack: Pack) -> list[Tensor]:
    """Positions of the training images of class 0 and of class 1. Raises UsageError where either has none."""
    labels = pack.labels("train")
    if labels is not None and labels.ndim == 1:
        found = [torch.from_numpy(np.flatnonzero(labels == k)) for k in (0, 1)]
        if all(map(len, found)):
            return found
    raise UsageError(
        f"`{pack.meta.name}` has no training images of two domains",
        hint="put them into `trainA` and `trainB`",
    )


class Order:
    """The order in which images are trained on, of which each rank has some rows.

    count: number of images of the split.
    n: number of images of a fixed random subset; None: all.
    seed: seed of the shuffles, one for each epoch.
    total: number of images of the global batch.
    part: this rank's rows of the global batch.
    among: positions in the split of the images to choose from; None: all.
    key: a word that makes orders of one seed differ.
    """

    def __init__(
        self, count: int, n: int | None, seed: int, total: int, part: slice, among: Tensor | None, key: str
    ):
        self.seed, self.total, self.part, self.key = seed, total, part, key
        self.subset, count = among, count if among is None else len(among)
        if n is not None and n < count:
            chosen = torch.from_numpy(np.random.RandomState(0).permutation(count)[:n])
            self.subset = chosen if among is None else among[chosen]
        self.n = count if n is None else min(n, count)
        self._orders: dict[int, Tensor] = {}

    def at(self, step: int) -> Tensor:
        """Positions [B / world] in the split. A batch may end one epoch and begin the next."""
        first, left = step * self.total + self.part.start, self.part.stop - self.part.start
        parts = []
        while left:
            epoch, row = divmod(first, self.n)
            parts.append(self._epoch(epoch)[row : row + left])
            first, left = first + len(parts[-1]), left - len(parts[-1])
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        return index if self.subset is None else self.subset[index]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, self.key))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(self.n, generator=generator)
        return self._orders[epoch]

    def spots(self, step: int) -> Tensor:
        """Two large random numbers for each image [B / world, 2], which place its patch."""
        noise = BatchNoise(self.seed, step, f"patch {self.key}", total=self.total, start=self.part.start)
        return noise.randint(1 << 31, self.part.stop - self.part.start, 2)


def positions(orders: Sequence[Order], step: int) -> np.ndarray:
    """The positions of each order [B], one order after the other."""
    return torch.cat([order.at(step) for order in orders]).numpy()


def places(orders: Sequence[Order], step: int) -> np.ndarray:
    """The same with where the patches of the images lie, [B, 3], as `stream.Pictures` takes it."""
    spots = torch.cat([order.spots(step) for order in orders]).numpy()
    return np.concatenate([positions(orders, step)[:, None], spots], 1)
