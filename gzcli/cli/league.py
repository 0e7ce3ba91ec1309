"""`gz bench --train-missing`: a league, which trains models for one budget each, judges them alike and ranks
them."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import jobs, out
from gzcli.cli.jobs import end, quoted
from gzcli.cli.options import choose, option, split
from gzcli.cli.report import with_report
from gzcli.core import signals
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.units import about, count, counted, duration
from gzcli.data.sets.names import locate
from gzcli.launch.slurm import check_printable
from gzcli.metrics import standings
from gzcli.store import files
from gzcli.store.paths import recipe_names, user_dir
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.core.jobs import BenchJob
    from gzcli.judge.league import Entry, Terms

LATE = 1.25  # times the budget from which it is told that a training took longer
DAY = 86_400  # seconds of training after which it is asked whether to start
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_option = partial(option, panel="Training what is compared")

TrainMissing = Annotated[bool, _option("--train-missing", "Train each model for an equal time first.")]
_BUDGET_HELP = "Time of each training: of work of the cores, on GPUs of the clock."
Budget = Annotated[str | None, _option("--budget 8m|1h", _BUDGET_HELP)]


def _some_models(ctx: typer.Context, incomplete: str) -> list[str]:
    return [*recipe_names(), *([] if "," in incomplete else ["all"])]


_MODELS = _option("--models all|M[,M…]", "Which; without it all that fit.", complete=_some_models)
LeagueModels = Annotated[str | None, _MODELS]
Seeds = Annotated[int, _option("--seeds K", "Trainings of each, from `--seed` on.", min=1)]
_CALLS_HELP = "Compare samplers at N network calls an image, too; 0: not."
Calls = Annotated[int, _option("--calls N", _CALLS_HELP, min=0)]
_CURVE_HELP = "Draw quality against a sampler's steps, or the training's time."
Curve = Annotated[str | None, _option("--curve steps|time", _CURVE_HELP)]


def terms_of(
    job: BenchJob,
    models: Sequence[str] | None,
    seeds: int,
    calls: int,
    curve: str | None,
    budget: str | None,
    *,
    train_missing: bool,
) -> Terms:
    """What the options ask for."""
    from gzcli.judge.league import Terms

    hint = f"gz bench --train-missing --budget {budget if train_missing and budget else '8m'} --data mnist"
    if not train_missing:
        raise UsageError("`--budget`, `--models` and `--curve` say what is trained", hint=hint)
    if not job.data:
        raise UsageError("`--train-missing` needs `--data`, the set to train on", hint=hint)
    seconds = parse_budget(budget)
    job = replace(job, data=locate(job.data).reference)
    curves = tuple(choose("curve", name, ("steps", "time")) for name in split(curve))
    names = tuple(dict.fromkeys(models or ()))
    every = not names or names == ("all",)
    all_seeds = tuple(range(job.seed, job.seed + seeds))
    return Terms(job.data, seconds, None if every else names, all_seeds, job, calls, curves)


def parse_budget(text: str | None) -> float:
    """The seconds of a budget such as `8m`, `1.5h` or `90s`. Raises UsageError for anything else."""
    from gzcli.judge.league import SHORTEST

    hint = "a number with its unit, at least 3s: `--budget 8m`, `--budget 1.5h`"
    if text is None:
        raise UsageError("`--train-missing` needs `--budget`, the time of each training", hint=hint)
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smhd])", text.strip())
    if not match:
        raise UsageError(f"`--budget {text}` is no time", hint=hint)
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds < SHORTEST:
        raise UsageError(f"`--budget {text}` is too short to train anything", hint=hint)
    return seconds


def hold(terms: Terms, *, budget: str, yes: bool, page: Path | None = None) -> None:
    """Holds a league and prints its table. A model that fails is a row with its error."""
    from gzcli.judge.league import draw, entries_of
    from gzcli.store.run_folder import Run

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    for word in sys.argv[1:]:
        check_printable(word=word)
    check_printable(folder=str(Path.cwd()))
    with out.progress("packing", unit="images") as report:
        entries, left_out = entries_of(terms, say=out.info, progress=report)
    if not entries:
        hint = next(iter(left_out.values()), None)
        raise UsageError(f"no model can be trained on `{terms.data}`", hint=hint)
    if entries[0].plan.note:
        out.warn(entries[0].plan.note)
    folder = user_dir("bench") / f"league-{locate(terms.data).key}-{budget.strip()}-{terms.key}"
    with files.lock(folder / ".lock", wait=False) as locked:
        if not locked:
            raise UsageError("another `gz` holds this league", hint=f"it writes into `{folder}`")
        before_start(entries, left_out, terms, budget, yes=yes)
        words = f"cd {shlex.quote(str(Path.cwd()))}\n{shlex.join(['gz', *sys.argv[1:]])}\n"
        files.write_atomic(folder / "command.sh", words)
        with signals.noted() as heard:
            result = play(entries, terms, folder, heard)
        took = [row.get("train_seconds", 0) for row in result["rows"]]
        if longer := [seconds for seconds in took if seconds > LATE * terms.budget]:
            result["notes"].append(
                f"{len(longer)} of {len(took)} trainings took up to {duration(max(longer))} and not "
                f"{duration(terms.budget)}: the machine was busier than at first, or validation and pictures "
                "took more than their share"
            )
        draw(folder, result)
        result |= {"left_out": left_out, "budget": terms.budget}
        files.write_json(Run(folder).league_file, result)
    show(result)
    out.data(with_report(result, folder, page))


def before_start(
    entries: Sequence[Entry], left_out: dict[str, str], terms: Terms, budget: str, *, yes: bool
) -> None:
    """Prints the plan, and asks on a terminal whether to start what takes more than a day."""
    from gzcli.cli.plan import start_or_not

    done = [run for entry in entries if (run := entry.run()) and run.state == "finished"]
    models, seeds = list(dict.fromkeys(entry.model for entry in entries)), len(terms.seeds)
    missing = len(entries) - len(done)
    seconds = missing * terms.budget
    of_seeds = f", {seeds} seeds" if seeds > 1 else ""
    takes = "nothing is trained, all that is left is to judge"
    if missing:
        takes = f"about {about(seconds)} of training, and the time to sample and judge"
    lines = out.fitted(" ".join(models), f"{len(models)} models: ")
    lines += [f"{budget} each{of_seeds}: {missing} to train, {len(done)} there", takes]
    for name, why in left_out.items():
        lines += out.fitted(f"left out: {name} ({why})")
    for line in lines:
        out.info(line)
    less = "fewer models or seeds, or a smaller `--budget`, take less"
    start_or_not(seconds, most=DAY, span="a day", ways=less, yes=yes)


# ---------------------------------------------------------------------------- training and judging


def play(entries: Sequence[Entry], terms: Terms, folder: Path, heard: Sequence[int]) -> dict[str, Any]:
    """Trains and judges one entry after the other, and writes what is known after each. Returns the JSON."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"data": terms.data, "notes": [], "floor": {}, "directions": {}}
    result: dict[str, Any] = {}
    for i, entry in enumerate(entries, 1):
        head = f"{i}/{len(entries)} {entry.model}" + (f" seed {entry.seed}" if len(terms.seeds) > 1 else "")
        since, run = time.monotonic(), entry.run()
        if not run or run.state != "finished":
            until = time.strftime("%H:%M", time.localtime(time.time() + terms.budget))
            out.info(f"{head}: " + ("goes on" if run else f"is trained, until {until} at the earliest"))
        try:
            judged = judge(entry.train(say=out.info), entry, terms, facts)
        except Interrupted as error:
            error.hint = "the same command goes on"
            raise
        except GzError as error:
            if heard:  # by which what the entry ran was ended
                raise stopped(heard[0]) from error
            judged = [
                row_of(entry, entry.run(), setting="default", metrics={}, floor={}, error=error.message)
            ]
        rows += judged
        metric = standings.ranking_metric(rows, terms.job.metrics)
        out.info(f"{head}: {in_short(judged[0], metric)}, {duration(time.monotonic() - since)}")
        result = write(folder, standings.of_one_size(rows), metric, facts)
        if heard:
            raise stopped(heard[0])
    return result


def stopped(number: int) -> Interrupted:
    """The end of a league by a signal that the entry at hand did not end by."""
    message = f"stopped by {signals.name_of(number)}"
    return Interrupted(message, signum=number, hint="the same command goes on")


def row_of(entry: Entry, run: Run | None, **more: Any) -> dict[str, Any]:
    """A row: the model, its seed, and what its run is and took."""
    from gzcli.judge.league import facts_of

    return {"model": entry.model, "seed": entry.seed, **(facts_of(run) if run else {}), **more}


def judge(run: Run, entry: Entry, terms: Terms, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run, of its own sampler first. A curve that cannot be drawn is a note."""
    from gzcli.judge.league import jobs_of, judgement, kept_steps

    rows: list[dict[str, Any]] = []
    if "time" in terms.curves and len(kept_steps(run)) < 2:
        facts["notes"].append(
            f"`{run.id}` was trained for less than a curve and kept no checkpoints for one: "
            f"`gz runs remove {run.id}` lets it be trained again with more (`train.keep`)"
        )
    for kind, (job, descriptions) in jobs_of(run, terms).items():
        key, done = judgement(run, job)
        try:
            if done:  # by the same job before
                result = files.read_json(Run(done).result_file)
            else:
                result = jobs.do_job(jobs.new_folder(run.path / "bench", key), job, quiet=True)
        except GzError as error:
            if kind == "main" or isinstance(error, Interrupted):
                raise
            facts["notes"].append(f"{entry.model}, seed {entry.seed}: no curve of {kind}: {error.message}")
            continue
        for key in ("directions", "floor", "floor_intervals"):
            facts[key] = {**facts.get(key, {}), **result.get(key, {})}
        facts |= {"data": result["data"], "provenance": result["provenance"]}
        facts["notes"] += [note for note in result["notes"] if note not in facts["notes"]]
        for row, description in zip(result["rows"], descriptions, strict=True):
            rate = row["metrics"].get("samples_per_s")
            of_setting = {
                "setting": description["setting"],
                "at_seconds": description.get("seconds"),
                "calls": row.get("calls"),
                "steps": row["sample"].get("steps"),
                "sample_seconds": 1 / rate if rate else None,
                "floor": result["floor"],
                "shape": result["provenance"]["shape"],
            }
            rows.append({**row, **row_of(entry, run), **of_setting})
    return rows


def write(
    folder: Path, rows: Sequence[dict[str, Any]], metric: str | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes the tables into `results/` and returns the JSON so far."""
    main = [row for row in rows if row["setting"] == "default"]
    equal = [row for row in rows if row["setting"].endswith("calls")]
    curves = {kind: [row for row in rows if row["setting"] == kind] for kind in ("steps", "time")}
    best_first = standings.summary(main, metric)
    tables = {"league": standings.table_of(main), "summary": standings.summary_table(best_first)}
    if equal:
        tables["equal_calls"] = standings.table_of(equal)
        tables["summary_equal_calls"] = standings.summary_table(standings.summary(equal, metric))
    if curves["steps"]:
        tables["curve_steps"] = standings.table_of(curves["steps"])
    if curves["time"]:
        tables["curve_time"] = standings.table_of(curves["time"], "at_seconds")
    paths = {name: folder / "results" / f"{name}.csv" for name, text in tables.items() if text}
    for name, path in paths.items():
        files.write_atomic(path, tables[name])
    return {
        **facts,
        "metric": metric,
        "rows": main,
        "equal_calls": equal,
        "curves": curves,
        "summary": best_first,
        "spearman": standings.agreement(main, metric) if metric else None,
        "folder": str(folder),
        "results": list(map(str, paths.values())),
        "pictures": [],
    }


# ---------------------------------------------------------------------------- what is printed


def in_short(row: dict[str, Any], metric: str | None) -> str:
    """A row's figure beside its floor, or its error."""
    if row.get("error"):
        return f"failed: {row['error']}"
    value = standings.value_of(row, metric) if metric else None
    if metric is None or value is None:
        return "judged"
    relative = short(standings.times_floor(row, metric))
    return f"{metric} {value:.4g}, {relative} × floor, {counted(row['calls'], 'call')} an image"


def show(result: dict[str, Any]) -> None:
    """Prints the table, the best first, and where the files are."""
    metric, equal = result["metric"], {}
    if metric and result["equal_calls"]:
        equal = {row["model"]: row for row in standings.summary(result["equal_calls"], metric)}
    at = [f"at {result['equal_calls'][0]['setting']}"] if equal else []
    head = ["", "model", metric or "", "× floor", *at, "params", "calls", "s/image"]
    lines = []
    for row in result["summary"]:
        line = [row["place"], row["model"], with_deviation(row, metric), short(row["times_floor"])]
        if equal:
            line.append(short((equal.get(row["model"]) or {}).get("times_floor")))
        params = count(row["params"]) if row["params"] else None
        lines.append([*line, params, short(row["calls"]), short(row["sample_seconds"], 2)])
    floor = result.get("floor", {}).get(metric)
    lines.append([None, "(real images)", short(floor), *[None] * (len(head) - 3)])
    out.table(head, lines, spare=("calls", "s/image", "params"), elsewhere="`--json` has them")
    for row in result["rows"]:
        if row.get("error"):
            out.info(f"failed: {row['model']}, seed {row['seed']}: {row['error']}")
    if order := result["spearman"]:
        out.info(f"order over seeds: rank correlation {order['mean']:.3f}, {order['min']:.3f} at least")
    notes = [line for note in result["notes"] for line in out.fitted(note, "note: ")]
    for text in (*notes, f"files: {result['folder']}"):
        out.info(text)
    first = result["summary"][0] if result["summary"] else None
    facts = [f"best: {first['model']}, {metric} {with_deviation(first, metric)}"] if first and metric else []
    end(facts, [(f"gz report {quoted(result['folder'])}", "a page of it")])


def with_deviation(row: dict[str, Any], metric: str | None) -> str | None:
    """The mean of a metric, with its standard deviation over seeds where there are several."""
    names = {standings.base(name): name for name in row["metrics"]}
    if metric not in names:
        return None
    spread = row["deviations"][names[metric]]
    return short(row["metrics"][names[metric]]) + (f" ± {short(spread, 2)}" if spread is not None else "")


def short(value: float | None, digits: int = 3) -> str:
    """A number in a few digits, and without a power of ten where it is large; `-` for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
