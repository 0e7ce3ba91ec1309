"""`gz bench`: trained models side by side on one data set, by image quality, likelihood, class balance and
speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data import same
from gzcli.data.open import open_pack
from gzcli.data.pack import Pack
from gzcli.data.wanted import Wanted
from gzcli.engine.calls import count_calls, steps_for
from gzcli.engine.devices import synchronise
from gzcli.engine.images import subset, treatment
from gzcli.engine.likelihood import images_of_test, likelihood
from gzcli.engine.log import Log
from gzcli.engine.pictures import sample_rows
from gzcli.engine.quality import Quality
from gzcli.engine.report import training_speed
from gzcli.engine.sampler import draw
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import UsageError, did_you_mean
from gzcli.jobs import BenchJob
from gzcli.store import files
from gzcli.store.runs import Run
from gzcli.units import sides

METRICS = ("fd", "kid_lenet", "prc_lenet", "classes", "bpd", "own", "speed", "fid", "kid", "is")
DEFAULT = ("fd", "kid_lenet", "prc_lenet", "classes", "bpd", "own", "speed")
MEASURED = 10_000  # test images at most of which a model's own figures are computed


def run(job: BenchJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes samples, `bench.json` and `bench.png` into `folder`.

    `job.n` samples of each model are compared with the whole test split. As a floor, n training images are
    compared with it too. All runs must have images of one size and fit. A run with other grey levels than
    the data set has columns of its own (`bpd@32`); one of binary images has `nats` and no `fd`. The
    likelihood of an image given its label is the column `bpd|y`. Each process draws its share of the samples
    and of the likelihoods. Rank 0 alone compares: it returns the JSON of `gz bench`, the others return {}.

    Raises UsageError for runs of different sizes or an unknown metric, MissingError for absent weights.
    """
    metrics = choose(job.metrics)
    variants = job.variants or ({},) * len(job.runs)
    models = [load(job, path, how, device) for path, how in zip(job.runs, variants, strict=True)]
    pack = open_pack(job.data, **same_form(models), say=log.info)
    for trained in models:
        same.check(trained.run.owner.path, pack.meta)
    quality = Quality(pack, metrics, job.n, device=device, weights=job.weights, say=log.info)
    rows, pictures = [], []
    for trained, how in zip(models, variants, strict=True):
        own = [name for name in metrics if not (how.get("quick") and name in ("bpd", "own"))]
        row, samples = measure(trained, pack, quality, own, job, folder, log)
        if job.variants:
            row["calls"] = count_calls(trained)
        if ranks.rank():
            continue
        shown = "   ".join(
            f"{k} {v:.4g}" for k, v in row["metrics"].items() if k.startswith(("fd", "bpd", "nats"))
        )
        log.info(f"{row['model']}: {shown}")
        rows.append(row)
        pictures.append((f"{row['model']}   {shown}", samples))
    if ranks.rank():
        return {}
    floor = quality.floor()
    real, name = pack.images("test"), pack.meta.name
    title = f"real images of {name}" + "".join(
        f"   {k} {v:.4g} (floor)" for k, v in floor.items() if k.startswith("fd")
    )
    sample_rows(folder / "bench.png", [*pictures, (title, real[subset(len(real), 16)])])
    result = {
        "data": name,
        "rows": rows,
        "floor": floor,
        "provenance": provenance(pack, quality, job),
        "notes": [*quality.warnings, *notes(models, rows, pack)],
        "picture": str(folder / "bench.png"),
    }
    files.write_json(folder / "bench.json", result)
    return result


def load(job: BenchJob, path: str, how: Mapping[str, Any], device: torch.device) -> Trained:
    """The model of a run, with the weights and the sampler that its variant asks for.

    how: the variant, as `BenchJob.variants` has it.
    """
    trained = load_trained(Run(Path(path)), device, how.get("checkpoint", job.checkpoint), job.precision)
    options = dict(how.get("sample", {}))
    if "calls" in how:
        options["steps"] = steps_for(trained, how["calls"])
    trained.part = replace(trained.part, sample={**trained.part.sample, **options})
    return trained


def notes(models: list[Trained], rows: list[dict[str, Any]], pack: Pack) -> list[str]:
    """Notes without which the figures could be misread."""
    binary = any(trained.images.levels == 2 for trained in models)
    lines = treatment({pack.meta.name: pack}, 2 if binary else None)
    likelihoods = [row["likelihood"] for row in rows if "likelihood" in row]
    if any(found["given_labels"] for found in likelihoods):
        lines.append(
            "columns `|y` are of log p(x | y), the label given: not to be compared with those of log p(x)"
        )
    if any(found["marginal"] for found in likelihoods):
        lines.append(
            "log p(x) of a conditional model is log Σ p(y) p(x | y), classes as frequent as in training"
        )
    return lines


def choose(asked: Sequence[str] | None) -> list[str]:
    """The metrics to compute; `nats` means `bpd`. Raises UsageError for an unknown one."""
    wanted = ["bpd" if name == "nats" else name for name in asked or DEFAULT]
    for name in wanted:
        if name not in METRICS:
            raise UsageError(
                f"there is no metric `{name}`",
                hint=did_you_mean(name, METRICS) or f"metrics: {', '.join(METRICS)}",
            )
    return list(dict.fromkeys(wanted))


def same_form(models: list[Trained]) -> Wanted:
    """The form of the images of all runs. Raises UsageError where they differ."""
    first = models[0]
    for other in models:
        if other.images.shape != first.images.shape:
            raise UsageError(
                f"`{other.run.id}` has images of {sides(other.images.shape)}, `{first.run.id}` of "
                f"{sides(first.images.shape)}: their figures are not comparable",
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


def measure(
    trained: Trained,
    pack: Pack,
    quality: Quality,
    metrics: Sequence[str],
    job: BenchJob,
    folder: Path,
    log: Log,
) -> tuple[dict[str, Any], np.ndarray]:
    """A model's row and its samples uint8 [n, C, H, W]."""
    since, levels = time.monotonic(), trained.images.levels
    labels = ask_labels(trained, pack, job.n)
    samples, seconds = sample(trained, labels, job, folder, log)
    row: dict[str, Any] = {"model": trained.name, "run": trained.run.owner.id, "step": trained.step}
    row["params"] = sum(p.numel() for p in trained.model.parameters())
    kind = None if trained.space else trained.model.likelihood  # latents have no likelihood of pixels
    by_default = kind in ("exact", "bound")  # one by an ODE takes long: only where metrics are named
    if "bpd" in metrics and (by_default or (kind == "ode" and job.metrics)):
        row["likelihood"] = likelihood(trained, pack, job.seed, log)
    if ranks.rank():
        return row, samples
    mark = quality.mark(levels)
    if levels == 2:
        found = quality.classes(samples, labels, levels)
    else:
        found = {key + mark: value for key, value in quality(samples, labels, levels).items()}
    if "likelihood" in row:
        found |= likelihood_columns(row["likelihood"], mark, binary=levels == 2)
    if "own" in metrics and hasattr(trained.model, "measure"):
        found |= own_figures(trained, pack, job.seed)
    if "speed" in metrics:
        found["samples_per_s"] = round(job.n / seconds, 3)
        row["train"] = training_speed(trained.run.path)
        found |= {f"train_{k}": v for k, v in row["train"].items() if k in ("tflops", "mfu")}
    row |= {
        "metrics": found,
        "sample": dict(trained.part.sample),
        "precision": trained.precision,
        "conditional": labels is not None,
        "levels": levels,
        "seconds": round(time.monotonic() - since, 1),
    }
    return row, samples


def likelihood_columns(value: dict[str, Any], mark: str, *, binary: bool) -> dict[str, float]:
    """The columns of a likelihood: that of log p(x | y) ends in `|y`, that of log p(x) is named by the unit.

    mark: what `Quality.mark` appends.
    """
    unit, mark = ("nats", "") if binary else ("bpd", mark)
    if not value["given_labels"]:
        return {unit + mark: value[unit]}
    marginal = value["marginal"]
    return {f"{unit}|y{mark}": value[unit]} | ({unit + mark: marginal[unit]} if marginal else {})


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
) -> tuple[np.ndarray, float]:
    """n samples uint8 [n, C, H, W], and the seconds that they took.

    They are kept in `folder`, in a file whose name is a hash of all that they depend on.
    """
    weights = trained.run.path / "model.safetensors"
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    options = dict(trained.part.sample)
    owner, device = trained.run.owner.id, trained.device.type
    made = [owner, trained.step, stamp, job.n, job.seed, options, device, trained.precision]
    key = hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:8]
    path = folder / "samples" / f"{owner}-{key}.npz"
    if ranks.agree(path.exists()):
        with np.load(path) as kept:
            return kept["samples"].transpose(0, 3, 1, 2), float(kept["seconds"])
    since = time.perf_counter()
    with log.bar(f"sample {trained.name}") as progress:
        images = draw(trained, job.n, seed=job.seed, labels=labels, progress=progress)
    synchronise(trained.device)
    seconds = time.perf_counter() - since
    if ranks.rank():
        return images, seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, samples=images.transpose(0, 2, 3, 1), seconds=seconds)
    return images, seconds


def own_figures(trained: Trained, pack: Pack, seed: int) -> dict[str, float]:
    """The figures that the model's `measure` finds on test images, 10,000 at most."""
    with torch.inference_mode():
        return trained.model.measure(map(trained.seen, images_of_test(trained, pack, MEASURED, seed)))


def provenance(pack: Pack, quality: Quality, job: BenchJob) -> dict[str, Any]:
    """What the figures depend on, beside the facts of each row."""
    return {
        "n_real": len(pack.images("test")),
        "n_fake": job.n,
        "split": "test",
        "shape": list(pack.meta.shape),
        "levels": pack.meta.levels,
        "resized": pack.meta.resized,
        "digest": pack.meta.digest,
        "seed": job.seed,
        "checkpoint": job.checkpoint,
        "processes": ranks.world(),
        **quality.provenance(),
        "versions": {
            name: version(name) for name in ("gzcli", "torch", "torch-fidelity", "numpy", "scikit-learn")
        },
    }
