"""`gz bench`: compares trained models, and images from elsewhere, by quality, likelihood, class balance and
speed. With `--train-missing`, it is `gz league`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gzcli.cli import comparison as com
from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, name_of, took
from gzcli.cli.options import a_model_or_run, argument, option
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.errors import UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.units import count, counted, figure
from gzcli.data.sets.registry import slug
from gzcli.metrics import standings
from gzcli.metrics.metric import column_of
from gzcli.store.runs import by_name

if TYPE_CHECKING:
    from gzcli.launch.comparing import Request

ARROWS = {"down": "↓", "up": "↑"}
COLUMN_PRIORITY = {"seconds": 2, "params": 5}  # like `Column.keep`, for columns that are not metrics
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")

_CONTESTANTS_HELP = "Models, run ids, aliases or folders; or images: a folder, zip, tar or npz."
_Contestants = Annotated[list[str] | None, argument("MODEL|RUN|IMAGES", _CONTESTANTS_HELP, a_model_or_run)]
# of a league, which has a verb of its own
_of_league = partial(option, hidden=True)
_TrainMissing = Annotated[bool, _of_league("--train-missing")]
_Budget = Annotated[str | None, _of_league("--budget 8m|1h")]
_Models = Annotated[str | None, _of_league("--models all|M[,M…]")]
_Seeds = Annotated[int, _of_league("--seeds K", min=1)]
_Calls = Annotated[int, _of_league("--calls N", min=0)]
_Curve = Annotated[str | None, _of_league("--curve steps|time")]
_Jobs = Annotated[int | None, _of_league("--jobs N", min=1)]
_Entry = Annotated[str | None, _of_league("--entry")]


def bench(
    contestants: _Contestants = None,
    data: com.Data = None,
    split: com.Split = "test",
    metrics: com.Metrics = None,
    n: com.N = None,
    weights: com.Weights = None,
    real_stats: com.Stats = None,
    export_stats: com.Export = None,
    checkpoint: opt.Checkpoint = "last",
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    precision: opt.Precision = None,
    seed: opt.SeedOrZero = 0,
    train_missing: _TrainMissing = False,
    budget: _Budget = None,
    models: _Models = None,
    seeds: _Seeds = 1,
    calls: _Calls = 20,
    curve: _Curve = None,
    at_once: _Jobs = None,
    entry: _Entry = None,
    dry_run: opt.DryRun = False,
    yes: opt.Yes = False,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
    wide: opt.Wide = False,
    report: opt.Report = None,
    columns: opt.Columns = None,
) -> None:
    """Compare models, or images from elsewhere, with real images.

    If you name no model, gz compares every model with a finished run on the data set. `gz league` trains
    the models first.
    """
    from gzcli.cli.league import league
    from gzcli.launch import comparing
    from gzcli.report import cited

    if train_missing:
        options = {name: value for name, value in locals().items() if name in league.__annotations__}
        return league(**options)
    of_league = {"--models": models, "--budget": budget, "--curve": curve, "--jobs": at_once}
    check_report(report)
    if any(of_league.values()):
        raise without_training(of_league, data)
    job = comparing.job_of(
        n,
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
    request = comparing.ask(contestants or (), job)
    if columns:
        cited.check(opt.split(columns), request.columns)
    if submit or slurm:
        request.check_images()
        name = f"bench-{slug(request.data.key)}"
        return jobs.submit("bench", name, seed, job.launch, slurm, dry_run=dry_run)
    for run, word in zip(request.runs, request.words, strict=True):
        jobs.announce(run, word, data=request.data.key)
    if dry_run:
        return show_dry(request)
    jobs.fetch(request.weights)
    folder = request.new_folder()
    result = jobs.do_job(folder, request.job)
    com.cite(result, columns) if columns else table(result, wide=wide)
    for text in (*(f"note: {note}" for note in result["notes"]), f"files: {folder}"):
        out.info(text)
    result = with_report(result, folder, report, columns)
    ended(result, folder, took())
    out.data(result)


def show_dry(request: Request) -> None:
    """Prints the cost of sampling runs and of evaluating them."""
    from gzcli.cli.plan import show_sampling

    for note in request.forecast_notes():
        out.info(f"note: {note}")
    job = request.job
    images, evaluation = request.cost(out.info)
    sets = f"{counted(len(job.images), 'set')} of images, " if job.images else ""
    further = out.wrapped_text(f"then {sets}{', '.join(evaluation.parts)}")
    rows = [(run, job.n, cost) for run, cost in zip(request.runs, images, strict=True)]
    show_sampling(rows, further, evaluation, judge_seconds=evaluation.seconds())


def without_training(of_league: Mapping[str, Any], data: str | None) -> UsageError:
    """The error for options of a league, by name with their values, without `--train-missing`."""
    names = [f"`{name}`" for name, value in of_league.items() if value]
    usual = {"--budget 8m": of_league["--budget"], "--data NAME": data}
    lacking = ["--train-missing", *(text for text, value in usual.items() if not value)]
    hint = f"to train the models first, add `{' '.join(lacking)}`"
    if models := of_league["--models"]:
        trained = [name for name in opt.split(models) if name != "all"]
        words = ["gz", "bench", *trained, *(["--data", data] if data else [])]
        hint = f"`{shlex.join(words)}` compares trained models; {hint}"
    return UsageError(f"{' and '.join(names)} need{'s' * (len(names) == 1)} `--train-missing`", hint=hint)


def ended(result: Mapping[str, Any], folder: Path, time: str) -> None:
    """Prints the last lines of `gz bench`: the agreement of the judges, the best models, and the report."""
    then, facts, metric = page_of(result, folder), [time], result["metric"]
    if text := com.judges(result["provenance"]):
        out.info(text)
    best = standings.first_of(result["places"])
    if len(result["places"]) > 1:
        facts = [f"best by {metric}: {' and '.join(best)}", time]
        runs = {row["name"]: row["run"] for row in result["rows"] if row.get("run")}
        if len(best) == 1 and (run := by_name(runs.get(best[0], ""))):
            then.append((f"gz sample {name_of(run)}", "draw more images"))
    for line in com.disagreement(result):
        out.info(line)
    end(facts, then)


def table(result: Mapping[str, Any], *, wide: bool = False) -> None:
    """Prints a line for each contestant and for real images. If space is short, the least important metrics
    are omitted first."""
    floors, directions = result["floors"], result["directions"]
    sizes = {floor["n"] for floor in floors} | {floor["images"] for floor in floors}
    lines = list(result["rows"])
    for floor in floors:
        images = f", {floor['images']:,}" if len(sizes) > 1 else ""
        evenly = "" if floor["drawn"] == "random" else f", by {floor['drawn']}"
        lines.append({**floor, "name": f"(real images{images}{evenly})"})
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    has = {key: any(line.get(key) is not None for line in lines) for key in COLUMN_PRIORITY}
    columns = [*["params"] * has["params"], *names, *["seconds"] * has["seconds"]]
    biased = {name for of_size in result["biased"].values() for name in of_size}
    first = next((name for name in columns if name in directions), None)
    shown = [com.Shown("name", [line["name"] for line in lines])]
    for name in columns:
        arrow = ARROWS.get(directions.get(name) or "", "")
        head = heading(name, columns, lines) + ("~" if name in biased else "") + arrow
        keep = COLUMN_PRIORITY.get(name) or column_of(name).keep
        values = [cell(name, line["metrics"].get(name, line.get(name))) for line in lines]
        shown.append(com.Shown(head, values, keep, name))
        halves = [half(line, name) for line in lines]
        if (wide or name == first) and any(halves):
            shown.append(com.Shown("±", halves, keep))  # omitted before its metric
    com.print_table(shown, wide=wide)


def cell(name: str, value: Any) -> Any:
    if name == "params" and value is not None:
        return count(value)
    return figure(value) if isinstance(value, float) else value


def heading(name: str, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    """The heading of a metric. That of a neighbour-based one omits its features if there is only one kind."""
    word, _, features = name.partition("_")
    several = sum(column.startswith(f"{word}_") for column in columns) > 1
    return (
        word if word in BY_NEIGHBOURS and features and not several else standings.metric_heading(name, lines)
    )


def half(line: Mapping[str, Any], name: str) -> str | None:
    """Half the 95 % interval of a metric; None if it has none."""
    ends = line["intervals"].get(name)
    if ends is None:
        return None
    value = (ends[1] - ends[0]) / 2
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"
