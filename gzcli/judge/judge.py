"""The judge of a bench: the figures of images, and of the models that drew them, by the chosen metrics
against a data set's real images; and its floor, the same figures of real images in place of samples."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import devices, ranks, streams
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.jobs import BenchJob
from gzcli.data.packs.pack import Pack
from gzcli.engine.curves import training_speed
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.judge import likelihood
from gzcli.judge.contestants import Contestant
from gzcli.judge.image_sets import ImageSet, RealImages, Space, some
from gzcli.judge.images import Images
from gzcli.metrics import vit
from gzcli.metrics.features import LeNetFeatures, lenet
from gzcli.metrics.frechet import Moments, moments
from gzcli.metrics.inception import inception
from gzcli.metrics.interval import mean_of_draws, subset
from gzcli.metrics.lite import is_installed, lite
from gzcli.metrics.metric import Figures, Metric, metrics
from gzcli.metrics.quality.fd import to_moments
from gzcli.models.nn.perceptual import LPIPS
from gzcli.store import files

SMALL = 10_000  # number of images below which FID is biased upwards
BANK = 50_000  # training images among which copies are looked for, at most
LPIPS_SIDE = 16  # pixels of a side at least, which VGG16 halves four times
UNKNOWN = 2**62  # images of statistics that do not say how many there were


class Judge:
    """The judge of a bench: made once, called for each contestant's images. Metrics read its attributes."""

    def __init__(self, pack: Pack, names: Sequence[str], job: BenchJob, device: torch.device, log: Log):
        self.metrics = [metrics()[name] for name in names]
        self.pack, self.device, self.log, self.say = pack, device, log, log.info
        self.seed, self.named = job.seed, job.metrics is not None
        self.real = RealImages(pack, job.split, self.say)
        self.values = int(np.prod(pack.meta.shape))  # of an image
        self.remembers = "memory" in names
        wanted = {metric.features for metric in self.metrics}
        if self.remembers:
            wanted.add("lite" if pack.meta.shape[0] == 3 and is_installed() else "lenet")
        fetched: dict[str, Callable[[], Space]] = {
            "inception": lambda: inception(job.weights, device),
            "lite": lambda: lite(device),
            "dinov2": lambda: vit.dinov2(device),
            "clip": lambda: vit.clip(device),
        }
        self.large = {name: opened() for name, opened in fetched.items() if name in wanted}
        self.lenet: LeNetFeatures | None = None
        if "lenet" in wanted:
            streams.change_spinner("preparing the feature network")
            self.lenet = lenet(pack, device=device, say=self.say)
        self.levels: set[int | None] = set()  # grey levels of the models so far
        self.floor_draws: dict[int, dict[str, list[float]]] = {}  # by how many images are stood in for
        self.stats = self.read_stats(Path(job.stats)) if job.stats else None
        if "lpips" in names:
            self.lpips  # noqa: B018 -- absent weights are told before the work

    # ------------------------------------------------------------------------ what metrics read

    def space_of(self, metric: Metric) -> Space | None:
        """The feature space of a metric; None: pixels."""
        return self.lenet if metric.features == "lenet" else self.large.get(metric.features)

    @property
    def memory_space(self) -> Space | None:
        return self.large.get("lite", self.lenet)

    @cached_property
    def train_images(self) -> ImageSet:
        """The training images among which copies are looked for."""
        return some(self.real.of("train"), BANK)

    @cached_property
    def lpips(self) -> LPIPS:
        _, height, width = self.pack.meta.shape
        if min(height, width) < LPIPS_SIDE:
            least = f"{LPIPS_SIDE}×{LPIPS_SIDE}"
            raise UsageError(
                f"LPIPS needs images of {least}, and those of `{self.pack.meta.name}` are {width}×{height}"
            )
        return LPIPS.from_files().eval().requires_grad_(False).to(self.device)

    def test_images(self, trained: Trained, n: int, size: int | None = None) -> Images:
        """At most n test images for a model, in batches."""
        index = subset(self.pack.meta.counts["test"], n)
        size = size or devices.batch_of(likelihood.BATCH_SIZE, trained.device)
        return Images.of(trained, self.pack, "test", index, size=size, seed=self.seed)

    def likelihood(self, trained: Trained) -> dict[str, Any]:
        return likelihood.likelihood(trained, self.pack, self.seed, self.log)

    def training_speed(self, trained: Trained) -> dict[str, float]:
        return training_speed(trained.run.path)

    def mark(self, levels: int | None) -> str:
        """The ending of figures at other grey levels than the data set has, as `@32`."""
        return "" if levels in (None, self.pack.meta.levels) else f"@{levels}"

    # ------------------------------------------------------------------------ figures

    def __call__(self, images: ImageSet, levels: int | None) -> Figures:
        """The figures of images, of a model with so many grey levels; None: of images from elsewhere. Those
        of a binary model are compared with no real images."""
        if levels == 2:
            found = self._of_images(images, "draws")
        else:
            self.levels.add(levels)
            found = self._marked(self.compared(images, self.real.reference(levels)), levels)
        return found | self._of_images(images, "test", "train")

    def compared(self, images: ImageSet, real: ImageSet, *, intervals: bool = True) -> Figures:
        """The figures of images beside real ones."""
        found: Figures = {}
        for metric in self.metrics:
            if metric.compare is None:
                continue
            fake = images.features(space := self.space_of(metric))
            if self.stats and metric is self.stats.metric:
                found |= to_moments(metric, fake, self.stats.moments)
            else:
                found |= metric.compare(fake, real.features(space), intervals)
        return {self._named(name): value for name, value in found.items()} | self._of_images(images, "draws")

    def _of_images(self, images: ImageSet, *floors: str) -> Figures:
        found: Figures = {}
        for metric in self.metrics:
            if metric.of_images and metric.floor in floors:
                found |= metric.of_images(self, images)
        return found

    def of_model(self, one: Contestant, *, sampler_only: bool) -> Figures:
        """The figures of a contestant's model itself, on the first rank. A call of every rank."""
        found: Figures = {}
        for metric in self.metrics:
            if (
                metric.of_model
                and (metric.shared or not ranks.rank())
                and (metric.of_sampler or not sampler_only)
            ):
                found |= metric.of_model(self, one)
        return found

    def floor(self, n: int) -> Figures:
        """The figures of n real images in place of samples, at all grey levels of the models so far.

        One draw of 2,000 digits may have twice the Fréchet distance of another, so that each figure is a mean
        over draws; in the features of larger networks it is of one draw.
        """
        found: Figures = {}
        values = self.floor_draws.setdefault(n, {})
        for levels in sorted(self.levels, key=str):
            pairs = self._pairs(n, levels)
            draws = [self.compared(fake, real, intervals=len(pairs) == 1) for fake, real in pairs]
            if not draws:
                continue
            found |= self._marked(mean_of_draws(draws), levels)
            mark = self.mark(levels)
            values |= {name + mark: [draw[name].value for draw in draws] for name in draws[0]}
        for split in ("test", "train"):
            if any(metric.of_images and metric.floor == split for metric in self.metrics):
                found |= self._of_images(some(self.real.of(split), n), split)
        return found

    def floor_size(self, n: int) -> int:
        """The number of real images that stand in place of n samples: fewer where there are no more."""
        return min(n, self.real.at_most)

    def _pairs(self, n: int, levels: int | None) -> list[tuple[ImageSet, ImageSet]]:
        """The draws of real images in place of n samples, and what each is compared with: one, where features
        take long."""
        pairs = self.real.pairs(self.floor_size(n), levels)
        return pairs[:1] if self.large else pairs

    def _marked(self, figures: Figures, levels: int | None) -> Figures:
        return {name + self.mark(levels): value for name, value in figures.items()}

    def _named(self, name: str) -> str:
        """A figure's name, of a LeNet that tells rotations apart with the ending `_rot`."""
        if not (self.lenet and self.lenet.rotations):
            return name
        return (
            f"{name.removesuffix('_lenet')}_rot"
            if name in ("fd", "fd_inf") or name.endswith("_lenet")
            else name
        )

    # ------------------------------------------------------------------------ features

    def prepare(self, contestants: Sequence[Contestant]) -> None:
        """Computes the features of the contestants' images, and of the real images that they and the floor
        are compared with: each process those of a share. A call of every rank."""
        memory = [self.memory_space] if self.remembers else []
        for images in (self.train_images, self.real.of("test")) if memory else ():
            self._compute("the data set", images, memory)
        compared = [metric for metric in self.metrics if metric.compare]
        spaces = [self.space_of(metric) for metric in compared]
        for one in {one.name: one for one in contestants}.values():
            self._compute(f"`{one.name}`", one.images, [*(spaces if one.levels != 2 else ()), *memory])
        # of the real images behind statistics no more is known
        of_real = [self.space_of(m) for m in compared if not self.stats or m is not self.stats.metric]
        for levels in sorted({one.levels for one in contestants if one.levels != 2}, key=str):
            self._compute("the data set", self.real.reference(levels), of_real)
            for n in sorted({len(one) for one in contestants}):
                for fake, real in self._pairs(n, levels):
                    self._compute("the floor", fake, spaces)
                    self._compute("the data set", real, of_real)

    def _compute(self, name: str, images: ImageSet, spaces: Sequence[Space | None]) -> None:
        """Computes the features of images in some spaces, and says how long it took."""
        if self.large and not all(space is None or images.knows(space) for space in spaces):
            self.say(f"features of {len(images):,} images of {name}")
        since = time.monotonic()
        for space in spaces:
            if space is not None:
                images.features(space)
        if (took := time.monotonic() - since) >= 1:
            by = f" on {ranks.world()} processes" if ranks.world() > 1 else ""
            self.say(f"features of {len(images):,} images of {name}: {took:.1f} s{by}")

    # ------------------------------------------------------------------------ what is told beside the figures

    def biased(self, n: int) -> list[str]:
        """The raw Fréchet distances of n samples that are as much of their number as of their quality: of
        fewer than two a feature."""
        least = min(n, len(self.real.reference(None)))
        return [
            self._named(metric.name) for metric in self.metrics if metric.width and least < 2 * metric.width
        ]

    def warnings(self, n: int) -> list[str]:
        """Notes without which the figures of n samples could be misread."""
        if biased := self.biased(n):
            return [
                f"`{'~`, `'.join(biased)}~`: fewer images than twice the features, a raw Fréchet distance "
                f"then sees their number more than their quality; `kid…` and `…_pca` hold at this n"
            ]
        if n < SMALL and any(metric.name == "fid" for metric in self.metrics):
            return [f"FID of {n} images is biased upwards: compare it at the same n only, or use `kid`"]
        return []

    def provenance(self) -> dict[str, Any]:
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

    # ------------------------------------------------------------------------ statistics of real images

    def stats_metric(self) -> Metric:
        """The Fréchet distance among the metrics whose statistics are meant. Raises UsageError where there is
        not exactly one."""
        distances = [metric for metric in self.metrics if metric.width]
        if len(distances) != 1:
            hint = "`--metrics fid` for files of pytorch-fid and clean-fid, `fd` for the features of the set"
            raise UsageError(f"statistics are of one Fréchet distance, not of {len(distances)}", hint=hint)
        return distances[0]

    def write_stats(self, path: Path) -> None:
        """Writes `mu` [D] and `sigma` [D, D] of the real images as pytorch-fid and clean-fid read them, with
        the number of images and the features' hash."""
        metric = self.stats_metric()
        space = self.space_of(metric)
        found = moments(self.real.reference(None).features(space)[:, : metric.width])
        file, name = io.BytesIO(), np.array(space.hash if space else "")
        np.savez(file, mu=found.mean, sigma=found.covariance, n=np.array(found.n), features=name)
        files.write_atomic(path, file.getvalue())

    def read_stats(self, path: Path) -> Statistics:
        """The statistics in a file. Raises UsageError for a file that is none, or of other features."""
        metric = self.stats_metric()
        return read_statistics(path, metric, self.space_of(metric))


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of real images' features, for one Fréchet distance."""

    metric: Metric
    moments: Moments
    facts: dict[str, Any]  # what the file says beside them


def read_statistics(path: Path, metric: Metric, space: Space | None) -> Statistics:
    """`mu` and `sigma` of an npz. Raises UsageError for a file that is none, or of other features."""
    hint, width = "statistics are arrays `mu` and `sigma`", metric.width
    try:
        held = files.read_arrays(path, "mu", "sigma")
        with files.reading(path):
            mu, sigma = (np.asarray(held[name], np.float64) for name in ("mu", "sigma"))
            n = int(held["n"]) if "n" in held else UNKNOWN
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError("it holds numbers that are not finite")
    except MissingError as e:
        raise UsageError(f"no npz of statistics: {e.message}", hint=hint) from e
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise UsageError(
            f"`{path}` has `mu` of shape {mu.shape} and `sigma` of {sigma.shape}: "
            f"`{metric.name}` has {width} features"
        )
    theirs = str(held["features"]) if "features" in held else None
    if theirs and space and theirs != space.hash:
        raise UsageError(
            f"`{path}` is of other features than `{metric.name}` has here "
            f"({theirs[:8]}, not {space.hash[:8]})",
            hint="a LeNet is of one data set: compare on the same `--data`, or by `fid`",
        )
    facts = {"file": str(path), "n": n if "n" in held else None, "features": theirs}
    return Statistics(metric, Moments(mu, sigma, n), facts)


def json_figures(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under a name, and their intervals under `intervals` or `NAME_intervals`, for JSON."""
    ends = {key: [value.low, value.high] for key, value in figures.items() if value.low is not None}
    intervals = "intervals" if name == "metrics" else f"{name}_intervals"
    return {name: {key: value.value for key, value in figures.items()}, intervals: ends}
