"""Every score of runs on one set, in one table, which pages show: AUROC and FPR95 beside what papers report.

python tests/tools/ood_table.py RUN|METHOD… --in mnist
    --out fashionmnist[,…] [-n N] [--score all|recipe] [--into FOLDER] [--join CSV]

A run is a model's name, a run's id or alias; a method needs no training. Each is judged by `gz ood --json`,
whose answer is kept in FOLDER: the same command resumes, and a run that fails is left out with its error.
FOLDER then contains `table.csv`; pages show it as `gzcli/docs/measured/<in>/ood.csv`. With `--join` rows of
other models in that file stay, and rows of the same model and images are replaced.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gzcli.core.devices import cpu_name
from gzcli.core.units import duration
from gzcli.metrics.alarms.methods import METHODS
from gzcli.metrics.standings import as_csv
from gzcli.store.run_folder import Run

FIGURES = ("auroc", "fpr95", "fpr95_id", "aupr_in", "aupr_out", "n_in", "n_out")


class Paper(NamedTuple):
    """What a paper reports, AUROC with the foreign images as the positive class.

    auroc: as text, as some report a range.
    source: the paper.
    """

    auroc: str
    source: str


# by (in, out, model, score); nets and training of the papers are larger than the small scale's
PAPERS = {
    ("fashionmnist", "mnist", "pixelcnnpp", "nll"): Paper(".089", "Ren 2019, arXiv:1906.02845"),
    ("fashionmnist", "mnist", "pixelcnnpp", "ratio"): Paper(".994", "Ren 2019, arXiv:1906.02845"),
    ("fashionmnist", "mnist", "pixelcnnpp", "complexity"): Paper(".967", "Serrà 2020, arXiv:1909.11480"),
    ("fashionmnist", "mnist", "glow", "complexity"): Paper(".998", "Serrà 2020, arXiv:1909.11480"),
    ("fashionmnist", "mnist", "hvae", "llr"): Paper(".984", "Havtorn 2021, arXiv:2102.08248"),
    **{
        ("mnist", "fashionmnist", model, "nll"): Paper(".99–1.00", "Nalisnick 2019, arXiv:1810.09136")
        for model in ("glow", "realnvp", "pixelcnn", "pixelcnnpp")
    },
}


def trained(run: Run | None) -> dict[str, Any]:
    """How long a run was trained, on what; empty of a method without training, whose machine is this one."""
    if run is None:
        return {"machine": cpu_name(), "clock": "", "train_seconds": "", "train_steps": ""}
    return {
        "machine": run.environment.get("machine", ""),
        "clock": run.clock,
        "train_seconds": round(run.training_seconds, 1),
        "train_steps": run.status().get("steps", ""),
    }


def judged(run: str, words: list[str], file: Path) -> dict[str, Any] | None:
    """The JSON of `gz ood` of a run, which is kept in a file; None where it failed, with the error shown."""
    if not file.exists():
        print(f"{run} …", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "gzcli", "ood", run, *words, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(
                f"left out: {run}, whose `gz ood` ended with {done.returncode}: {done.stdout}",
                file=sys.stderr,
            )
            return None
        file.write_text(done.stdout)
    return json.loads(file.read_text())


def rows_of(made: dict[str, Any], model: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each score and foreign set."""
    rows = []
    facts_of_none = trained(None)
    for one in made["results"]:
        paper = PAPERS.get((made["in"], one["out"], model, one["score"]))
        low, high = (one.get("ci") or {}).get("auroc") or (None, None)
        rows.append(
            {
                "model": "baseline" if one["baseline"] or model in METHODS else model,
                "run": made["run"],
                "in": made["in"],
                "out": one["out"],
                "score": one["score"],
                **{key: one[key] for key in FIGURES},
                "auroc_low": low,
                "auroc_high": high,
                "paper_auroc": paper and paper.auroc,
                "paper": paper and paper.source,
                "seconds": made["seconds"],
                **(facts_of_none if one["baseline"] else facts),
            }
        )
    return rows


def main() -> None:
    from gzcli.launch.from_file import find_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN|METHOD")
    parser.add_argument("--in", dest="inside", required=True, metavar="NAME")
    parser.add_argument("--out", dest="outs", required=True, metavar="NAME[,NAME…]")
    parser.add_argument("-n", type=int, help="images of each set; without it as many as `ood.budget` allows")
    parser.add_argument("--score", default="all", help="as in `gz ood`; recipe: those of each model's recipe")
    parser.add_argument("--into", type=Path, default=Path("ood_table"), metavar="FOLDER")
    parser.add_argument("--join", type=Path, metavar="CSV", help="a table whose further rows stay")
    args = parser.parse_args()
    args.into.mkdir(parents=True, exist_ok=True)
    common = ["--in", args.inside, "--out", args.outs]
    common += ["-n", str(args.n)] if args.n else []
    scores = [] if args.score == "recipe" else ["--score", args.score]
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    if args.join and args.join.exists():
        earlier = csv.DictReader(args.join.read_text().splitlines())
        rows = {key_of(row): row for row in earlier}
    for word in args.runs:
        run = None if word in METHODS else find_run(word, data=args.inside)
        words = common if run is None else [*common, *scores]
        slug = "-".join(part.strip("-").replace(",", "+").replace("/", "_") for part in words)
        name = word if run is None else run.id
        if made := judged(name, words, args.into / f"{name}-{slug}.json"):
            model = word if run is None else run.model
            print(f"{model}: {duration(made['seconds'])}", file=sys.stderr, flush=True)
            fresh = rows_of(made, model, trained(run))
            judged_again = {(row["model"], row["out"]) for row in fresh} - {
                ("baseline", row["out"]) for row in fresh
            }
            rows = {key: row for key, row in rows.items() if key[:2] not in judged_again}
            # baselines know no model: those of the last run are every run's
            rows |= {key_of(row): row for row in fresh}
            (args.into / "table.csv").write_text(as_csv(list(rows.values())))


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["out"], row["score"]


if __name__ == "__main__":
    main()
