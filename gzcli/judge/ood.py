"""`gz ood`: scores of in-distribution and foreign test images, and how well each score tells them apart."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.jobs import OodJob
from gzcli.data.packs.open import check_unchanged, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.library import listed_images
from gzcli.data.sets.registry import SPECS, Benchmark, find_benchmark
from gzcli.engine.log import Log
from gzcli.engine.pictures import histograms
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.images import BANK, short_paths, treatment
from gzcli.judge.scoring import Pick, score_all
from gzcli.metrics import baselines, lite
from gzcli.metrics.detection import FIGURES, detection
from gzcli.metrics.interval import subset
from gzcli.store import files
from gzcli.store.runs import Run

BASELINES = ("png", "mean", "knn_pixels", "knn_lite")  # scores that use no model
PLAIN = ("nll", "elbo")  # the likelihood itself, or its bound
FPR = {
    "fpr95": "the share of in-distribution images that is flagged when 95 % of the foreign ones are found",
    "fpr95_id": "the share of foreign images that is accepted when 95 % of the in-distribution ones are",
}


@dataclass
class ScoreTable:
    """The scores of a set's test images."""

    index: np.ndarray  # positions of the images in the split, [N]
    names: list[str] | None  # names of all files of the split; None where they have none
    scores: dict[str, np.ndarray]  # float64 [N] of each score, by its name


def run(job: OodJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `scores.csv`, `histograms.png` and `ood.json` into `folder`.

    The in-distribution images are the test split of `job.ins`. The foreign ones are the test splits of known
    sets, and the test split or all images of the user's own sets. Both are brought to the run's size,
    channels and grey levels. Each process scores its share. Returns the JSON of `gz ood` on rank 0, and {} on
    others.
    """
    began = time.monotonic()

    def load(path: str) -> Trained:
        return load_trained(Run(Path(path)), device, job.checkpoint, job.precision)

    trained = load(job.run)
    home, sets = open_sets(trained, job, log)

    def index(name: str, n: int | None) -> np.ndarray:
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
    rows = [compare(tables, sets, scored.names, benchmark, bootstrap=len(seeds) == 1) for tables in seeds]
    results = over_seeds(rows)
    short = short_paths(list(sets))
    shown = [row | {"out": short.get(row["out"], row["out"])} for row in results]
    write_scores(folder / "scores.csv", seeds, job.ins, job.seed)
    tables = {short[name]: table.scores for name, table in seeds[0].items()}
    histograms(folder / "histograms.png", tables, short[job.ins], shown)
    packs = {short[name]: pack for name, pack in sets.items()}
    result = {
        **scored.facts(trained, job),
        "results": results,
        "notes": [
            *ensemble_notes(job),
            *notes(shown, packs, trained.images.levels, benchmark, lists=job.imglists),
        ],
        "names": short,
        "positive": "out",
        "benchmark": benchmark and benchmark.name,
        "levels": trained.images.levels,
        "shape": list(trained.images.shape),
        "likelihood": trained.model.likelihood,
        "solver_gap": scored.gap and asdict(scored.gap),
        "coders": sorted(baselines.coders()),
        "seconds": round(time.monotonic() - began, 1),
        "files": {"scores": str(folder / "scores.csv"), "histograms": str(folder / "histograms.png")},
    }
    files.write_json(folder / "ood.json", result)
    return result


def open_sets(trained: Trained, job: OodJob, log: Log) -> tuple[Pack, dict[str, Pack]]:
    """The in-distribution set; and all sets whose test images are scored by name, that one first: with
    OpenOOD's lists of a benchmark the images in these."""
    home = open_pack(job.ins, **trained.wanted, say=log.info)
    check_unchanged(trained.run.owner.path, home.meta)
    foreign = partial(open_pack, **trained.wanted, foreign=True, say=log.info)
    if job.imglists and job.benchmark:
        lists, benchmark = Path(job.imglists), find_benchmark(job.benchmark)
        listed = {name: listed_images(lists, benchmark, name) for name in (job.ins, *job.outs)}
        sets = {name: foreign(images) for name, images in listed.items()}
    else:
        sets = {job.ins: home, **{name: foreign(name) for name in job.outs}}
        for name in job.outs:
            meta = sets[name].meta
            if meta.digest == home.meta.digest or meta.title == home.meta.title:
                message = f"`{name}` is both the in- and the out-of-distribution set"
                raise UsageError(message, hint="`--out` takes other sets")
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.name}` has no test images")
    return home, sets


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
            scores = {score: values[i] for score, values in columns.items()}
            tables[name] = replace(table, scores=table.scores | scores)


def compare(
    tables: Mapping[str, ScoreTable],
    packs: Mapping[str, Pack],
    names: Sequence[str],
    benchmark: Benchmark | None = None,
    *,
    bootstrap: bool = True,
) -> list[dict[str, Any]]:
    """A row for each foreign set and score, by the conventions of a benchmark; the first table is that of the
    in-distribution set. Its `beats_baselines` says whether its AUROC is above that of every baseline, each in
    its better direction."""
    inside, *outside = tables
    baselines_of = [score for score in BASELINES if score in tables[inside].scores]
    how: dict[str, Any] = {"trapezoid": benchmark is not None, "bootstrap": 1000 if bootstrap else 0}
    rows = []
    for out in outside:
        measured = {}
        for score in (*names, *baselines_of):
            measured[score] = detection(*(tables[name].scores[score] for name in (inside, out)), **how)
        bar = max(max(measured[score]["auroc"], 1 - measured[score]["auroc"]) for score in baselines_of)
        for score, figures in measured.items():
            head = {"out": out, "score": score, "baseline": score in BASELINES}
            beats = None if score in BASELINES else figures["auroc"] > bar
            rows.append(head | figures | {"resized": packs[out].meta.resized, "beats_baselines": beats})
    return with_group_means(rows, benchmark) if benchmark else rows


def with_group_means(results: list[dict[str, Any]], benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows with their `group`, near or far, and after each group a row of its means for every score."""
    rows = [row | {"group": benchmark.group(row["out"])} for row in results]
    ordered = []
    for group in ("near", "far"):
        inside = [row for row in rows if row["group"] == group]
        ordered += inside
        for score in dict.fromkeys(row["score"] for row in inside):
            same = [row for row in inside if row["score"] == score]
            means = {key: float(np.mean([row[key] for row in same])) for key in FIGURES}
            total = {"n_in": same[0]["n_in"], "n_out": sum(row["n_out"] for row in same)}
            rest = {"out": f"mean of {group}", "ci": None, "beats_baselines": None}
            ordered.append(same[0] | means | total | rest)
    return ordered


def over_seeds(seeds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of every seed as one table of means; `spread` is the deviation of each figure over the seeds,
    and `beats_baselines` says whether most of them do."""
    if len(seeds) == 1:
        return seeds[0]
    means_of_rows = []
    for rows in zip(*seeds, strict=True):
        values = {key: np.array([row[key] for row in rows]) for key in FIGURES}
        means = {key: float(each.mean()) for key, each in values.items()}
        spread = {key: float(each.std(ddof=1)) for key, each in values.items()}
        beats = [row["beats_baselines"] for row in rows]
        verdict = {"beats_baselines": None if None in beats else 2 * sum(beats) > len(beats)}
        means_of_rows.append(rows[0] | means | verdict | {"spread": spread})
    return means_of_rows


def notes(
    results: list[dict[str, Any]],
    packs: Mapping[str, Pack],
    levels: int | None,
    benchmark: Benchmark | None = None,
    *,
    lists: str | None = None,
) -> list[str]:
    """Notes without which the figures could be misread."""
    lines = []
    if benchmark:
        left = [name for name in (*benchmark.near, *benchmark.far) if name not in packs]
        if left:
            lines.append(f"left out of `{benchmark.name}`: {', '.join(left)}; means are of the others")
        drawn = "OpenOOD draws its images from lists of its own; these are from the whole test splits"
        drawn = f"the images are those of OpenOOD's lists in `{lists}`" if lists else drawn
        lines.append(f"{drawn}, AUPR by its trapezoid")
        fpr = f"whose FPR95 is `{benchmark.fpr}`: {FPR[benchmark.fpr]}"
        lines.append(f"`{benchmark.name}` is of OpenOOD {benchmark.version}, {fpr}")
    else:
        lines.append(
            f"`fpr95` (OpenOOD v1.5): {FPR['fpr95']}; `fpr95_id` (ODIN, OpenOOD v1): {FPR['fpr95_id']}"
        )
    lines += ["`png` and `mean` know no direction: their AUROC of .1 is worth one of .9"]
    lines += treatment(packs, levels, but="the baselines are of the sets' own bytes")
    totals = {name: pack.meta.counts["test"] for name, pack in packs.items() if pack.meta.name not in SPECS}
    for row in {row["out"]: row for row in results if row["out"] in totals}.values():
        if row["n_out"] < (total := totals[row["out"]]):
            of = f"of the {total:,} images of `{row['out']}`"
            lines.append(f"{row['n_out']:,} {of} were scored; `--full` takes all")
    if plain := [row for row in results if row["score"] in PLAIN]:
        failed = sorted({f"`{row['out']}`" for row in plain if row["auroc"] < 0.5})
        here = f", as here on {', '.join(failed)}" if failed else ""
        lines.append(
            "plain likelihood fails in the hard direction (FashionMNIST → MNIST: AUROC near .1), as simpler "
            f"images are more likely{here}; `complexity` or `ratio` correct for it"
        )
    beaten = [f"`{row['score']}` on `{row['out']}`" for row in results if row["beats_baselines"] is False]
    if beaten:
        lines.append(f"a baseline, without a model, does as well as {', '.join(beaten)}")
    return lines


def write_scores(path: Path, seeds: Sequence[Mapping[str, ScoreTable]], inside: str, first: int = 0) -> None:
    """Writes a CSV with the columns set, role (in | out), index in the split, file (of the user's own
    pictures), and one for each score; with several seeds one for each score and seed, as `recon@1`."""
    columns = [
        (f"{score}@{first + i}" if len(seeds) > 1 and score not in BASELINES else score, i, score)
        for score in seeds[0][inside].scores
        for i in range(len(seeds) if score not in BASELINES else 1)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "role", "index", "file", *(column for column, _, _ in columns)])
    for name, table in seeds[0].items():
        role = "in" if name == inside else "out"
        rows = zip(*(seeds[i][name].scores[score] for _, i, score in columns), strict=True)
        for at, row in zip(map(int, table.index), rows, strict=True):
            file = table.names[at] if table.names else ""
            writer.writerow([name, role, at, file, *map(repr, map(float, row))])
    files.write_atomic(path, text.getvalue())
