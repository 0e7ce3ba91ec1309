"""Image quality of samples by the chosen metrics against a data set's real images, with the floor of real
images in place of samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks, waiting
from gzcli.data.packs.pack import Pack
from gzcli.judge import figures, statistics
from gzcli.judge.figures import SPACES, WIDTHS, Found
from gzcli.judge.image_sets import ImageSet, RealImages, Space
from gzcli.metrics import vit
from gzcli.metrics.features import LeNetFeatures, lenet
from gzcli.metrics.fidelity import inception
from gzcli.metrics.interval import half_samples
from gzcli.metrics.lite import is_installed, lite

SMALL = 10_000  # number of images below which FID is biased upwards


class Quality:
    """The quality of samples: made once for a data set, called for each set of them.

    Raises MissingError for absent weights, UsageError for statistics of other features.
    """

    def __init__(
        self,
        pack: Pack,
        metrics: Sequence[str],
        *,
        split: str = "test",
        device: torch.device,
        weights: str | None = None,
        stats: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.pack, self.metrics, self.real, self.say = pack, list(metrics), RealImages(pack, split, say), say
        wanted = {SPACES[name] for name in metrics if name in SPACES}
        colour = pack.meta.shape[0] == 3 and is_installed()
        wanted |= {"lite" if colour else "lenet"} if "memory" in metrics else set()
        open_space: dict[str, Callable[[], Space]] = {
            "inception": lambda: inception(weights, device),
            "lite": lambda: lite(device),
            "dinov2": lambda: vit.dinov2(device),
            "clip": lambda: vit.clip(device),
        }
        self.large = {name: opened() for name, opened in open_space.items() if name in wanted}
        self.lenet: LeNetFeatures | None = None
        if "lenet" in wanted or "classes" in metrics:
            waiting.now("preparing the feature network")
            self.lenet = lenet(pack, device=device, say=say)
        self.tail = "_rot" if self.lenet and self.lenet.rotations else ""
        self.used: set[int | None] = set()  # grey levels of the models so far
        self.floor_draws: dict[int, dict[str, list[float]]] = {}  # by how many images are stood in for
        self.stats: statistics.Statistics | None = None
        if stats:
            self.stats = statistics.read(Path(stats), self.metrics, self.space_of)

    def __call__(
        self,
        samples: ImageSet,
        levels: int | None = None,
        real: ImageSet | None = None,
        *,
        ends: bool = True,
    ) -> Found:
        """The figures of samples, with intervals."""
        self.used.add(levels)
        real = real or self.real.reference(levels)
        found: Found = {}
        for metric in self.metrics:
            if metric not in SPACES:
                continue
            space = self.space_of(metric)
            if self.stats and metric == self.stats.metric:
                found |= figures.to_statistics(metric, samples.features(space), self.stats.moments)
            else:
                found |= figures.compare(metric, samples.features(space), real.features(space), ends=ends)
        found = {self._named(name): value for name, value in found.items()}
        return found | (self.classes(samples) if "classes" in self.metrics else {})

    def prepare(self, samples: Mapping[str, tuple[ImageSet, int | None]], *others: ImageSet) -> None:
        """Computes the features of samples and of the real images that they and the floor are compared with:
        each process those of a share. A call of every rank."""
        in_memory = [self.memory_space] if self.memory_space else []
        for images in others:
            self._compute("the data set", images, in_memory)
        spaces = [self.space_of(metric) for metric in self.metrics if metric in SPACES]
        for name, (images, levels) in samples.items():
            self._compute(f"`{name}`", images, [*(spaces if levels != 2 else ()), *in_memory])
        with_stats = self.stats.metric if self.stats else None  # no more is known of its real images
        of_real = [self.space_of(m) for m in self.metrics if m in SPACES and m != with_stats]
        for level in sorted({levels for _, levels in samples.values() if levels != 2}, key=str):
            self._compute("the data set", self.real.reference(level), of_real)
            for n in sorted({len(images) for images, _ in samples.values()}):
                for fake, real in self._draws(n, level):
                    self._compute("the floor", fake, spaces)
                    self._compute("the data set", real, of_real)

    def _compute(self, name: str, images: ImageSet, spaces: Sequence[Space | None]) -> None:
        """Computes the features of images in some spaces, and says how long it took."""
        if self.dear and not all(space is None or images.knows(space) for space in spaces):
            self.say(f"features of {len(images):,} images of {name}")
        since = time.monotonic()
        for space in spaces:
            if space is not None:
                images.features(space)
        if (took := time.monotonic() - since) >= 1:
            by = f" on {ranks.world()} processes" if ranks.world() > 1 else ""
            self.say(f"features of {len(images):,} images of {name}: {took:.1f} s{by}")

    def classes(self, samples: ImageSet) -> Found:
        """`tv`, by how much the classes of samples differ from those of training images, and the share of
        samples that the LeNet takes for their label's class; {} without classes."""
        known, net, meta = self.pack.labels("train"), self.lenet, self.pack.meta
        if known is None or net is None or net.rotations or meta.multilabel:
            return {}
        seen = net.predict(samples.images)
        of = partial(figures.total_variation, labels=known, classes=len(meta.classes))
        found = {"tv": figures.not_negative(half_samples(of, seen))}
        if samples.labels is not None:
            right = float(np.mean(seen == samples.labels))
            found["label_accuracy"] = figures.share(right, len(seen))
        return found

    def floor(self, n: int) -> Found:
        """The same figures of n real images in place of samples, at all grey levels of the models so far.

        One draw of 2,000 digits may have twice the Fréchet distance of another, so that each figure is a mean
        over draws; in the features of larger networks it is of one draw.
        """
        found: Found = {}
        of_n = self.floor_draws.setdefault(n, {})
        for levels in sorted(self.used, key=str):
            pairs = self._draws(n, levels)
            draws = [self(fake, levels, real, ends=len(pairs) == 1) for fake, real in pairs]
            if not draws:
                continue
            for name, value in figures.mean_of_draws(draws).items():
                found[name + self.mark(levels)] = value
                of_n[name + self.mark(levels)] = [draw[name].value for draw in draws]
        return found

    def _draws(self, n: int, levels: int | None) -> list[tuple[ImageSet, ImageSet]]:
        """The draws of real images in place of n samples, and what each is compared with."""
        pairs = self.real.pairs(self.floor_size(n), levels)
        return pairs[:1] if self.dear else pairs

    def floor_size(self, n: int) -> int:
        """The number of real images that stand in place of n samples: fewer where there are no more."""
        return min(n, self.real.at_most)

    @property
    def dear(self) -> bool:
        """Whether features take long."""
        return bool(self.large)

    def space_of(self, metric: str) -> Space | None:
        """The feature space of a metric; None: pixels."""
        return self.lenet if SPACES[metric] == "lenet" else self.large.get(SPACES[metric])

    @property
    def memory_space(self) -> Space | None:
        """The feature space in which copies of training images are looked for; None where they are not."""
        return self.large.get("lite", self.lenet) if "memory" in self.metrics else None

    def mark(self, levels: int | None) -> str:
        """The ending of figures at other grey levels than the data set has, as `@32`."""
        return "" if levels in (None, self.pack.meta.levels) else f"@{levels}"

    def biased(self, n: int) -> list[str]:
        """The raw Fréchet distances of n samples that are as much of their number as of their quality."""
        real = len(self.real.reference(None))
        asked = [metric for metric in self.metrics if metric in WIDTHS]
        return [self._named(metric) for metric in asked if figures.is_biased(metric, n, real)]

    def warnings(self, n: int) -> list[str]:
        """Notes without which the figures of n samples could be misread."""
        found = []
        if biased := self.biased(n):
            found.append(
                f"`{'~`, `'.join(biased)}~`: fewer images than twice the features, a raw Fréchet distance "
                f"then sees their number more than their quality; `kid…` and `…_pca` hold at this n"
            )
        elif "fid" in self.metrics and n < SMALL:
            found.append(f"FID of {n} images is biased upwards: compare it at the same n only, or use `kid`")
        return found

    def provenance(self) -> dict[str, Any]:
        """What the figures depend on beside the images."""
        net = self.lenet
        return {
            "features": net and net.hash,
            "features_accuracy": net and net.accuracy,
            "features_rotations": net and net.rotations,
            **dict.fromkeys(("lite", "inception")),
            **{name: space.hash for name, space in self.large.items()},
            "stats": self.stats and self.stats.facts,
            "floor_draws": self.floor_draws[max(self.floor_draws)] if self.floor_draws else {},
        }

    def _named(self, name: str) -> str:
        """A figure's name, of a LeNet that tells rotations apart with the ending `_rot`."""
        if not self.tail or (name not in ("fd", "fd_inf") and not name.endswith("_lenet")):
            return name
        return name.removesuffix("_lenet") + self.tail
