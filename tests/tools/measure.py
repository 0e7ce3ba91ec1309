"""`make measured LEAGUE=FOLDER`: the figures that pages show, from a league's folder and its runs, into
`gzcli/docs/measured/`; `make costs`: what every recipe's trainings cost.

python tests/tools/measure.py league FOLDER [INTO]
python tests/tools/measure.py costs [--timed]      times are those of this machine, which must be quiet
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from gzcli import __version__
from gzcli.core import devices, measured
from gzcli.core.errors import GzError
from gzcli.core.sections import LaunchSection
from gzcli.launch import forecast, launcher
from gzcli.launch.plan import ask
from gzcli.metrics.standings import as_csv
from gzcli.recipe.resolve import Resolved
from gzcli.store import runs
from gzcli.store.metrics import metric_lines
from gzcli.store.paths import recipe_names, spelling
from gzcli.store.runs import Run

SETS = {
    "mnist": ("small", "full"),
    "cifar10": ("small", "full", "paper"),
}  # whose costs are told, and at which scales


WIDEST, COLOURS = 420, 48  # of a picture of samples


def league(folder: Path, root: Path = measured.ROOT) -> list[Path]:
    """Writes what pages show of a league whose folder `gz bench --train-missing` has named, below its set and
    the scale of its runs. Models that stand there of a league of the same terms, and not in this one, stay.
    Returns the files.

    root: where to; the package's own folder unless it is given.
    """
    if not (folder / "league.json").is_file():
        raise SystemExit(f"{folder} holds no finished league: the line in its command.sh goes on with it")
    result = json.loads((folder / "league.json").read_text())
    first: dict[str, Run] = {}  # the run of each model's first seed
    for row in result["rows"]:
        if row["model"] not in first and not row.get("error") and (run := runs.by_name(row["run"])):
            first[row["model"]] = run
    if not first:
        raise SystemExit(f"none of the runs of {folder} is here")
    scales = {run.serving.tree().get("scale") for run in first.values()} - {None}
    if len(scales) != 1:
        raise SystemExit(f"the runs are of several scales: {', '.join(sorted(scales))}")
    into = root / next(iter(first.values())).data / scales.pop()
    if not same_terms(into, result):
        shutil.rmtree(into, ignore_errors=True)
    for name in ("curves", "samples"):
        (into / name).mkdir(parents=True, exist_ok=True)
        for model in {row["model"] for row in result["rows"]}:
            for path in (into / name).glob(f"{model}.*"):
                path.unlink()
    rows = [merged(into, folder / "results", name) for name in ("summary", "league")]
    models = [row["model"] for row in rows[0]]
    for name, own in zip(("summary", "league"), rows, strict=True):
        own.sort(key=lambda row: models.index(row["model"]))
        (into / f"{name}.csv").write_text(as_csv(own))
    command = (folder / "command.sh").read_text().splitlines()[-1]
    about = {
        "command": re.sub(r"--models \S+", f"--models {','.join(models)}", command),
        "date": date.today().isoformat(),
        "version": __version__,
        "machine": devices.cpu_name() or platform.machine(),
        "budget": result["budget"],
        "metric": result["metric"],
        "floor": result["floor"],
        "left_out": result["left_out"],
    }
    (into / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    for model, run in first.items():
        if pictures := sorted((run.serving.path / "samples").glob("*.png")):
            small(pictures[-1], into / "samples" / f"{model}.png")
        before = 0.0
        for part in run.stages or [run]:
            stage = "" if part is run else part.path.name
            if rows := list(curve_of(part, before)):
                name = f"{model}.{stage}" if stage else model
                (into / "curves" / f"{name}.csv").write_text(as_csv(rows))
            before += spent(part)
    return sorted(path for path in into.rglob("*.*") if path.is_file())


def same_terms(into: Path, result: dict[str, Any]) -> bool:
    """Whether the league in `into` had the budget, the metric and the real images of this one."""
    if not (into / "about.json").is_file():
        return False
    about = json.loads((into / "about.json").read_text())
    floors = [league["floor"].get(result["metric"]) for league in (about, result)]
    same = all(about[key] == result[key] for key in ("budget", "metric"))
    return same and None not in floors and math.isclose(*floors, rel_tol=1e-6)


def merged(into: Path, results: Path, name: str) -> list[dict[str, str]]:
    """The rows of a league's table, with those of other models that stand in `into`. A summary's are in their
    new order, one seed's ranks with them."""
    rows, others = (measured.rows_of(folder / f"{name}.csv") for folder in (results, into))
    own = {row["model"] for row in rows}
    rows += [row for row in others if row["model"] not in own]
    if name == "summary" and others:
        rows.sort(key=lambda row: float(row["times_floor"] or "inf"))
        for place, row in enumerate(rows, 1):
            row["place"] = row["rank"] = str(place) if row["times_floor"] else ""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def small(picture: Path, target: Path) -> None:
    """Saves a picture of samples in at most WIDEST pixels of width and few colours, for the wheel."""
    with Image.open(picture) as image:
        high = max(1, round(image.height * min(1.0, WIDEST / image.width)))
        resized = image.convert("RGB").resize((min(image.width, WIDEST), high), Image.Resampling.LANCZOS)
        resized.quantize(COLOURS).save(target, optimize=True)


def spent(run: Run) -> float:
    """Seconds of a training: of its cores' work where it was counted, as others may have used the machine."""
    return run.work or run.seconds


def curve_of(run: Run, before: float) -> Iterator[dict[str, Any]]:
    """The validations of a run or stage, rows of the columns `measured.CURVE`.

    before: seconds of training of earlier stages.
    """
    metric, steps = run.best.metric if run.best else "", run.status().get("step")
    for line in metric_lines(run.path):
        if (value := line.get(f"val_{metric}")) is not None and steps:
            seconds = round(before + spent(run) * line["step"] / steps, 1)
            yield dict(
                zip(measured.CURVE, (metric, line["step"], seconds, float(f"{value:.5g}")), strict=True)
            )


def price(timed: bool) -> list[dict[str, Any]]:
    """The costs of every recipe on the sets of SETS, as rows of `costs.csv`; what is known is in the cache.

    timed: whether steps are tried, at the scale that a CPU trains.
    """
    rows = []
    for data, scales in SETS.items():
        for scale in scales:
            groups: dict[str, list[Resolved]] = {}  # by what they see of the set
            for name in recipe_names():
                try:
                    recipe = ask(name, data, (), {"scale": scale}).recipe
                    groups.setdefault(json.dumps(forecast.of_data(recipe)[0].info()), []).append(recipe)
                except GzError as error:
                    print(f"{name} {data} {scale}: {error.message}", file=sys.stderr)
            for shape, recipes in groups.items():
                rows += costs_of(recipes, json.loads(shape), timed=timed and scale == "small")
    order = {name: i for i, name in enumerate(recipe_names())}
    return sorted(rows, key=lambda row: order[row["model"]])


def costs_of(recipes: list[Resolved], shape: dict[str, Any], *, timed: bool) -> Iterator[dict[str, Any]]:
    """Rows of recipes that see a set alike.

    shape: description of the set, as `TrialJob.info` has it.
    """
    plan = launcher.plan(LaunchSection(cpu=True), every_gpu=False)
    measure = partial(forecast.measured, say=print)
    for recipe in recipes:
        rows, _ = forecast.expect(recipe, plan, shape, measure=measure, timed=timed)
        name, scale = spelling(recipe.card.name), recipe.choice.scale
        if any(one.params is None for one in rows):
            print(f"{name} {recipe.key} {scale}: {rows[0].lacking}", file=sys.stderr)
            continue
        seconds = forecast.together([one.seconds for one in rows]) if timed else None
        on_h100 = forecast.together([one.on_h100s(1) for one in rows])
        yield {
            "model": name,
            "data": recipe.key,
            "scale": scale,
            "params": sum(one.params for one in rows),
            "steps": sum(one.part.train.steps for one in rows),
            "seconds": seconds and round(seconds),
            "machine": seconds and forecast.machine_of(plan),
            "seconds_on_h100": on_h100 and round(on_h100),
        }


def main(words: list[str]) -> None:
    if words[:1] == ["league"] and len(words) in (2, 3):
        for path in league(Path(words[1]), *map(Path, words[2:])):
            print(path)
    elif words[:1] == ["costs"] and set(words[1:]) <= {"--timed"}:
        measured.ROOT.mkdir(parents=True, exist_ok=True)
        (measured.ROOT / "costs.csv").write_text(as_csv(price("--timed" in words)))
        print(measured.ROOT / "costs.csv")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
