"""What `gz bench` compares: samples that it draws of runs, and images from anywhere."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.jobs import BenchJob
from gzcli.core.sizes import as_size
from gzcli.core.units import by_sides
from gzcli.data.packs.facts import facts_of
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.packs.wanted import Wanted
from gzcli.data.sets.names import locate
from gzcli.engine.devices import synchronise
from gzcli.engine.log import Log
from gzcli.engine.sampler import draw
from gzcli.engine.trained import Trained
from gzcli.judge.image_sets import ImageSet, some
from gzcli.judge.naming import short_names
from gzcli.store import arrays

FEWEST = 50  # images of a contestant


@dataclass
class Contestant:
    """Images that are compared with real ones."""

    name: str  # in the table
    images: ImageSet  # the images, with the labels by which they were drawn
    path: str  # where they come from: a run's folder, or the images' own path
    trained: Trained | None = None  # the model that drew them; None for images from elsewhere
    seconds: float | None = None  # that drawing them took; None for images from elsewhere
    kept: str | None = None  # path of the file of what the model drew; None for images from elsewhere
    notes: list[str] = field(default_factory=list)  # what was done to them

    @property
    def levels(self) -> int | None:
        """Grey levels of the model; None for images from elsewhere, which have those of the set."""
        return self.trained.images.levels if self.trained else None

    def __len__(self) -> int:
        return len(self.images)


def sampled(trained: Trained, pack: Pack, job: BenchJob, folder: Path, log: Log) -> Contestant:
    """`job.n` samples of a model; a conditional one draws them by the labels of as many training images."""
    labels = ask_labels(trained, pack, job.n)
    images, seconds, kept = sample(trained, labels, job, folder, log)
    known = None if labels is None else labels.numpy()
    of_run = str(trained.run.owner.path)
    return Contestant(trained.name, ImageSet(images, known), of_run, trained, seconds, str(kept))


def read(what: str, pack: Pack, wanted: Wanted, n: int, log: Log) -> Contestant:
    """The images of a folder, an archive, an npz or a set, in the form of the others: n of them, or all where
    they are fewer.

    Raises UsageError for fewer than 50.
    """
    found = locate(what)
    theirs = open_pack(found, **wanted, foreign=True, say=log.info)
    total = theirs.meta.counts["test"]
    if total < FEWEST:
        raise UsageError(f"`{what}` holds {total} images", hint=f"at least {FEWEST} can be compared")
    channels, height, width = theirs.meta.shape
    kind = "grey" if channels == 1 else "colour"
    text = f"taken as {total:,} {kind} pictures of {width}×{height}"
    had = facts_of(found)
    if theirs.meta.resized and had:
        text += f", resized from {had.width}×{had.height}"
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
    name = Path(found.reference).name
    return Contestant(
        name, ImageSet(images.images[:], images.labels), found.reference, notes=[f"`{found.shown}`: {text}"]
    )


def form_of(models: list[Trained], pack: Pack | None = None) -> Wanted:
    """The form of the images of all runs; without runs that of the data set.

    Raises UsageError where they differ.
    """
    if not models:
        if pack is None:
            return Wanted(size=None, channels=None, fit="crop", patch=None)
        channels, *had = pack.meta.shape
        return Wanted(size=as_size(*had), channels=channels, fit="crop", patch=None)
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
            alike = {other.path for other in contestants if Path(other.path).name == one.name}
            one.name = short_names(alike)[one.path]
    seen: dict[str, int] = {}
    for one in contestants:
        seen[one.name] = seen.get(one.name, 0) + 1
        if seen[one.name] > 1:
            one.name = f"{one.name} ({seen[one.name]})"


def ask_labels(trained: Trained, pack: Pack, n: int) -> torch.Tensor | None:
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
    """n samples uint8 [n, C, H, W], the seconds that they took, and the file in `folder` that they are kept
    in, whose name is a hash of all that they depend on.
    """
    weights = trained.run.path / "model.safetensors"
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    options: dict[str, Any] = dict(trained.part.sample)
    owner, device = trained.run.owner.id, trained.device.type
    made = [owner, trained.step, stamp, job.n, job.seed, options, device, trained.precision]
    key = hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:8]
    path = folder / "samples" / f"{owner}-{key}.npz"

    def read(path: Path) -> tuple[np.ndarray, float, Path]:
        kept = arrays.arrays(path)
        with arrays.reading(path):
            images = kept["samples"].transpose(0, 3, 1, 2)
            if len(images) != job.n or images.dtype != np.uint8:
                raise ValueError(f"these are not {job.n} samples")
            return images, float(kept["seconds"]), path

    kept = arrays.cached(path, read, log.warn) if ranks.rank() == 0 else None
    if ranks.agree(kept is not None):
        return kept or read(path)
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
