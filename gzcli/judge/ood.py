"""`gz ood`: scores of in-distribution and foreign test images, and how well each score distinguishes them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice
from gzcli.core.units import MAX_SCORED_IMAGES
from gzcli.data.library import listed_images
from gzcli.data.packs.open import PackOptions, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.benchmarks import Benchmark, find_benchmark
from gzcli.data.sets.registry import SPECS
from gzcli.engine.log import Log
from gzcli.engine.pictures import histograms
from gzcli.judge import methods
from gzcli.judge.images import MAX_BANK_IMAGES, Pick, short_paths, treatment
from gzcli.judge.scores import Scoring, Table, write_csv
from gzcli.metrics import baselines, networks, pretrained
from gzcli.metrics.alarms.alarm import MAX_FITTED_IMAGES
from gzcli.metrics.alarms.choice import defaults, sides
from gzcli.metrics.alarms.methods import METHODS
from gzcli.metrics.detection import DETECTION_METRICS, detection
from gzcli.metrics.interval import subset
from gzcli.store import files
from gzcli.store.jobs import OodJob
from gzcli.store.runs import Run

BASELINES = ("png", "mean", "knn_pixels", "pca", "pca_local", "knn_lite")  # scores that use no model
RESIDUALS = ("pca", "pca_local")
PLAIN_LIKELIHOODS = ("nll", "elbo")  # the likelihood itself, or its bound
FPR = {
    "fpr95": "the share of in-distribution images that is flagged if 95 % of the foreign images are",
    "fpr95_id": "the share of foreign images that is accepted if 95 % of the in-distribution images are",
}


@dataclass(frozen=True)
class Scored:
    """Scores of the test images of the in-distribution set, which is the first of `sets`, and of foreign
    sets. A run or a method without training computes them.

    names: names of the scores.
    levels: grey levels of the run. None for latents, or without a run.
    tables: for each seed, the tables of scores by the names of the sets, with baselines; {} on ranks other
      than 0.
    facts: facts for JSON.
    notes: notes for the user.
    """

    names: Sequence[str]
    sets: Mapping[str, Pack]
    picks: Mapping[str, Pick]
    tables: Sequence[Mapping[str, Table]]
    levels: int | None
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()


def run(job: OodJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes `scores.csv`, `histograms.png` and `ood.json` into `folder`. Returns the JSON of `gz ood` on
    rank 0, and {} on others."""
    began = time.monotonic()
    scored = scored_by_method(job, device, log) if job.method else scored_by_run(job, device, log)
    if ranks.rank():
        return {}
    sets, seeds = scored.sets, scored.tables
    benchmark = find_benchmark(job.benchmark) if job.benchmark else None
    compared = partial(compare, packs=sets, names=scored.names, benchmark=benchmark)
    results = over_seeds([compared(tables) for tables in seeds])
    short = short_paths(list(sets))
    shown = [row | {"out": short.get(row["out"], row["out"])} for row in results]
    place, picture = Run(folder), folder / "histograms.png"
    write_scores(place.scores_file, seeds, scored.picks, job)
    histograms(picture, {short[name]: table for name, table in seeds[0].items()}, short[job.ins], shown)
    packs = {short[name]: pack for name, pack in sets.items()}
    result = {
        **scored.facts,
        "results": results,
        "notes": [*scored.notes, *notes(shown, packs, scored.levels, benchmark, job)],
        "names": short,
        "positive": "out",
        "benchmark": benchmark and benchmark.name,
        "levels": scored.levels,
        "coders": sorted(baselines.coders()),
        "seconds": round(time.monotonic() - began, 1),
        "files": {"scores": str(place.scores_file), "histograms": str(picture)},
    }
    files.write_json(place.ood_file, result)
    return result


def scored_by_run(job: OodJob, device: torch.device, log: Log) -> Scored:
    scoring = Scoring(job, device, log)
    trained, home = scoring.trained, scoring.home
    sets = open_sets(home, trained.form, job, log)

    def picks(n: int | None) -> dict[str, Pick]:
        return picks_of(sets, n)

    scoring.score(picks)
    without_model = {} if ranks.rank() else baseline_scores(scoring.picks, home, device)
    facts = {
        **scoring.facts(),
        "shape": list(trained.images.shape),
        "likelihood": trained.model.likelihood,
        "solver_gap": scoring.gap and asdict(scoring.gap),
    }
    tables = [{name: each[name] | without_model.get(name, {}) for name in sets} for each in scoring.tables]
    return Scored(scoring.names, sets, scoring.picks, tables, trained.images.levels, facts)


def scored_by_method(job: OodJob, device: torch.device, log: Log) -> Scored:
    """Scores images by a method that needs no training. It is fitted to the training images."""
    home, form = methods.open_home(job, log.info)
    sets = open_sets(home, form, job, log)
    train = home.images("train")
    images = np.asarray(train[subset(len(train), MAX_FITTED_IMAGES)])
    choice, fitted = methods.fit_chosen(job.method or "", images)
    picks = picks_of(sets, None if job.full else job.n or MAX_SCORED_IMAGES)
    tables = baseline_scores(picks, home, device)
    for name, pick in picks.items():
        tables[name][choice.method] = fitted.score(pick.images())
    facts = methods.facts_in(choice, fitted, home, len(images), job)
    remarks = methods.choice_in_words(choice, fitted)
    return Scored([choice.method], sets, picks, [tables], None, facts, remarks)


def picks_of(sets: Mapping[str, Pack], n: int | None) -> dict[str, Pick]:
    """At most n test images of each set."""
    totals = {name: pack.meta.counts["test"] for name, pack in sets.items()}
    return {name: Pick(sets[name], "test", subset(total, n or total)) for name, total in totals.items()}


def open_sets(home: Pack, form: PackOptions, job: OodJob, log: Log) -> dict[str, Pack]:
    """The sets whose test images are scored, by name; the in-distribution set is the first."""
    foreign = partial(open_pack, **form, foreign=True, say=log.info)
    if job.imglists and job.benchmark:
        listed = partial(listed_images, Path(job.imglists), find_benchmark(job.benchmark))
        sets = {name: foreign(listed(name)) for name in (job.ins, *job.outs)}
    else:
        sets = {job.ins: home, **{name: foreign(name) for name in job.outs}}
        for name in job.outs:
            meta = sets[name].meta
            if meta.digest == home.meta.digest or meta.title == home.meta.title:
                message = f"`{name}` is both the in- and the out-of-distribution set"
                raise UsageError(message, hint=advice("choose another set for {}", Option("out")))
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.reference}` has no test images")
    return sets


def baseline_scores(picks: Mapping[str, Pick], home: Pack, device: torch.device) -> dict[str, Table]:
    """The scores of every pick that need no model, computed from the unchanged bytes whatever the model's
    grey levels. They are the PNG size, the pixel mean, the distance to neighbours in pixels, and residuals of
    principal components. For colour images there is also the distance in features of EfficientNet-Lite0, if
    its weights are installed."""
    train = home.images("train")
    index = subset(len(train), MAX_BANK_IMAGES if train[:1].size <= 4096 else MAX_BANK_IMAGES // 4)
    images = [pick.pack.images("test")[pick.index] for pick in picks.values()]
    few = train[subset(len(train), MAX_FITTED_IMAGES)]
    neighbours = METHODS["knn_pixels"].fit(train[index])
    residuals = {name: METHODS[name].fit(few, **defaults(name, sides(few.shape[1:]))) for name in RESIDUALS}
    columns = {
        "png": list(map(baselines.png_size, images)),
        "mean": list(map(baselines.pixel_mean, images)),
        "knn_pixels": [neighbours.score(each) for each in images],
        **{name: [fitted.score(each) for each in images] for name, fitted in residuals.items()},
    }
    if home.meta.shape[0] == 3 and networks.is_installed():
        space = pretrained.lite(device)
        bank = space.features(train[subset(len(train), MAX_BANK_IMAGES // 4)])
        columns["knn_lite"] = baselines.knn_features(bank, [space.features(each) for each in images])
    return {name: {score: c[i] for score, c in columns.items()} for i, name in enumerate(picks)}


def compare(
    tables: Mapping[str, Table],
    packs: Mapping[str, Pack],
    names: Sequence[str],
    benchmark: Benchmark | None = None,
) -> list[dict[str, Any]]:
    """A row for each foreign set and score, by the conventions of a benchmark. The first table is that of the
    in-distribution set. `beats_baselines` is true if the AUROC is above that of every baseline, each taken in
    its better direction."""
    inside, *outside = tables
    plain = [score for score in BASELINES if score in tables[inside] and score not in names]
    rows = []
    for out in outside:
        figures = {
            score: detection(tables[inside][score], tables[out][score], trapezoid=benchmark is not None)
            for score in (*names, *plain)
        }
        bar = max(max(figures[score]["auroc"], 1 - figures[score]["auroc"]) for score in plain)
        for score, row in figures.items():
            head = {"out": out, "score": score, "baseline": score in plain}
            beats = None if score in plain else row["auroc"] > bar
            rows.append(head | row | {"resized": packs[out].meta.resized, "beats_baselines": beats})
    return with_group_means(rows, benchmark) if benchmark else rows


def with_group_means(results: list[dict[str, Any]], benchmark: Benchmark) -> list[dict[str, Any]]:
    rows = [row | {"group": benchmark.group(row["out"])} for row in results]
    ordered = []
    for group in ("near", "far"):
        of_group = [row for row in rows if row["group"] == group]
        ordered += of_group
        for score in dict.fromkeys(row["score"] for row in of_group):
            same = [row for row in of_group if row["score"] == score]
            means = {key: float(np.mean([row[key] for row in same])) for key in DETECTION_METRICS}
            total = {"n_in": same[0]["n_in"], "n_out": sum(row["n_out"] for row in same)}
            rest = {"out": f"mean of {group}", "ci": None, "beats_baselines": None}
            ordered.append(same[0] | means | total | rest)
    return ordered


def over_seeds(seeds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One table of means from the rows of every seed. `spread` is the standard deviation of each metric over
    the seeds."""
    if len(seeds) == 1:
        return seeds[0]
    means_of_rows = []
    for rows in zip(*seeds, strict=True):
        values = {key: np.array([row[key] for row in rows]) for key in DETECTION_METRICS}
        means = {key: float(each.mean()) for key, each in values.items()}
        spread = {key: float(each.std(ddof=1)) for key, each in values.items()}
        beats = [row["beats_baselines"] for row in rows]
        verdict = None if None in beats else 2 * sum(beats) > len(beats)
        means_of_rows.append(rows[0] | means | {"beats_baselines": verdict, "ci": None, "spread": spread})
    return means_of_rows


def notes(
    results: list[dict[str, Any]],
    packs: Mapping[str, Pack],
    levels: int | None,
    benchmark: Benchmark | None,
    job: OodJob,
) -> list[str]:
    """Notes on metrics that could be misread."""
    ensemble = f"metrics of an ensemble of {len(job.others) + 1} runs: `waic` is the mean of −log p plus "
    ensemble += "its variance over the runs; other scores are means of standardised scores"
    several = f"metrics are means over {job.seeds} seeds of the noise, ± one standard deviation; "
    several += "`scores.csv` has a column for each seed, and the histograms show the first"
    sign = "`png` and `mean` can differ in either direction: an AUROC of .1 is as good as one of .9"
    below = {(row["score"], row["out"]) for row in results if row["auroc"] < 0.5}
    outs = {row["out"]: row["n_out"] for row in results}
    smaller = {out for score, out in below if score == "png"}  # the files of its images are
    failed = sorted(smaller & {out for score, out in below if score in PLAIN_LIKELIHOODS})
    simple = "likelihood fails on foreign images that are simpler than the training set, here on "
    simple += f"{', '.join(f'`{out}`' for out in failed)}; `complexity` or `ratio` correct for that"
    totals = {name: pack.meta.counts["test"] for name, pack in packs.items() if pack.meta.name not in SPECS}
    return [
        *[ensemble] * bool(job.others),
        *[several] * (job.seeds > 1),
        *convention(benchmark, packs, job.imglists),
        *[sign] * any(score in ("png", "mean") for score, _ in below),
        *treatment(packs, levels, but="the baselines use the images before binarization"),
        *(
            f"{n:,} of the {totals[out]:,} images of `{out}` were scored; use `--full` to score all"
            for out, n in outs.items()
            if n < totals.get(out, 0)
        ),
        *[simple] * bool(failed),
        *(line for out in packs for line in beside_baselines(results, out)),
    ]


def beside_baselines(results: list[dict[str, Any]], out: str) -> list[str]:
    """Notes on a model's scores that do not exceed the best baseline on a foreign set, and on those that are
    worse than chance. Each baseline is taken in its better direction."""
    rows = [row for row in results if row["out"] == out]
    reached = {row["score"]: max(row["auroc"], 1 - row["auroc"]) for row in rows if row["baseline"]}
    if not reached:
        return []
    best = max(reached, key=lambda name: reached[name])
    of_model = {f"`{row['score']}`": row["auroc"] for row in rows if not row["baseline"]}
    level = [name for name, auroc in of_model.items() if auroc <= reached[best]]
    worse = [name for name, auroc in of_model.items() if auroc < 0.5]
    baseline = f"the baseline `{best}`, which uses no model ({reached[best]:.3f})"
    lines = []
    above, chance = f"no higher AUROC than {baseline}", "an AUROC below .5, which is worse than chance"
    for names, words in ((level, above), (worse, chance)):
        if names:
            *most, last = names
            listed = f"{', '.join(most)} and {last} have" if most else f"{last} has"
            lines.append(f"on `{out}`, {listed} {words}")
    return lines


def convention(benchmark: Benchmark | None, packs: Mapping[str, Pack], lists: str | None) -> list[str]:
    if not benchmark:
        return [f"`fpr95` (OpenOOD v1.5): {FPR['fpr95']}; `fpr95_id` (ODIN, OpenOOD v1): {FPR['fpr95_id']}"]
    left = [name for name in (*benchmark.near, *benchmark.far) if name not in packs]
    missing = f"omitted from `{benchmark.name}`: {', '.join(left)}; means are over the other sets"
    drawn = "the images are those of the whole test splits, not those of OpenOOD's lists"
    drawn = f"the images are those of OpenOOD's lists in `{lists}`" if lists else drawn
    fpr = f"whose FPR95 is `{benchmark.fpr}`: {FPR[benchmark.fpr]}"
    of = f"`{benchmark.name}` is from OpenOOD {benchmark.version}, {fpr}"
    return [*([missing] if left else []), f"{drawn}; AUPR is by OpenOOD's trapezoid rule", of]


def write_scores(
    path: Path, seeds: Sequence[Mapping[str, Table]], picks: Mapping[str, Pick], job: OodJob
) -> None:
    """Writes a CSV with the columns set, role (in | out), index in the split, file (for the user's own
    images), and one column per score. With several seeds, there is one column per score and seed, such as
    `recon@1`."""
    columns = {}
    for score in seeds[0][job.ins]:
        of_model = score not in BASELINES
        for i in range(len(seeds) if of_model else 1):
            columns[f"{score}@{job.seed + i}" if len(seeds) > 1 and of_model else score] = (i, score)
    lines = []
    for name, pick in picks.items():
        role, names = "in" if name == job.ins else "out", pick.pack.names("test")
        rows = zip(*(seeds[i][name][score] for i, score in columns.values()), strict=True)
        for at, row in zip(map(int, pick.index), rows, strict=True):
            lines.append([name, role, at, names[at] if names else "", *map(float, row)])
    write_csv(path, ["set", "role", "index", "file", *columns], lines)
