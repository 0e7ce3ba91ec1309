"""`gz ood`: scores of in-distribution and foreign test images, and how well each score tells them apart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data import same
from gzcli.data.benchmarks import find as find_benchmark
from gzcli.data.open import open_named
from gzcli.data.pack import Pack
from gzcli.engine.budget import Images, affordable, subset, timed
from gzcli.engine.converged import gap_line, solver_gap
from gzcli.engine.log import Log
from gzcli.engine.ood_table import compare, grouped, notes, short_names, write_scores
from gzcli.engine.pictures import histograms
from gzcli.engine.scores import BANKS, OVER_NLL, Scorer, choose
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import DivergedError, MissingError, UsageError
from gzcli.metrics import baselines
from gzcli.metrics.features import lenet
from gzcli.models.nn import LPIPS
from gzcli.store import files
from gzcli.store.runs import Run, find
from gzcli.types import Batch

BATCH = defaultdict(lambda: 128, cpu=64, cuda=256)
TRIAL = 16  # images on which the scores are timed
FIT = 500  # held-out images that statistics are of, whatever `-n`: as many as the smallest budget pays for
BANK = 10_000  # training images that neighbours are looked for among, at most


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `scores.csv`, `histograms.png` and `ood.json` into `folder`.

    job: {run, checkpoint, in, out, scores, background, benchmark, n, full, seed, options}. The
    in-distribution images are the test split of `in`; those of `out` the test splits of known sets and, of
    the user's own, the test split or all. They pass through the run's size, channels and grey levels. Each
    process scores its share. Returns the JSON of `gz ood`, on ranks other than 0 nothing. Raises
    DivergedError for scores that are not finite.
    """
    began = time.monotonic()
    trained = load_trained(Run(Path(job["run"])), device, job["checkpoint"])
    c, size, _ = trained.images.shape
    home = open_named(job["in"], size=size, channels=c, say=log.info)
    same.hold(trained.run.owner.path, home.meta)
    packs = {name: open_named(name, size=size, channels=c, foreign=True, say=log.info) for name in job["out"]}
    check_sets(home, packs)
    settings = trained.part.ood
    behind = job.get("background") or settings.background
    names = choose(trained, job["scores"])
    background = load_trained(find(behind), device) if behind and "ratio" in names else None
    options = {**settings.options, **job["options"]}
    scorer = Scorer(trained, names, background=background, options=options, seed=job["seed"])
    if wrong := sorted(set(job["options"]) & set(scorer.unused)):
        raise UsageError(f"none of the scores {', '.join(names)} takes `{wrong[0]}`")

    asked = {"recon", "ensemble"} & set(names) and not options.get("pixels")
    seen_by = perceive(trained, home, log) if asked else None
    n = fit(scorer, home, job, settings.budget, 1 + len(packs), log)
    if (
        gap := solver_gap(trained, trial_batch(trained, home, job["seed"]))
        if set(names) & set(OVER_NLL)
        else None
    ):
        log.info(gap_line(gap))
    tables: dict[str, dict[str, Any]] = {}
    for name, pack in [(job["in"], home), *packs.items()]:
        tables[name] = score_set(scorer, pack, n, log)
    if ranks.rank():
        return {}
    add_baselines(tables, home, packs)

    benchmark = find_benchmark(job["benchmark"]) if job.get("benchmark") else None
    results = compare(tables, packs, names, trapezoid=benchmark is not None)
    if benchmark:
        results = grouped(results, benchmark)
    short = short_names(list(tables))
    told = [row | {"out": short.get(row["out"], row["out"])} for row in results]
    write_scores(folder / "scores.csv", tables, job["in"])
    histograms(
        folder / "histograms.png",
        {short[name]: table for name, table in tables.items()},
        short[job["in"]],
        told,
    )
    result = {
        "run": trained.run.owner.id,
        "in": job["in"],
        "results": results,
        "notes": notes(
            told,
            {short[name]: pack for name, pack in {job["in"]: home, **packs}.items()},
            trained.images.levels,
            benchmark,
        ),
        "names": short,
        "processes": ranks.world(),
        "positive": "out",
        "benchmark": benchmark and benchmark.name,
        "seed": job["seed"],
        "checkpoint": job["checkpoint"],
        "step": trained.step,
        "levels": trained.images.levels,
        "shape": list(trained.images.shape),
        "perceptual": seen_by,
        "likelihood": trained.model.likelihood,
        "background": background and background.run.owner.id,
        "solver_gap": gap,
        "coders": sorted(baselines.coders()),
        "seconds": round(time.monotonic() - began, 1),
        "files": {"scores": str(folder / "scores.csv"), "histograms": str(folder / "histograms.png")},
    }
    files.write_json(folder / "ood.json", result)
    return result


def perceive(trained: Trained, home: Pack, log: Log) -> str | None:
    """Gives a model whose `recon` asks for it a distance of images beside that of pixels: LPIPS where its
    weights are at hand, else that of the features of a LeNet of the set. Returns which."""
    if not hasattr(trained.model, "perceptual") or trained.space is not None:
        return None
    try:
        trained.model.perceptual = LPIPS.from_files().to(trained.device).forward
        return "lpips"
    except MissingError:
        judge = lenet(home, device=trained.device, say=log.info)
        trained.model.perceptual = judge.distance
        return f"lenet {judge.hash}"


def check_sets(home: Pack, packs: Mapping[str, Pack]) -> None:
    for name, pack in packs.items():
        if pack.meta.digest == home.meta.digest or pack.meta.title == home.meta.title:
            raise UsageError(
                f"`{name}` is both the in- and the out-of-distribution set", hint="`--out` takes other sets"
            )
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.name}` has no test images")


def fit(scorer: Scorer, home: Pack, job: Mapping[str, Any], budget: float, sets: int, log: Log) -> int | None:
    """Fits the scores on fixed numbers of held-out and, for banks, of training images. Returns how many
    images of each of `sets` sets are to be scored: the job's n, else None for all, or what is left of
    `budget` seconds pays for."""
    since, trained, counts = time.perf_counter(), scorer.trained, home.meta.counts
    split = held_out_split(home)
    how = {"size": BATCH[trained.device.type], "seed": job["seed"]}
    held_out = Images.of(trained, home, split, subset(counts[split], FIT), **how)
    train = Images.of(trained, home, "train", subset(counts["train"], BANK), **how)
    told = {name: train if name in BANKS else held_out for name in scorer.fits()}
    if told or {"typicality", "ensemble"} & set(scorer.names):
        many = max([len(images.index) for images in told.values()] or [len(held_out.index)])
        log.info(f"fitting the scores on {many:,} images of `{home.meta.name}`")
    scorer.fit(held_out, train)
    if job["n"] is not None or job["full"]:
        return job["n"]
    left = budget - (time.perf_counter() - since)
    return ranks.agree(afford(scorer, trial_batch(trained, home, job["seed"]), left, sets, log))


def held_out_split(home: Pack) -> str:
    """Validation; a tiny set has none."""
    return "val" if home.meta.counts["val"] else "train"


def trial_batch(trained: Trained, home: Pack, seed: int) -> Batch:
    """The first held-out images, on which scores are timed and likelihoods by an ODE held against finer
    ones."""
    split = held_out_split(home)
    index = subset(home.meta.counts[split], FIT)[:TRIAL]
    return next(iter(Images.of(trained, home, split, index, size=TRIAL, seed=seed)))


def afford(scorer: Scorer, trial: Batch, budget: float, sets: int, log: Log) -> int:
    """Images of each of `sets` sets that `budget` seconds pay for, timed on a first batch; processes share
    them."""
    seconds = timed(lambda: scorer(trial), trial.x.device) / len(trial) / ranks.world()
    n = affordable(seconds, budget, sets)
    if (expected := seconds * sets * n) > 1.5 * budget:
        log.warn(
            f"the scores need about {expected / 60:.0f} minutes even for {n} images a set; `-n` takes fewer"
        )
    return n


def score_set(scorer: Scorer, pack: Pack, n: int | None, log: Log) -> dict[str, Any]:
    """Of n test images, or all: index [N], float64 [N] a score, and `names` of all files of the split, or
    None."""
    trained, total = scorer.trained, pack.meta.counts["test"]
    size = BATCH[trained.device.type]
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

        return {"index": images.index, "names": pack.names("test")} | ranks.over(images, work)


def add_baselines(tables: Mapping[str, dict[str, Any]], home: Pack, packs: Mapping[str, Pack]) -> None:
    """PNG size, pixel mean and k-NN beside the scores: of each set's own bytes, whatever levels the model
    sees."""
    train = home.images("train")
    index = subset(len(train), BANK if train[:1].size <= 4096 else BANK // 4)
    sides = zip(tables.values(), [home, *packs.values()], strict=True)
    images = [pack.images("test")[table["index"]] for table, pack in sides]
    distances = baselines.knn_pca(train[index], images)
    for table, seen, distance in zip(tables.values(), images, distances, strict=True):
        table |= {"png": baselines.png_size(seen), "mean": baselines.pixel_mean(seen), "knn_pixels": distance}
