"""The images that `gz bench` compares, with their features: each is computed once and shared by the metrics,
those of real images are kept in the cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.data.packs.batches import quantise, to_uint8
from gzcli.data.packs.pack import Pack
from gzcli.metrics.interval import subset
from gzcli.store import files
from gzcli.store.paths import cache_dir

DRAWS = 5  # draws of real images over which the floor is averaged
# The split whose images stand in place of samples, by the one that they are compared with.
OTHER = {"test": "train", "train": "test", "all": "all"}


class Space(Protocol):
    """A feature space: `hash` names its weights, `features` maps uint8 [N, C, H, W] to float64 [N, D], by
    `batch` images at a time."""

    hash: str
    device: torch.device
    batch: int

    def features(self, images: Any) -> np.ndarray: ...


@dataclass
class ImageSet:
    """Images and what is known of them."""

    images: Any  # uint8 [N, C, H, W]
    labels: np.ndarray | None = None  # int64 [N] or [N, K] where there are any
    key: str | None = None
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)
    _features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def features(self, space: Space | None) -> np.ndarray:
        """float64 [N, D] in a space; without one the pixels, uint8 [N, C·H·W].

        A call of every rank, where there are several and the features are not known yet.
        """
        if space is None:
            return np.asarray(self.images[:]).reshape(len(self), -1)
        if space.hash not in self._features:
            self._features[space.hash] = self._kept(space)
        return self._features[space.hash]

    def knows(self, space: Space) -> bool:
        return space.hash in self._features

    def take(self, rows: np.ndarray) -> ImageSet:
        """Some of the images [n], with those of their features that are known."""
        labels = None if self.labels is None else self.labels[rows]
        known = {name: features[rows] for name, features in self._features.items()}
        return ImageSet(self.images[rows], labels, _features=known)

    def _kept(self, space: Space) -> np.ndarray:
        """The features, from the cache or computed; networks compute in single precision, so that no digit is
        lost in a file of it."""
        if self.key is None:
            return self._computed(space)
        name = f"{self.key}-{space.hash[:16]}-{space.device.type}.npy"
        path = cache_dir("features", "real") / name

        def read(path: Path) -> np.ndarray:
            found = files.read_array(path)
            with files.reading(path):
                if found.ndim != 2 or len(found) != len(self) or not np.isfinite(found).all():
                    raise ValueError("these are not the features of the set")
            return found

        found = files.read_cached(path, read, self.say) if ranks.rank() == 0 else None
        if ranks.agree(found is not None):
            return (read(path) if found is None else found).astype(np.float64)
        found, file = self._computed(space), io.BytesIO()
        if ranks.rank() == 0:
            np.save(file, found.astype(np.float32))
            files.write_atomic(path, file.getvalue())
        return found

    def _computed(self, space: Space) -> np.ndarray:
        """The features, of which each process computes those of a share of the batches."""

        def work(start: int) -> dict[str, np.ndarray]:
            return {"found": space.features(self.images[start : start + space.batch])}

        return ranks.over(range(0, len(self), space.batch), work)["found"]


class RealImages:
    """The images of a data set that samples are compared with, at the grey levels of the samples."""

    def __init__(self, pack: Pack, split: str = "test", say: Callable[[str], None] = lambda text: None):
        self.pack, self.split, self.say = pack, split, say
        self._sets: dict[tuple[str, int | None], ImageSet] = {}
        self._pairs: dict[tuple[int, int | None], list[tuple[ImageSet, ImageSet]]] = {}

    def reference(self, levels: int | None) -> ImageSet:
        return self.of(self.split, levels)

    def of(self, split: str, levels: int | None = None) -> ImageSet:
        """The images of a split at as few grey levels."""
        levels = None if levels in (2, self.pack.meta.levels) else levels
        if (split, levels) not in self._sets:
            parts = ("train", "val", "test") if split == "all" else (split,)
            images = [self.pack.images(part) for part in parts if self.pack.meta.counts[part]]
            labels = [self.pack.labels(part) for part in parts if self.pack.meta.counts[part]]
            joined = images[0] if len(images) == 1 else np.concatenate([part[:] for part in images])
            if levels is not None:
                joined = to_uint8(quantise(torch.from_numpy(np.array(joined)), levels)).numpy()
            known = (
                None
                if any(y is None for y in labels)
                else np.concatenate([y for y in labels if y is not None])
            )
            meta = self.pack.meta
            shape = "x".join(map(str, meta.shape))  # a pack may be cut into patches
            key = f"{meta.digest}-{shape}-{split}-{levels or meta.levels}"
            self._sets[split, levels] = ImageSet(joined, known, key, self.say)
        return self._sets[split, levels]

    @property
    def at_most(self) -> int:
        """How many real images can stand in place of samples."""
        total = len(self.of(OTHER[self.split]))
        return total // 2 if self.split == "all" else total

    def pairs(self, n: int, levels: int | None) -> list[tuple[ImageSet, ImageSet]]:
        """Real images that stand in place of n samples, and those that they are compared with, in up to five
        disjoint random draws.

        Training images are compared with the test split, test images with the training split, and of all
        images n with the others.
        """
        if (n, levels) not in self._pairs:
            self._pairs[n, levels] = self._drawn(n, levels)
        return self._pairs[n, levels]

    def _drawn(self, n: int, levels: int | None) -> list[tuple[ImageSet, ImageSet]]:
        source, reference = self.of(OTHER[self.split], levels), self.reference(levels)
        total = len(source)
        order = np.random.default_rng(0).permutation(total)
        rows = [np.sort(order[i * n : (i + 1) * n]) for i in range(min(DRAWS, total // n))] if n else []
        source = replace(source, labels=None)  # the LeNet knows those that it was trained on
        if self.split != "all":
            return [(source.take(draw), reference) for draw in rows]
        everything = np.arange(total)
        return [(source.take(draw), source.take(np.setdiff1d(everything, draw))) for draw in rows]


def some(images: ImageSet, n: int) -> ImageSet:
    """n of the images, by `subset`; all where they are fewer."""
    return images if len(images) <= n else images.take(subset(len(images), n))
