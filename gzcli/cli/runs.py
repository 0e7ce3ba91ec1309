"""`gz runs`: what has been trained, where it lies, and getting rid of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.cli.list import list_runs
from gzcli.cli.options import Checkpoint, Json, Quiet, Yes, complete_data, complete_model, complete_model_or_run, complete_run
from gzcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from gzcli.store.runs import Run

app = typer.Typer(help="List, show, export and remove runs.")

_Ref = Annotated[str, typer.Argument(metavar="RUN", help="Id, alias, folder or model.", autocompletion=complete_model_or_run)]
_Refs = Annotated[list[str], typer.Argument(metavar="RUN…", help="Ids, aliases or folders.", autocompletion=complete_run)]


@app.command("list")
def list_(
    model: Annotated[str, typer.Option("--model", metavar="M", help="Of one model only.", autocompletion=complete_model)] = "",
    data: Annotated[str, typer.Option("--data", metavar="NAME", help="Of one data set only.", autocompletion=complete_data)] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List runs, newest first."""
    list_runs(model or None, data or None)


@app.command()
def show(run: _Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Show a run's state and its whole recipe."""
    found = _find(run)
    tree, facts = found.tree(), summary(found)
    width = max(map(len, facts)) + 1
    out.text("\n".join(f"{key + ':':<{width}} {value}" for key, value in facts.items() if value is not None))
    if not out.is_json():
        from gzcli.recipe.write import dump

        out.text("\n" + dump(tree).rstrip())
    out.data({**facts, "recipe": tree})


@app.command()
def path(run: _Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Print the folder of a run."""
    found = _find(run)
    out.text(str(found.path))
    out.data({"run": found.id, "path": found.path})


@app.command()
def export(
    run: _Ref,
    to: Annotated[Literal["diffusers"], typer.Option("--to", help="The library that is to load it.")] = "diffusers",
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to; by default in the run.")] = None,
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's weights in the format of another library."""
    from gzcli.cli.jobs import do_job, stamp

    found = _find(run)
    out.info(f"run: {found.id}")
    place = (folder or found.path / "export" / to).resolve()
    job = {"verb": "export", "run": str(found.path), "checkpoint": checkpoint, "to": to, "out": str(place)}
    result = do_job(found.path / "export" / stamp(), job, gpus=None, cpu=True)
    out.text(str(place))
    out.data(result)


@app.command()
def prune(
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="K", min=0, help="Keep the K newest finished runs of each model and data set."),
    ] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Remove the runs that did not finish.")] = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove old or unfinished runs; runs with a name, and running ones, stay."""
    from gzcli.store.runs import all_runs

    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint="gz runs prune --keep 1")
    seen: dict[tuple[str, str], int] = {}
    doomed = []
    for run in all_runs():  # newest first
        if run.state == "finished":
            rank = seen[run.model, run.data] = seen.get((run.model, run.data), 0) + 1
            old = keep is not None and rank > keep
        else:
            old = unfinished and run.state != "running"
        if old and not run.alias:
            doomed.append(run)
    _remove(doomed, yes)


@app.command()
def remove(runs: _Refs, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove runs for good."""
    _remove(list({run.path: run for run in map(_exact, runs)}.values()), yes)


def summary(run: Run) -> dict[str, Any]:
    """What the lists and `--json` tell of a run."""
    status = run.status()
    at = next((stage for stage in run.stages if stage.state != "finished"), run.serving)
    created = status.get("created")
    return {
        "run": run.id,
        "alias": run.alias,
        "model": run.model,
        "data": run.data,
        "state": run.state,
        "stage": None if at is run else at.path.name,
        "step": at.status().get("step"),
        "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(created)) if created else None,
        "error": (status.get("error") or {}).get("message"),
        "path": run.path,
    }


def _exact(ref: str) -> Run:
    """The run of that id, alias or folder, in whatever state."""
    from gzcli.store.runs import all_runs, by_name

    if found := by_name(ref):
        return found
    known = [name for run in all_runs() for name in (run.alias, run.id) if name]
    raise UsageError(f"no run is called `{ref}`", hint=did_you_mean(ref, known) or "`gz runs list` shows them")


def _find(ref: str) -> Run:
    """The same, or a model's newest finished run."""
    from gzcli.store.runs import by_name, find

    return by_name(ref) or find(ref)


def _remove(runs: list[Run], yes: bool) -> None:
    from gzcli.store.runs import remove

    size = sum(file.stat().st_size for run in runs for file in run.path.rglob("*") if file.is_file())
    if runs and not yes:
        for run in runs:
            out.info(f"  {run.id}  {run.state}")
        if not sys.stdin.isatty():
            raise UsageError(f"removing {_count(runs)} needs `--yes` where nobody can be asked")
        if not typer.confirm(f"Remove {_count(runs)} ({size / 1e6:,.1f} MB)?", err=True):
            raise typer.Exit(0)
    for run in runs:
        remove(run)
    out.info(f"removed {_count(runs)} ({size / 1e6:,.1f} MB)" if runs else "nothing to remove")
    out.data({"removed": [run.id for run in runs], "bytes": size})


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
