"""`gz runs`: list, show, compare, export, share and remove trained runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.cli.jobs import bytes_of, end, quoted, took
from gzcli.cli.list import alone, in_words, list_runs, names_of, summaries, summary, table_of_runs
from gzcli.cli.options import (
    Checkpoint,
    Json,
    Quiet,
    Wide,
    Yes,
    complete_data,
    complete_model,
    complete_model_or_run,
    complete_run,
    may_remove,
)
from gzcli.core.errors import MissingError, UsageError, did_you_mean
from gzcli.core.units import counted, figure, size
from gzcli.store import claims
from gzcli.store import runs as store
from gzcli.store.run_folder import Run

app = typer.Typer(
    help="List, show, compare, share, export and remove runs.",
    callback=alone("runs", list_runs),
    invoke_without_command=True,
)

_Ref = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Id, alias, folder or model.", autocompletion=complete_model_or_run),
]
_Refs = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Ids, aliases or folders.", autocompletion=complete_run)
]
_Any = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN RUN…", help="Ids, aliases, folders or models.", autocompletion=complete_model_or_run
    ),
]
_Repository = Annotated[
    str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the Hugging Face hub.")
]
_Dtype = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--dtype", help="Of the weights in a file; bf16 halves it, and changes samples a little."),
]

Row = Sequence[Any]
NARROW = 18  # columns that a run has at least in a table of several
# Keys that do not say what is trained: a description, a count, where it ran, and how often it was looked at,
# which each run finds out for itself.
UNTOLD = ("about", "params", "launch.")
LOOKS = "_every"


@app.command("list")
def list_(
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="Of one model only.", autocompletion=complete_model)
    ] = "",
    data: Annotated[
        str,
        typer.Option("--data", metavar="NAME", help="Of one data set only.", autocompletion=complete_data),
    ] = "",
    wide: Wide = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List runs, newest first."""
    list_runs(model or None, data or None, wide=wide)


@app.command()
def show(run: _Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Show a run's state and its whole recipe."""
    place = _find(run)
    tree, facts = place.tree(), summary(place)
    shown = facts | dict.fromkeys(("seconds", "bytes")) | in_words(facts) | {"made": None}
    width = max(map(len, shown)) + 1
    out.text("\n".join(f"{key + ':':<{width}} {value}" for key, value in shown.items() if value is not None))
    if not out.is_json():
        from gzcli.recipe.yaml import dump

        recipe = {key: value for key, value in tree.items() if (key, value) != ("params", None)}
        out.text("\n" + dump(recipe).rstrip())
    out.data({**facts, "recipe": tree})


@app.command("compare")
def compare_(runs: _Any, wide: Wide = False, json: Json = False, quiet: Quiet = False) -> None:
    """Show runs side by side: figures, time, size, and the keys in which their recipes differ."""
    chosen = list({run.path: run for run in map(_find, runs)}.values())
    if len(chosen) < 2:
        raise UsageError("`gz runs compare` needs two runs or more", hint="`gz runs list` shows them")
    compare(chosen, wide=wide)


@app.command()
def path(run: _Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Print the folder of a run."""
    place = _find(run)
    out.text(str(place.path))
    out.data({"run": place.id, "path": place.path})


@app.command()
def export(
    run: _Ref,
    to: Annotated[
        Literal["file", "onnx", "torch", "diffusers"],
        typer.Option("--to", help="One file that `gz` reads anywhere, or another library's format."),
    ] = "file",
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Where to write; into the run's folder without it."),
    ] = None,
    dtype: _Dtype = "fp32",
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run as one file to share, or its weights in the format of another library."""
    source = _find(run)
    place = (out_ or source.path / "export" / (f"{source.id}.safetensors" if to == "file" else to)).resolve()
    if to == "file":
        check_file(place, replaceable=out_ is None)
    elif dtype != "fp32":
        raise UsageError("`--dtype` goes with `--to file`")
    elif out_:
        claims.check_empty(place)
    began = monotonic()
    result = exported(source, run, place, to=to, dtype=dtype, checkpoint=checkpoint)
    out.text(str(place))
    if to == "file":
        then = [(f"gz sample {quoted(place)}", "pictures from it, on any machine")]
        end([f"one file of {bytes_of(place)}", took(began)], then)
    else:
        look = (f"ls {quoted(place)}", "what it holds, and how it is loaded")
        end([f"{bytes_of(place)} for {to}", took(began)], [look, (f"gz sample {quoted(run)}", "")])
    out.data(result)


@app.command()
def push(
    run: _Ref,
    repository: _Repository,
    licence: Annotated[
        str, typer.Option("--licence", metavar="ID", help="Of the weights, as the hub names licences.")
    ] = "mit",
    private: Annotated[bool, typer.Option("--private", help="For you alone.")] = False,
    dtype: _Dtype = "fp32",
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a run on the Hugging Face hub, with a card that says what it is."""
    import base64
    import tempfile

    from gzcli.launch.from_file import metadata
    from gzcli.metrics.metric import meanings
    from gzcli.store import files, hub

    name = hub.name_of(repository)
    source = _find(run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = exported(source, run, folder / hub.FILE, to="file", dtype=dtype, checkpoint=checkpoint)
        card = result["card"]
        if (preview := metadata(folder / hub.FILE).get("preview")) is None:
            raise MissingError(
                "the run has no picture of its samples", hint="gz train RUN --resume draws one"
            )
        files.write_atomic(folder / Run.preview_picture, base64.b64decode(preview))
        files.write_atomic(folder / "README.md", hub.readme(card, name, licence, meanings()))
        sent = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        address = hub.push(folder, name, private=private)
    out.text(address)
    out.hint(f"gz sample hf://{name}")
    out.data({"run": source.id, "repository": name, "url": address, "files": sent})


@app.command()
def pull(
    repository: _Repository,
    name: Annotated[
        str | None, typer.Option("--name", metavar="ALIAS", help="A second name for the run.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get a run from the Hugging Face hub into the store; `gz sample hf://OWNER/NAME` draws without that."""
    from gzcli.launch import from_file
    from gzcli.store import hub

    address = hub.PREFIX + repository.removeprefix(hub.PREFIX)
    file = hub.fetched(address)
    checked = from_file.run_of(file, source=address)  # before there is a run
    run = store.create(checked.model, checked.data, alias=name)
    status = {key: run.status()[key] for key in ("alias", "created", "order")}
    try:
        from_file.write(file, run.path, source=address, **status)
    except BaseException:
        store.remove(run)
        raise
    out.text(run.id)
    out.hint(f"gz sample {run.alias or run.id}")
    out.data({"run": run.id, "path": run.path, "from": address})


@app.command()
def prune(
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep", metavar="K", min=0, help="Keep the best and the K newest of a model and data set."
        ),
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Remove the runs that did not finish.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove old or unfinished runs; the best ones, those with a name and those being trained stay.

    Runs that were cut short (`--steps 10`, another image size) count as older than any complete one.

    `--keep 0` keeps no best one.
    """
    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint="gz runs prune --keep 1")
    store.tidy()
    doomed = [] if keep is None else store.outdated(keep)
    if unfinished:
        doomed += [run for run in store.all_runs() if run.state not in ("finished", "running", "damaged")]
    _remove([run for run in doomed if not run.alias and claims.is_removable(run.path)], yes, skip=True)


@app.command()
def remove(runs: _Refs, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove runs for good."""
    chosen = list({run.path: run for run in map(_exact, runs)}.values())
    for run in chosen:
        claims.check_removable(run)
    _remove(chosen, yes)


def _exact(ref: str) -> Run:
    """The run of this id, alias or folder, in any state. Raises UsageError where there is none."""
    if run := store.by_name(ref):
        return run
    names = [name for run in store.all_runs() for name in (run.alias, run.id) if name]
    raise UsageError(
        f"no run is called `{ref}`", hint=did_you_mean(ref, names) or "`gz runs list` shows them"
    )


def _find(ref: str) -> Run:
    """The run of this id, alias or folder, in any state; else the finished one that `ref` means."""
    from gzcli.launch.from_file import find_run

    return store.by_name(ref) or find_run(ref)


def _remove(runs: list[Run], yes: bool, *, skip: bool = False) -> None:
    """Lists the runs, asks unless `yes`, removes them; with `skip` one that a process has taken meanwhile
    stays."""
    rows = summaries(runs)
    total = sum(row["bytes"] for row in rows)
    what = f"{counted(len(runs), 'run')} ({size(total)})"
    if runs:
        table_of_runs(runs, rows, to_stderr=True)
    if runs and not may_remove(what, yes):
        runs, total = [], 0
    gone = []
    for run in runs:
        try:
            store.remove(run)
            gone.append(run.id)
        except UsageError as error:
            if not skip:
                raise
            out.info(f"left: {error.message}")
            total -= rows[runs.index(run)]["bytes"]
    if gone:
        left = [("gz runs list", "what is left")] if store.all_runs() else []
        end([f"removed {counted(len(gone), 'run')} ({size(total)})"], left)
    else:
        out.info("nothing was removed" if rows else "nothing to remove")
    out.data({"removed": gone, "bytes": total})


# ---------------------------------------------------------------------------- exports


def exported(source: Run, ref: str, place: Path, **fields: Any) -> dict[str, Any]:
    """Exports a run, which the user called `ref`, to a path. Returns the JSON of `gz runs export`."""
    from gzcli.cli.jobs import announce, do_job, new_folder
    from gzcli.core.jobs import ExportJob
    from gzcli.core.sections import LaunchSection

    announce(source, ref)
    job = ExportJob(str(source.path), out=str(place), launch=LaunchSection(cpu=True), **fields)
    return do_job(new_folder(source.path / "export"), job)


def check_file(place: Path, *, replaceable: bool) -> None:
    """Raises UsageError for the path of a file that has another ending, or that there is already."""
    if place.suffix != ".safetensors":
        raise UsageError(f"`{place.name}` must end in `.safetensors`", hint="--out my-model.safetensors")
    if place.exists() and not replaceable:
        raise UsageError(f"there is a `{place}` already", hint="name a new file")


# ---------------------------------------------------------------------------- runs side by side


def compare(runs: Sequence[Run], *, wide: bool = False) -> None:
    """Prints figures and differing keys, a column for each run; where they do not fit beside each other, in
    tables of fewer runs below each other."""
    from gzcli.cli.plan import leaves
    from gzcli.store.metrics import last_figures

    rows, figures = [summary(run) for run in runs], [last_figures(run) for run in runs]
    trees = [dict(leaves(run.tree())) for run in runs]
    differ = differences(trees)
    lines = [*facts(runs, rows)]
    for key in dict.fromkeys(key for last in figures for key in last):
        lines.append((f"last {key}", *(figure(last[key]) if key in last else None for last in figures)))
    several = {key for key in differ if wide or _differs([tree[key] for tree in trees if key in tree])}
    values = {key: [None if v is None else str(v) for v in differ[key]] for key in differ if key in several}
    lines += [(key, *texts) for key, texts in values.items()]
    names = names_of(runs, sys.stdout, wide=wide)
    for part in blocks(names, lines, None if wide else out.room(sys.stdout)):
        heads = ("", *(names[i] for i in part))
        cells = [(line[0], *(line[i + 1] for i in part)) for line in lines]
        cells = [line for line in cells if any(cell is not None for cell in line[1:])]
        out.table(heads, cells, wrap=heads[1:], narrow=NARROW, wide=wide)
        if part[-1] + 1 < len(runs):
            out.text("")
    if not differ:
        out.info("their recipes are the same")
    if alone := len(differ) - len(several):
        out.info(f"left out: {counted(alone, 'key')} that not all have ({out.ELSEWHERE})")
    with_figures = [{**row, "figures": last} for row, last in zip(rows, figures, strict=True)]
    out.data({"runs": with_figures, "differ": differ})


def facts(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What is said of every run, a line each."""
    columns: list[dict[str, Any]] = []
    for run, row in zip(runs, rows, strict=True):
        step, steps, shown = row["step"], row["steps"], in_words(row)
        memory = max((part.status().get("peak_memory") or 0 for part in run.stages or [run]), default=0)
        columns.append(
            {
                "name": row["alias"],
                "state": row["state"],
                "step": f"{step:,} of {steps:,}" if step is not None and steps else step,
                "best": shown["best"],
                "at step": f"{row['best']['step']:,}" if row["best"] else None,
                "curve": shown["curve"],
                "time": shown["time"],
                "params": shown["params"],
                "memory": size(memory) if memory else None,
                "size": shown["size"],
                "made": shown["made"],
            }
        )
    return [(key, *(column[key] for column in columns)) for key in columns[0]]


def differences(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ, with the value of each run; None where a run has no such key."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    values = {
        key: [tree.get(key) for tree in trees]
        for key in keys
        if not key.startswith(UNTOLD) and not key.endswith(LOOKS)
    }
    return {key: row for key, row in values.items() if _differs(row)}


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def blocks(names: Sequence[str], lines: Sequence[Row], room: int | None) -> list[list[int]]:
    """Which runs stand beside each other in each table: as many as fit, two at least, shared out evenly."""
    every = list(range(len(names)))
    if room is None:
        return [every]
    first = max(len(line[0]) for line in lines)
    each = [min(max(len(str(line[i + 1])) for line in lines), NARROW) for i in every]
    each = [max(cells, len(name)) + 2 for cells, name in zip(each, names, strict=True)]
    fit = max(2, (room - first) // max(each))
    tables = -(-len(names) // fit)
    return [every[i * len(every) // tables : (i + 1) * len(every) // tables] for i in range(tables)]
