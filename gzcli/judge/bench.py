"""`gz bench`: trained models and images from anywhere side by side on one data set, by image quality,
likelihood, class balance and speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.jobs import BenchJob
from gzcli.data.packs.open import check_unchanged, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.engine.log import Log
from gzcli.engine.pictures import sample_rows
from gzcli.engine.sheets import Row, sheet
from gzcli.engine.trained import load_trained
from gzcli.judge.contestants import Contestant, common_form, count_calls, read, sampled, tell_apart, varied
from gzcli.judge.images import treatment
from gzcli.judge.judge import Judge, json_figures
from gzcli.metrics import pretrained
from gzcli.metrics.interval import subset
from gzcli.metrics.manifold import nearest
from gzcli.metrics.metric import column_of, metrics
from gzcli.store import files
from gzcli.store.png import save_png
from gzcli.store.runs import Run

SHOWN = 16  # images of a contestant in the picture of all
COPIES = 10  # samples of a contestant in the picture of those nearest to a training image
GIVEN_LABELS = "columns `|y` are of log p(x | y), the label given: not to be compared with those of log p(x)"
MARGINAL = "log p(x) of a conditional model is log Σ p(y) p(x | y), classes as frequent as in training"
VERSIONS = ("gzcli", "torch", "torch-fidelity", "numpy", "scikit-learn")


def run(job: BenchJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes samples, `bench.json` and `bench.png` into `folder`, and `neighbours.png` if `memory` is among
    the metrics. Rank 0 alone compares: it returns the JSON of `gz bench`, the others {}.

    `job.n` samples of each model, and of each set of images from elsewhere as many if there are, are compared
    with the real images of the split. As a floor, as many other real images are compared with them too. All
    runs must have images of one size and fit, to which the other images are brought. A run with other grey
    levels than the data set has columns of its own (`bpd@32`); one of binary images has `nats` and no `fd`.
    """
    choose(job.metrics)
    variants = job.variants or ({},) * len(job.runs)
    models = []
    for path, variant in zip(job.runs, variants, strict=True):
        weights = variant.get("checkpoint", job.checkpoint)
        models.append(varied(load_trained(Run(Path(path)), device, weights, job.precision), variant))
    pack = open_pack(job.data, **common_form(models), say=log.info)
    for trained in models:
        check_unchanged(trained.run.owner.path, pack.meta)
    judge = Judge(pack, choose(job.metrics, pack), job, device, log)
    contestants = [sampled(trained, pack, job, folder, log) for trained in models]
    for trained, one, variant in zip(models, contestants, variants, strict=True):
        since = time.monotonic()
        one.figures = judge.of_model(one, sampler_only=bool(variant.get("quick")))
        if job.variants and not ranks.rank():
            one.facts["calls"] = count_calls(trained)
        one.facts["seconds"] = time.monotonic() - since + (one.seconds or 0.0)
    contestants += [read(what, pack, common_form(models, pack), job.n, log) for what in job.images]
    tell_apart(contestants)
    rank, processes = ranks.rank(), ranks.world()
    judge.prepare(contestants)
    if rank:
        return {}
    with ranks.alone():
        return compared(job, folder, judge, contestants, processes)


def compared(
    job: BenchJob, folder: Path, judge: Judge, contestants: Sequence[Contestant], processes: int
) -> dict[str, Any]:
    """The JSON of `gz bench`, whose files are written."""
    rows, lines = [], []
    for one in contestants:
        rows.append(row_of(one, judge))
        figures, images = brief(rows[-1]["metrics"]), one.images.images
        judge.say(f"{one.name}: {figures}")
        # images of a folder often lie in the order of their classes
        order = np.arange(len(images)) if one.trained else np.random.default_rng(0).permutation(len(images))
        lines.append((f"{one.name}   {figures}", images[order[:SHOWN]]))
    floors = {n: judge.floor(n) for n in dict.fromkeys(map(len, contestants))}
    floors = dict(sorted(floors.items(), reverse=True))
    floor = floors[max(floors)]
    if job.export_stats:
        judge.write_stats(Path(job.export_stats))
    picture, neighbours = folder / "bench.png", folder / "neighbours.png"
    real = judge.real.reference(None).images
    of_real = brief({f"{name} (floor)": value.value for name, value in floor.items()})
    title = f"real images of {judge.pack.meta.name}   {of_real}"
    sample_rows(picture, [*lines, (title, real[subset(len(real), SHOWN)])])
    if judge.remembers:
        save_png(neighbours, copies(contestants, judge))
    every = [*(row["metrics"] for row in rows), *floors.values()]
    result = {
        "data": judge.pack.meta.name,
        "rows": rows,
        **json_figures("floor", floor),
        "floors": [
            {"n": n, "images": judge.floor_size(n), "draws": judge.floor_draws[n]}
            | json_figures("metrics", values)
            for n, values in floors.items()
        ],
        "directions": {name: column_of(name).better for part in every for name in part},
        "biased": {str(n): judge.biased(n) for n in floors},
        "provenance": provenance(judge, job, processes),
        "notes": notes(contestants, rows, judge, list(floors)),
        "picture": str(picture),
        "neighbours": str(neighbours) if judge.remembers else None,
        "stats": job.export_stats,
    }
    files.write_json(Run(folder).bench_file, result)
    return result


def choose(names: Sequence[str] | None, pack: Pack | None = None) -> list[str]:
    """The metrics to compute; `nats` means `bpd`. None: those that need no fetched weights and take little
    time, by the data set. Raises UsageError for an unknown one."""
    known = metrics()
    if names is None:
        colour = pack is not None and pack.meta.shape[0] == 3 and pretrained.is_installed()
        ways = ("always", "colour") if colour else ("always",)
        return [name for way in ways for name, metric in known.items() if metric.default == way]
    names = ["bpd" if name == "nats" else name for name in names]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"metrics: {', '.join(known)}"
            raise UsageError(f"there is no metric `{name}`", hint=hint)
    return list(dict.fromkeys(names))


def row_of(one: Contestant, judge: Judge) -> dict[str, Any]:
    since, trained = time.monotonic(), one.trained
    figures = judge(one.images, one.levels) | one.figures
    row: dict[str, Any] = {"name": one.name, "model": None, "run": None, "step": None, "params": None}
    if trained:
        row |= {"model": trained.name, "run": trained.run.owner.id, "step": trained.step}
        row["params"] = sum(p.numel() for p in trained.model.parameters())
    return {
        **row,
        "path": one.path,
        "samples": one.file,
        "n": len(one),
        **json_figures("metrics", figures),
        "sample": dict(trained.part.sample) if trained else {},
        "precision": trained.precision if trained else None,
        "conditional": one.images.labels is not None,
        "levels": one.levels,
        **one.facts,
        "seconds": round(one.facts.get("seconds", 0.0) + time.monotonic() - since, 1),
    }


def brief(values: Mapping[str, float]) -> str:
    return "   ".join(f"{k} {v:.4g}" for k, v in values.items() if k.startswith(("fd", "bpd", "nats")))


def copies(contestants: Sequence[Contestant], judge: Judge) -> np.ndarray:
    """A sheet [H, W, C]: of each contestant, and of the test images, those nearest to a training image, above
    this and above the one that is nearest by pixels."""
    train, space, blocks = judge.train_images, judge.memory_space, []
    sets = {one.name: one.images for one in contestants} | {"test images": judge.real.of("test")}
    for name, images in sets.items():
        distances, places = nearest(images.features(space), train.features(space))
        rows = np.argsort(distances[:, 0], kind="stable")[:COPIES]
        shown = np.asarray(images.images[np.sort(rows)])[np.argsort(np.argsort(rows))]
        by_pixels = nearest(shown, np.asarray(train.images[:]))[1][:, 0]
        neighbours = {"nearest by features": places[rows, 0], "nearest by pixels": by_pixels}
        of_train = [Row(kind, [train.images[int(i)] for i in index]) for kind, index in neighbours.items()]
        blocks.append([Row(name, list(shown)), *of_train])
    return sheet(blocks)


def notes(
    contestants: Sequence[Contestant], rows: Sequence[Mapping[str, Any]], judge: Judge, sizes: Sequence[int]
) -> list[str]:
    """Notes without which the figures of contestants of these numbers of images could be misread."""
    binary = any(one.levels == 2 for one in contestants)
    lines = [line for n in sizes for line in judge.warnings(n)]
    lines += treatment({judge.pack.meta.name: judge.pack}, 2 if binary else None)
    lines += [note for one in contestants for note in one.notes]
    if len(sizes) > 1:
        counts = ", ".join(f"{n:,}" for n in sizes)
        lines.append(f"the contestants have {counts} images: compare each with the floor of its own number")
    if stats := judge.stats:
        lines.append(f"`{stats.metric.name}` is the distance to the mean and covariance in `{stats.file}`")
    for n in sizes:
        if (real := judge.floor_size(n)) < n:
            lines.append(f"the floor of {n:,} samples is of {real:,} real images, as there are no more")
    unlabelled = [one.name for one in contestants if one.images.labels is None]
    if unlabelled and any(metric.name == "worth" for metric in judge.metrics):
        lines.append(f"`worth` needs labels, which there are none of with `{'`, `'.join(unlabelled)}`")
    likelihoods = [row["likelihood"] for row in rows if "likelihood" in row]
    if any(likelihood["given_labels"] for likelihood in likelihoods):
        lines.append(GIVEN_LABELS)
    if any(likelihood["marginal"] for likelihood in likelihoods):
        lines.append(MARGINAL)
    return list(dict.fromkeys(lines))


def provenance(judge: Judge, job: BenchJob, processes: int) -> dict[str, Any]:
    meta = judge.pack.meta
    return {
        "n_real": len(judge.real.reference(None)),
        "n_fake": job.n,
        "split": job.split,
        "shape": list(meta.shape),
        "levels": meta.levels,
        "resized": meta.resized,
        "digest": meta.digest,
        "seed": job.seed,
        "checkpoint": job.checkpoint,
        "processes": processes,
        **judge.provenance(),
        "versions": {name: version(name) for name in VERSIONS},
    }
