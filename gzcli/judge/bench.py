"""`gz bench`: trained models and images from anywhere side by side on one data set, by image quality,
likelihood, class balance and speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.jobs import BenchJob
from gzcli.data.packs import same
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.engine.curves import training_speed
from gzcli.engine.log import Log
from gzcli.engine.pictures import sample_rows
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge import perceptual, statistics
from gzcli.judge.bench_notes import brief, directions, notes, provenance, told
from gzcli.judge.calls import count_calls
from gzcli.judge.contestants import Contestant, form_of, read, sampled, tell_apart
from gzcli.judge.figures import SPACES, Found
from gzcli.judge.images import subset
from gzcli.judge.judges import Judges
from gzcli.judge.likelihood import images_of_test, likelihood
from gzcli.judge.variants import quick, varied
from gzcli.metrics import lite
from gzcli.metrics.interval import Interval
from gzcli.store import files
from gzcli.store.runs import Run

METRICS = (*SPACES, "lpips", "classes", "bpd", "own", "speed", "memory", "worth")
DEFAULT = ("fd", "kid_lenet", "prc_lenet", "swd", "classes", "bpd", "own", "speed")
IN_COLOUR = ("kid_lite",)  # with these where the extra `features` is installed
MEASURED = 10_000  # test images at most of which a model's own figures are computed


def run(job: BenchJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes samples, `bench.json` and `bench.png` into `folder`, and `neighbours.png` if
    `memory` is among the metrics.

    `job.n` samples of each model, and of each set of images from elsewhere as many if there are, are compared
    with the real images of the split. As a floor, as many other real images are compared with them too. All
    runs must have images of one size and fit, to which the other images are brought. A run with other grey
    levels than the data set has columns of its own (`bpd@32`); one of binary images has `nats` and no `fd`.
    The likelihood of an image given its label is the column `bpd|y`. Each process draws its share of the
    samples, of the likelihoods and of the features. Rank 0 alone compares: it returns the JSON of `gz bench`,
    the others {}.

    Raises UsageError for runs of different sizes or an unknown metric, MissingError for absent weights.
    """
    choose(job.metrics)
    variants = job.variants or ({},) * len(job.runs)
    models = []
    for path, variant in zip(job.runs, variants, strict=True):
        weights = variant.get("checkpoint", job.checkpoint)
        models.append(varied(load_trained(Run(Path(path)), device, weights, job.precision), variant))
    pack = open_pack(job.data, **form_of(models), say=log.info)
    for trained in models:
        same.check(trained.run.owner.path, pack.meta)
    metrics = choose(job.metrics, pack)
    judges = Judges(pack, metrics, job, device, log.info)
    contestants = [sampled(trained, pack, job, folder, log) for trained in models]
    known = [
        of_model(one, pack, quick(metrics) if variant.get("quick") else metrics, job, judges, log)
        for one, variant in zip(contestants, variants, strict=True)
    ]
    contestants += [read(what, pack, form_of(models, pack), job.n, log) for what in job.images]
    tell_apart(contestants)
    rank, processes = ranks.rank(), ranks.world()
    judges.prepare(contestants)
    if rank:
        return {}
    with ranks.alone():
        return compared(job, folder, judges, contestants, known, processes, log)


def compared(
    job: BenchJob,
    folder: Path,
    judges: Judges,
    contestants: Sequence[Contestant],
    known: Sequence[dict[str, Any]],
    processes: int,
    log: Log,
) -> dict[str, Any]:
    """The JSON of `gz bench`, whose files are written."""
    quality, rows = judges.quality, []
    for i, one in enumerate(contestants):
        facts = known[i] if one.trained else {}
        rows.append(judge(one, facts, judges))
        log.info(f"{one.name}: {brief(rows[-1]['metrics'])}")
    floors = {len(one): judges.floor(len(one)) for one in contestants}
    floors = dict(sorted(floors.items(), reverse=True))
    if job.export_stats:
        real = quality.real.reference(None)
        statistics.write(Path(job.export_stats), real, quality.metrics, quality.space_of)
    pictures(folder, contestants, rows, floors, judges)
    result = {
        "data": quality.pack.meta.name,
        "rows": rows,
        **told("floor", floors[max(floors)]),
        "floors": [
            {"n": n, "images": quality.floor_size(n), "draws": quality.floor_draws[n]}
            | told("metrics", found)
            for n, found in floors.items()
        ],
        "directions": directions([*(row["metrics"] for row in rows), *floors.values()]),
        "biased": {str(n): quality.biased(n) for n in floors},
        "provenance": provenance(quality, job, processes),
        "notes": notes(contestants, rows, quality, list(floors)),
        "picture": str(folder / "bench.png"),
        "neighbours": str(folder / "neighbours.png") if judges.memory else None,
        "stats": job.export_stats,
    }
    files.write_json(folder / "bench.json", result)
    return result


def choose(asked: Sequence[str] | None, pack: Pack | None = None) -> list[str]:
    """The metrics to compute; `nats` means `bpd`. Raises UsageError for an unknown one."""
    if asked is None:
        colour = pack is not None and pack.meta.shape[0] == 3 and lite.is_installed()
        return [*DEFAULT, *(IN_COLOUR if colour else ())]
    wanted = ["bpd" if name == "nats" else name for name in asked]
    for name in wanted:
        if name not in METRICS:
            raise UsageError(
                f"there is no metric `{name}`",
                hint=did_you_mean(name, METRICS) or f"metrics: {', '.join(METRICS)}",
            )
    return list(dict.fromkeys(wanted))


def of_model(
    one: Contestant, pack: Pack, metrics: Sequence[str], job: BenchJob, judges: Judges, log: Log
) -> dict[str, Any]:
    """What is known of a row from the model alone; its `found` are figures. A call of every rank."""
    trained = one.trained
    assert trained is not None
    since = time.monotonic()
    found: Found = {}
    row: dict[str, Any] = {"found": found}
    kind = None if trained.space else trained.model.likelihood  # latents have no likelihood of pixels
    by_default = kind in ("exact", "bound")  # one by an ODE takes long: only where metrics are named
    if "bpd" in metrics and (by_default or (kind == "ode" and job.metrics)):
        row["likelihood"] = likelihood(trained, pack, job.seed, log)
    if judges.lpips and "lpips" in metrics:
        found |= perceptual.of_reconstructions(trained, pack, judges.lpips, job.seed, log)
    if ranks.rank():
        return row
    if job.variants:
        row["calls"] = count_calls(trained)
    if "own" in metrics and hasattr(trained.model, "measure"):
        found |= {name: Interval(value) for name, value in own_figures(trained, pack, job.seed).items()}
    if "speed" in metrics and one.seconds:
        found["samples_per_s"] = Interval(round(len(one) / one.seconds, 3))
        row["train"] = training_speed(trained.run.path)
        rates = {name: value for name, value in row["train"].items() if name in ("tflops", "mfu")}
        found |= {f"train_{name}": Interval(value) for name, value in rates.items()}
    row["seconds"] = time.monotonic() - since + (one.seconds or 0.0)
    return row


def judge(one: Contestant, facts: dict[str, Any], judges: Judges) -> dict[str, Any]:
    """The row of a contestant."""
    since, levels, trained = time.monotonic(), one.levels, one.trained
    found = judges(one.images, levels)
    if "likelihood" in facts:
        pixels = int(np.prod(one.images.images.shape[1:]))
        mark = judges.quality.mark(levels)
        found |= likelihood_columns(facts["likelihood"], mark, pixels, binary=levels == 2)
    found |= facts.pop("found", {})
    row: dict[str, Any] = {"name": one.name, "model": None, "run": None, "step": None, "params": None}
    if trained:
        row |= {"model": trained.name, "run": trained.run.owner.id, "step": trained.step}
        row["params"] = sum(p.numel() for p in trained.model.parameters())
    return {
        **row,
        "path": one.path,
        "samples": one.kept,
        "n": len(one),
        **told("metrics", found),
        "sample": dict(trained.part.sample) if trained else {},
        "precision": trained.precision if trained else None,
        "conditional": one.images.labels is not None,
        "levels": levels,
        **facts,
        "seconds": round(facts.get("seconds", 0.0) + time.monotonic() - since, 1),
    }


def likelihood_columns(value: dict[str, Any], mark: str, pixels: int, *, binary: bool) -> Found:
    """The columns of a likelihood: that of log p(x | y) ends in `|y`, that of log p(x) is named by the unit."""
    unit, mark = ("nats", "") if binary else ("bpd", mark)

    def of(found: Mapping[str, float]) -> Interval:
        half = 1.96 * found["se"] / (1 if binary else pixels * np.log(2))
        return Interval(found[unit], found[unit] - half, found[unit] + half)

    if not value["given_labels"]:
        return {unit + mark: of(value)}
    marginal = value["marginal"]
    return {f"{unit}|y{mark}": of(value)} | ({unit + mark: of(marginal)} if marginal else {})


def own_figures(trained: Trained, pack: Pack, seed: int) -> dict[str, float]:
    """The figures that the model's `measure` finds on test images, 10,000 at most."""
    with torch.inference_mode():
        return trained.model.measure(map(trained.seen, images_of_test(trained, pack, MEASURED, seed)))


def pictures(
    folder: Path,
    contestants: Sequence[Contestant],
    rows: Sequence[Mapping[str, Any]],
    floors: Mapping[int, Found],
    judges: Judges,
) -> None:
    """Writes `bench.png`, some images of each contestant above real ones, and `neighbours.png`."""
    quality = judges.quality
    real = quality.real.reference(None).images
    least = told("floor", floors[max(floors)])["floor"]
    of_real = brief({f"{name} (floor)": value for name, value in least.items()})
    lines = []
    for one, row in zip(contestants, rows, strict=True):
        images = one.images.images  # those of a folder often lie in the order of their classes
        shown = images if one.trained else images[np.random.default_rng(0).permutation(len(images))[:16]]
        lines.append((f"{one.name}   {brief(row['metrics'])}", shown))
    title = f"real images of {quality.pack.meta.name}   {of_real}"
    sample_rows(folder / "bench.png", [*lines, (title, real[subset(len(real), 16)])])
    if judges.memory:
        judges.memory.picture(folder / "neighbours.png", {one.name: one.images for one in contestants})
