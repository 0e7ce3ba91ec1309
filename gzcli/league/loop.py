"""The loop of a league. Its entries are trained and judged one by one, or several in parallel processes, and
the tables are written after each. The same call resumes an interrupted league."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.core import signals
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import counted, duration
from gzcli.data.packs.open import pack_options, peek
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import locate
from gzcli.launch import jobs, launcher
from gzcli.league.league import (
    Entry,
    Terms,
    entries_of,
    is_judged,
    is_outdated,
    jobs_of,
    judged_by,
    judgement,
    kept_steps,
    run_facts,
)
from gzcli.league.training import RESUME_HINT, stopped, train_judges
from gzcli.metrics import standings
from gzcli.metrics.selection import choose
from gzcli.store import claims, files
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

MARKERS = "osD^vP*X"
SECONDS_COUNT = 600.0  # budget below which times of day are printed with seconds
Point = tuple[float, float, float]  # x, mean over seeds, half of its 95 % interval


@dataclass(frozen=True)
class League:
    """A league that is ready to run."""

    terms: Terms
    entries: Sequence[Entry]
    left_out: Mapping[str, str]  # model → why it does not take part
    folder: Path
    pack: PackMeta | None  # that of the real images; None if they are not packed
    metrics: Sequence[str]  # names of the metrics

    @classmethod
    def of(cls, terms: Terms, budget: str, *, say: Say = silent, progress: Report = unreported) -> League:
        """The league of these terms. `budget` is the budget as typed. Raises UsageError if no model can take
        part, or if a metric needs more real images."""
        entries, left_out = entries_of(terms, say=say, progress=progress)
        if not entries:
            hint = next(iter(left_out.values()), None)
            raise UsageError(f"no model can be trained on `{terms.data}`", hint=hint)
        name = f"league-{locate(terms.data).key}-{budget.strip()}-{terms.key}"
        pack = peek(terms.data, **pack_options(entries[0].recipe.parts[-1].data))
        chosen = choose(terms.job.metrics, pack, terms.job.split)
        return cls(terms, entries, left_out, user_dir("bench") / name, pack, chosen)

    def name_of(self, entry: Entry) -> str:
        return f"{entry.model} seed {entry.seed}" if len(self.terms.seeds) > 1 else entry.model


def run_league(
    league: League,
    *,
    at_once: int | None = None,
    command: str | None = None,
    say: Say = silent,
    mode: str = "human",
) -> dict[str, Any]:
    """Runs a league and returns its JSON. A model that fails becomes a row with its error. Raises the error
    of the first row if all have failed.

    at_once: number of entries to train in parallel, each in its own process. None: one at a time, in this
      process.
    command: shell command that runs the league again. None: there is none.
    mode: "quiet" if the processes of entries print nothing.
    """
    terms, folder = league.terms, league.folder
    with files.lock(folder / ".lock", wait=False) as locked:
        if not locked:
            raise UsageError(
                "another `gz` is running this league", hint=f"wait for it to finish; it writes to `{folder}`"
            )
        if command:
            files.write_atomic(folder / "command.sh", command)
        left = [entry for entry in league.entries if not ((run := entry.run()) and run.state == "finished")]
        train_judges((entry.recipe.parts[0] for entry in left), say, terms.job.metrics)
        with signals.noted() as heard:
            result, failed = run_entries(league, begun(league, at_once, heard, say, mode), heard, say)
        if late := [row for row in result["summary"] if row["late"]]:
            longest = max(row["train_seconds"] for row in late)
            result["notes"].append(
                f"no rank for {', '.join(row['title'] for row in late)}: trainings took up to "
                f"{duration(longest)} on average instead of {duration(terms.budget)}, for validation, "
                "sample grids or preparation"
            )
        if len(terms.seeds) == 1:
            result["notes"].append("1 seed: ± covers the images only; another seed may differ by more")
        draw(folder, result)
        result |= {"left_out": dict(league.left_out)}
        files.write_json(Run(folder).league_file, result)
    if len(failed) == len(league.entries):
        message = f"all {counted(len(failed), 'training')} failed: {failed[0].message}"
        raise type(failed[0])(message, hint=failed[0].hint)
    return result


# ---------------------------------------------------------------------------- training and judging

# an entry's position, the time when it began, and what failed in its process
Begun = tuple[int, float, GzError | None]


def run_entries(
    league: League, order: Iterator[Begun], heard: Sequence[int], say: Say
) -> tuple[dict[str, Any], list[GzError]]:
    """Trains and judges the entries one by one, and writes the tables after each. Returns the JSON and the
    errors of rows."""
    terms, entries = league.terms, league.entries
    rows: dict[int, list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {"data": terms.data, "notes": [], "floor": {}, "directions": {}}
    result, errors = dict[str, Any](), list[GzError]()
    for i, since, problem in order:
        entry, head = entries[i], f"{len(rows) + 1}/{len(entries)} {league.name_of(entries[i])}"
        try:
            if problem:
                raise problem
            rows[i] = judge(train(entry, terms.budget, head, say), entry, terms, facts, say)
        except Interrupted as error:
            error.advise(RESUME_HINT)
            raise
        except GzError as error:
            if heard:  # the signal that ended the entry's command
                raise stopped(heard[0]) from error
            failed = {"setting": "default", "metrics": {}, "floor": {}, "error": error.message}
            rows[i] = [facts_of_row(entry, entry.run()) | failed]
            errors.append(error)
        so_far = [row for key in sorted(rows) for row in rows[key]]
        metric = standings.ranking_metric(so_far, terms.job.metrics, facts["directions"])
        say(f"{head}: {in_short(rows[i][0], metric)}, {duration(time.monotonic() - since)}")
        facts["budget"] = terms.budget
        result = write(league.folder, standings.of_one_size(so_far), metric, facts)
    if heard:
        raise stopped(heard[0])
    return result, errors


def begun(league: League, at_once: int | None, heard: Sequence[int], say: Say, mode: str) -> Iterator[Begun]:
    """Yields the entries one by one; after a signal, none begins. With `at_once`, that many at a time are
    trained and judged in parallel processes before they are yielded. Entries with nothing left to do are
    yielded directly."""
    entries = league.entries
    apart = [i for i, entry in enumerate(entries) if at_once and not is_judged(entry.run(), league.terms)]
    for i in range(len(entries)):
        if i not in apart and (at_once or not heard):
            yield i, time.monotonic(), None
    folders = {i: league.folder / "entries" / f"{i:03d}" for i in apart}
    for i, folder in folders.items():
        league.terms.of(entries[i].key).write(folder)
    free = launcher.slots(at_once or 1, gpus=bool(league.terms.job.launch.gpus))
    free = [{**slot, "GZ_OUTPUT": mode} for slot in free]
    for i, since, code in launcher.side_by_side("gzcli.league", folders, free, heard):
        problem = None
        try:
            launcher.outcome(Run(folders[i]), code, [])
        except GzError as error:
            problem = error
        if problem and heard:
            say(f"{league.name_of(entries[i])}: {problem.message}")
        else:
            yield i, since, problem


def run_entry(terms: Terms, say: Say) -> None:
    """Trains and judges an entry, for a league that another process runs now or later."""
    with signals.noted() as heard:
        (entry,), _ = entries_of(terms, say=say)
        judge(train(entry, terms.budget, entry.model, say), entry, terms, {"notes": []}, say)
        if heard:
            raise stopped(heard[0])


def train(entry: Entry, budget: float, head: str, say: Say) -> Run:
    run = entry.run()
    if not run or run.state != "finished":
        clock = "%H:%M:%S" if budget < SECONDS_COUNT else "%H:%M"
        until = time.strftime(clock, time.localtime(time.time() + budget))
        say(f"{head}: " + ("resuming" if run else f"training until {until} or later"))
    return entry.train(say=lambda text: say(f"{head}: {text}"))


def facts_of_row(entry: Entry, run: Run | None) -> dict[str, Any]:
    """The model and seed of a row, and the id and cost of its run."""
    facts = {"model": entry.model, "seed": entry.seed, "command": entry.command}
    return facts | (run_facts(run) if run else {})


def judge(run: Run, entry: Entry, terms: Terms, facts: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    """The rows of a run, first with its own sampler. If a curve cannot be drawn, a note is printed."""
    rows: list[dict[str, Any]] = []
    if "time" in terms.curves and len(kept_steps(run)) < 2:
        facts["notes"].append(
            f"`{run.id}` kept too few checkpoints for a curve; "
            f"to train it again with more, first run `gz runs remove {run.id}`"
        )
    for kind, (job, descriptions) in jobs_of(run, terms).items():
        key, result = judgement(run, job)
        try:
            if result is None:
                if kind == "main" and is_outdated(run, job, key):
                    say(f"{entry.model}: evaluated again, because gz's code or the weights have changed")
                result = jobs.do_job(claims.new_folder(run.path / "bench", key), job)
        except GzError as error:
            if kind == "main" or isinstance(error, Interrupted):
                raise
            facts["notes"].append(f"{entry.model}, seed {entry.seed}: no curve of {kind}: {error.message}")
            continue
        for key in ("directions", "floor", "floor_intervals"):
            facts[key] = {**facts.get(key, {}), **result.get(key, {})}
        facts |= {"data": result["data"], "provenance": result["provenance"]}
        facts["notes"] += [note for note in result["notes"] if note not in facts["notes"]]
        by = judged_by()
        for row, description in zip(result["rows"], descriptions, strict=True):
            rate = row["metrics"].get("samples_per_s")
            of_setting = {
                "setting": description["setting"],
                "title": row["title"],
                "at_seconds": description.get("seconds"),
                "calls": row.get("calls"),
                "steps": row["sample"].get("steps"),
                "sample_seconds": 1 / rate if rate else None,
                "shape": result["provenance"]["shape"],
            }
            rows.append({**row, **facts_of_row(entry, run), **of_setting, **by})
    return rows


def write(
    folder: Path, rows: Sequence[dict[str, Any]], metric: str | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes the tables into `results/` and returns the JSON so far."""
    main = [row for row in rows if row["setting"] == "default"]
    equal = [row for row in rows if row["setting"].endswith("calls")]
    curves = {kind: [row for row in rows if row["setting"] == kind] for kind in ("steps", "time")}
    best_first, best_of_equal = (standings.summary(some, metric, facts["budget"]) for some in (main, equal))
    tables = {
        "league": standings.table_of(main),
        "summary": standings.summary_table(best_first),
        "equal_calls": standings.table_of(equal) if equal else "",
        "summary_equal_calls": standings.summary_table(best_of_equal) if equal else "",
        "curve_steps": standings.table_of(curves["steps"]) if curves["steps"] else "",
        "curve_time": standings.table_of(curves["time"], "at_seconds") if curves["time"] else "",
    }
    files_of = {folder / "results" / f"{name}.csv": text for name, text in tables.items() if text}
    for path, text in files_of.items():
        files.write_atomic(path, text)
    spearman = standings.agreement(main, metric) if metric else None
    result = facts | {"metric": metric, "rows": main, "equal_calls": equal, "curves": curves}
    result |= {"summary": best_first, "spearman": spearman, "folder": str(folder)}
    result["second"] = standings.second_of(best_first, metric) if metric else None
    return result | {"results": list(map(str, files_of)), "pictures": []}


def in_short(row: dict[str, Any], metric: str | None) -> str:
    """A row's metric beside its floor, or its error."""
    if row.get("error"):
        return f"failed: {row['error']}"
    value = standings.value_of(row, metric) if metric else None
    if metric is None or value is None:
        return "evaluated"
    excess = standings.excess_of(row, metric)
    over = f", {excess.words} above real images" if excess else ""
    return f"{metric} {value:.4g}{over}, {counted(row['calls'], 'call')} per image"


# ---------------------------------------------------------------------------- images


def draw(folder: Path, result: dict[str, Any]) -> None:
    metric = result["metric"]
    for kind, (key, x) in standings.AXES.items():
        points = standings.curve(result["curves"][kind], metric, key) if metric else {}
        if points:
            path, title = folder / "results" / f"curve_{kind}.png", f"{result['data']}: {metric} against {x}"
            curves = {
                row["model"]: points[row["model"]] for row in result["summary"] if row["model"] in points
            }
            floor = result["floor"].get(metric)
            draw_curves(path, curves, x=x, y=metric, floor=floor, title=title)
            result["pictures"].append(str(path))


def draw_curves(
    path: Path, curves: Mapping[str, Sequence[Point]], *, x: str, y: str, floor: float | None, title: str
) -> None:
    """Writes a figure with a line for each model and one for real images, on logarithmic axes."""
    from matplotlib.ticker import LogLocator

    from gzcli.engine.pictures import pyplot, save_figure

    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    colours = pyplot().get_cmap("tab10").colors
    for i, (model, points) in enumerate(curves.items()):
        xs, ys, halves = zip(*points, strict=True)
        style = {"color": colours[i % len(colours)], "marker": MARKERS[i // len(colours) % len(MARKERS)]}
        style |= {"markersize": 5, "linewidth": 1.3, "capsize": 2}
        axes.errorbar(xs, ys, yerr=halves, label=model, **style)
    if floor and floor > 0:
        axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="real images")
    if any(half for points in curves.values() for *_, half in points):
        y += ", 95 % intervals over seeds"
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, path)
