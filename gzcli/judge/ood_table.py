"""The table of `gz ood`: detection figures of each foreign set and score, and notes on them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.data.packs.pack import Pack
from gzcli.data.sets.benchmarks import Benchmark
from gzcli.data.sets.sets import SPECS
from gzcli.judge.images import treatment
from gzcli.metrics.detection import detection
from gzcli.store import files

FIGURES = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_id")
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


def compare(
    tables: Mapping[str, ScoreTable],
    packs: Mapping[str, Pack],
    names: Sequence[str],
    *,
    trapezoid: bool = False,
    bootstrap: bool = True,
) -> list[dict[str, Any]]:
    """A row for each foreign set and score. Its `beats_baselines` says whether its AUROC is above that of
    every baseline, each in its better direction."""
    inside, *outside = tables
    known = [score for score in BASELINES if score in tables[inside].scores]
    draws = 1000 if bootstrap else 0
    rows = []
    for out in outside:
        measured = {}
        for score in (*names, *known):
            values = (tables[name].scores[score] for name in (inside, out))
            measured[score] = detection(*values, trapezoid=trapezoid, bootstrap=draws)
        bar = max(max(measured[score]["auroc"], 1 - measured[score]["auroc"]) for score in known)
        for score, found in measured.items():
            named = {"out": out, "score": score, "baseline": score in BASELINES}
            beats = None if score in BASELINES else found["auroc"] > bar
            rows.append(named | found | {"resized": packs[out].meta.resized, "beats_baselines": beats})
    return rows


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
    found = []
    for rows in zip(*seeds, strict=True):
        values = {key: np.array([row[key] for row in rows]) for key in FIGURES}
        means = {key: float(each.mean()) for key, each in values.items()}
        spread = {key: float(each.std(ddof=1)) for key, each in values.items()}
        beats = [row["beats_baselines"] for row in rows]
        verdict = {"beats_baselines": None if None in beats else 2 * sum(beats) > len(beats)}
        found.append(rows[0] | means | verdict | {"spread": spread})
    return found


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
        if missing := [*left, *benchmark.absent]:
            lines.append(f"left out of `{benchmark.name}`: {', '.join(missing)}; means are of the others")
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
    own = {name: pack.meta.counts["test"] for name, pack in packs.items() if pack.meta.name not in SPECS}
    for row in {row["out"]: row for row in results if row["out"] in own}.values():
        if row["n_out"] < (total := own[row["out"]]):
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
