"""What a bench compares: samples that it draws of runs, each in one or several ways, and images from
anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from gzcli.core.types import ImageNoise, no_progress
from gzcli.core.units import as_size, by_sides
from gzcli.data.packs.open import PackOptions, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.packs.traits import facts_of
from gzcli.data.sets.names import locate
from gzcli.engine.log import Log
from gzcli.engine.sampler import draw
from gzcli.engine.trained import Trained
from gzcli.judge.image_sets import ImageSet, some
from gzcli.judge.images import short_paths
from gzcli.metrics.metric import Figures
from gzcli.models.nn import spread_labels
from gzcli.models.options import defaults, grouped
from gzcli.store import files

FEWEST = 50  # images of a contestant


@dataclass
class Contestant:
    """Images that are compared with real ones, and the model that drew them, if one did."""

    name: str
    images: ImageSet  # with the labels by which they were drawn
    path: str  # of the run, or of the images
    trained: Trained | None = None
    seconds: float | None = None  # that drawing them took
    file: str | None = None  # of what the model drew
    notes: list[str] = field(default_factory=list)  # what was done to the images
    figures: Figures = field(default_factory=dict)  # of the model itself
    facts: dict[str, Any] = field(default_factory=dict)  # what its row says besides

    @property
    def levels(self) -> int | None:
        """Grey levels of the model; None for images from elsewhere, which have those of the set."""
        return self.trained.images.levels if self.trained else None

    def __len__(self) -> int:
        return len(self.images)


def sampled(trained: Trained, pack: Pack, job: BenchJob, folder: Path, log: Log) -> Contestant:
    """`job.n` samples of a model; a conditional one draws them by the labels of as many training images."""
    labels = training_labels(trained, pack, job.n)
    drawn, seconds, file = sample(trained, labels, job, folder, log)
    images = ImageSet(drawn, None if labels is None else labels.numpy())
    return Contestant(trained.name, images, str(trained.run.owner.path), trained, seconds, str(file))


def read(what: str, pack: Pack, wanted: PackOptions, n: int, log: Log) -> Contestant:
    """The images of a folder, an archive, an npz or a set, in the form of the others: n of them, or all where
    they are fewer."""
    source = locate(what)
    theirs = open_pack(source, **wanted, foreign=True, say=log.info)
    total = theirs.meta.counts["test"]
    if total < FEWEST:
        raise UsageError(f"`{what}` holds {total} images", hint=f"at least {FEWEST} can be compared")
    channels, height, width = theirs.meta.shape
    kind = "grey" if channels == 1 else "colour"
    text = f"taken as {total:,} {kind} pictures of {width}×{height}"
    before = facts_of(source)
    if theirs.meta.resized and before:
        text += f", resized from {before.width}×{before.height}"
    if theirs.meta.source_channels != channels:
        text += ", made grey" if channels == 1 else ", made RGB"
    if total > n:
        text += f"; {n:,} of them are compared"
    elif total < n:
        text += f"; fewer than the {n:,} of `-n`, so that the floor is drawn at {total:,} too"
    labels = theirs.labels("test")
    if labels is not None and (
        pack.meta.multilabel or labels.ndim > 1 or labels.max() >= len(pack.meta.classes)
    ):
        labels = None  # classes of another set
    images = some(ImageSet(theirs.images("test"), labels), n)
    images = ImageSet(images.images[:], images.labels)
    note = f"`{source.shown}`: {text}"
    return Contestant(Path(source.reference).name, images, source.reference, notes=[note])


def common_form(models: list[Trained], pack: Pack | None = None) -> PackOptions:
    """The form of the images of all runs; without runs that of the data set."""
    if not models:
        if pack is None:
            return PackOptions(size=None, channels=None, fit="crop", patch=None)
        channels, *sides = pack.meta.shape
        return PackOptions(size=as_size(*sides), channels=channels, fit="crop", patch=None)
    first = models[0]
    for other in models:
        if other.images.shape != first.images.shape:
            raise UsageError(
                f"`{other.run.id}` has images of {by_sides(other.images.shape)}, `{first.run.id}` of "
                f"{by_sides(first.images.shape)}: their figures are not comparable",
                hint="run `gz bench` once for each size",
            )
        if other.wanted != first.wanted:
            ways = [trained.part.data.fit for trained in (other, first)]
            raise UsageError(
                f"pictures came to `{other.run.id}` by `data.fit: {ways[0]}`, to `{first.run.id}` by "
                f"`{ways[1]}`: their figures are not comparable",
                hint="run `gz bench` once for each fit",
            )
    return first.wanted


def tell_apart(contestants: list[Contestant]) -> None:
    """Gives contestants of one name longer ones: of runs their alias or id, of images as much of their path
    as is needed; what is still equal gets a number."""
    names = [one.name for one in contestants]
    for one in contestants:
        if names.count(one.name) < 2:
            continue
        if one.trained:
            run = one.trained.run.owner
            one.name = run.alias or run.id
        else:
            paths = {other.path for other in contestants if Path(other.path).name == one.name}
            one.name = short_paths(paths)[one.path]
    seen: dict[str, int] = {}
    for one in contestants:
        seen[one.name] = seen.get(one.name, 0) + 1
        if seen[one.name] > 1:
            one.name = f"{one.name} ({seen[one.name]})"


def training_labels(trained: Trained, pack: Pack, n: int) -> torch.Tensor | None:
    """The labels of n training images, by which a conditional model samples; None for other models."""
    labels = pack.labels("train")
    if labels is None or not trained.model.conditional:
        return None
    rows = np.random.default_rng(0).permutation(len(labels))
    chosen = torch.from_numpy(np.asarray(labels[np.resize(rows, n)]))
    return chosen.float() if pack.meta.multilabel else chosen


def sample(
    trained: Trained, labels: torch.Tensor | None, job: BenchJob, folder: Path, log: Log
) -> tuple[np.ndarray, float, Path]:
    """n samples uint8 [n, C, H, W], the seconds that they took, and their file in `folder`, whose name is a
    hash of all that they depend on."""
    weights = trained.run.model_file
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    options: dict[str, Any] = dict(trained.part.sample)
    owner, device = trained.run.owner.id, trained.device.type
    made = [owner, trained.step, stamp, job.n, job.seed, options, device, trained.precision]
    key = hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:8]
    path = folder / "samples" / f"{owner}-{key}.npz"

    def read(path: Path) -> tuple[np.ndarray, float, Path]:
        file = files.read_arrays(path)
        with files.reading(path):
            images = file["samples"].transpose(0, 3, 1, 2)
            if len(images) != job.n or images.dtype != np.uint8:
                raise ValueError(f"these are not {job.n} samples")
            return images, float(file["seconds"]), path

    earlier = files.read_cached(path, read, log.warn) if ranks.rank() == 0 else None
    if ranks.agree(earlier is not None):
        return earlier or read(path)
    since = time.perf_counter()
    with log.bar(f"sample {trained.name}") as progress:
        images = draw(trained, job.n, seed=job.seed, labels=labels, progress=progress)
    synchronise(trained.device)
    seconds = time.perf_counter() - since
    if ranks.rank():
        return images, seconds, path
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, samples=images.transpose(0, 2, 3, 1), seconds=seconds)
    return images, seconds, path


def varied(trained: Trained, variant: Mapping[str, Any]) -> Trained:
    """The model with the sampler that a variant of `BenchJob.variants` asks for."""
    options = dict(variant.get("sample", {}))
    if "calls" in variant:
        options["steps"] = steps_for(trained, variant["calls"])
    return replace(trained, part=replace(trained.part, sample={**trained.part.sample, **options}))


def count_calls(trained: Trained, options: Mapping[str, Any] | None = None) -> int:
    """The network calls of one image, found by drawing it.

    Each layer that runs counts with its parameters, and half of these parameters run as often or more. So
    the large network of several counts, and a layer that is skipped at some steps does not. Guidance doubles
    the batch, which counts as two calls. The pixel models compute every value once and keep it, past their
    layers' `forward`: they count as many calls as they take without that (`naive`), one for each value drawn.
    """
    keywords = grouped(trained.model.sample, {**trained.part.sample, **(options or {})})
    if "naive" in defaults(trained.model.sample):
        parts: Any = trained.model.parts
        return parts * math.prod(trained.info.shape[1:])
    noise = ImageNoise(0, range(1), trained.device)
    labels = spread_labels(None, 1, trained.info, trained.device) if trained.model.conditional else None
    net = getattr(trained.model, "net", getattr(trained.model, "trunk", None))  # a denoiser's, a prior's
    with torch.inference_mode(), trained.sampling(), counted(net) as runs:
        trained.model.sample(1, labels=labels, noise=noise, progress=no_progress, **keywords)
    return weighted_median([(count, own_size(layer)) for layer, count in runs.items()])


def steps_for(trained: Trained, calls: int) -> int | None:
    """The most `steps` of the model's sampler whose calls are `calls` at most; None where it has no steps.

    The calls of a solver are a line in its steps (Euler s, midpoint 2 s, Heun 2 s − 1): two counts give it.
    Where its first step alone takes more it is 1 step.
    """
    if "steps" not in defaults(trained.model.sample):
        return None
    few, more = count_calls(trained, {"steps": 2}), count_calls(trained, {"steps": 4})
    slope = (more - few) / 2
    steps = int(2 + (calls - few) / slope) if slope > 0 else calls
    return max(1, steps)


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


def own_size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters(recurse=False))


def weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """The largest value that half of the weight reaches or exceeds; 0 without weight."""
    half, reached = sum(weight for _, weight in values) / 2, 0
    for value, weight in sorted(values, reverse=True):
        reached += weight
        if weight and reached >= half:
            return value
    return 0
