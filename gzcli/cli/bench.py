"""`gz bench`: compares trained models, and images from anywhere, by quality, likelihood, class balance and
speed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.cli.jobs import end, name_of, quoted, took
from gzcli.cli.league import Budget, Calls, Curve, LeagueModels, Seeds, TrainMissing, hold, terms_of
from gzcli.cli.model_options import complete_metrics
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Precision,
    Processes,
    Quiet,
    Report,
    SeedOrZero,
    Slurm,
    Submit,
    Wide,
    Yes,
    complete_data,
    complete_model_or_run,
)
from gzcli.cli.options import split as items
from gzcli.cli.report import check_report, with_report
from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.core.units import figure
from gzcli.metrics.metric import column_of, help_text, weights_of

if TYPE_CHECKING:
    from gzcli.data.sets.names import DataSet
    from gzcli.store.run_folder import Run

ARROWS = {"down": "↓", "up": "↑"}
KEEP = {"seconds": 2, "params": 5}  # as `Column.keep`, of what is no figure of a metric
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")

_Contestants = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL|RUN|IMAGES",
        help="Models, runs' ids, aliases or folders; or images: a folder, zip, tar or npz.",
        autocompletion=complete_model_or_run,
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME|PATH",
        help="The real images, a data set or a path; without it the set of the first run.",
        autocompletion=complete_data,
    ),
]
_Split = Annotated[
    Literal["test", "train", "all"],
    typer.Option("--split", help="Which of the real images; papers on CIFAR-10 take `train`."),
]
_Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="M[,M…]", help=help_text(), autocompletion=complete_metrics)
]
_N = Annotated[
    int, typer.Option("-n", metavar="N", min=50, help="Samples drawn of each model; images taken at most.")
]
_Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="File of Inception's weights.", exists=True, resolve_path=True
    ),
]
_Stats = Annotated[
    Path | None,
    typer.Option(
        "--real-stats",
        metavar="FILE",
        help="`mu` and `sigma` of real images for the Fréchet distance, as pytorch-fid has them.",
        exists=True,
        resolve_path=True,
    ),
]
_Export = Annotated[
    Path | None,
    typer.Option("--export-stats", metavar="FILE", help="Write those of the real images.", resolve_path=True),
]


def bench(
    contestants: _Contestants = None,
    data: _Data = None,
    split: _Split = "test",
    metrics: _Metrics = None,
    n: _N = 2000,
    weights: _Weights = None,
    real_stats: _Stats = None,
    export_stats: _Export = None,
    checkpoint: Checkpoint = "last",
    gpus: Gpus = None,
    cpu: Cpu = False,
    processes: Processes = None,
    precision: Precision = None,
    seed: SeedOrZero = 0,
    train_missing: TrainMissing = False,
    budget: Budget = None,
    models: LeagueModels = None,
    seeds: Seeds = 1,
    calls: Calls = 20,
    curve: Curve = None,
    yes: Yes = False,
    submit: Submit = None,
    slurm: Slurm = None,
    wide: Wide = False,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare models, and images from anywhere, with real ones.

    Without a name, every model that has a finished run on the data set is compared.
    """
    began = monotonic()
    from gzcli.cli.jobs import announce, do_job, fetch, new_folder, processes_of
    from gzcli.cli.submit import submit_verb
    from gzcli.core.jobs import BenchJob
    from gzcli.store.paths import user_dir

    check_report(report)
    needed = [] if weights else weights_of(items(metrics))
    job = BenchJob(
        (),
        data or "",
        tuple(items(metrics)) or None,
        n,
        str(weights) if weights else None,
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        launch=processes_of(gpus, cpu, processes),
        split=split,
        stats=str(real_stats) if real_stats else None,
        export_stats=str(export_stats) if export_stats else None,
    )
    if train_missing or budget or models or curve:
        named = models or contestants
        terms = terms_of(job, named, seeds, calls, curve, budget, train_missing=train_missing)
        if submit or slurm:
            what = f"league-{terms.data}"
            return submit_verb("bench", what, seed, job.launch, slurm or (), goes_on=True)
        fetch(needed)
        return hold(terms, budget=str(budget), yes=yes, page=report)
    data_set, runs, images = find_contestants(contestants or [], data)
    if submit or slurm:
        return submit_verb("bench", data_set.key, seed, job.launch, slurm or ())
    for run, word in runs:
        announce(run, word, data=data_set.key)
    chosen = tuple(str(run.path) for run, _ in runs)
    job = replace(job, runs=chosen, data=data_set.reference, images=tuple(images))
    fetch(needed)
    folder = new_folder(user_dir("bench"), data_set.key)
    result = do_job(folder, job)
    table(result, wide=wide)
    for note in result["notes"]:
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    ended(result, folder, took(began))
    out.data(with_report(result, folder, report))


def ended(result: Mapping[str, Any], folder: Path, time: str) -> None:
    """The end of `gz bench`: who is best by the first figure, and a page of it."""
    from gzcli.metrics.standings import comparable
    from gzcli.store.runs import by_name

    names = [name for row in result["rows"] for name in row["metrics"]]
    ranked = [name for name in names if result["directions"].get(name)]
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


def find_contestants(words: list[str], data: str | None) -> tuple[DataSet, list[tuple[Run, str]], list[str]]:
    """The set of real images, the runs with the words that mean them, and the references of the images.

    A model's run is the newest on the set. Without a word every model takes part that has a finished run on
    it. Raises UsageError for a word that means neither a run nor images, and for images without a set of real
    ones; MissingError where no run is there.
    """
    from gzcli.data.sets.names import locate
    from gzcli.launch.from_file import find_run
    from gzcli.store.runs import all_runs

    data_set = locate(data) if data else None
    named: list[str] = []
    images: list[str] = []
    for word in words:
        if is_run(word):
            named.append(word)
        else:
            images.append(images_at(word))
    if not words:
        done = [run for run in all_runs() if run.state == "finished"]
        data_set = data_set or (locate(data_of(done[0])) if done else locate("digits"))
        done = [run for run in done if canonical(run.data) == canonical(data_set.key)]
        named = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
        if not named:
            raise MissingError(
                f"no finished run on `{data_set.reference}`", hint=f"gz train vae --data {data_set.reference}"
            )
    runs: list[tuple[Run, str]] = []
    for word in named:
        runs.append((find_run(word, data=data_set.key if data_set else None), word))
        data_set = data_set or locate(data_of(runs[0][0]))
    if data_set is None:
        hint = f"gz bench {words[0]} --data mnist · gz bench {words[0]} --data ./real"
        raise UsageError("images are compared with real ones: say which by `--data`", hint=hint)
    return data_set, runs, images


def is_run(word: str) -> bool:
    """Whether a word means a run, a model or a file of weights. A name that nothing has counts as one,
    because the search for runs suggests what may have been meant."""
    from gzcli.data.sets.names import ENDINGS, is_set
    from gzcli.launch.from_file import is_shared
    from gzcli.store import runs
    from gzcli.store.paths import recipe_names

    if runs.by_name(word) is not None or is_shared(word) or matching(word, recipe_names()):
        return True
    if "/" in word or word.lower().endswith(ENDINGS) or word.endswith(".safetensors"):
        return False
    return bool(runs.all_runs(model=word)) or not is_set(word)


def images_at(word: str) -> str:
    """The reference of the images that a word means. Of a folder of `gz sample` they are its `samples.npz`,
    else its `images`, without the sheet beside them."""
    from gzcli.data.readers.folder import open_path
    from gzcli.data.sets.names import OwnSet, locate
    from gzcli.data.sets.registry import Form
    from gzcli.store.run_folder import Run

    tried = "no run, no model, and no folder, zip, tar or npz of images"
    try:
        source = locate(word)
        if not isinstance(source, OwnSet):
            return source.reference
        drawn = Run(source.path)
        if drawn.sheet_picture.is_file() and drawn.job_file.is_file():
            parts = (drawn.samples_file, drawn.images_folder)
            if part := next((part for part in parts if part.exists()), None):
                source = OwnSet(part)
            else:
                hint = "draw them again with `gz sample … --npz`"
                raise UsageError(f"`{word}` holds the sheet of a sample and not its images", hint=hint)
        open_path(source.path, Form(foreign=True))
    except MissingError as e:
        raise UsageError(f"`{word}` is {tried}: {e.message}", hint=e.hint) from e
    return source.reference


def data_of(run: Run) -> str:
    return str(run.serving.tree()["data"]["name"])


def table(result: Mapping[str, Any], *, wide: bool = False) -> None:
    """Prints a line for each contestant, and one for real images in place of samples, with the direction in
    which each figure is better. Behind the first figure stands half its 95 % interval."""
    lines = [*result["rows"], *(floor_line(floor, result["floors"]) for floor in result["floors"])]
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    left: list[str] = []
    columns = [
        name
        for name in ("params", *names, "seconds")
        if name in names or any(line.get(name) is not None for line in lines)
    ]
    room = out.room(sys.stdout)
    while not wide and room and columns and width(result, lines, columns) > room:
        left.append(least(columns))
        columns.remove(left[-1])
    out.table(*cells(result, lines, columns, wide=wide), wide=True)  # its ± leaves with its figure
    out.left_out(left[::-1])


def cells(
    result: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    wide: bool = False,
) -> tuple[list[str], list[list[Any]]]:
    biased = {name for names in result["biased"].values() for name in names}
    heads, rows = ["name"], [[line["name"]] for line in lines]
    first = next((name for name in columns if name in result["directions"]), None)
    for name in columns:
        mark = "~" if name in biased else ""
        heads.append(short(name, columns) + mark + ARROWS.get(result["directions"].get(name) or "", ""))
        with_interval = wide or name == first
        halves = [half(line, name) for line in lines]
        for row, line in zip(rows, lines, strict=True):
            row.append(number(line["metrics"].get(name, line.get(name))))
        if with_interval and any(halves):
            heads.append("±")
            for row, text in zip(rows, halves, strict=True):
                row.append(text)
    return heads, rows


def short(name: str, columns: Sequence[str]) -> str:
    """The heading of a figure by neighbours, without the name of its features where it is the only one."""
    word, _, features = name.partition("_")
    several = sum(other.startswith(f"{word}_") for other in columns) > 1
    return word if word in BY_NEIGHBOURS and features and not several else name


def width(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> int:
    """Letters of the longest line of the table."""
    return max(map(len, out.aligned(*cells(result, lines, columns)).splitlines()))


def least(columns: Sequence[str]) -> str:
    """The column that can be spared first; of those that can be spared alike the last."""
    return min(reversed(columns), key=lambda name: KEEP.get(name) or column_of(name).keep)


def floor_line(floor: Mapping[str, Any], floors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    several = len(floors) > 1 or floor["images"] < floor["n"]
    count = f", {floor['images']:,}" if several else ""
    return {**floor, "name": f"(real images{count})"}


def half(line: Mapping[str, Any], name: str) -> str | None:
    ends = line["intervals"].get(name)
    if ends is None:
        return None
    value = (ends[1] - ends[0]) / 2
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def number(value: Any) -> Any:
    return figure(value) if isinstance(value, float) else value
