"""`gz league`: trains models, each for the same time, and ranks them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import comparison as com
from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end
from gzcli.cli.options import a_model, a_set, argument, option
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.sections import LaunchSection
from gzcli.core.units import about, count, counted, duration, short
from gzcli.data.sets.registry import slug
from gzcli.launch.cost import OF_EVALUATION, OF_SAMPLING, OF_TRAINING, Cost
from gzcli.launch.slurm import check_printable
from gzcli.metrics import standings
from gzcli.metrics.metric import column_of
from gzcli.store.paths import recipe_names

if TYPE_CHECKING:
    from gzcli.league.league import Entry, Terms
    from gzcli.league.loop import League

LONG_LEAGUE_SECONDS = 86_400  # seconds of training above which gz asks before it starts
LEAGUE_KEYS = {
    OF_TRAINING: "train_seconds",
    OF_SAMPLING: "sample_seconds",
    OF_EVALUATION: "judge_seconds",
}  # in JSON


def _models_or_all(ctx: typer.Context, incomplete: str) -> list[str]:
    return [*recipe_names(), *([] if "," in incomplete else ["all"])]


_Names = Annotated[list[str] | None, argument("MODEL", "The same as `--models`.", a_model)]
_Data = Annotated[
    str | None, option("--data NAME|PATH", "A data set, or your own images. Required.", complete=a_set)
]
_BUDGET_HELP = "Training time per model: CPU time on CPUs, wall-clock time on GPUs. Required."
_Budget = Annotated[str | None, option("--budget 8m|1h", _BUDGET_HELP)]
_MODELS_HELP = "Models to train. Default: all that fit the data set."
_Models = Annotated[str | None, option("--models all|M[,M…]", _MODELS_HELP, complete=_models_or_all)]
_SEEDS_HELP = "Number of trainings per model, with seeds counted from `--seed`."
_Seeds = Annotated[int, option("--seeds K", _SEEDS_HELP, min=1)]
_CALLS_HELP = "Also compare samplers at N network calls per image. 0: skip."
_Calls = Annotated[int, option("--calls N", _CALLS_HELP, min=0)]
_JOBS_HELP = f"{opt.JOBS_HELP} With `--submit`, a job array."
_Jobs = Annotated[int | None, option("--jobs N", _JOBS_HELP, min=1)]
_Entry = Annotated[str | None, option("--entry", hidden=True)]  # of a league, which this process is for
_CURVE_HELP = "Plot quality against sampler steps or training time."
_Curve = Annotated[str | None, option("--curve steps|time", _CURVE_HELP)]


def league(
    contestants: _Names = None,
    data: _Data = None,
    budget: _Budget = None,
    models: _Models = None,
    seeds: _Seeds = 1,
    at_once: _Jobs = None,
    curve: _Curve = None,
    calls: _Calls = 20,
    split: com.Split = "test",
    metrics: com.Metrics = None,
    n: com.NOfLeague = None,
    weights: com.Weights = None,
    real_stats: com.Stats = None,
    export_stats: com.Export = None,
    checkpoint: opt.Checkpoint = "last",
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    precision: opt.Precision = None,
    seed: opt.SeedOrZero = 0,
    entry: _Entry = None,
    dry_run: opt.DryRun = False,
    yes: opt.Yes = False,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
    report: opt.Report = None,
    columns: opt.Columns = None,
) -> None:
    """Train models for equal times on a data set, and rank them.

    Re-running the command resumes a league, and trains only what is missing.
    """
    from gzcli.launch import comparing
    from gzcli.league import league as request
    from gzcli.league.loop import run_entry
    from gzcli.report import cited

    check_report(report)
    job = comparing.job_of(
        n,
        request.LEAGUE_SAMPLES,
        data=data or "",
        metrics=opt.split(metrics),
        weights=weights,
        real_stats=real_stats,
        export_stats=export_stats,
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        launch=LaunchSection(opt.parse_gpus(gpus), cpu, processes),
        split=split,
    )
    names = opt.split(models) if models else contestants
    how: dict[str, Any] = {"seeds": seeds, "calls": calls, "curves": opt.split(curve), "at_once": at_once}
    terms = request.ask(names, budget, job, **how)
    if columns:
        cited.check(opt.split(columns), request.columns_of(terms))
    if submit or slurm:
        return submit_league(terms, at_once, slurm, dry_run=dry_run)
    if dry_run:
        return show_dry(prepared(terms, str(budget)), str(budget), at_once)
    jobs.fetch(comparing.downloads(job))
    if entry:
        return run_entry(terms.of(entry), out.info)
    run(terms, budget=str(budget), yes=yes, at_once=at_once, page=report, columns=columns)


def submit_league(terms: Terms, at_once: int | None, options: list[str] | None, *, dry_run: bool) -> None:
    """Submits a league as one job; with `--jobs`, as an array with a task for each entry."""
    from gzcli.league.league import tasks_of

    name, entries = f"bench-{slug(f'league-{terms.data}')}", tasks_of(terms)
    tasks = entries if at_once else []
    array = [f"array=0-{len(tasks) - 1}%{at_once}"] if tasks else []
    options = [*array, *(options or ())]
    verb = "bench" if "--train-missing" in sys.argv else "league"
    jobs.submit(verb, name, terms.job.seed, terms.job.launch, options, "same", tasks=tasks, dry_run=dry_run)
    if tasks:
        out.info(f"{counted(len(tasks), 'task')}; then repeat the command without `--submit` for the tables")


def prepared(terms: Terms, budget: str) -> League:
    """The league of these terms, whose data set is packed."""
    from gzcli.league.loop import League

    with out.progress("packing", unit="images") as report:
        return League.of(terms, budget, say=out.info, progress=report)


def run(
    terms: Terms, *, budget: str, yes: bool, at_once: int | None, page: Path | None, columns: str | None
) -> None:
    """Runs a league and prints its table."""
    from gzcli.league.loop import run_league

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    for word in sys.argv[1:]:
        check_printable(word=word)
    check_printable(folder=str(Path.cwd()))
    league = prepared(terms, budget)
    if note := league.entries[0].plan.note:
        out.warn(note)
    before_start(league, budget, at_once, yes=yes)
    command = f"cd {shlex.quote(str(Path.cwd()))}\n{shlex.join(['gz', *sys.argv[1:]])}\n"
    mode = "quiet" if out.is_quiet() else "human"
    result = run_league(league, at_once=at_once, command=command, say=out.info, mode=mode)
    result = with_report(result, league.folder, page, columns)
    show_league(result, columns)
    out.data(result)


def before_start(league: League, budget: str, at_once: int | None, *, yes: bool) -> None:
    """Prints the plan. On a terminal, it asks for confirmation of what takes more than a day."""
    from gzcli.cli.plan import start_or_not

    lines, facts = plan_of(league, budget, at_once)
    for line in lines:
        out.info(line)
    less = "to save time, use fewer models or seeds, or a smaller `--budget`"
    start_or_not(facts["seconds"], most=LONG_LEAGUE_SECONDS, span="a day", ways=less, yes=yes)


def show_dry(league: League, budget: str, at_once: int | None) -> None:
    """Prints the plan of a league."""
    lines, facts = plan_of(league, budget, at_once)
    for line in lines:
        out.text(line)
    out.data(facts)


def plan_of(league: League, budget: str, at_once: int | None) -> tuple[list[str], dict[str, Any]]:
    """What a league will do and what it still costs, in words and as JSON."""
    from gzcli.league.cost import costs_of, judges_of, parallel_of, seconds_of

    rows = costs_of(league, out.info)
    costs = [cost for _, cost in rows]
    judges, parallel = judges_of(league, costs), parallel_of(league, costs, at_once)
    seconds = seconds_of(costs, judges, parallel)
    facts = {"data": league.terms.data, "budget": league.terms.budget, "judges_seconds": judges.seconds()}
    facts |= {"parallel": parallel, "seconds": seconds}
    facts["rows"] = [as_json(entry, *row) for entry, row in zip(league.entries, rows, strict=True)]
    facts["left_out"] = dict(league.left_out)
    total = [f"total: about {about(seconds)}{in_parallel(parallel)}"]
    lines = [*trainings_of(league, budget, costs), *times_of(league, costs, judges, total)]
    for name, why in league.left_out.items():
        lines += out.wrapped_text(f"left out: {name} ({why})")
    return lines, facts


def as_json(entry: Entry, n: int, cost: Cost) -> dict[str, Any]:
    """The remaining cost of an entry; `sample_seconds` is None if it is unknown."""
    seconds: dict[str, float | None] = {key: cost.why.get(why, 0.0) for why, key in LEAGUE_KEYS.items()}
    if cost.fixed is None:
        seconds["sample_seconds"] = None
    return {"model": entry.model, "seed": entry.seed, "n": n, "calls": cost.calls, **seconds}


def trainings_of(league: League, budget: str, costs: Sequence[Cost]) -> list[str]:
    """The models of a league, and how many of its trainings are left, in words."""
    models = list(dict.fromkeys(entry.model for entry in league.entries))
    left = sum(OF_TRAINING in cost.why for cost in costs)
    number = len(league.terms.seeds)
    seeds = f", {number} seeds" if number > 1 else ""
    trained = f"{budget} each{seeds}: {left} to train, {len(costs) - left} already trained"
    return [*out.wrapped_text(" ".join(models), f"{counted(len(models), 'model')}: "), trained]


def times_of(league: League, costs: Sequence[Cost], judges: Cost, total: Sequence[str]) -> list[str]:
    """The remaining times of a league in words, and, if there are several, the lines of the total."""
    whole = sum(costs, Cost()) + judges
    parts = Cost(why={why: whole.why[why] for why in (*LEAGUE_KEYS, *judges.why) if why in whole.why}).parts
    words = [*parts[:-2], " and ".join(parts[-2:])] if parts else ["nothing to do"]
    lines = [*out.wrapped_text(", ".join(words)), *(total if len(parts) > 1 else ())]
    pairs = zip(league.entries, costs, strict=True)
    unknown = dict.fromkeys(entry.model for entry, cost in pairs if cost.fixed is None)
    return [*lines, *(out.wrapped_text(" ".join(unknown), "unknown sampling time: ") if unknown else ())]


def in_parallel(parallel: int) -> str:
    return f" with {parallel} trainings in parallel" if parallel > 1 else ""


def show_league(result: dict[str, Any], columns: str | None = None) -> None:
    """Prints the table, the best first, and the paths of the files."""
    if columns:
        com.cite(result, columns)
    else:
        standings_table(result)
    for row in result["rows"]:
        if row.get("error"):
            out.info(f"failed: {row['model']}, seed {row['seed']}: {row['error']}")
    if order := result["spearman"]:
        out.info(f"rank correlation between seeds: mean {order['mean']:.3f}, minimum {order['min']:.3f}")
    notes = [line for note in result["notes"] for line in out.wrapped_text(note, "note: ")]
    judged = com.judges(result.get("provenance") or {})
    for text in (*com.disagreement(result), judged, *notes, f"files: {result['folder']}"):
        if text:
            out.info(text)
    best = standings.first_of({row["title"]: row["place"] for row in result["summary"]})
    facts = [f"best by {result['metric']}: {' and '.join(best)}"] if best else []
    if unranked := [row["title"] for row in result["summary"] if row["metrics"] and row["place"] is None]:
        facts.append(f"no rank: {' and '.join(unranked)}")
    if failed := sum("error" in row for row in result["rows"]):
        facts.append(f"{failed} of {counted(len(result['rows']), 'training')} failed")
    end(facts, page_of(result, result["folder"]))


def standings_table(result: Mapping[str, Any]) -> None:
    """Prints a line for each model, the best first, and one for real images."""
    metric, rows, floors = result["metric"], result["summary"], floors_of(result["rows"])
    names = {standings.base(name): None for row in rows for name in row["metrics"]}
    beside = [name for name in names if name != metric and column_of(name).beside]
    beside.sort(key=lambda name: -column_of(name).keep)

    def shown(
        head: str, values: Iterable[Any], real: Iterable[Any] = (), keep: int | None = None
    ) -> com.Shown:
        cells = [*values, *real]
        return com.Shown(head, [*cells, *[None] * (len(rows) + len(floors) - len(cells))], keep)

    def of_metric(name: str | None, head: str, keep: int | None = None) -> com.Shown:
        values = (short(standings.value_of(row, name) if name else None) for row in rows)
        return shown(head, values, (short(floor.get(name or "")) for floor in floors.values()), keep)

    columns = [
        shown("", (row["place"] for row in rows)),
        shown("model", (row["title"] for row in rows), floors),
    ]
    columns += [
        of_metric(metric, metric or ""),
        shown("excess", (with_interval(row, metric) for row in rows)),
    ]
    least = 5 + len(beside)
    columns += [of_metric(name, name.removesuffix("_lenet"), least - i) for i, name in enumerate(beside)]
    if metric and result["equal_calls"]:
        of_calls = standings.summary(result["equal_calls"], metric, result["budget"])
        equal = {row["model"]: row for row in of_calls}
        excesses = (with_interval(equal.get(row["model"]) or {}, metric) for row in rows)
        columns.append(shown(f"at {result['equal_calls'][0]['setting']}", excesses, keep=4))
    trained = (duration(row["train_seconds"]) if row["train_seconds"] else None for row in rows)
    params = (count(row["params"]) if row["params"] else None for row in rows)
    columns += [shown("trained", trained, keep=3), shown("params", params, keep=2)]
    columns.append(shown("calls", (short(row["calls"]) for row in rows), keep=1))
    columns.append(shown("s/image", (short(row["sample_seconds"], 2) for row in rows), keep=0))
    com.print_table(columns, elsewhere="see `--json`")


def floors_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, float]]:
    """The floors of a league's rows, one for each way in which their images were sampled. Of several, the
    floor with the most images is returned."""
    floors = {}
    for row in sorted(rows, key=lambda row: row.get("n") or 0):
        if row.get("floor"):
            evenly = "" if row.get("drawn", "random") == "random" else f", by {row['drawn']}"
            floors[f"(real images{evenly})"] = row["floor"]
    return floors


def with_interval(row: Mapping[str, Any], metric: str | None) -> str | None:
    """The excess over the floor, with half the width of its interval."""
    if not (ends := row.get("excess", {}).get(metric)):
        return None
    return standings.excess_from(ends).words
