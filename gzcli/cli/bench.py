"""`gz bench`: compares trained models, and images from elsewhere, by quality, likelihood, class balance and
speed. With `--train-missing` it is a league: it first trains the models, each on the same budget. `gz which`
is a series of leagues."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, name_of, quoted, took
from gzcli.cli.options import a_model, a_model_or_run, a_set, argument, option
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.errors import UsageError, choose
from gzcli.core.sections import LaunchSection, part_of
from gzcli.core.units import BUDGETS, MOST, about, count, counted, duration, figure, seconds_of, short
from gzcli.data.packs.open import counts_of, pack_options, peek
from gzcli.data.sets.registry import locate, slug
from gzcli.launch.slurm import check_printable
from gzcli.metrics import networks, selection, standings
from gzcli.metrics.metric import column_of, help_text, metrics, one_distance, weights_of
from gzcli.models import catalog
from gzcli.recipe.suggest import NEEDS
from gzcli.store import claims
from gzcli.store.paths import recipe_names, user_dir
from gzcli.store.runs import by_name

if TYPE_CHECKING:
    from gzcli.data.sets.registry import DataSet
    from gzcli.league.league import Terms
    from gzcli.league.loop import League
    from gzcli.league.which import Outcome, Race
    from gzcli.models.catalog import ModelCard
    from gzcli.store.jobs import BenchJob
    from gzcli.store.run_folder import Run

ARROWS = {"down": "↓", "up": "↑"}
DAY = 86_400  # seconds of training above which gz asks before it starts
KEEP = {"seconds": 2, "params": 5}  # like `Column.keep`, for columns that are not metrics
TIMES = ("train_seconds", "sample_seconds", "judge_seconds")  # key of an entry of a league
OF_BENCH, OF_LEAGUE = 2000, 10_000  # samples of each model
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")


def _models_or_all(ctx: typer.Context, incomplete: str) -> list[str]:
    return [*recipe_names(), *([] if "," in incomplete else ["all"])]


_CONTESTANTS_HELP = "Models, run ids, aliases or folders; or images: a folder, zip, tar or npz."
_Contestants = Annotated[list[str] | None, argument("MODEL|RUN|IMAGES", _CONTESTANTS_HELP, a_model_or_run)]
_DATA_HELP = "Real images: a data set or a path. Default: the data set of the first run."
_Data = Annotated[str | None, option("--data NAME|PATH", _DATA_HELP, complete=a_set)]
_SPLIT_HELP = "Split of the real images. Papers on CIFAR-10 use `train`."
_Split = Annotated[Literal["test", "val", "train", "all"], option("--split", _SPLIT_HELP)]
_Metrics = Annotated[str | None, option("--metrics M[,M…]", help_text(), complete=metrics())]
_N_HELP = (
    "Maximum number of samples per model and of real images. Default: 2,000, or 10,000 with "
    "`--train-missing`."
)
_N = Annotated[int | None, option("-n N", _N_HELP, min=50)]
_WEIGHTS_HELP = "File with Inception weights."
_Weights = Annotated[Path | None, option("--weights FILE", _WEIGHTS_HELP, exists=True, resolve_path=True)]
_STATS_HELP = "`mu` and `sigma` of real images for the Fréchet distance, in pytorch-fid format."
_Stats = Annotated[Path | None, option("--real-stats FILE", _STATS_HELP, exists=True, resolve_path=True)]
_EXPORT_HELP = "Write `mu` and `sigma` of the real images."
_Export = Annotated[Path | None, option("--export-stats FILE", _EXPORT_HELP, resolve_path=True)]

_of_league = partial(option, panel="Training the compared models")
_TrainMissing = Annotated[bool, _of_league("--train-missing", "Train each model for an equal time first.")]
_BUDGET_HELP = "Training time per model: CPU time on CPUs, wall-clock time on GPUs."
_Budget = Annotated[str | None, _of_league("--budget 8m|1h", _BUDGET_HELP)]
_MODELS = _of_league(
    "--models all|M[,M…]", "Models to train. Default: all that fit the data set.", complete=_models_or_all
)
_Models = Annotated[str | None, _MODELS]
_Seeds = Annotated[
    int, _of_league("--seeds K", "Number of trainings per model, with seeds counted from `--seed`.", min=1)
]
_CALLS_HELP = "Also compare samplers at N network calls per image. 0: skip."
_Calls = Annotated[int, _of_league("--calls N", _CALLS_HELP, min=0)]
_JOBS_HELP = "Number of parallel trainings, each on a core or GPU."
_Jobs = Annotated[int | None, _of_league("--jobs N", f"{_JOBS_HELP} With `--submit`, a job array.", min=1)]
_Entry = Annotated[str | None, typer.Option("--entry", hidden=True)]  # of a league, which this process is for
_CURVE_HELP = "Plot quality against sampler steps or training time."
_Curve = Annotated[str | None, _of_league("--curve steps|time", _CURVE_HELP)]


def bench(
    contestants: _Contestants = None,
    data: _Data = None,
    split: _Split = "test",
    metrics: _Metrics = None,
    n: _N = None,
    weights: _Weights = None,
    real_stats: _Stats = None,
    export_stats: _Export = None,
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

    If you name no model, gz compares every model with a finished run on the data set.
    """
    from gzcli.launch.contestants import find_contestants
    from gzcli.league.league import beside_others
    from gzcli.league.loop import play_one
    from gzcli.store.jobs import BenchJob

    check_report(report)
    of_league = {"--models": models, "--budget": budget, "--curve": curve, "--jobs": at_once}
    if any(of_league.values()) and not train_missing:
        raise without_training(of_league, data)
    job = BenchJob(
        (),
        data or "",
        tuple(opt.split(metrics)) or None,
        n or (OF_LEAGUE if train_missing else OF_BENCH),
        str(weights) if weights else None,
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        launch=LaunchSection(opt.parse_gpus(gpus), cpu, processes),
        split=split,
        stats=str(real_stats) if real_stats else None,
        export_stats=str(export_stats) if export_stats else None,
        likelihoods=n,
    )
    check_stats(job)
    networks = [] if weights else weights_of(job.metrics or ())
    if train_missing:
        names = opt.split(models) if models else contestants
        job = replace(job, launch=beside_others(job.launch)) if at_once else job
        terms = terms_of(job, names, seeds, calls, curve, budget)
        if columns:
            check_columns(columns, job, cards_of(terms))
        if submit or slurm:
            return submit_league(terms, at_once, slurm, dry_run=dry_run)
        if dry_run:
            return show_dry(terms, str(budget), at_once)
        jobs.fetch(networks)
        if entry:
            return play_one(terms.of(entry), out.info)
        return hold(terms, budget=str(budget), yes=yes, at_once=at_once, page=report, columns=columns)
    data_set, runs, images = find_contestants(contestants or [], data)
    if columns:
        check_columns(
            columns, job, [catalog.card_of(run, part_of(run.serving.tree()).model) for run, _ in runs]
        )
    if submit or slurm:
        selection.choose(job.metrics, data_set, job.split)  # mistakes are reported before that
        return jobs.submit("bench", f"bench-{slug(data_set.key)}", seed, job.launch, slurm, dry_run=dry_run)
    for run, word in runs:
        jobs.announce(run, word, data=data_set.key)
    if dry_run:
        return show_dry_bench([run for run, _ in runs], len(images), job, data_set)
    paths = tuple(str(run.path) for run, _ in runs)
    jobs.fetch(networks)
    folder = claims.new_folder(user_dir("bench"), data_set.key)
    result = jobs.do_job(folder, replace(job, runs=paths, data=data_set.reference, images=tuple(images)))
    cite(result, columns) if columns else table(result, wide=wide)
    for text in (*(f"note: {note}" for note in result["notes"]), f"files: {folder}"):
        out.info(text)
    result = with_report(result, folder, report, columns)
    ended(result, folder, took())
    out.data(result)


def check_columns(columns: str, job: BenchJob, cards: Iterable[ModelCard]) -> None:
    """Raises UsageError, before any work, for a column that neither the metrics of a bench nor its models
    have. The images choose among the usual metrics later, so all of them count."""
    from gzcli.report import cited

    usual = [name for name, metric in metrics().items() if metric.default]
    chosen = selection.choose(job.metrics) if job.metrics else usual
    figures = [column.name for name in chosen for column in metrics()[name].columns]
    if "own" in chosen:
        figures += [name for card in cards for name in card.metrics]
    cited.check(opt.split(columns), list(dict.fromkeys(figures)))


def show_dry_bench(runs: Sequence[Run], images: int, job: BenchJob, data_set: DataSet) -> None:
    """Prints the cost of sampling runs and of evaluating them. images: number of contestants that are
    images."""
    from gzcli.cli.plan import Drawing, show_drawing
    from gzcli.launch import forecast, launcher

    form = pack_options(part_of(runs[0].serving.tree()).data) if runs else None
    meta = peek(data_set, **form) if form else peek(data_set)
    real = meta or data_set
    chosen = selection.choose(job.metrics, real, job.split)
    for note in (*selection.omitted(job.metrics, real, job.split), *not_in_forecast(job, chosen)):
        out.info(f"note: {note}")
    plan = launcher.plan(job.launch, every_gpu=False)
    drawers = {run.path: drawer for run in runs if (drawer := forecast.drawer_of_run(run, plan))}
    costs = forecast.drawn([*drawers.values()], kinds_of(job), partial(forecast.measured, say=out.info))
    cost_of = dict(zip(drawers, costs, strict=True))
    most = most_likelihoods(job, data_set)
    likelihoods = sum(
        cost_of[run.path].of_likelihoods(most, drawers[run.path].part.ood.budget)
        for run in runs
        if run.path in cost_of
    )
    judged = forecast.STARTING_UP + forecast.judging(job.n, plan.gpus) * (len(runs) + images)
    untrained = networks.TRAINING * len(networks.untrained(chosen, data_set, meta))
    sets = f"{counted(images, 'set')} of images, " if images else ""
    times = ((likelihoods, "of test likelihoods"), (untrained, forecast.JUDGES_TRAINED))
    more = [f"about {about(seconds)} {what}" for seconds, what in times if seconds]
    unknown = forecast.Drawn()
    rows = [
        (run, job.n, Drawing.of(run.model, run.data, run).or_as(cost_of.get(run.path, unknown)))
        for run in runs
    ]
    further = out.fitted(", ".join([f"then {sets}about {about(judged)} of evaluation", *more]))
    seconds = judged + likelihoods + untrained
    show_drawing(rows, further, evaluation=seconds, judge_seconds=seconds)


def not_in_forecast(job: BenchJob, chosen: Sequence[str]) -> list[str]:
    """Notes on metrics that a forecast does not include, and on the networks that they need. A forecast knows
    the time of the usual metrics."""
    named = [name for name in chosen if not metrics()[name].default]
    lines = [f"the time of {listed(named)} is not included"] if named else []
    if weights := [] if job.weights else weights_of(named):
        lines.append(f"the weights of {listed(weights)} are downloaded if they are missing")
    return lines


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def most_likelihoods(job: BenchJob, data_set: DataSet) -> int:
    """The most test images whose likelihood is computed. The set need not be packed."""
    most, counts = job.likelihoods or MOST, counts_of(data_set)
    return min(most, counts["test"]) if counts else most


def kinds_of(job: BenchJob) -> tuple[str, ...]:
    """The kinds of likelihoods that a bench computes. Those by an ODE are expensive, so they must be
    named."""
    if job.metrics is None:
        return ("exact", "bound")
    return ("exact", "bound", "ode") if {"bpd", "nats"} & set(job.metrics) else ()


def check_stats(job: BenchJob) -> None:
    """Raises UsageError if statistics of real images do not match exactly one metric, or cannot be
    written."""
    if (job.stats or job.export_stats) and job.metrics:
        one_distance(metrics()[name] for name in job.metrics if name in metrics())
    if job.export_stats and Path(job.export_stats).is_dir():
        hint = f"name a file in it: `--export-stats {quoted(Path(job.export_stats) / 'stats.npz')}`"
        raise UsageError(f"`--export-stats` needs a file, but `{job.export_stats}` is a folder", hint=hint)


def ended(result: Mapping[str, Any], folder: Path, time: str) -> None:
    """Prints the last lines of `gz bench`: the agreement of the judges, the best models, and the report."""
    then, facts, metric = page_of(result, folder), [time], result["metric"]
    if text := judges(result["provenance"]):
        out.info(text)
    best = standings.first_of(result["places"])
    if len(result["places"]) > 1:
        facts = [f"best by {metric}: {' and '.join(best)}", time]
        runs = {row["name"]: row["run"] for row in result["rows"] if row.get("run")}
        if len(best) == 1 and (run := by_name(runs.get(best[0], ""))):
            then.append((f"gz sample {name_of(run)}", "draw more images"))
    for line in disagreement(result):
        out.info(line)
    end(facts, then)


def judges(provenance: Mapping[str, Any]) -> str:
    """The accuracies of the networks whose features are compared."""
    titles = {"features_accuracy": "first judge", "second_accuracy": "second"}
    parts = [f"{title} {provenance[key]:.1%}" for key, title in titles.items() if provenance.get(key)]
    return f"accuracy on real test images: {', '.join(parts)}" if parts else ""


def disagreement(result: Mapping[str, Any]) -> list[str]:
    """A note on how far the second judge agrees with the order of the first."""
    if not (second := result.get("second")):
        return []
    by = f"rank correlation between {result['metric']} and {second['metric']}"
    lines = [f"{by}: {second['spearman']:.3f}"]
    if second["apart"]:
        apart = (f"{name} ({first}, {second_name})" for name, first, second_name in second["apart"])
        lines += out.fitted(", ".join(apart), "models ranked differently: ")
    return lines


# ---------------------------------------------------------------------------- the table


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
    has = {key: any(line.get(key) is not None for line in lines) for key in KEEP}
    columns = [*["params"] * has["params"], *names, *["seconds"] * has["seconds"]]
    biased = {name for of_size in result["biased"].values() for name in of_size}
    first = next((name for name in columns if name in directions), None)
    heads, cells = ["name"], [[line["name"]] for line in lines]
    spare: dict[str, int] = {}  # heading → priority; the lowest is omitted first
    called: dict[str, str] = {}  # heading → the metric's name
    for name in columns:
        mark = "~" if name in biased else ""
        heads.append(heading(name, columns, lines) + mark + ARROWS.get(directions.get(name) or "", ""))
        spare[heads[-1]], called[heads[-1]] = KEEP.get(name) or column_of(name).keep, name
        halves = [half(line, name) for line in lines]
        for row, line in zip(cells, lines, strict=True):
            value = line["metrics"].get(name, line.get(name))
            row.append(cell(name, value))
        if (wide or name == first) and any(halves):
            heads.append("±")
            spare["±"] = spare[heads[-2]]  # omitted before its metric
            for row, text in zip(cells, halves, strict=True):
                row.append(text)
    leaving = sorted(spare, key=lambda head: (spare[head], -heads.index(head)))
    out.table(heads, cells, spare={head: called.get(head, head) for head in leaving}, wide=wide)


def cell(name: str, value: Any) -> Any:
    if name == "params" and value is not None:
        return count(value)
    return figure(value) if isinstance(value, float) else value


def heading(name: str, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    """The heading of a metric. That of a neighbour-based one omits its features if there is only one kind."""
    word, _, features = name.partition("_")
    several = sum(column.startswith(f"{word}_") for column in columns) > 1
    return word if word in BY_NEIGHBOURS and features and not several else standings.heading(name, lines)


def half(line: Mapping[str, Any], name: str) -> str | None:
    """Half the 95 % interval of a metric; None if it has none."""
    ends = line["intervals"].get(name)
    if ends is None:
        return None
    value = (ends[1] - ends[0]) / 2
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


# ---------------------------------------------------------------------------- a league


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


def terms_of(
    job: BenchJob,
    models: Sequence[str] | None,
    seeds: int,
    calls: int,
    curve: str | None,
    budget: str | None,
) -> Terms:
    """The league's terms from the options. A budget is a time such as `8m`, `1.5h` or `90s`."""
    from gzcli.league.league import SHORTEST, Terms

    if not job.data:
        hint = f"gz bench --train-missing --budget {budget or '8m'} --data mnist"
        raise UsageError("`--train-missing` needs `--data`, the data set to train on", hint=hint)
    if budget is None:
        raise UsageError("`--train-missing` needs `--budget`, the training time per model", hint=BUDGETS)
    seconds = seconds_of(budget)
    if seconds < SHORTEST:
        raise UsageError(f"`--budget {budget}` is too short to train a model", hint=BUDGETS)
    job = replace(job, data=locate(job.data).reference)
    curves = tuple(choose("curve", name, ("steps", "time")) for name in opt.split(curve))
    names = tuple(dict.fromkeys(models or ()))
    all_seeds = tuple(range(job.seed, job.seed + seeds))
    return Terms(job.data, seconds, None if names in ((), ("all",)) else names, all_seeds, job, calls, curves)


def cards_of(terms: Terms) -> list[ModelCard]:
    """The cards of the models that a league may train."""
    from gzcli.launch.plan import ask

    if terms.models is None:
        return [*catalog.cards().values()]
    return [catalog.card(ask(name, terms.data, (), {}).recipe.parts[-1].model) for name in terms.models]


def submit_league(terms: Terms, at_once: int | None, options: list[str] | None, *, dry_run: bool) -> None:
    """Submits a league as one job; with `--jobs`, as an array with a task for each entry."""
    from gzcli.launch.plan import ask

    name, launch = f"bench-{slug(f'league-{terms.data}')}", terms.job.launch
    for model in terms.models or ():
        ask(model, terms.data, (), {})  # mistakes are reported before that
    selection.choose(terms.job.metrics, locate(terms.data), terms.job.split)
    models = (terms.models or recipe_names()) if at_once else ()
    tasks = [f"{model}:{number}" for number in terms.seeds for model in models]
    array = [f"array=0-{len(tasks) - 1}%{at_once}"] if tasks else []
    options = [*array, *(options or ())]
    jobs.submit("bench", name, terms.job.seed, launch, options, "same", tasks=tasks, dry_run=dry_run)
    if tasks:
        out.info(f"{counted(len(tasks), 'task')}; then repeat the command without `--submit` for the tables")


def hold(
    terms: Terms, *, budget: str, yes: bool, at_once: int | None, page: Path | None, columns: str | None
) -> None:
    """Runs a league and prints its table."""
    from gzcli.league import loop

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    for word in sys.argv[1:]:
        check_printable(word=word)
    check_printable(folder=str(Path.cwd()))
    with out.progress("packing", unit="images") as report:
        league = loop.League.of(terms, budget, say=out.info, progress=report)
    if note := league.entries[0].plan.note:
        out.warn(note)
    before_start(league, budget, at_once, yes=yes)
    command = f"cd {shlex.quote(str(Path.cwd()))}\n{shlex.join(['gz', *sys.argv[1:]])}\n"
    mode = "quiet" if out.is_quiet() else "human"
    result = loop.hold(league, at_once=at_once, command=command, say=out.info, mode=mode)
    result = with_report(result, league.folder, page, columns)
    show_league(result, columns)
    out.data(result)


def before_start(league: League, budget: str, at_once: int | None, *, yes: bool) -> None:
    """Prints the plan. On a terminal, it asks for confirmation of what takes more than a day."""
    from gzcli.cli.plan import start_or_not

    costs, parallel, seconds = forecast_of(league, at_once)
    for line in lines_of(league, budget, costs, parallel, seconds):
        out.info(line)
    less = "to save time, use fewer models or seeds, or a smaller `--budget`"
    start_or_not(seconds, most=DAY, span="a day", ways=less, yes=yes)


def show_dry(terms: Terms, budget: str, at_once: int | None) -> None:
    """Prints the plan of a league."""
    from gzcli.league import loop

    with out.progress("packing", unit="images") as report:
        league = loop.League.of(terms, budget, say=out.info, progress=report)
    costs, parallel, seconds = forecast_of(league, at_once)
    for line in lines_of(league, budget, costs, parallel, seconds):
        out.text(line)
    facts = {"data": terms.data, "budget": terms.budget, "judges_seconds": judges_of(league, costs)}
    facts |= {"parallel": parallel, "seconds": seconds}
    out.data(facts | {"rows": costs, "left_out": dict(league.left_out)})


def forecast_of(league: League, at_once: int | None) -> tuple[list[dict[str, Any]], int, float]:
    """The remaining cost of each entry, the number of trainings that run in parallel, at most that of the
    entries with work left, and the total seconds: of the judges, and then of the entries in parallel."""
    from gzcli.launch import launcher

    costs = costs_of(league)
    each = [sum(cost[name] or 0.0 for name in TIMES) for cost in costs]
    left = max(sum(map(bool, each)), 1)
    parallel = launcher.parallel(min(at_once or 1, left), gpus=bool(league.terms.job.launch.gpus))
    return costs, parallel, judges_of(league, costs) + max(sum(each) / parallel, *each)


def judges_of(league: League, costs: Sequence[Mapping[str, Any]]) -> float:
    """The seconds to train the judges of a league with these costs, if anything is left to judge."""
    left = any(cost["judge_seconds"] for cost in costs)
    judges = networks.untrained(league.metrics, locate(league.terms.data), league.pack)
    return left * networks.TRAINING * len(judges)


def costs_of(league: League) -> list[dict[str, Any]]:
    """The remaining seconds of each entry for training, sampling (None if unknown) and evaluation."""
    from gzcli.cli.plan import Drawing
    from gzcli.launch import forecast
    from gzcli.league.league import is_judged

    terms, rows = league.terms, []
    likelihoods = most_likelihoods(terms.job, locate(terms.data))
    unjudged = {entry.key: entry for entry in league.entries if not is_judged(entry.run(), terms)}
    drawers = [forecast.Drawer.of(entry.request.recipe, entry.plan) for entry in unjudged.values()]
    costs = forecast.drawn(drawers, kinds_of(terms.job), partial(forecast.measured, say=out.info))
    cost_of = dict(zip(unjudged, costs, strict=True))
    for entry in league.entries:
        run = entry.run()
        trained = bool(run and run.state == "finished")
        drawing = Drawing.of(entry.model, locate(terms.data).key, run if trained else None)
        here = cost_of.get(entry.key) or forecast.Drawn()
        if here.sample and not trained:
            drawing = Drawing(here.sample, here.calls)
        n, each = terms.job.n, drawing.seconds
        if each and n * each > terms.budget:
            n = min(n, OF_BENCH)
        budget = entry.request.recipe.parts[-1].ood.budget
        judged = forecast.STARTING_UP + forecast.judging(n, entry.plan.gpus)
        judged += here.of_likelihoods(likelihoods, budget)
        facts = {"model": entry.model, "seed": entry.seed, "n": n, "calls": drawing.calls}
        facts |= {"train_seconds": 0.0 if trained else terms.budget}
        facts |= {"sample_seconds": each and n * each, "judge_seconds": judged}
        rows.append(facts if entry.key in cost_of else facts | dict.fromkeys(TIMES, 0.0))
    return rows


def lines_of(
    league: League, budget: str, costs: Sequence[Mapping[str, Any]], parallel: int, seconds: float
) -> list[str]:
    """The plan of a league in words."""
    from gzcli.launch import forecast

    terms, models = league.terms, list(dict.fromkeys(entry.model for entry in league.entries))
    left = sum(cost["train_seconds"] > 0 for cost in costs)
    seeds = f", {len(terms.seeds)} seeds" if len(terms.seeds) > 1 else ""
    lines = out.fitted(" ".join(models), f"{counted(len(models), 'model')}: ")
    lines.append(f"{budget} each{seeds}: {left} to train, {len(costs) - left} already trained")
    unknown = list(dict.fromkeys(cost["model"] for cost in costs if cost["sample_seconds"] is None))
    times = [sum(cost[name] or 0.0 for cost in costs) for name in TIMES] + [judges_of(league, costs)]
    words = zip(times, ("of training", "of sampling", "of evaluation", forecast.JUDGES_TRAINED), strict=True)
    parts = [f"about {about(time)} {what}" for time, what in words if time]
    parts = [*parts[:-2], " and ".join(parts[-2:])] if parts else ["nothing to do"]
    lines += out.fitted(", ".join(parts))
    if sum(map(bool, times)) > 1:
        lines.append(f"total: about {about(seconds)}{in_parallel(parallel)}")
    if unknown:
        lines += out.fitted(" ".join(unknown), "unknown sampling time: ")
    for name, why in league.left_out.items():
        lines += out.fitted(f"left out: {name} ({why})")
    return lines


# ---------------------------------------------------------------------------- what is printed


def cite(result: Mapping[str, Any], columns: str) -> None:
    """Prints the table for citation, with these columns only."""
    from gzcli.report import cited

    if chosen := cited.table(result, opt.split(columns)):
        marked = [
            [f"{cell.text}{'*' * cell.best} {cell.small}".strip() for cell in row] for row in chosen.rows
        ]
        out.table([column.name for column in chosen.columns], marked)
        out.info(cited.caption((model for model, *_ in marked), f"*: {cited.BEST}"))


def show_league(result: dict[str, Any], columns: str | None = None) -> None:
    """Prints the table, the best first, and the paths of the files."""
    if columns:
        cite(result, columns)
    else:
        standings_table(result)
    for row in result["rows"]:
        if row.get("error"):
            out.info(f"failed: {row['model']}, seed {row['seed']}: {row['error']}")
    if order := result["spearman"]:
        out.info(f"rank correlation between seeds: mean {order['mean']:.3f}, minimum {order['min']:.3f}")
    notes = [line for note in result["notes"] for line in out.fitted(note, "note: ")]
    judged = judges(result.get("provenance") or {})
    for text in (*disagreement(result), judged, *notes, f"files: {result['folder']}"):
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
    metric, equal = result["metric"], {}
    if metric and result["equal_calls"]:
        rows = standings.summary(result["equal_calls"], metric, result["budget"])
        equal = {row["model"]: row for row in rows}
    at = [f"at {result['equal_calls'][0]['setting']}"] if equal else []
    names = {standings.base(name) for row in result["summary"] for name in row["metrics"]} - {metric}
    beside = [name for name in names if column_of(name).beside]
    beside.sort(key=lambda name: -column_of(name).keep)  # the most dispensable first
    titles = [name.removesuffix("_lenet") for name in beside]
    head = ["", "model", metric or "", "excess", *titles, *at, "trained", "params", "calls", "s/image"]
    lines = []
    for row in result["summary"]:
        value = standings.value_of(row, metric) if metric else None
        line = [row["place"], row["title"], short(value), with_interval(row, metric)]
        line += [short(standings.value_of(row, name)) for name in beside]
        if equal:
            line.append(with_interval(equal.get(row["model"]) or {}, metric))
        params = count(row["params"]) if row["params"] else None
        trained = duration(row["train_seconds"]) if row["train_seconds"] else None
        lines.append([*line, trained, params, short(row["calls"]), short(row["sample_seconds"], 2)])
    for title, floor in floors_of(result["rows"]).items():
        real = [short(floor.get(name)) for name in beside]
        lines.append([None, title, short(floor.get(metric)), None, *real, *[None] * (len(at) + 4)])
    spare = ("s/image", "calls", "params", "trained", *at, *reversed(titles))
    out.table(head, lines, spare=spare, elsewhere="see `--json`")


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


# ---------------------------------------------------------------------------- a race

USUAL_RACE = "20m"
_RACE_HELP = "Total training time: CPU time on CPUs, wall-clock time on GPUs. Required."
_RaceBudget = Annotated[str | None, option("--budget 20m|1h", _RACE_HELP)]
_NEED_HELP = f"Capabilities that the model needs: {', '.join(NEEDS)}."
_Need = Annotated[str | None, option("--need A[,B…]", _NEED_HELP, complete=NEEDS)]
_RACED_HELP = "Models to race. Default: a shortlist from the shipped leagues."
_Raced = Annotated[str | None, option("--models M[,M…]", _RACED_HELP, complete=a_model)]
_RACE_DATA_HELP = "The data set, or your own images."
_RaceJobs = Annotated[int | None, option("--jobs N", _JOBS_HELP, min=1)]
_RaceData = Annotated[str, option("--data NAME|PATH", _RACE_DATA_HELP, complete=a_set)]
_Dry = Annotated[bool, option("--dry-run", "Print the rounds without training.")]


def which(
    data: _RaceData,
    budget: _RaceBudget = None,
    need: _Need = None,
    models: _Raced = None,
    at_once: _RaceJobs = None,
    seed: opt.SeedOrZero = 0,
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    dry_run: _Dry = False,
    yes: opt.Yes = False,
) -> None:
    """Find the model that suits a data set, by racing models on it.

    The models train for equal times, and gz compares their samples with validation images. The better half
    trains for twice as long, until two are left. Re-running the command resumes a race.
    """
    from gzcli.cli.plan import start_or_not
    from gzcli.launch import launcher
    from gzcli.league import which as race
    from gzcli.league.league import Terms, beside_others
    from gzcli.store.jobs import BenchJob

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    if budget is None:
        hint = f"gz which --data {quoted(data)} --budget {USUAL_RACE}"
        raise UsageError("missing option `--budget`", hint=hint)
    needs = [choose("need", word, NEEDS) for word in opt.split(need)]
    launch = LaunchSection(opt.parse_gpus(gpus), cpu)
    launch = beside_others(launch) if at_once else launch
    name = locate(data).reference
    job = BenchJob((), name, None, race.SAMPLES, seed=seed, launch=launch, split="val")
    terms = Terms(name, seconds_of(budget), tuple(opt.split(models)) or None, (seed,), job, 0)
    plan = race.race_of(terms, needs)
    parallel = launcher.parallel(min(at_once or 1, len(plan.models)), gpus=bool(launch.gpus))
    say = out.text if dry_run else out.info
    for text in in_words(plan, parallel):
        say(text)
    if dry_run:
        facts = {"data": name, "budget": terms.budget, "evaluation": plan.evaluation, **as_json(plan)}
        return out.data(facts | {"parallel": parallel, "seconds": plan.seconds(parallel)})
    ways = "to save time, use fewer `--models`, or a smaller `--budget`"
    start_or_not(plan.seconds(parallel), most=DAY, span="a day", ways=ways, yes=yes)
    mode = "quiet" if out.is_quiet() else "human"
    show_race(race.run(plan, at_once=at_once, say=out.info, mode=mode))


def in_words(race: Race, parallel: int) -> list[str]:
    """The models and the rounds of a race, in words."""
    rounds = " → ".join(f"{n} × {duration(seconds)}" for n, seconds in race.rounds)
    return [
        *out.fitted(" ".join(race.models), f"{counted(len(race.models), 'model')}: "),
        f"rounds: {rounds}",
        f"training: about {about(race.budget)}; sampling and evaluation: up to {about(race.evaluation)}",
        f"total: up to {about(race.seconds(parallel))}{in_parallel(parallel)}",
    ]


def in_parallel(parallel: int) -> str:
    return f" with {parallel} trainings in parallel" if parallel > 1 else ""


def as_json(race: Race) -> dict[str, Any]:
    return {"models": race.models, "rounds": [{"models": n, "seconds": s} for n, s in race.rounds]}


def race_table(outcome: Outcome) -> None:
    """Prints the result of the longest training of each model, the best first."""
    judges, of_model = outcome.rounds[-1]["judges"], dict[str, tuple[int, dict[str, standings.Excess]]]()
    for i, result in enumerate(outcome.rounds):
        of_model |= {row["model"]: (i, standings.excesses_of(row, judges)) for row in result["summary"]}
    lines = []
    for name in outcome.order:
        i, excesses = of_model[name]
        cells = [excesses[key].words if key in excesses else None for key in judges]
        lines.append([name, i + 1, *cells, duration(outcome.race.rounds[i][1])])
    out.table(("model", "round", *judges, "trained"), lines)
    ranked = "; the best model has the lowest geometric mean" if len(judges) > 1 else ""
    out.info(f"{', '.join(judges)}: excess over real images, lower is better{ranked}")


def show_race(outcome: Outcome) -> None:
    """Prints the outcome of a race, and the command that continues the winner's training."""
    race_table(outcome)
    if outcome.ties:
        out.info(f"no judge distinguishes {' and '.join(outcome.ties)}")
    if outcome.agreement is not None:
        out.info(f"rank correlation between the first two rounds: {outcome.agreement:.2f}")
    if outcome.order[0] != outcome.favourite:
        out.info(
            f"`{outcome.favourite}` led the first round but did not win: short trainings mislead on this "
            "data set, so use a larger `--budget`"
        )
    if outcome.dropped_alike:
        dropped = " and ".join(outcome.dropped_alike)
        out.info(
            f"the first round may have dropped {dropped} by chance: no judge saw a difference from a model "
            "that stayed; a larger `--budget` helps"
        )
    winner, steps = outcome.winner, outcome.winner.status()["step"]
    resume = f"gz train {quoted(name_of(winner))} --resume --steps {2 * steps}"
    data = quoted(outcome.race.terms.data)
    whole = f"gz train {outcome.order[0]} --data {data}"
    end(
        [f"best: {outcome.order[0]}", took()],
        [(whole, "train it at full length"), (resume, "continue its training")],
    )
    out.data(
        {
            "data": outcome.race.terms.data,
            "budget": outcome.race.budget,
            **as_json(outcome.race),
            "order": outcome.order,
            "judges": outcome.rounds[-1]["judges"],
            "ties": outcome.ties,
            "agreement": outcome.agreement,
            "run": winner.id,
            "command": resume,
            "rows": [result["summary"] for result in outcome.rounds],
        }
    )
