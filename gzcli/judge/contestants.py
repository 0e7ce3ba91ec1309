"""The contestants of a bench: samples of runs, and images from elsewhere. A run may be sampled in several
ways."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.devices import clock, synchronise
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.hints import advice, gz
from gzcli.core.types import Progress
from gzcli.core.units import as_size, by_sides
from gzcli.data.packs.open import PackOptions, facts_of, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.registry import locate
from gzcli.engine.log import Log
from gzcli.engine.sampler import count_calls, draw
from gzcli.engine.trained import Trained
from gzcli.judge.images import short_paths
from gzcli.judge.real import ImageSet, Strata, by_cluster, by_label
from gzcli.metrics.metric import Figures
from gzcli.models.base import flat_defaults
from gzcli.store import files
from gzcli.store.jobs import BenchJob
from gzcli.store.runs import Run

MIN_IMAGES = 50  # minimum number of images of a contestant


@dataclass
class Contestant:
    """Images that are compared with real ones, and the model that drew them, if any."""

    name: str
    images: ImageSet  # with the labels on which they were conditioned
    path: str  # path of the run or of the images
    trained: Trained | None = None
    seconds: float | None = None  # duration of sampling
    file: str | None = None  # npz of the samples
    notes: list[str] = field(default_factory=list)  # what was done to the images
    figures: Figures = field(default_factory=dict)  # metrics of the model itself
    facts: dict[str, Any] = field(default_factory=dict)  # further columns of its row
    strata: Strata | None = None  # classes or clusters that are drawn evenly; None: drawn at random

    @cached_property
    def levels(self) -> int | None:
        """The grey levels of the images. None means the data set's levels; images from elsewhere have None,
        and binary models that draw pixel means."""
        levels = self.trained.images.levels if self.trained else None
        return None if levels == 2 and not np.isin(self.images.images, (0, 255)).all() else levels

    @property
    def layout(self) -> str:
        """A key of the classes or clusters that are sampled evenly; "" for random samples."""
        return self.strata.name + self.strata.key if self.strata else ""

    def __len__(self) -> int:
        return len(self.images)


def sampled(trained: Trained, pack: Pack, job: BenchJob, folder: Path, log: Log) -> Contestant:
    """`job.n` samples of a model, which are also written to a file. Those of a conditional model have the
    classes of the training images, in the same proportions. In a league, samples of an earlier evaluation are
    reused if the drawing code has not changed. A model draws only `job.few` if more would take longer than
    `job.patience`."""
    owner, strata, labels = trained.run.owner, strata_of(trained, pack), sample_labels(trained, pack, job.n)
    # differs between variants
    facts = json.dumps([trained.step, dict(trained.part.sample), job.n, job.seed, job.drawing], default=str)
    path = Run(folder).samples_folder / f"{owner.id}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.npz"
    earlier = sorted(owner.path.glob(f"bench/*/{path.parent.name}/{path.name}")) if job.drawing else []
    notes: list[str] = []
    reused = next(filter(None, (read_samples(file, trained, job.n) for file in earlier)), None)
    if ranks.agree(reused is not None):
        assert reused is not None
        images, seconds, notes = reused
    else:
        with log.bar(f"sample {trained.title}") as progress:
            images, seconds = patient_draw(trained, job, labels, progress, notes)
    if not ranks.rank():
        arrays = {"samples": images.transpose(0, 2, 3, 1), "seconds": np.float64(seconds)}
        files.write_arrays(path, arrays | {"notes": np.array(notes, str)})
    if (n := len(images)) < job.n:
        notes.append(f"`{trained.title}` drew only {n:,} samples, as {job.n:,} would take too long")
    image_set = ImageSet(images, None if labels is None else labels[:n].numpy())
    title = trained.title_of_samples
    return Contestant(title, image_set, str(owner.path), trained, seconds, str(path), notes, strata=strata)


def read_samples(path: Path, trained: Trained, most: int) -> tuple[np.ndarray, float, list[str]] | None:
    """The samples uint8 [n, C, H, W], seconds and notes in a file of an earlier evaluation, with n at most
    `most`. None if it is damaged."""
    channels, *sides = trained.images.shape
    with suppress(MissingError), files.reading(path):
        arrays = files.read_arrays(path, "samples", "seconds")
        samples, seconds = arrays["samples"], float(arrays["seconds"])
        n, *shape = samples.shape
        if samples.dtype == np.uint8 and 0 < n <= most and shape == [*sides, channels] and seconds > 0:
            return samples.transpose(0, 3, 1, 2), seconds, list(map(str, arrays.get("notes", ())))
    return None


def patient_draw(
    trained: Trained, job: BenchJob, labels: Tensor | None, progress: Progress, notes: list[str]
) -> tuple[np.ndarray, float]:
    """`job.n` samples, or only `job.few` if `job.patience` demands it, and the seconds that they took."""
    n, few = job.n, job.n if job.patience is None else min(job.few, job.n)
    since = clock(trained.device, "cpu")
    images, seconds = timed_draw(trained, few, job.seed, labels, progress, notes)
    took = clock(trained.device, "cpu") - since
    if few == n or ranks.agree(took * n / few > (job.patience or 0.0)):
        return images, seconds
    notes.clear()
    return timed_draw(trained, n, job.seed, labels, progress, notes)


def timed_draw(
    trained: Trained, n: int, seed: int, labels: Tensor | None, progress: Progress, notes: list[str]
) -> tuple[np.ndarray, float]:
    since, first_labels = time.perf_counter(), None if labels is None else labels[:n]
    images = draw(trained, n, seed=seed, labels=first_labels, progress=progress, warn=notes.append)
    synchronise(trained.device)
    return images, time.perf_counter() - since


def strata_of(trained: Trained, pack: Pack) -> Strata | None:
    """The classes or clusters that a model samples evenly; None for random samples."""
    if getattr(trained.model, "clusters", None) is not None and trained.values is None:
        return by_cluster(trained)
    labels = pack.labels("train")
    if not trained.model.conditional or labels is None or labels.ndim > 1:
        return None
    return by_label(labels, len(pack.meta.classes))


def sample_labels(trained: Trained, pack: Pack, n: int) -> Tensor | None:
    """The labels of n samples of a conditional model: classes in the proportions of the training images,
    approximately also among the first samples. For a multi-label set, the labels of random training
    images."""
    labels = pack.labels("train") if trained.model.conditional else None
    if labels is None:
        return None
    if pack.meta.multilabel:
        rows = np.random.default_rng(0).permutation(len(labels))
        return torch.from_numpy(np.asarray(labels[np.resize(rows, n)])).float()
    ends = np.cumsum(np.bincount(labels, minlength=len(pack.meta.classes))) / len(labels)
    # Kronecker's sequence of √2, as clusters follow that of the golden ratio
    return torch.from_numpy(np.searchsorted(ends, (0.5 + np.arange(n) * 2**0.5) % 1, side="right"))


def read(name: str, pack: Pack, form: PackOptions, n: int, log: Log) -> Contestant:
    """At most n images of a folder, archive, npz file or data set, in the form of the other contestants."""
    source = locate(name)
    images_pack = open_pack(source, **form, foreign=True, say=log.info)
    total = images_pack.meta.counts["test"]
    if total < MIN_IMAGES:
        raise UsageError(f"`{name}` contains {total} images", hint=f"give at least {MIN_IMAGES} images")
    channels, height, width = images_pack.meta.shape
    text = f"read as {total:,} {'grey' if channels == 1 else 'colour'} images of {width}×{height}"
    if images_pack.meta.resized and (before := facts_of(source)):
        text += f", resized from {before.width}×{before.height}"
    if images_pack.meta.source_channels != channels:
        text += ", converted to grey" if channels == 1 else ", converted to RGB"
    if total > n:
        text += f"; {n:,} of them are compared"
    elif total < n:
        text += f"; fewer than the {n:,} of `-n`, so its floor is for {total:,} samples"
    labels = labels_in(pack, images_pack)
    if pack.meta.classes and images_pack.meta.classes and labels is None:
        text += f"; their labels are not used, because the classes are not those of `{pack.meta.reference}`"
    images = ImageSet(images_pack.images("test"), labels).first(n)
    images = ImageSet(images.images[:], images.labels)
    notes = [f"`{source.shown}`: {note}" for note in (text, *images_pack.meta.notes)]
    return Contestant(Path(source.reference).name, images, source.reference, notes=notes)


def labels_in(pack: Pack, images: Pack) -> np.ndarray | None:
    """The labels of images as class numbers of a set, [N]. Their classes are names of the set's classes, or
    all numbers of them. None without labels, or for other classes."""
    labels, numbers = images.labels("test"), tuple(map(str, range(len(pack.meta.classes))))
    if labels is None or labels.ndim > 1 or pack.meta.multilabel:
        return None
    for classes in (pack.meta.classes, numbers):
        if set(images.meta.classes) <= set(classes):
            return np.array([classes.index(name) for name in images.meta.classes])[labels]
    return None


def common_form(models: list[Trained], pack: Pack | None = None) -> PackOptions:
    """The form of the images of all runs, or of the data set if there are no runs."""
    if not models:
        channels, *sides = pack.meta.shape if pack else (None,)
        return PackOptions(size=as_size(*sides) if sides else None, channels=channels, fit="crop", patch=None)
    first, *rest = models
    for run in rest:
        size, first_size = by_sides(run.images.shape), by_sides(first.images.shape)
        why, criterion = f"`{run.run.id}` has images of {size}, but `{first.run.id}` of {first_size}", "size"
        if run.images.shape == first.images.shape:
            fit = f"`{run.run.id}` was trained with `data.fit: {run.part.data.fit}`"
            why, criterion = f"{fit}, but `{first.run.id}` with `{first.part.data.fit}`", "fit"
        if run.form != first.form:
            hint = advice(f"run {{}} once for each {criterion}", gz("bench"))
            raise UsageError(f"{why}: their metrics are not comparable", hint=hint)
    return first.form


def tell_apart(contestants: list[Contestant]) -> None:
    """Renames contestants that share a name to their alias, id or a longer part of their path. Names that are
    still equal get numbers."""
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
    """The model with a sampler variant of `BenchJob.variants`."""
    options = dict(variant.get("sample", {}))
    if "calls" in variant:
        options["steps"] = steps_for(trained, variant["calls"])
    return replace(trained, part=replace(trained.part, sample={**trained.part.sample, **options}))


def steps_for(trained: Trained, calls: int) -> int | None:
    """The largest number of `steps` (at least 1) of the model's sampler that takes at most `calls` network
    calls; None for a sampler without steps. Calls are linear in the steps s (Euler s, midpoint 2 s, Heun 2 s
    − 1), so two counts determine them."""
    if "steps" not in flat_defaults(trained.model.sample):
        return None
    calls_of_2, calls_of_4 = count_calls(trained, {"steps": 2}), count_calls(trained, {"steps": 4})
    slope = (calls_of_4 - calls_of_2) / 2
    return max(1, int(2 + (calls - calls_of_2) / slope) if slope > 0 else calls)
