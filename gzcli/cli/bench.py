"""`gz bench`: compares trained models, and images from anywhere, by quality, likelihood, class balance and
speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.cli.bench_table import table
from gzcli.cli.ends import end, name_of, quoted, took
from gzcli.cli.league_options import Budget, Calls, Curve, LeagueModels, Seeds, TrainMissing, terms_of
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
from gzcli.cli.options import (
    split as items,
)
from gzcli.cli.report import check_report, with_report
from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.core.units import figure

if TYPE_CHECKING:
    from gzcli.data.sets.names import DataSet
    from gzcli.store.run import Run

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
    str | None,
    typer.Option(
        "--metrics",
        metavar="M[,M…]",
        help="fd fd_inf kid_lenet prc_lenet swd classes bpd own speed memory worth; with the extra "
        "`features` fd_lite fd_lite_pca kid_lite prc_lite; with weights that are fetched fid kid is, lpips, "
        "fd_dinov2 kid_dinov2 prc_dinov2, fd_clip kid_clip prc_clip.",
        autocompletion=complete_metrics,
    ),
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
    from gzcli.cli.jobs import announce, do_job, new_folder, processes_of
    from gzcli.cli.submit import submit_verb
    from gzcli.cli.weights import bring
    from gzcli.core.jobs import BenchJob
    from gzcli.data.download.weights import needed_by
    from gzcli.store.paths import user_dir

    check_report(report)
    needed = [] if weights else needed_by(tuple(items(metrics)))
    job = BenchJob(
        (),
        data or "",
        tuple(items(metrics)) or None,
        n,
        seed,
        str(weights) if weights else None,
        checkpoint,
        precision,
        processes_of(gpus, cpu, processes),
        split=split,
        stats=str(real_stats) if real_stats else None,
        export_stats=str(export_stats) if export_stats else None,
    )
    if train_missing or budget or models or curve:
        from gzcli.cli.league import hold

        named = models or contestants
        terms = terms_of(job, named, seeds, calls, curve, budget, train_missing=train_missing)
        if submit or slurm:
            what = f"league-{terms.data}"
            return submit_verb("bench", what, seed, job.launch, slurm or (), goes_on=True)
        bring(needed)
        return hold(terms, budget=str(budget), yes=yes, page=report)
    found, runs, images = entered(contestants or [], data)
    if submit or slurm:
        return submit_verb("bench", found.key, seed, job.launch, slurm or ())
    for run, word in runs:
        announce(run, word, data=found.key)
    chosen = tuple(str(run.path) for run, _ in runs)
    job = replace(job, runs=chosen, data=found.reference, images=tuple(images))
    bring(needed)
    folder = new_folder(user_dir("bench"), found.key)
    result = do_job(folder, job)
    table(result, wide=wide)
    for note in result["notes"]:
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    ended(result, folder, took(began))
    out.data(with_report(result, folder, report))


def ended(result: Mapping[str, Any], folder: Path, time: str) -> None:
    """The end of `gz bench`: who is best by the first figure, and a page of it.

    folder: of the results.
    time: that the verb took.
    """
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


def entered(words: list[str], data: str | None) -> tuple[DataSet, list[tuple[Run, str]], list[str]]:
    """The set of real images, the runs with the words that mean them, and the references of the images.

    A model's run is the newest on the set. Without a word every model takes part that has a finished run on
    it. Raises UsageError for a word that means neither a run nor images, and for images without a set of real
    ones; MissingError where no run is there.

    words: models, runs, and images.
    data: the set of real images; None: that of the first run, else of the newest finished run, else `digits`.
    """
    from gzcli.data.sets.names import locate
    from gzcli.launch.from_file import find_run
    from gzcli.store.runs import all_runs

    found = locate(data) if data else None
    named: list[str] = []
    images: list[str] = []
    for word in words:
        if is_run(word):
            named.append(word)
        else:
            images.append(images_at(word))
    if not words:
        done = [run for run in all_runs() if run.state == "finished"]
        found = found or (locate(data_of(done[0])) if done else locate("digits"))
        done = [run for run in done if canonical(run.data) == canonical(found.key)]
        named = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
        if not named:
            raise MissingError(
                f"no finished run on `{found.reference}`", hint=f"gz train vae --data {found.reference}"
            )
    runs: list[tuple[Run, str]] = []
    for word in named:
        runs.append((find_run(word, data=found.key if found else None), word))
        found = found or locate(data_of(runs[0][0]))
    if found is None:
        hint = f"gz bench {words[0]} --data mnist · gz bench {words[0]} --data ./real"
        raise UsageError("images are compared with real ones: say which by `--data`", hint=hint)
    return found, runs, images


def is_run(word: str) -> bool:
    """Whether a word means a run, a model, or a file of weights. One that looks like a name and means nothing
    at all does too: the search for it tells what was meant."""
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
    else its `images`, without the sheet beside them.

    Raises UsageError that says what was tried.
    """
    from gzcli.data.packs.forms import Form
    from gzcli.data.readers.own import open_path
    from gzcli.data.sets.names import OwnSet, locate

    tried = "no run, no model, and no folder, zip, tar or npz of images"
    try:
        found = locate(word)
        if not isinstance(found, OwnSet):
            return found.reference
        if (found.path / "grid.png").is_file() and (found.path / "job.json").is_file():
            parts = (found.path / name for name in ("samples.npz", "images"))
            if part := next((part for part in parts if part.exists()), None):
                found = OwnSet(part)
            else:
                hint = "draw them again with `gz sample … --npz`"
                raise UsageError(f"`{word}` holds the sheet of a sample and not its images", hint=hint)
        open_path(found.path, Form(foreign=True))
    except MissingError as e:
        raise UsageError(f"`{word}` is {tried}: {e.message}", hint=e.hint) from e
    return found.reference


def data_of(run: Run) -> str:
    """The reference of the set that a run was trained on."""
    return str(run.serving.tree()["data"]["name"])
