"""The images that a bench compares, with their features: samples of runs, other images, and the real images
of the data set. A run may be sampled in several ways."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gzcli.core import ranks
from gzcli.core.devices import synchronise
from gzcli.core.errors import UsageError
from gzcli.core.jobs import BenchJob
from gzcli.core.types import ImageNoise, Say, no_progress, silent
from gzcli.core.units import as_size, by_sides
from gzcli.data.packs.batches import quantise, to_uint8
from gzcli.data.packs.open import PackOptions, facts_of, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.names import locate
from gzcli.engine.log import Log
from gzcli.engine.sampler import draw
from gzcli.engine.trained import Trained
from gzcli.judge.images import short_paths
from gzcli.metrics.features import LeNetFeatures
from gzcli.metrics.interval import subset
from gzcli.metrics.metric import Figures
from gzcli.metrics.pretrained import Features
from gzcli.models.base import flat_defaults, group_options
from gzcli.models.nn import spread_labels
from gzcli.store import files
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run

FEWEST = 50  # images of a contestant
DRAWS = 5  # of real images over which the floor is averaged
# The split whose images stand in place of samples, by the one that they are compared with.
OTHER = {"test": "train", "train": "test", "all": "all"}
Space = Features | LeNetFeatures


@dataclass
class ImageSet:
    """Images, with their labels and features. Features are computed once and shared by the metrics."""

    images: Any  # uint8 [N, C, H, W]
    labels: np.ndarray | None = None  # int64 [N] or [N, K] where there are any
    key: str | None = None  # name of real images' features in the cache; None: not cached
    say: Say = field(default=silent, repr=False)
    _features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def features(self, space: Space | None) -> np.ndarray:
        """float64 [N, D] in a space, or the pixels, uint8 [N, C·H·W], without one. Every rank must call this
        if the features are not computed yet."""
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

    def _cached(self, space: Space) -> np.ndarray:
        """The features by way of the cache, in single precision as networks compute them."""
        path = cache_dir("features", "real") / f"{self.key}-{space.hash[:16]}-{space.device.type}.npy"

        def read(path: Path) -> np.ndarray:
            features = files.read_array(path)
            with files.reading(path):
                if features.ndim != 2 or len(features) != len(self) or not np.isfinite(features).all():
                    raise ValueError("these are not the features of the set")
            return features.astype(np.float64)

        features = files.read_cached(path, read, self.say) if ranks.rank() == 0 else None
        if ranks.agree(features is not None):
            return read(path) if features is None else features
        features, file = self._computed(space), io.BytesIO()
        if ranks.rank() == 0:
            np.save(file, features.astype(np.float32))
            files.write_atomic(path, file.getvalue())
        return features

    def _computed(self, space: Space) -> np.ndarray:
        def work(start: int) -> dict[str, np.ndarray]:
            return {"features": space.features(self.images[start : start + space.batch])}

        return ranks.over(range(0, len(self), space.batch), work)["features"]


def some(images: ImageSet, n: int) -> ImageSet:
    return images if len(images) <= n else images.take(subset(len(images), n))


class RealImages:
    """The images of a data set that samples are compared with, at the grey levels of the samples."""

    def __init__(self, pack: Pack, split: str = "test", say: Say = silent):
        self.pack, self.split, self.say = pack, split, say
        self._sets: dict[tuple[str, int | None], ImageSet] = {}
        self._pairs: dict[tuple[int, int | None], list[tuple[ImageSet, ImageSet]]] = {}

    def reference(self, levels: int | None) -> ImageSet:
        return self.of(self.split, levels)

    def of(self, split: str, levels: int | None = None) -> ImageSet:
        """The images of a split, quantised to a number of grey levels."""
        meta = self.pack.meta
        levels = None if levels in (2, meta.levels) else levels
        if (split, levels) not in self._sets:
            names = ("train", "val", "test") if split == "all" else (split,)
            parts = [name for name in names if meta.counts[name]]
            images = [self.pack.images(part) for part in parts]
            labels = [y for part in parts if (y := self.pack.labels(part)) is not None]
            joined = images[0] if len(images) == 1 else np.concatenate([part[:] for part in images])
            if levels is not None:
                joined = to_uint8(quantise(torch.from_numpy(np.array(joined)), levels)).numpy()
            classes = np.concatenate(labels) if len(labels) == len(parts) else None
            shape = "x".join(map(str, meta.shape))  # a pack may be cut into patches
            key = f"{meta.digest}-{shape}-{split}-{levels or meta.levels}"
            self._sets[split, levels] = ImageSet(joined, classes, key, self.say)
        return self._sets[split, levels]

    @property
    def at_most(self) -> int:
        total = len(self.of(OTHER[self.split]))
        return total // 2 if self.split == "all" else total

    def pairs(self, n: int, levels: int | None) -> list[tuple[ImageSet, ImageSet]]:
        """Up to five disjoint random draws of n real images in place of samples, each with the images that it
        is compared with: training images with the test split, test images with the training split, and n of
        all images with the remaining ones."""
        if (n, levels) not in self._pairs:
            # without labels, as the LeNet was trained on them
            source = replace(self.of(OTHER[self.split], levels), labels=None)
            total, reference = len(source), self.reference(levels)
            order = np.random.default_rng(0).permutation(total)
            draws = [np.sort(order[i * n : (i + 1) * n]) for i in range(min(DRAWS, total // n) if n else 0)]
            every = self.split == "all"
            others = [source.take(np.setdiff1d(order, rows)) if every else reference for rows in draws]
            self._pairs[n, levels] = list(zip(map(source.take, draws), others, strict=True))
        return self._pairs[n, levels]


# ---------------------------------------------------------------------------- contestants


@dataclass
class Contestant:
    """Images that are compared with real ones, and the model that generated them, if any."""

    name: str
    images: ImageSet  # with the labels that they were conditioned on
    path: str  # of the run, or of the images
    trained: Trained | None = None
    seconds: float | None = None  # duration of sampling
    file: str | None = None  # npz of the samples
    notes: list[str] = field(default_factory=list)  # what was done to the images
    figures: Figures = field(default_factory=dict)  # of the model itself
    facts: dict[str, Any] = field(default_factory=dict)  # further columns of its row

    @property
    def levels(self) -> int | None:
        """Grey levels of the model; None for images from elsewhere, which have those of the set."""
        return self.trained.images.levels if self.trained else None

    def __len__(self) -> int:
        return len(self.images)


def sampled(trained: Trained, pack: Pack, job: BenchJob, folder: Path, log: Log) -> Contestant:
    """`job.n` samples of a model, which are written to a file too. Those of a conditional model have the
    labels of random training images."""
    labels, chosen = pack.labels("train") if trained.model.conditional else None, None
    if labels is not None:
        rows = np.random.default_rng(0).permutation(len(labels))
        chosen = torch.from_numpy(np.asarray(labels[np.resize(rows, job.n)]))
        chosen = chosen.float() if pack.meta.multilabel else chosen
    since, owner = time.perf_counter(), trained.run.owner
    with log.bar(f"sample {trained.title}") as progress:
        images = draw(trained, job.n, seed=job.seed, labels=chosen, progress=progress)
    synchronise(trained.device)
    seconds = time.perf_counter() - since
    facts = json.dumps([trained.step, dict(trained.part.sample)], default=str)  # differs between variants
    path = Run(folder).samples_folder / f"{owner.id}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.npz"
    if not ranks.rank():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, samples=images.transpose(0, 2, 3, 1), seconds=seconds)
    image_set = ImageSet(images, None if chosen is None else chosen.numpy())
    return Contestant(trained.title, image_set, str(owner.path), trained, seconds, str(path))


def read(name: str, pack: Pack, form: PackOptions, n: int, log: Log) -> Contestant:
    """At most n images of a folder, an archive, an npz or a set, in the form of the other contestants."""
    source = locate(name)
    images_pack = open_pack(source, **form, foreign=True, say=log.info)
    total = images_pack.meta.counts["test"]
    if total < FEWEST:
        raise UsageError(f"`{name}` holds {total} images", hint=f"at least {FEWEST} can be compared")
    channels, height, width = images_pack.meta.shape
    text = f"taken as {total:,} {'grey' if channels == 1 else 'colour'} pictures of {width}×{height}"
    if images_pack.meta.resized and (before := facts_of(source)):
        text += f", resized from {before.width}×{before.height}"
    if images_pack.meta.source_channels != channels:
        text += ", made grey" if channels == 1 else ", made RGB"
    if total > n:
        text += f"; {n:,} of them are compared"
    elif total < n:
        text += f"; fewer than the {n:,} of `-n`, so that the floor is drawn at {total:,} too"
    labels = images_pack.labels("test")
    if labels is not None and (
        pack.meta.multilabel or labels.ndim > 1 or labels.max() >= len(pack.meta.classes)
    ):
        labels = None  # classes of another set
    images = some(ImageSet(images_pack.images("test"), labels), n)
    images = ImageSet(images.images[:], images.labels)
    note = f"`{source.shown}`: {text}"
    return Contestant(Path(source.reference).name, images, source.reference, notes=[note])


def common_form(models: list[Trained], pack: Pack | None = None) -> PackOptions:
    """The form of the images of all runs; without runs that of the data set."""
    if not models:
        channels, *sides = pack.meta.shape if pack else (None,)
        return PackOptions(size=as_size(*sides) if sides else None, channels=channels, fit="crop", patch=None)
    first, *others = models
    for run in others:
        size, first_size = by_sides(run.images.shape), by_sides(first.images.shape)
        why, criterion = f"`{run.run.id}` has images of {size}, `{first.run.id}` of {first_size}", "size"
        if run.images.shape == first.images.shape:
            came = f"pictures came to `{run.run.id}` by `data.fit: {run.part.data.fit}`"
            why, criterion = f"{came}, to `{first.run.id}` by `{first.part.data.fit}`", "fit"
        if run.form != first.form:
            hint = f"run `gz bench` once for each {criterion}"
            raise UsageError(f"{why}: their figures are not comparable", hint=hint)
    return first.form


def tell_apart(contestants: list[Contestant]) -> None:
    """Renames contestants of equal names to their alias, id or a longer part of their path, and numbers
    those that are still equal."""
    names = Counter(contestant.name for contestant in contestants)
    for contestant in contestants:
        if names[contestant.name] > 1 and contestant.trained:
            contestant.name = contestant.trained.run.owner.alias or contestant.trained.run.owner.id
        elif names[contestant.name] > 1:
            contestant.name = short_paths(
                {c.path for c in contestants if Path(c.path).name == contestant.name}
            )[contestant.path]
    counts: Counter[str] = Counter()
    for contestant in contestants:
        counts[contestant.name] += 1
        if counts[contestant.name] > 1:
            contestant.name = f"{contestant.name} ({counts[contestant.name]})"


# ---------------------------------------------------------------------------- samplers at equal network calls


def varied(trained: Trained, variant: Mapping[str, Any]) -> Trained:
    """The model with the sampler that a variant of `BenchJob.variants` asks for."""
    options = dict(variant.get("sample", {}))
    if "calls" in variant:
        options["steps"] = steps_for(trained, variant["calls"])
    return replace(trained, part=replace(trained.part, sample={**trained.part.sample, **options}))


def steps_for(trained: Trained, calls: int) -> int | None:
    """The largest number of `steps` (at least 1) of the model's sampler that takes at most `calls` network
    calls; None for a sampler without steps. Calls are linear in the steps (Euler s, midpoint 2 s, Heun
    2 s − 1), so two counts determine them."""
    if "steps" not in flat_defaults(trained.model.sample):
        return None
    calls_of_2, calls_of_4 = count_calls(trained, {"steps": 2}), count_calls(trained, {"steps": 4})
    slope = (calls_of_4 - calls_of_2) / 2
    return max(1, int(2 + (calls - calls_of_2) / slope) if slope > 0 else calls)


def count_calls(trained: Trained, options: Mapping[str, Any] | None = None) -> int:
    """The network calls of one image, counted while sampling it: those of the layers that hold half of the
    parameters, so the largest of several networks counts. Guidance doubles the batch and counts as two calls.
    Pixel models cache activations and bypass `forward`: they count one call for each value."""
    model = trained.model
    keywords = group_options(model.sample, {**trained.part.sample, **(options or {})})
    if "naive" in flat_defaults(model.sample):
        return int(getattr(model, "parts")) * math.prod(trained.info.shape[1:])  # noqa: B009
    noise = ImageNoise(0, range(1), trained.device)
    labels = spread_labels(None, 1, trained.info, trained.device) if model.conditional else None
    net = getattr(model, "net", getattr(model, "trunk", None))  # a denoiser's, a prior's
    with torch.inference_mode(), trained.sampling(), counted(net) as runs:
        model.sample(1, labels=labels, noise=noise, progress=no_progress, **keywords)
    weights = {layer: sum(p.numel() for p in layer.parameters(recurse=False)) for layer in runs}
    half, reached = sum(weights.values()) / 2, 0
    for layer, count in sorted(runs.items(), key=lambda item: item[1], reverse=True):
        reached += weights[layer]
        if weights[layer] and reached >= half:
            return count
    return 0


@contextmanager
def counted(net: nn.Module | None) -> Iterator[Counter[nn.Module]]:
    """Counts the calls of every module within the block, also of attached ones, while one image is drawn."""
    runs: Counter[nn.Module] = Counter()
    rows = 1

    def note(module: nn.Module, inputs: Any) -> None:
        nonlocal rows
        if module is net:
            rows = len(inputs[0])
        runs[module] += rows

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield runs
    finally:
        handle.remove()
