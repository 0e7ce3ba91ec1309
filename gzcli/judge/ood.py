"""`gz ood`: scores of in-distribution and foreign test images, and how well each score tells them apart."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.jobs import OodJob
from gzcli.data.packs.open import check_unchanged, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.library import listed_images
from gzcli.data.sets.registry import find_benchmark
from gzcli.engine.log import Log
from gzcli.engine.pictures import histograms
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.images import BANK, subset
from gzcli.judge.naming import short_names
from gzcli.judge.ood_scores import Pick, score_all
from gzcli.judge.ood_table import ScoreTable, compare, notes, over_seeds, with_group_means, write_scores
from gzcli.metrics import baselines, lite
from gzcli.store import files
from gzcli.store.runs import Run


def run(job: OodJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `scores.csv`, `histograms.png` and `ood.json` into `folder`.

    The in-distribution images are the test split of `job.ins`. The foreign ones are the test splits of known
    sets, and the test split or all images of the user's own sets. Both are brought to the run's size,
    channels and grey levels. Each process scores its share. Returns the JSON of `gz ood` on rank 0, and {} on
    others.

    Raises DivergedError for scores that are not finite.
    """
    began = time.monotonic()

    def load(path: str) -> Trained:
        return load_trained(Run(Path(path)), device, job.checkpoint, job.precision)

    trained = load(job.run)
    home, packs = open_sets(trained, job, log)
    listed = listed_sets(trained, job, log)
    packs |= {name: pack for name, pack in listed.items() if name != job.ins}
    sets = {job.ins: listed.get(job.ins, home), **packs}

    def index(name: str, n: int | None) -> Any:
        total = sets[name].meta.counts["test"]
        return subset(total, n or total)

    def picks(n: int | None) -> dict[str, Pick]:
        return {name: Pick(pack, "test", index(name, n)) for name, pack in sets.items()}

    scored = score_all(trained, job, home, picks, log, load=load, sets=len(sets))
    if ranks.rank():
        return {}
    n = max(len(next(iter(table.values()))) for table in scored.seeds[0].values())
    seeds = [
        {name: ScoreTable(index(name, n), sets[name].names("test"), table) for name, table in tables.items()}
        for tables in scored.seeds
    ]
    add_baselines(seeds, sets, home, device)

    benchmark = find_benchmark(job.benchmark) if job.benchmark else None
    short = short_names(list(sets))
    found = []
    for tables in seeds:
        rows = compare(
            tables, packs, scored.names, trapezoid=benchmark is not None, bootstrap=len(seeds) == 1
        )
        found.append(with_group_means(rows, benchmark) if benchmark else rows)
    results = over_seeds(found)
    shown = [row | {"out": short.get(row["out"], row["out"])} for row in results]
    named = {short[name]: pack for name, pack in sets.items()}
    write_scores(folder / "scores.csv", seeds, job.ins, job.seed)
    of_short = {short[name]: table.scores for name, table in seeds[0].items()}
    histograms(folder / "histograms.png", of_short, short[job.ins], shown)
    said = notes(shown, named, trained.images.levels, benchmark, lists=job.imglists)
    result = {
        "run": trained.run.owner.id,
        "runs": [Run(Path(path)).id for path in (job.run, *job.others)],
        "in": job.ins,
        "results": results,
        "notes": [*ensemble_notes(job), *said],
        "names": short,
        "processes": ranks.world(),
        "positive": "out",
        "benchmark": benchmark and benchmark.name,
        "seed": job.seed,
        "seeds": job.seeds,
        "checkpoint": job.checkpoint,
        "precision": job.precision or "fp32",
        "step": trained.step,
        "levels": trained.images.levels,
        "shape": list(trained.images.shape),
        "perceptual": scored.perceptual,
        "likelihood": trained.model.likelihood,
        "background": scored.background,
        "solver_gap": scored.gap and asdict(scored.gap),
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
    check_unchanged(trained.run.owner.path, home.meta)
    outs = () if job.imglists else job.outs
    packs = {name: open_pack(name, **trained.wanted, foreign=True, say=log.info) for name in outs}
    for name, pack in packs.items():
        if pack.meta.digest == home.meta.digest or pack.meta.title == home.meta.title:
            raise UsageError(
                f"`{name}` is both the in- and the out-of-distribution set", hint="`--out` takes other sets"
            )
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.name}` has no test images")
    return home, packs


def listed_sets(trained: Trained, job: OodJob, log: Log) -> dict[str, Pack]:
    """The images of OpenOOD's lists by set, the in-distribution one too; {} where none are asked for."""
    if not job.imglists or not job.benchmark:
        return {}
    root, benchmark = Path(job.imglists), find_benchmark(job.benchmark)
    own = {name: listed_images(root, benchmark, name) for name in (job.ins, *job.outs)}
    return {
        name: open_pack(found, **trained.wanted, foreign=True, say=log.info) for name, found in own.items()
    }


def ensemble_notes(job: OodJob) -> list[str]:
    """Notes on how the figures of several runs, or of several seeds, came about."""
    lines = []
    if job.others:
        lines.append(
            f"figures of {len(job.others) + 1} runs together: `waic` is the mean of −log p and its variance "
            "over the runs; other scores are means of deviations from held-out images"
        )
    if job.seeds > 1:
        lines.append(
            f"figures are means over {job.seeds} seeds of the noise, ± their deviation; `scores.csv` has a "
            "column for each seed, the histograms are of the first"
        )
    return lines


def add_baselines(
    seeds: list[dict[str, ScoreTable]], sets: Mapping[str, Pack], home: Pack, device: torch.device
) -> None:
    """Adds PNG size, pixel mean and the distances to neighbours to the tables of every seed: in pixels and,
    where the images have colour and its weights are installed, in features of EfficientNet-Lite0.

    They are computed of each set's own bytes, whatever grey levels the model has.
    """
    train = home.images("train")
    index = subset(len(train), BANK if train[:1].size <= 4096 else BANK // 4)
    first = seeds[0]
    images = [sets[name].images("test")[table.index] for name, table in first.items()]
    added = {
        "png": map(baselines.png_size, images),
        "mean": map(baselines.pixel_mean, images),
        "knn_pixels": baselines.knn_pca(train[index], images),
    }
    if home.meta.shape[0] == 3 and lite.is_installed():
        space = lite.lite(device)
        bank = space.features(train[subset(len(train), BANK // 4)])
        added["knn_lite"] = baselines.knn_features(bank, [space.features(own) for own in images])
    columns = {score: list(values) for score, values in added.items()}
    for tables in seeds:
        for i, (name, table) in enumerate(tables.items()):
            known = {score: values[i] for score, values in columns.items()}
            tables[name] = replace(table, scores=table.scores | known)
