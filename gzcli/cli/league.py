"""`gz bench --train-missing`: trains models for one budget each, judges them alike and ranks them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.cli.league_table import in_short, show
from gzcli.cli.plan import start_or_not, wrapped
from gzcli.cli.report import with_report
from gzcli.core import signals
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.units import about, duration
from gzcli.launch.slurm import check_printable
from gzcli.metrics import standings

if TYPE_CHECKING:
    from gzcli.core.jobs import BenchJob
    from gzcli.judge.league import Entry, Terms
    from gzcli.store.runs import Run

LATE = 1.25  # times the budget from which it is told that a training took longer
DAY = 86_400  # seconds of training after which it is asked whether to start


def hold(terms: Terms, *, budget: str, yes: bool, page: Path | None = None) -> None:
    """Holds a league and prints its table. A model that fails is a row with its error.

    Raises Interrupted where it is stopped: the same command goes on.
    """
    from gzcli.data.sets.names import locate
    from gzcli.judge.league import draw, entries_of
    from gzcli.store import files
    from gzcli.store.paths import user_dir

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    for word in sys.argv[1:]:
        check_printable(word=word)
    check_printable(folder=str(Path.cwd()))
    with out.progress("packing", unit="images") as report:
        entries, left_out = entries_of(terms, say=out.info, progress=report)
    if not entries:
        raise UsageError(
            f"no model can be trained on `{terms.data}`", hint=next(iter(left_out.values()), None)
        )
    if entries[0].plan.note:
        out.warn(entries[0].plan.note)
    folder = user_dir("bench") / f"league-{locate(terms.data).key}-{budget.strip()}-{terms.key}"
    with files.lock(folder / ".lock", wait=False) as got:
        if not got:
            raise UsageError("another `gz` holds this league", hint=f"it writes into `{folder}`")
        before_start(entries, left_out, terms, budget, yes=yes)
        words = f"cd {shlex.quote(str(Path.cwd()))}\n{shlex.join(['gz', *sys.argv[1:]])}\n"
        files.write_atomic(folder / "command.sh", words)
        with signals.noted() as heard:
            result = play(entries, terms, folder, heard)
        result["notes"] += late(result["rows"], terms.budget)
        draw(folder, result)
        result |= {"left_out": left_out, "budget": terms.budget}
        files.write_json(folder / "league.json", result)
    show(result)
    out.data(with_report(result, folder, page))


def before_start(
    entries: Sequence[Entry], left_out: dict[str, str], terms: Terms, budget: str, *, yes: bool
) -> None:
    """Prints the plan. Asks on a terminal whether to start what takes more than a day; in a script it says
    so. Raises UsageError where the answer is no."""
    found = [run for entry in entries if (run := entry.run()) and run.state == "finished"]
    models, seeds = list(dict.fromkeys(entry.model for entry in entries)), len(terms.seeds)
    missing = len(entries) - len(found)
    of_seeds = f", {seeds} seeds" if seeds > 1 else ""
    lines = [
        *wrapped(" ".join(models), f"{len(models)} models: "),
        f"{budget} each{of_seeds}: {missing} to train, {len(found)} there",
        f"about {about(missing * terms.budget)} of training, and the time to sample and judge"
        if missing
        else "nothing is trained, all that is left is to judge",
    ]
    for name, why in left_out.items():
        lines += wrapped(f"left out: {name} ({why})")
    for line in lines:
        out.info(line)
    less = "fewer models or seeds, or a smaller `--budget`, take less"
    start_or_not(missing * terms.budget, most=DAY, span="a day", ways=less, yes=yes)


def play(entries: Sequence[Entry], terms: Terms, folder: Path, got: Sequence[int]) -> dict[str, Any]:
    """Trains and judges one entry after the other, and writes what is known after each. Returns the JSON."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"data": terms.data, "notes": [], "floor": {}, "directions": {}}
    result: dict[str, Any] = {}
    for i, entry in enumerate(entries, 1):
        head = f"{i}/{len(entries)} {entry.model}" + (f" seed {entry.seed}" if len(terms.seeds) > 1 else "")
        since, trained = time.monotonic(), entry.run()
        if not trained or trained.state != "finished":
            until = time.strftime("%H:%M", time.localtime(time.time() + terms.budget))
            out.info(f"{head}: " + ("goes on" if trained else f"is trained, until {until} at the earliest"))
        try:
            found = judged(entry.train(say=out.info), entry, terms, facts)
        except Interrupted as error:
            error.hint = "the same command goes on"
            raise
        except GzError as error:
            if got:  # by which what the entry ran was ended
                raise stopped(got) from error
            found = [failed(entry, error)]
        rows += found
        metric = standings.ranking_metric(rows, terms.job.metrics)
        out.info(f"{head}: {in_short(found[0], metric)}, {duration(time.monotonic() - since)}")
        result = write(folder, standings.of_one_size(rows), metric, facts)
        if got:
            raise stopped(got)
    return result


def stopped(got: Sequence[int]) -> Interrupted:
    """The end of a league by a signal that the entry at hand did not end by."""
    message = f"stopped by {signals.name_of(got[0])}"
    return Interrupted(message, signum=got[0], hint="the same command goes on")


def failed(entry: Entry, error: GzError) -> dict[str, Any]:
    """The row of a training, or of a judgement, that ended with an error."""
    from gzcli.judge.league import facts_of

    run = entry.run()
    return {
        "model": entry.model,
        "seed": entry.seed,
        "setting": "default",
        **(facts_of(run) if run else {}),
        "metrics": {},
        "floor": {},
        "error": error.message,
    }


def judged(run: Run, entry: Entry, terms: Terms, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run, of its own sampler first. A curve that cannot be drawn is a note."""
    from gzcli.judge.league import facts_of, jobs_of, kept_steps

    own = {"model": entry.model, "seed": entry.seed, **facts_of(run)}
    rows: list[dict[str, Any]] = []
    if "time" in terms.curves and len(kept_steps(run)) < 2:
        facts["notes"].append(
            f"`{run.id}` was trained for less than a curve and kept no checkpoints for one: "
            f"`gz runs remove {run.id}` lets it be trained again with more (`train.keep`)"
        )
    for kind, (job, descriptions) in jobs_of(run, terms).items():
        try:
            result = result_of(run, job)
        except Interrupted:
            raise
        except GzError as error:
            if kind == "main":
                raise
            facts["notes"].append(f"{entry.model}, seed {entry.seed}: no curve of {kind}: {error.message}")
            continue
        facts["directions"] |= result.get("directions", {})
        facts["data"], facts["floor"] = result["data"], {**facts["floor"], **result["floor"]}
        facts["floor_intervals"] = {**facts.get("floor_intervals", {}), **result.get("floor_intervals", {})}
        facts["provenance"] = result["provenance"]
        facts["notes"] += [note for note in result["notes"] if note not in facts["notes"]]
        for row, known in zip(result["rows"], descriptions, strict=True):
            rate = row["metrics"].get("samples_per_s")
            found = {
                **row,
                **own,
                "setting": known["setting"],
                "at_seconds": known.get("seconds"),
                "calls": row.get("calls"),
                "steps": row["sample"].get("steps"),
                "sample_seconds": 1 / rate if rate else None,
                "floor": result["floor"],
                "shape": result["provenance"]["shape"],
            }
            rows.append(found)
    return rows


def result_of(run: Run, job: BenchJob) -> dict[str, Any]:
    """The result of a job that judges a run: that of the same job before, or of one done now."""
    from gzcli.cli.jobs import do_job, new_folder
    from gzcli.judge.league import judgement
    from gzcli.store import files

    key, done = judgement(run, job)
    if done:
        found: dict[str, Any] = files.read_json(done / "result.json")
        return found
    return do_job(new_folder(run.path / "bench", key), job, quiet=True)


def late(rows: Sequence[dict[str, Any]], budget: float) -> list[str]:
    """A note where trainings took longer than their budget; [] where none did."""
    longer = [row["train_seconds"] for row in rows if row.get("train_seconds", 0) > LATE * budget]
    if not longer:
        return []
    took = f"took up to {duration(max(longer))} and not {duration(budget)}"
    return [
        f"{len(longer)} of {len(rows)} trainings {took}: "
        "the machine was busier than at first, or validation and pictures took more than their share"
    ]


# ---------------------------------------------------------------------------- what is written


def write(
    folder: Path, rows: Sequence[dict[str, Any]], metric: str | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes the tables into `results/` and returns the JSON so far: rows of the models' own samplers as
    those of `gz bench`, "equal_calls", "curve" rows, and the "summary" over seeds."""
    from gzcli.store import files

    main = [row for row in rows if row["setting"] == "default"]
    equal = [row for row in rows if row["setting"].endswith("calls")]
    curves = {kind: [row for row in rows if row["setting"] == kind] for kind in ("steps", "time")}
    best_first = standings.summary(main, metric)
    tables = {
        "league": standings.table_of(main),
        "summary": standings.summary_table(best_first),
        "equal_calls": standings.table_of(equal) if equal else "",
        "summary_equal_calls": standings.summary_table(standings.summary(equal, metric)) if equal else "",
        "curve_steps": standings.table_of(curves["steps"]) if curves["steps"] else "",
        "curve_time": standings.table_of(curves["time"], "at_seconds") if curves["time"] else "",
    }
    for name, text in tables.items():
        if text:
            files.write_atomic(folder / "results" / f"{name}.csv", text)
    return {
        **facts,
        "metric": metric,
        "rows": main,
        "equal_calls": equal,
        "curves": curves,
        "summary": best_first,
        "spearman": standings.agreement(main, metric) if metric else None,
        "folder": str(folder),
        "results": [str(folder / "results" / f"{name}.csv") for name, text in tables.items() if text],
        "pictures": [],
    }
