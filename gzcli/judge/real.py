"""The real images of a data set, and the floor of metrics, computed from draws of real images instead of
samples. Models with labels or clusters sample these evenly. Evenly drawn real images are closer to the test
split than random ones (digits: a Fréchet distance of 4.9 instead of 5.9). The floor of each contestant
therefore draws real images in the same way as the contestant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.types import ImageNoise, Say, silent
from gzcli.data.packs.batches import BINARY_SEED, quantise, to_uint8
from gzcli.data.packs.pack import SPLITS, Pack
from gzcli.engine.trained import Trained
from gzcli.metrics.classifier import NetFeatures
from gzcli.metrics.interval import subset
from gzcli.metrics.pretrained import Features
from gzcli.metrics.selection import COUNTERPART
from gzcli.store import cache_files, files
from gzcli.store.code import JUDGING, code_hash
from gzcli.store.paths import cache_dir

FLOOR_DRAWS = 20  # draws of real images over which the floor is averaged
MAX_REAL_IMAGES = 50_000  # maximum number of real images from which they are drawn
REAL_BATCH = 1000  # images whose clusters are computed at once
DRAW_MULTIPLE = 10  # the same for fewer samples, as a multiple of their number
Space = Features | NetFeatures


@dataclass
class ImageSet:
    """Images, with their labels and features. Features are computed once and shared by the metrics."""

    images: Any  # uint8 [N, C, H, W]
    labels: np.ndarray | None = None  # int64 [N] or [N, K] if there are any
    key: str | None = None  # name of real images' features in the cache; None: not cached
    say: Say = field(default=silent, repr=False)
    _features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def features(self, space: Space | None) -> np.ndarray:
        """The features, float64 [N, D], in a space; without a space the pixels, uint8 [N, C·H·W]. Every rank
        must call this if the features are not computed yet."""
        if space is None:
            return np.asarray(self.images[:]).reshape(len(self), -1)
        if not self.knows(space):
            self._features[space.hash] = self._cached(space) if self.key else self._computed(space)
        return self._features[space.hash]

    def knows(self, space: Space) -> bool:
        return space.hash in self._features

    def take(self, rows: np.ndarray) -> ImageSet:
        labels = None if self.labels is None else self.labels[rows]
        features = {name: values[rows] for name, values in self._features.items()}
        return ImageSet(self.images[rows], labels, _features=features)

    def first(self, n: int) -> ImageSet:
        """At most n of the images, always the same ones, so that their features can be cached."""
        if len(self) <= n:
            return self
        return replace(self.take(subset(len(self), n)), key=self.key and f"{self.key}-{n}", say=self.say)

    def _cached(self, space: Space) -> np.ndarray:
        """The features, read from the cache or stored there, in single precision as networks compute them."""
        stem, code = f"{self.key}-{space.hash[:16]}-{space.device.type}", code_hash(*JUDGING)
        path = cache_dir("features", "real") / f"{stem}-{code}.npy"

        def read(path: Path) -> np.ndarray:
            # the width of a space is that of an image's features
            features, width = files.read_array(path), space.features(self.images[:1]).shape[1]
            if features.dtype != np.float32 or features.shape != (len(self), width):
                raise ValueError("these are not the features of the set")
            if not np.isfinite(features).all():
                raise ValueError("a feature is not finite")
            return features.astype(np.float64)

        features = cache_files.read(path, read, self.say) if ranks.rank() == 0 else None
        if ranks.agree(features is not None):
            return read(path) if features is None else features
        features = self._computed(space)
        if ranks.rank() == 0:
            for old in path.parent.glob(f"{stem}*.npy"):  # of other code; it may have hundreds of megabytes
                cache_files.remove(old)
            cache_files.write(path, files.write_array, features.astype(np.float32), self.say)
        return features

    def _computed(self, space: Space) -> np.ndarray:
        def work(start: int) -> dict[str, np.ndarray]:
            return {"features": space.features(self.images[start : start + space.batch])}

        return ranks.over(range(0, len(self), space.batch), work)["features"]


@dataclass(frozen=True)
class Strata:
    """The classes or clusters that are sampled evenly."""

    name: str  # "label" or "cluster"
    shares: np.ndarray  # shares of the samples, [K]
    assign: Callable[[ImageSet], np.ndarray]  # the stratum of each of some images, [N]
    key: str = ""  # of the clusters

    def quotas(self, n: int) -> np.ndarray:
        """How many of n samples belong to each stratum, [K], by the method of largest remainders."""
        expected = n * self.shares / self.shares.sum()
        counts = expected.astype(np.int64)
        rest = np.argsort(counts - expected, kind="stable")[: n - counts.sum()]
        counts[rest] += 1
        return counts

    def draw(self, strata: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """The indices of n images, drawn without repetition from these strata [N]. If a stratum has too few
        images, random other images replace the missing ones."""
        order, rows = rng.permutation(len(strata)), []
        for stratum, count in enumerate(self.quotas(n)):
            rows.append(order[strata[order] == stratum][:count])
        drawn = np.concatenate(rows)
        rest = order[~np.isin(order, drawn)]
        return np.sort(np.concatenate([drawn, rest[: n - len(drawn)]]))


def by_label(labels: np.ndarray, classes: int) -> Strata:
    """The classes of training images with labels [N]."""

    def assign(images: ImageSet) -> np.ndarray:
        return np.zeros(len(images), np.int64) if images.labels is None else images.labels

    return Strata("label", np.bincount(labels, minlength=classes) / len(labels), assign)


def by_cluster(trained: Trained) -> Strata:
    """The clusters of a model; the clusters of a conditional model are within the classes."""
    clusters: Any = trained.model.clusters

    def assign(images: ImageSet) -> np.ndarray:
        parts = []
        for start in range(0, len(images), REAL_BATCH):
            u8 = torch.from_numpy(np.array(images.images[start : start + REAL_BATCH])).to(trained.device)
            y = None
            if trained.model.conditional and images.labels is not None:
                y = torch.from_numpy(images.labels[start : start + REAL_BATCH])
            x = quantise(u8, 256)
            x = x if trained.space is None else trained.space.encode(x)
            parts.append(clusters(x, None if y is None else y.to(x.device)).cpu().numpy())
        return np.concatenate(parts)

    shares = clusters.shares.double().cpu().numpy()
    digest = hashlib.sha256(clusters.centres.cpu().numpy().tobytes() + shares.tobytes())
    return Strata("cluster", shares, assign, digest.hexdigest()[:16])


class RealImages:
    """The images of a data set that samples are compared with, at the grey levels of the samples."""

    def __init__(self, pack: Pack, split: str = "test", say: Say = silent):
        self.pack, self.split, self.say = pack, split, say
        self._sets: dict[tuple[str, int | None], ImageSet] = {}

    def reference(self, levels: int | None) -> ImageSet:
        return self.of(self.split, levels)

    def of(self, split: str, levels: int | None = None) -> ImageSet:
        """The images of a split, quantised to a number of grey levels. Binary images are drawn."""
        meta = self.pack.meta
        levels = None if levels == meta.levels else levels
        if (split, levels) not in self._sets:
            names = SPLITS if split == "all" else (split,)
            parts = [name for name in names if meta.counts[name]]
            images = [self.pack.images(part) for part in parts]
            labels = [y for part in parts if (y := self.pack.labels(part)) is not None]
            joined = images[0] if len(images) == 1 else np.concatenate([part[:] for part in images])
            if levels is not None:
                noise = ImageNoise(BINARY_SEED, range(len(joined)))  # the same draw as for likelihoods
                joined = to_uint8(quantise(torch.from_numpy(np.array(joined)), levels, noise)).numpy()
            classes = np.concatenate(labels) if len(labels) == len(parts) else None
            shape = "x".join(map(str, meta.shape))  # a pack may be cut into patches
            key = f"{meta.digest}-{shape}-{split}-{levels or meta.levels}"
            self._sets[split, levels] = ImageSet(joined, classes, key, self.say)
        return self._sets[split, levels]

    @property
    def at_most(self) -> int:
        total = len(self.of(COUNTERPART[self.split]))
        return total // 2 if self.split == "all" else total

    def bank(self, n: int, levels: int | None) -> ImageSet:
        """The real images from which n are drawn instead of samples."""
        source = self.of(COUNTERPART[self.split], levels)
        return (
            source
            if self.split == "all"
            else source.first(min(MAX_REAL_IMAGES, max(DRAW_MULTIPLE * n, MAX_REAL_IMAGES // 5)))
        )

    def draws(
        self, n: int, levels: int | None, strata: Strata | None = None
    ) -> Iterator[tuple[ImageSet, ImageSet]]:
        """Draws of n real images instead of samples, each with the images that it is compared with. Training
        images are compared with the test split, test images with the training split, and n of all images with
        the remaining ones. There is a single draw if n is the number of all images."""
        bank, reference = self.bank(n, levels), self.reference(levels)
        of_bank = None if strata is None else strata.assign(bank)
        for i in range(FLOOR_DRAWS if n < len(bank) else 1):
            rng = np.random.default_rng([0, i])
            if strata is None or of_bank is None:
                rows = np.sort(rng.permutation(len(bank))[:n])
            else:
                rows = strata.draw(of_bank, n, rng)
            # without labels, as the judges were trained on them
            fake = replace(bank.take(rows), labels=None)
            against = (
                bank.take(np.setdiff1d(np.arange(len(bank)), rows)) if self.split == "all" else reference
            )
            yield fake, against
