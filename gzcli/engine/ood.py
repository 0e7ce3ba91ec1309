"""`gz ood`: scores of in-distribution and foreign test images, and how well each score tells them apart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data import same
from gzcli.data.benchmarks import find as find_benchmark
from gzcli.data.open import open_pack
from gzcli.data.pack import Pack
from gzcli.engine.converged import solver_gap
from gzcli.engine.images import (
    BANK,
    FIT,
    Images,
    affordable,
    fitting_images,
    held_out_split,
    subset,
    timed,
)
from gzcli.engine.log import Log
from gzcli.engine.ood_table import ScoreTable, compare, notes, short_names, with_group_means, write_scores
from gzcli.engine.pictures import histograms
from gzcli.engine.scores import Scorer, choose
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import DivergedError, MissingError, UsageError
from gzcli.jobs import OodJob
from gzcli.metrics import baselines
from gzcli.metrics.features import lenet
from gzcli.metrics.likelihood_scores import read
from gzcli.models.nn import LPIPS
from gzcli.store import files
from gzcli.store.runs import Run, find
from gzcli.types import Batch

BATCH_SIZE = defaultdict(lambda: 128, cpu=64, cuda=256)  # images that are scored together, by device
TRIAL = 16  # held-out images on which the scores are timed


def run(job: OodJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `scores.csv`, `histograms.png` and `ood.json` into `folder`.

    The in-distribution images are the test split of `job.ins`. The foreign ones are the test splits of known
    sets, and the test split or all images of the user's own sets. Both are brought to the run's size,
    channels and grey levels. Each process scores its share. Returns the JSON of `gz ood` on rank 0, and {} on
    others.

    Raises DivergedError for scores that are not finite.
    """
    began = time.monotonic()
    trained = load_trained(Run(Path(job.run)), device, job.checkpoint, job.precision)
    home, packs = open_sets(trained, job, log)
    scorer = make_scorer(trained, job, device)
    compares = set(trained.model.perceptual_scores) & set(scorer.own())
    distance = perceive(trained, home, log) if compares and not scorer.options.get("pixels") else None
    n = fit(scorer, home, job, 1 + len(packs), log)
    gap = solver_gap(trained, trial_batch(trained, home, job.seed)) if read(scorer.names, "nll") else None
    if gap:
        log.info(str(gap))
    sets = {job.ins: home, **packs}
    tables = {name: score_set(scorer, pack, n, log) for name, pack in sets.items()}
    if ranks.rank():
        return {}
    add_baselines(tables, sets, home)

    benchmark = find_benchmark(job.benchmark) if job.benchmark else None
    results = compare(tables, packs, scorer.names, trapezoid=benchmark is not None)
    if benchmark:
        results = with_group_means(results, benchmark)
    short = short_names(list(tables))
    shown = [row | {"out": short.get(row["out"], row["out"])} for row in results]
    named = {short[name]: pack for name, pack in sets.items()}
    write_scores(folder / "scores.csv", tables, job.ins)
    of_short = {short[name]: table.scores for name, table in tables.items()}
    histograms(folder / "histograms.png", of_short, short[job.ins], shown)
    result = {
        "run": trained.run.owner.id,
        "in": job.ins,
        "results": results,
        "notes": notes(shown, named, trained.images.levels, benchmark),
        "names": short,
        "processes": ranks.world(),
        "positive": "out",
        "benchmark": benchmark and benchmark.name,
        "seed": job.seed,
        "checkpoint": job.checkpoint,
        "precision": job.precision or "fp32",
        "step": trained.step,
        "levels": trained.images.levels,
        "shape": list(trained.images.shape),
        "perceptual": distance,
        "likelihood": trained.model.likelihood,
        "background": scorer.background and scorer.background.run.owner.id,
        "solver_gap": gap and asdict(gap),
        "coders": sorted(baselines.coders()),
        "seconds": round(time.monotonic() - began, 1),
        "files": {"scores": str(folder / "scores.csv"), "histograms": str(folder / "histograms.png")},
    }
    files.write_json(folder / "ood.json", result)
    return result


def open_sets(trained: Trained, job: OodJob, log: Log) -> tuple[Pack, dict[str, Pack]]:
    """The in-distribution set and the foreign ones by name, at the run's size and channels.

    Raises UsageError where one set is on both sides, or the in-distribution one has no test images.
    """
    home = open_pack(job.ins, **trained.wanted, say=log.info)
    same.check(trained.run.owner.path, home.meta)
    packs = {name: open_pack(name, **trained.wanted, foreign=True, say=log.info) for name in job.outs}
    for name, pack in packs.items():
        if pack.meta.digest == home.meta.digest or pack.meta.title == home.meta.title:
            raise UsageError(
                f"`{name}` is both the in- and the out-of-distribution set", hint="`--out` takes other sets"
            )
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.name}` has no test images")
    return home, packs


def make_scorer(trained: Trained, job: OodJob, device: torch.device) -> Scorer:
    """The scorer of the job's scores, else of the recipe's.

    Raises UsageError for an option of the job that no score takes.
    """
    section = trained.part.ood
    names = choose(trained, job.scores)
    reference = job.background or section.background
    background = None
    if reference and read(names, "background_nll"):
        background = load_trained(find(reference), device)
    options = {**section.options, **job.options}
    scorer = Scorer(trained, names, background=background, options=options, seed=job.seed)
    if wrong := sorted(set(job.options) & set(scorer.unused)):
        raise UsageError(f"none of the scores {', '.join(names)} takes `{wrong[0]}`")
    return scorer


def perceive(trained: Trained, home: Pack, log: Log) -> str | None:
    """Gives a model whose scores compare images a perceptual distance, and returns its name, else None.

    It is LPIPS where its weights are at hand, else the distance between features of the set's LeNet.
    """
    if not trained.model.perceptual_scores or trained.space is not None:
        return None
    try:
        trained.model.perceptual = LPIPS.from_files().to(trained.device).forward
        return "lpips"
    except MissingError:
        net = lenet(home, device=trained.device, say=log.info)
        trained.model.perceptual = net.distance
        return f"lenet {net.hash}"


def fit(scorer: Scorer, home: Pack, job: OodJob, sets: int, log: Log) -> int | None:
    """Fits the scores on fixed numbers of held-out images and, where a score says so, of training images.

    Returns how many images of each set are to be scored: the job's n; None for all; else as many as the rest
    of the recipe's budget pays for.

    scorer: the scores.
    home: the in-distribution set.
    sets: number of all sets.
    """
    since, trained = time.perf_counter(), scorer.trained
    held_out, train = fitting_images(trained, home, size=BATCH_SIZE[trained.device.type], seed=job.seed)
    if scorer.is_fitted():
        on_train = set(trained.model.fitted_on_train)
        kinds = [train if name in on_train else held_out for name in scorer.fits()] or [held_out]
        many = max(len(images.index) for images in kinds)
        log.info(f"fitting the scores on {many:,} images of `{home.meta.name}`")
    scorer.fit(held_out, train)
    if job.n is not None or job.full:
        return job.n
    left = trained.part.ood.budget - (time.perf_counter() - since)
    return ranks.agree(afford(scorer, trial_batch(trained, home, job.seed), left, sets, log))


def trial_batch(trained: Trained, home: Pack, seed: int) -> Batch:
    """The first held-out images, on which scores are timed and the likelihood by an ODE is checked."""
    split = held_out_split(home)
    index = subset(home.meta.counts[split], FIT)[:TRIAL]
    return next(iter(Images.of(trained, home, split, index, size=TRIAL, seed=seed)))


def afford(scorer: Scorer, trial: Batch, budget: float, sets: int, log: Log) -> int:
    """How many images of each set can be scored within a budget, by all processes together.

    trial: a batch, whose scores are timed.
    budget: seconds for all sets.
    sets: number of all sets.
    """
    seconds = timed(lambda: scorer(trial), trial.x.device) / len(trial) / ranks.world()
    n = affordable(seconds, budget, sets)
    if (expected := seconds * sets * n) > 1.5 * budget:
        log.warn(
            f"the scores need about {expected / 60:.0f} minutes even for {n} images a set; `-n` takes fewer"
        )
    return n


def score_set(scorer: Scorer, pack: Pack, n: int | None, log: Log) -> ScoreTable:
    """The scores of a set's test images.

    n: number of test images; None: all.
    """
    trained, total = scorer.trained, pack.meta.counts["test"]
    size = BATCH_SIZE[trained.device.type]
    images = Images.of(trained, pack, "test", subset(total, n or total), size=size, seed=scorer.seed)
    done, share = 0, len(images.index) / ranks.world()
    with log.bar(f"score {pack.meta.name}") as progress:

        def work(batch: Batch) -> dict[str, np.ndarray]:
            nonlocal done
            try:
                found = scorer(batch)
            except DivergedError as e:
                raise DivergedError(f"{e.message} of `{pack.meta.name}`", hint=e.hint) from e
            done += len(batch)
            progress(done, share)
            return found

        return ScoreTable(images.index, pack.names("test"), ranks.over(images, work))


def add_baselines(tables: Mapping[str, ScoreTable], sets: Mapping[str, Pack], home: Pack) -> None:
    """Adds PNG size, pixel mean and k-NN distance to the tables. They are computed of each set's own bytes,
    whatever grey levels the model has."""
    train = home.images("train")
    index = subset(len(train), BANK if train[:1].size <= 4096 else BANK // 4)
    images = [sets[name].images("test")[table.index] for name, table in tables.items()]
    distances = baselines.knn_pca(train[index], images)
    for table, seen, distance in zip(tables.values(), images, distances, strict=True):
        table.scores |= {"png": baselines.png_size(seen), "mean": baselines.pixel_mean(seen)}
        table.scores["knn_pixels"] = distance
