"""`gz runs`: list, show, compare, export, share and remove trained runs."""

from __future__ import annotations

import base64
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import bytes_of, end, quoted, took
from gzcli.cli.list import group, list_runs, names_of, table_of_runs
from gzcli.cli.options import a_model, a_model_or_run, a_set, argument, option
from gzcli.core.errors import MissingError, UsageError, did_you_mean
from gzcli.core.hints import Option, advice, gz
from gzcli.core.sections import LaunchSection, leaves
from gzcli.core.units import counted, figure, size
from gzcli.store import claims, files
from gzcli.store import runs as store
from gzcli.store.metrics import in_words, last_figures, summaries, summary
from gzcli.store.run_folder import Run

app = group("runs", list_runs)

_Ref = Annotated[str, argument("RUN", "Id, alias, folder or model.", a_model_or_run)]
_Refs = Annotated[list[str], argument("RUN", "Ids, aliases or folders.", opt.a_run)]
_Any = Annotated[list[str], argument("RUN", "Ids, aliases, folders or models.", a_model_or_run)]
_Repository = Annotated[str, argument("OWNER/NAME", "A model repository on the Hugging Face hub.")]
_DTYPE_HELP = "Type of the weights in the file. bf16 halves its size and slightly changes samples."
_Dtype = Annotated[Literal["fp32", "bf16"], option("--dtype", _DTYPE_HELP)]
_OfModel = Annotated[str, option("--model M", "Only runs of one model.", complete=a_model)]
_OfData = Annotated[str, option("--data NAME", "Only runs on one data set.", complete=a_set)]
_TO_HELP = "One file for `gz`, a folder for diffusers, or an `alarm` that needs neither gz nor torch."
_To = Annotated[Literal["file", "diffusers", "alarm"], option("--to", _TO_HELP)]
_LENGTH_HELP = (
    "EMA length: standard deviation of the averaging profile, relative to training time. Default: the best."
)
_Length = Annotated[float | None, option("--length S", _LENGTH_HELP, min=0.01, max=0.25)]
_Out = Annotated[Path | None, option("--out PATH", "Output folder. Default: inside the run's folder.")]
_Licence = Annotated[str, option("--licence ID", "Licence of the weights: its identifier on the hub.")]
_Private = Annotated[bool, option("--private", "Make the repository private.")]
_Name = Annotated[str | None, option("--name ALIAS", "A second name for the run.")]
_KEEP_HELP = "Keep the best and the K newest runs of each model and data set."
_Keep = Annotated[int | None, option("--keep K", _KEEP_HELP, min=0)]
_Unfinished = Annotated[bool, option("--unfinished", "Remove unfinished runs.")]

Row = Sequence[Any]
RUN_FACTS = ("name", "state", "step", "best", "at step", "curve", "time", "params", "memory", "size", "made")
MIN_RUN_WIDTH = 18  # minimum width of a run's column in a table of several runs
# keys that do not affect the training: a description, a parameter count, and the devices of a run
NOT_TRAINED = ("about", "params", "launch.")


@app.command("list")
def list_(model: _OfModel = "", data: _OfData = "", wide: opt.Wide = False) -> None:
    """List runs, newest first."""
    list_runs(model or None, data or None, wide=wide)


@app.command()
def show(run: _Ref) -> None:
    """Show a run's state and its whole recipe."""
    place = _find(run)
    tree, facts = place.tree(), summary(place) | {"ema": place.serving.status().get("ema_length")}
    shown = facts | dict.fromkeys(("seconds", "bytes")) | in_words(facts) | {"made": None}
    if early := shown.pop("ended_by_patience"):
        shown["ended"] = f"early (`train.patience`), at step {early:,}"
    shown = {key: value for key, value in shown.items() if value is not None}
    width = max(map(len, shown)) + 1
    out.text("\n".join(f"{key + ':':<{width}} {value}" for key, value in shown.items()))
    if not out.is_json():
        from gzcli.recipe.yaml import dump

        recipe = {key: value for key, value in tree.items() if (key, value) != ("params", None)}
        out.text("\n" + dump(recipe).rstrip())
    out.data({**facts, "recipe": tree})


@app.command()
def compare(runs: _Any, wide: opt.Wide = False) -> None:
    """Compare runs side by side: metrics, time, size, and the keys that differ."""
    from gzcli.recipe.yaml import flow

    chosen = list({run.path: run for run in map(_find, runs)}.values())
    if len(chosen) < 2:
        raise UsageError(
            "`gz runs compare` needs at least two runs", hint=advice("{} shows them", gz("runs list"))
        )
    rows, figures = [summary(run) for run in chosen], [last_figures(run) for run in chosen]
    trees = [dict(leaves(run.tree())) for run in chosen]
    differ = differences(trees)
    lines = facts(chosen, rows)
    for key in dict.fromkeys(key for last in figures for key in last):
        lines.append((f"last {key}", *(figure(last[key]) if key in last else None for last in figures)))
    several = [key for key in differ if wide or _differ([tree[key] for tree in trees if key in tree])]
    shown = lambda v: v if v is None or isinstance(v, str) else flow(v)  # noqa: E731
    lines += [(key, *map(shown, differ[key])) for key in several]
    side_by_side(names_of(chosen, wide=wide), lines, wide=wide)
    if not differ:
        out.info("their recipes are identical")
    if alone := len(differ) - len(several):
        out.info(f"omitted: {counted(alone, 'key')} that only some runs have ({out.HIDDEN_COLUMNS_NOTE})")
    with_figures = [{**row, "figures": last} for row, last in zip(rows, figures, strict=True)]
    out.data({"runs": with_figures, "differ": differ})


@app.command()
def path(run: _Ref) -> None:
    """Print the folder of a run."""
    place = _find(run)
    out.text(str(place.path))
    out.data({"run": place.id, "path": place.path})


@app.command()
def export(
    run: _Ref,
    to: _To = "file",
    out_: _Out = None,
    dtype: _Dtype = "fp32",
    checkpoint: opt.Checkpoint = "last",
) -> None:
    """Export a run as one file, or its weights for another library."""
    source = _find(run)
    place = (out_ or source.path / "export" / (f"{source.id}.safetensors" if to == "file" else to)).resolve()
    if to == "file" and place.suffix != ".safetensors":
        raise UsageError(
            f"`{place.name}` must end in `.safetensors`", hint=Option("out", "my-model.safetensors")
        )
    if to == "file" and out_ and place.exists():
        raise UsageError(f"`{place}` already exists", hint="choose another file name")
    if to != "file" and dtype != "fp32":
        raise UsageError("`--dtype` works only with `--to file`")
    if to != "file" and out_:
        claims.check_empty(place)
    result = exported(source, run, place, to=to, dtype=dtype, checkpoint=checkpoint)
    out.text(str(place))
    if to == "file":
        then = [(f"gz sample {quoted(place)}", "draw images, on any machine")]
        end([f"one file of {bytes_of(place)}", took()], then)
    else:
        look = (f"ls {quoted(place)}", "list its files")
        end([f"{bytes_of(place)} for {to}", took()], [look, (f"gz sample {quoted(run)}", "")])
    out.data(result)


@app.command()
def ema(run: _Ref, length: _Length = None) -> None:
    """Use another average of a run's weights: the best by validation, or one of a given length.

    gz combines the snapshots that `--set train.ema_snapshots=20` saved in training. Afterwards, `gz sample`,
    `gz ood` and `gz bench` use this average.
    """
    from gzcli.store.jobs import EmaJob

    source = _find(run)
    served = source.serving
    if source.state != "finished":
        hint = store.WAIT_HINT if source.state == "running" else gz("train", source.id, resume=True)
        raise MissingError(f"`{source.id}` is not finished ({source.state})", hint=hint)
    if not any(served.snapshots_folder.glob("[0-9]*.safetensors")):
        snapshots = {f"{served.in_owner}train.ema_snapshots": 20}
        hint = gz("train", source.model, data=source.data, set=snapshots)
        raise MissingError(f"`{source.id}` has no snapshots to average", hint=hint)
    jobs.announce(source, run)
    with claims.claimed(source):
        result = jobs.do_job(claims.new_folder(source.path / "ema"), EmaJob(str(served.path), length))
    lines = []
    for row in result["rows"]:
        length, missed, value = row["length"], row["missed"], row["value"]
        name = "of the run" if length is None else f"{length:g}"
        fit = None if missed is None else f"{missed:.2%}"
        validated = None if value is None else figure(value)
        lines.append((name, fit, validated, "served" if length == result["length"] else None))
    out.table(("EMA length", "fit error", f"val {result['metric'] or '–'}", ""), lines)
    end([took()], [(f"gz sample {quoted(run)}", "draw images")])
    out.data(result)


@app.command()
def push(
    run: _Ref,
    repository: _Repository,
    licence: _Licence = "mit",
    private: _Private = False,
    dtype: _Dtype = "fp32",
    checkpoint: opt.Checkpoint = "last",
) -> None:
    """Upload a run to the Hugging Face hub, with a model card."""
    from gzcli.launch.from_file import metadata
    from gzcli.metrics.metric import meanings
    from gzcli.store import hub

    name = hub.repository_name(repository)
    source = _find(run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = exported(source, run, folder / hub.FILE, to="file", dtype=dtype, checkpoint=checkpoint)
        card = result["card"]
        if (preview := metadata(folder / hub.FILE).get("preview")) is None:
            hint = advice("draw one with {}", gz("train", "RUN", resume=True))
            raise MissingError("the run has no sample image", hint=hint)
        files.write_atomic(folder / Run.preview_picture, base64.b64decode(preview))
        files.write_atomic(folder / "README.md", hub.readme(card, name, licence, meanings()))
        sent = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        address = hub.push(folder, name, private=private)
    out.text(address)
    out.hint(f"gz sample hf://{name}")
    out.data({"run": source.id, "repository": name, "url": address, "files": sent})


@app.command()
def pull(repository: _Repository, name: _Name = None) -> None:
    """Download a run from the Hugging Face hub. `gz sample hf://OWNER/NAME` works without this."""
    from gzcli.launch import from_file
    from gzcli.store import hub

    address = hub.PREFIX + repository.removeprefix(hub.PREFIX)
    file = from_file.file_on_hub(address)
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
def prune(keep: _Keep = None, unfinished: _Unfinished = False, yes: opt.Yes = False) -> None:
    """Remove old or unfinished runs. gz keeps the best runs, and runs that are named or still training.

    Incomplete runs (`--steps 10`, another image size) count as older than complete ones.

    `--keep 0` does not keep the best run.
    """
    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint=gz("runs prune", keep=1))
    store.tidy()
    doomed = [] if keep is None else store.outdated(keep)
    if unfinished:
        doomed += [run for run in store.all_runs() if run.state not in ("finished", "running", "damaged")]
    _remove([run for run in doomed if not run.alias and claims.is_removable(run.path)], yes, skip=True)


@app.command()
def remove(runs: _Refs, yes: opt.Yes = False) -> None:
    """Delete runs."""
    chosen: dict[Path, Run] = {}
    for ref in runs:
        if (run := store.by_name(ref)) is None:
            hint = did_you_mean(ref, opt.run_names()) or advice("{} shows them", gz("runs list"))
            raise UsageError(f"no run is called `{ref}`", hint=hint)
        chosen[run.path] = run
    for run in chosen.values():
        claims.check_removable(run)
    _remove(list(chosen.values()), yes)


def _find(ref: str) -> Run:
    """The run with this id, alias or folder, in any state. Otherwise the finished run that `ref` refers
    to."""
    from gzcli.launch.from_file import find_run

    return store.by_name(ref) or find_run(ref)


def _remove(runs: list[Run], yes: bool, *, skip: bool = False) -> None:
    """Lists the runs, asks for confirmation unless `yes`, and removes them. With `skip`, runs that are in use
    by then are kept."""
    rows = summaries(runs)
    if runs:
        table_of_runs(runs, rows, to_stderr=True)
        every = size(sum(row["bytes"] for row in rows))
        runs = runs if opt.may_remove(f"{counted(len(runs), 'run')} ({every})", yes) else []
    gone, total = [], 0
    for run, row in zip(runs, rows, strict=False):
        try:
            store.remove(run)
            gone.append(run.id)
            total += row["bytes"]
        except UsageError as error:
            if not skip:
                raise
            out.info(f"kept: {error.message}")
    if gone:
        left = [("gz runs list", "list the remaining runs")] if store.all_runs() else []
        end([f"removed {counted(len(gone), 'run')} ({size(total)})"], left)
    else:
        out.info("nothing was removed" if rows else "nothing to remove")
    out.data({"removed": gone, "bytes": total})


# ---------------------------------------------------------------------------- exports


def exported(source: Run, ref: str, place: Path, **fields: Any) -> dict[str, Any]:
    """Exports a run to a path; `ref` is the name that the user typed. Returns the JSON of `gz runs
    export`."""
    from gzcli.store.jobs import ExportJob

    jobs.announce(source, ref)
    job = ExportJob(str(source.path), out=str(place), launch=LaunchSection(cpu=True), **fields)
    return jobs.do_job(claims.new_folder(source.path / "export"), job)


# ---------------------------------------------------------------------------- runs side by side


def facts(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Prints a line of facts about every run."""
    columns: list[dict[str, Any]] = []
    for run, row in zip(runs, rows, strict=True):
        step, steps = row["step"], row["steps"]
        memory = max((part.status().get("peak_memory") or 0 for part in run.stages or [run]), default=0)
        more = {"name": row["alias"], "memory": size(memory) if memory else None}
        more["step"] = f"{step:,} of {steps:,}" if step is not None and steps else step
        if row["ended_by_patience"]:
            more["step"] = f"{more['step']}, stopped early"
        if row["served"]:
            more["step"] = f"{more['step']}; step {row['served']:,} is served"
        more["at step"] = f"{row['best']['step']:,}" if row["best"] else None
        columns.append({**row, **in_words(row), **more})
    return [(key, *(column[key] for column in columns)) for key in RUN_FACTS]


def differences(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ, each with the values of all runs (None if a run lacks the key)."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    of_training = [key for key in keys if not key.startswith(NOT_TRAINED) and not key.endswith("_every")]
    values = {key: [tree.get(key) for tree in trees] for key in of_training}
    return {key: row for key, row in values.items() if _differ(row)}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def side_by_side(names: Sequence[str], lines: Sequence[Row], *, wide: bool) -> None:
    """Prints a column for each run, in as many tables as the terminal's width requires. A table has at least
    two runs."""
    runs, tables, room = len(names), 1, None if wide else out.room(sys.stdout)
    if room is not None:
        first = max(len(line[0]) for line in lines)
        cells = [min(max(len(str(line[i + 1])) for line in lines), MIN_RUN_WIDTH) for i in range(runs)]
        widest = max(max(cell, len(name)) + 2 for cell, name in zip(cells, names, strict=True))
        tables = -(-runs // max(2, (room - first) // widest))
    for i in range(tables):
        part = range(i * runs // tables, (i + 1) * runs // tables)
        heads = ("", *(names[n] for n in part))
        rows = [(line[0], *(line[n + 1] for n in part)) for line in lines]
        rows = [row for row in rows if any(cell is not None for cell in row[1:])]
        out.table(heads, rows, wrap=heads[1:], narrow=MIN_RUN_WIDTH, wide=wide)
        if i + 1 < tables:
            out.text("")
