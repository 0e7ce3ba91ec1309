"""`make measured LEAGUE=FOLDER`: the figures that pages show, from leagues' folders and their runs, into
`gzcli/docs/measured/`; `make costs`: what every recipe's trainings cost.

python tests/tools/measure.py league FOLDER… [--commit HASH]
                                                  those of one set and scale are joined; the commit of code
                                                  that was trained outside of a clone
python tests/tools/measure.py peers FOLDER         of `gz bench` on images of `peers.py`
python tests/tools/measure.py costs [--timed]      times are those of this machine, which must be quiet
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from gzcli import __version__
from gzcli.core import devices, measured
from gzcli.core.errors import GzError
from gzcli.core.sections import LaunchSection
from gzcli.launch import forecast, launcher, needs
from gzcli.launch.plan import ask
from gzcli.metrics import standings
from gzcli.metrics.metric import column_of, metrics
from gzcli.metrics.standings import as_csv
from gzcli.recipe.resolve import Resolved
from gzcli.store import rates, runs, start
from gzcli.store.metrics import metric_lines
from gzcli.store.paths import recipe_names, spelling
from gzcli.store.runs import Run

SETS = {
    "mnist": ("small", "full"),
    "cifar10": ("small", "full", "paper"),
}  # whose costs are told, and at which scales
BESIDE = {"torchcfm": "cfm", "denoising-diffusion-pytorch": "ddpm", "pythae": "vae", "normflows": "glow"}


# what is kept of a row, so that further models and seeds can join it
FIELDS = (
    *standings.STANDING_FACTS,
    "commit",
    "judge_commit",
    "judge_code",
    "machine",
    "command",
    "sample",
    "metrics",
    "intervals",
    "excess",
    "floor",
    "shape",
    "error",
)
# metrics by the networks that judge
OF_JUDGES = {
    column.name
    for metric in metrics().values()
    if metric.features in ("lenet", "second")
    for column in metric.columns
}
# width and number of shades of a picture of samples, in grey and in colour
GREY, COLOUR = (420, 8), (270, 32)


def league(*folders: Path, root: Path = measured.MEASURED_FOLDER, commit: str | None = None) -> list[Path]:
    """Writes what pages show of the leagues whose folders `gz league` has named: those of one
    set and scale are one league, joined by model and seed, also with what stands there. Returns the files.

    root: where to; the package's own folder unless it is given.
    commit: of the code of rows that do not know theirs.
    """
    places: dict[Path, list[League]] = {}
    for one in map(opened, folders):
        places.setdefault(root / one.place, []).append(one)
    for into, leagues in places.items():
        about = shared_by(leagues)
        before, commands = earlier(into, about)
        for name in ("curves", "samples"):
            (into / name).mkdir(parents=True, exist_ok=True)
        about["commands"] = merged([*commands, *about["commands"]])
        rows = {}  # by model and seed; one that failed gives way to one that did not
        new = [row for one in leagues for row in one.result["rows"]]
        for row in (*before, *({**row, "commit": row.get("commit") or commit} for row in new)):
            if not row.get("error") or (row["model"], row["seed"]) not in rows:
                rows[row["model"], row["seed"]] = short({key: row[key] for key in FIELDS if key in row})
        check_judges(into, [row for row in rows.values() if not row.get("error")])
        (into / "rows.json").write_text(json.dumps(list(rows.values())) + "\n")
        joined = standings.of_one_size(list(rows.values()))
        (into / "league.csv").write_text(standings.table_of(joined))
        summary = standings.summary_table(standings.summary(joined, about["metric"], about["budget"]))
        (into / "summary.csv").write_text(summary)
        about["commit"] = standings.joined(row.get("commit") for row in rows.values()) or None
        about["seeds"] = sorted({seed for _, seed in rows})
        (into / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        for model, run in {name: run for one in leagues for name, run in one.runs.items()}.items():
            picture_and_curves(into, model, run)
    return sorted(path for into in places for path in into.rglob("*.*") if path.is_file())


def short(value: Any) -> Any:
    """A row whose numbers have eight digits, because all digits of three seeds take too much space in git."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def earlier(into: Path, about: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that stand there, and the commands that made them. Pictures and curves stay until their model
    is trained again."""
    if not (into / "rows.json").is_file():
        return [], []
    facts = json.loads((into / "about.json").read_text())
    # written by hand: trials of recipes on this league
    about |= {key: facts[key] for key in ("tuned", "note") if key in facts}
    # eight minutes of a faster processor are more training
    terms = ("budget", "metric", "judges", "machine", "instructions")
    if differing := [key for key in terms if facts.get(key) != about[key]]:
        raise SystemExit(f"{into} has a league with other {', '.join(differing)}; remove it to replace it")
    return json.loads((into / "rows.json").read_text()), facts["commands"]


def check_judges(into: Path, rows: list[dict[str, Any]]) -> None:
    """Refuses rows that different code has judged, and names older rows, which do not know that code."""
    commits = {row["judge_code"]: row.get("judge_commit") for row in rows if row.get("judge_code")}
    if len(commits) > 1:
        of_each = ", ".join(f"{code} of commit {commit}" for code, commit in commits.items())
        raise SystemExit(f"{into}: rows were judged by different code, {of_each}; run every league again")
    if commits and (older := [row["model"] for row in rows if not row.get("judge_code")]):
        print(f"{into}: it is not known which code judged {', '.join(older)}", file=sys.stderr)


def merged(commands: list[str]) -> list[str]:
    """Commands of leagues, as one those that differ in their models alone."""
    models: dict[tuple[str, str], list[str]] = {}  # by what stands before and after them
    for command in commands:
        words = re.fullmatch(r"(.* --models )(\S+)(.*)", command)
        before, names, after = words.groups() if words else (command, "", "")
        models.setdefault((before, after), []).extend(names.split(","))
    return [before + ",".join(dict.fromkeys(names)) + after for (before, after), names in models.items()]


@dataclass(frozen=True)
class League:
    """A finished league, and the run of each model's first seed."""

    folder: Path
    result: dict[str, Any]
    runs: dict[str, Run]
    place: Path  # its set and scale


def opened(folder: Path) -> League:
    if not (folder / "league.json").is_file():
        raise SystemExit(f"{folder} holds no finished league: the line in its command.sh goes on with it")
    result = json.loads((folder / "league.json").read_text())
    first: dict[str, Run] = {}
    for row in result["rows"]:
        if row["model"] not in first and not row.get("error") and (run := runs.by_name(row["run"])):
            first[row["model"]] = run
    if not first:
        raise SystemExit(f"none of the runs of {folder} is here")
    places = {(run.data, run.serving.tree().get("scale")) for run in first.values()}
    if len(places) != 1:
        raise SystemExit(f"the runs of {folder} are of several sets or scales: {sorted(places)}")
    return League(folder, result, first, Path(*places.pop()))


def shared_by(leagues: list[League]) -> dict[str, Any]:
    """How leagues were made that are to be one: `about.json`. They must have one budget, metric and judge."""
    terms = [{key: one.result[key] for key in ("budget", "metric")} | judges(one.result) for one in leagues]
    if any(term != terms[0] for term in terms):
        raise SystemExit(f"{leagues[0].place}: the leagues are of several terms: {terms}")
    versions = leagues[-1].result["provenance"].get("versions", {})
    return {
        "commands": [(one.folder / "command.sh").read_text().splitlines()[-1] for one in leagues],
        "date": date.today().isoformat(),
        "version": __version__,
        "torch": versions.get("torch"),
        "machine": devices.cpu_name(),
        "instructions": list(rates.instruction_sets()),
        "rates": rates.cpu_rates(devices.cpu_name()),  # GFLOP/s of a core
        "cores": start.cores(),
        **terms[0],
        "n": leagues[-1].result["provenance"].get("n_fake"),
        "floor": leagues[-1].result["floor"],
        "left_out": {name: why for one in leagues for name, why in one.result["left_out"].items()},
    }


def judges(result: dict[str, Any]) -> dict[str, Any]:
    """The hash and the accuracy of each network that judges."""
    facts = result["provenance"]
    names = {"first": "features", "second": "second"}
    networks = {title: name for title, name in names.items() if facts.get(name)}
    return {
        "judges": {
            title: {"hash": facts[name], "accuracy": facts.get(f"{name}_accuracy")}
            for title, name in networks.items()
        }
    }


def picture_and_curves(into: Path, model: str, run: Run) -> None:
    if pictures := sorted((run.serving.path / "samples").glob("*.png")):
        small(pictures[-1], into / "samples" / f"{model}.png")
    before = 0.0
    for part in run.stages or [run]:
        stage = "" if part is run else part.path.name
        if rows := list(curve_of(part, before)):
            name = f"{model}.{stage}" if stage else model
            (into / "curves" / f"{name}.csv").write_text(as_csv(rows))
        before += spent(part)


def small(picture: Path, target: Path) -> None:
    """Saves a picture of samples in few pixels and shades, for the wheel."""
    with Image.open(picture) as image:
        whole = image.convert("RGB")
    red, green, blue = whole.split()
    widest, shades = GREY if red.tobytes() == green.tobytes() == blue.tobytes() else COLOUR
    high = max(1, round(whole.height * min(1.0, widest / whole.width)))
    resized = whole.resize((min(whole.width, widest), high), Image.Resampling.LANCZOS)
    resized.quantize(shades).save(target, optimize=True)


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
                zip(
                    measured.CURVE_COLUMNS,
                    (metric, line["step"], seconds, float(f"{value:.5g}")),
                    strict=True,
                )
            )


def peers(folder: Path) -> Path:
    """Writes what `gz bench` said of images of `peers.py`, and returns the file. Rows of other names
    stay."""
    result, rows = json.loads((folder / "result.json").read_text()), []
    leagues = [measured.about(*place) for place in measured.places() if place[0] == result["data"]]
    # each machine trains its own judges for a set that has none
    alien = any(judges(result)["judges"] != about["judges"] for about in leagues)
    omitted = OF_JUDGES if alien else set()
    for row in result["rows"]:
        values = {name: one for name, one in row["metrics"].items() if column_of(name).name not in omitted}
        facts = json.loads(Path(row["path"]).with_suffix(".json").read_text())
        excess = {
            name: standings.excess_from(row["excess"][name]) for name in values if name in row["excess"]
        }
        rows.append(
            {
                "name": ", ".join(filter(None, (facts["title"], facts["package"]))),
                "version": facts["version"],
                "model": BESIDE.get(facts["package"], ""),
                "seconds": facts["train_cpu_seconds"],
                "train_steps": facts["steps"],
                "n": facts["n"],
                "machine": facts["machine"],
                **values,
                **{f"{name}_excess": one.value for name, one in excess.items()},
                **{f"{name}_excess_half": one.half for name, one in excess.items()},
            }
        )
    names = {row["name"] for row in rows}
    rows = [*(row for row in measured.peers(result["data"]) if row["name"] not in names), *rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    path = measured.MEASURED_FOLDER / result["data"] / "peers.csv"
    path.write_text(as_csv([{name: row.get(name) for name in columns} for row in rows]))
    return path


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
                    groups.setdefault(json.dumps(needs.of_data(recipe)[0].info()), []).append(recipe)
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
        on_h100 = forecast.h100_seconds(rows, 1)
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
    if words[:1] == ["league"] and len(words) > 1:
        commit = words.pop() if words[-2] == "--commit" else None
        folders = [Path(word) for word in words[1:] if word != "--commit"]
        for path in league(*folders, commit=commit):
            print(path)
    elif words[:1] == ["peers"] and len(words) == 2:
        print(peers(Path(words[1])))
    elif words[:1] == ["costs"] and set(words[1:]) <= {"--timed"}:
        measured.MEASURED_FOLDER.mkdir(parents=True, exist_ok=True)
        (measured.MEASURED_FOLDER / "costs.csv").write_text(as_csv(price("--timed" in words)))
        print(measured.MEASURED_FOLDER / "costs.csv")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
