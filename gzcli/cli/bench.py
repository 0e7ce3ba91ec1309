"""`gz bench`: compares trained models, and images from anywhere, by quality, likelihood, class balance and
speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gzcli.cli import jobs, league, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, name_of, quoted, took
from gzcli.cli.options import a_model_or_run, a_set, argument, option
from gzcli.cli.report import check_report, with_report
from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.core.sections import LaunchSection
from gzcli.core.units import figure
from gzcli.data.sets.names import ENDINGS, OwnSet, is_set, locate, slug
from gzcli.metrics.metric import column_of, help_text, metrics, weights_of
from gzcli.store.paths import recipe_names, user_dir
from gzcli.store.run_folder import Run
from gzcli.store.runs import all_runs, by_name

if TYPE_CHECKING:
    from gzcli.data.sets.names import DataSet

ARROWS = {"down": "↓", "up": "↑"}
KEEP = {"seconds": 2, "params": 5}  # as `Column.keep`, of what is no figure of a metric
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")

_CONTESTANTS_HELP = "Models, runs' ids, aliases or folders; or images: a folder, zip, tar or npz."
_Contestants = Annotated[list[str] | None, argument("MODEL|RUN|IMAGES", _CONTESTANTS_HELP, a_model_or_run)]
_DATA_HELP = "The real images, a data set or a path; without it the set of the first run."
_Data = Annotated[str | None, option("--data NAME|PATH", _DATA_HELP, complete=a_set)]
_SPLIT_HELP = "Which of the real images; papers on CIFAR-10 take `train`."
_Split = Annotated[Literal["test", "train", "all"], option("--split", _SPLIT_HELP)]
_Metrics = Annotated[str | None, option("--metrics M[,M…]", help_text(), complete=metrics())]
_N = Annotated[int, option("-n N", "Samples drawn of each model; images taken at most.", min=50)]
_WEIGHTS_HELP = "File of Inception's weights."
_Weights = Annotated[Path | None, option("--weights FILE", _WEIGHTS_HELP, exists=True, resolve_path=True)]
_STATS_HELP = "`mu` and `sigma` of real images for the Fréchet distance, as pytorch-fid has them."
_Stats = Annotated[Path | None, option("--real-stats FILE", _STATS_HELP, exists=True, resolve_path=True)]
_EXPORT_HELP = "Write those of the real images."
_Export = Annotated[Path | None, option("--export-stats FILE", _EXPORT_HELP, resolve_path=True)]


def bench(
    contestants: _Contestants = None,
    data: _Data = None,
    split: _Split = "test",
    metrics: _Metrics = None,
    n: _N = 2000,
    weights: _Weights = None,
    real_stats: _Stats = None,
    export_stats: _Export = None,
    checkpoint: opt.Checkpoint = "last",
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    precision: opt.Precision = None,
    seed: opt.SeedOrZero = 0,
    train_missing: league.TrainMissing = False,
    budget: league.Budget = None,
    models: league.LeagueModels = None,
    seeds: league.Seeds = 1,
    calls: league.Calls = 20,
    curve: league.Curve = None,
    yes: opt.Yes = False,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
    wide: opt.Wide = False,
    report: opt.Report = None,
) -> None:
    """Compare models, and images from anywhere, with real ones.

    Without a name, every model that has a finished run on the data set is compared.
    """
    from gzcli.core.jobs import BenchJob

    check_report(report)
    job = BenchJob(
        (),
        data or "",
        tuple(opt.split(metrics)) or None,
        n,
        str(weights) if weights else None,
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        launch=LaunchSection(opt.parse_gpus(gpus), cpu, processes),
        split=split,
        stats=str(real_stats) if real_stats else None,
        export_stats=str(export_stats) if export_stats else None,
    )
    networks = [] if weights else weights_of(job.metrics or ())
    if train_missing or budget or models or curve:
        names = opt.split(models) if models else contestants
        terms = league.terms_of(job, names, seeds, calls, curve, budget, train_missing=train_missing)
        if submit or slurm:
            return jobs.submit(
                "bench", f"bench-{slug(f'league-{terms.data}')}", seed, job.launch, slurm, "same"
            )
        jobs.fetch(networks)
        return league.hold(terms, budget=str(budget), yes=yes, page=report)
    data_set, runs, images = find_contestants(contestants or [], data)
    if submit or slurm:
        return jobs.submit("bench", f"bench-{slug(data_set.key)}", seed, job.launch, slurm)
    for run, word in runs:
        jobs.announce(run, word, data=data_set.key)
    paths = tuple(str(run.path) for run, _ in runs)
    jobs.fetch(networks)
    folder = jobs.new_folder(user_dir("bench"), data_set.key)
    result = jobs.do_job(folder, replace(job, runs=paths, data=data_set.reference, images=tuple(images)))
    table(result, wide=wide)
    for text in (*(f"note: {note}" for note in result["notes"]), f"files: {folder}"):
        out.info(text)
    ended(result, folder, took())
    out.data(with_report(result, folder, report))


def ended(result: Mapping[str, Any], folder: Path, time: str) -> None:
    """The end of `gz bench`: who is best by the first figure, and a page of it."""
    from gzcli.metrics.standings import comparable

    ranked = [name for row in result["rows"] for name in row["metrics"] if result["directions"].get(name)]
    then = [(f"gz report {quoted(folder)}", "a page of it")]
    facts, rows = [time], []
    if ranked:
        having = [row for row in result["rows"] if row["metrics"].get(ranked[0]) is not None]
        rows = comparable(having, ranked[0], result["floor"])[0]
    if len(rows) > 1:
        sign = -1 if result["directions"][ranked[0]] == "up" else 1
        best = min(rows, key=lambda row: sign * row["metrics"][ranked[0]])
        facts = [f"best by {ranked[0]}: {best['name']}, {figure(best['metrics'][ranked[0]])}", time]
        if run := by_name(best.get("run") or ""):
            then.append((f"gz sample {name_of(run)}", "more of its pictures"))
    end(facts, then)


# ---------------------------------------------------------------------------- who takes part


def find_contestants(words: list[str], data: str | None) -> tuple[DataSet, list[tuple[Run, str]], list[str]]:
    """The set of real images, the runs with the words that mean them, and the references of the images."""
    from gzcli.launch.from_file import find_run

    data_set = locate(data) if data else None
    names = [word for word in words if is_run(word)]
    images = [images_at(word) for word in words if word not in names]
    if not words:
        done = [run for run in all_runs() if run.state == "finished"]
        data_set = data_set or locate(data_of(done[0]) if done else "digits")
        done = [run for run in done if canonical(run.data) == canonical(data_set.key)]
        names = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
        if not names:
            name = data_set.reference
            raise MissingError(f"no finished run on `{name}`", hint=f"gz train vae --data {name}")
    runs: list[tuple[Run, str]] = []
    for word in names:
        runs.append((find_run(word, data=data_set.key if data_set else None), word))
        data_set = data_set or locate(data_of(runs[0][0]))
    if data_set is None:
        hint = f"gz bench {words[0]} --data mnist · gz bench {words[0]} --data ./real"
        raise UsageError("images are compared with real ones: say which by `--data`", hint=hint)
    return data_set, runs, images


def is_run(word: str) -> bool:
    """Whether a word means a run, a model or weights; an unknown name does, for their search has a hint."""
    from gzcli.launch.from_file import is_shared

    if by_name(word) is not None or is_shared(word) or matching(word, recipe_names()):
        return True
    if "/" in word or word.lower().endswith(ENDINGS) or word.endswith(".safetensors"):
        return False
    return bool(all_runs(model=word)) or not is_set(word)


def images_at(word: str) -> str:
    """The images that a word means; those of a folder of `gz sample` are `samples.npz`, else `images`."""
    from gzcli.data.readers.folder import open_path
    from gzcli.data.sets.registry import Form

    try:
        source = locate(word)
        if not isinstance(source, OwnSet):
            return source.reference
        drawn = Run(source.path)
        if drawn.sheet_picture.is_file() and drawn.job_file.is_file():
            if not (parts := [part for part in (drawn.samples_file, drawn.images_folder) if part.exists()]):
                hint = "draw them again with `gz sample … --npz`"
                raise UsageError(f"`{word}` holds the sheet of a sample and not its images", hint=hint)
            source = OwnSet(parts[0])
        open_path(source.path, Form(foreign=True))
    except MissingError as e:
        message = f"`{word}` is no run, no model, and no folder, zip, tar or npz of images: {e.message}"
        raise UsageError(message, hint=e.hint) from e
    return source.reference


def data_of(run: Run) -> str:
    return str(run.serving.tree()["data"]["name"])


# ---------------------------------------------------------------------------- the table


def table(result: Mapping[str, Any], *, wide: bool = False) -> None:
    """Prints a line for each contestant and for real images; the figures that can be spared leave first."""
    floors, directions = result["floors"], result["directions"]
    several = len(floors) > 1 or any(floor["images"] < floor["n"] for floor in floors)
    lines = list(result["rows"])
    for floor in floors:
        count = f", {floor['images']:,}" if several else ""
        lines.append({**floor, "name": f"(real images{count})"})
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    columns = [
        name
        for name in ("params", *names, "seconds")
        if name in names or any(line.get(name) is not None for line in lines)
    ]
    biased = {name for of_size in result["biased"].values() for name in of_size}
    first = next((name for name in columns if name in directions), None)
    heads, cells = ["name"], [[line["name"]] for line in lines]
    spare: dict[str, int] = {}  # heading → the least leaves first
    called: dict[str, str] = {}  # heading → the figure's name
    for name in columns:
        mark = "~" if name in biased else ""
        heads.append(short(name, columns) + mark + ARROWS.get(directions.get(name) or "", ""))
        spare[heads[-1]], called[heads[-1]] = KEEP.get(name) or column_of(name).keep, name
        halves = [half(line, name) for line in lines]
        for row, line in zip(cells, lines, strict=True):
            value = line["metrics"].get(name, line.get(name))
            row.append(figure(value) if isinstance(value, float) else value)
        if (wide or name == first) and any(halves):
            heads.append("±")
            spare["±"] = spare[heads[-2]]  # it leaves before its figure
            for row, text in zip(cells, halves, strict=True):
                row.append(text)
    leaving = sorted(spare, key=lambda head: (spare[head], -heads.index(head)))
    out.table(heads, cells, spare=leaving, wide=wide, called=called)


def short(name: str, columns: Sequence[str]) -> str:
    """The heading of a figure by neighbours, without the name of its features where it is the only one."""
    word, _, features = name.partition("_")
    several = sum(other.startswith(f"{word}_") for other in columns) > 1
    return word if word in BY_NEIGHBOURS and features and not several else name


def half(line: Mapping[str, Any], name: str) -> str | None:
    """Half the 95 % interval of a figure; None where it has none."""
    ends = line["intervals"].get(name)
    if ends is None:
        return None
    value = (ends[1] - ends[0]) / 2
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"
