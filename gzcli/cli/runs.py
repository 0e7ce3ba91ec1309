"""`gz runs`: list, show, export and remove trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gzcli.cli import out
from gzcli.cli.list import list_runs
from gzcli.cli.options import (
    Checkpoint,
    Json,
    Quiet,
    Yes,
    complete_data,
    complete_model,
    complete_model_or_run,
    complete_run,
    confirmed,
)
from gzcli.cli.summary import COLUMNS, cells, in_words, summary
from gzcli.errors import UsageError, did_you_mean
from gzcli.units import size

if TYPE_CHECKING:
    from gzcli.store.runs import Run

app = typer.Typer(help="List, show, export and remove runs.")

_Ref = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Id, alias, folder or model.", autocompletion=complete_model_or_run),
]
_Refs = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Ids, aliases or folders.", autocompletion=complete_run)
]


@app.command("list")
def list_(
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="Of one model only.", autocompletion=complete_model)
    ] = "",
    data: Annotated[
        str,
        typer.Option("--data", metavar="NAME", help="Of one data set only.", autocompletion=complete_data),
    ] = "",
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
    shown = facts | {"seconds": None, "bytes": None} | in_words(facts)
    width = max(map(len, shown)) + 1
    out.text("\n".join(f"{key + ':':<{width}} {value}" for key, value in shown.items() if value is not None))
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
    to: Annotated[Literal["diffusers"], typer.Option("--to", help="The library to write for.")] = "diffusers",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write; into the run's folder without it."),
    ] = None,
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's weights in the format of another library."""
    from gzcli.cli.jobs import announce, do_job, stamp
    from gzcli.jobs import ExportJob
    from gzcli.sections import LaunchSection
    from gzcli.store.owned import check_empty

    found = _find(run)
    announce(found, run)
    if folder:
        check_empty(folder)
    place = (folder or found.path / "export" / to).resolve()
    job = ExportJob(str(found.path), to, str(place), checkpoint, launch=LaunchSection(cpu=True))
    result = do_job(found.path / "export" / stamp(), job)
    out.text(str(place))
    out.data(result)


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
    from gzcli.store import owned, runs

    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint="gz runs prune --keep 1")
    doomed = [] if keep is None else runs.outdated(keep)
    if unfinished:
        doomed += [run for run in runs.all_runs() if run.state not in ("finished", "running", "damaged")]
    _remove([run for run in doomed if not run.alias and owned.is_removable(run.path)], yes)


@app.command()
def remove(runs: _Refs, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove runs for good."""
    _remove(list({run.path: run for run in map(_exact, runs)}.values()), yes)


def _exact(ref: str) -> Run:
    """The run of this id, alias or folder, in any state. Raises UsageError where there is none."""
    from gzcli.store.runs import all_runs, by_name

    if found := by_name(ref):
        return found
    known = [name for run in all_runs() for name in (run.alias, run.id) if name]
    raise UsageError(
        f"no run is called `{ref}`", hint=did_you_mean(ref, known) or "`gz runs list` shows them"
    )


def _find(ref: str) -> Run:
    """The run of this id, alias or folder, in any state; for a model's name its finished run."""
    from gzcli.store.runs import by_name, find

    return by_name(ref) or find(ref)


def _remove(runs: list[Run], yes: bool) -> None:
    """Lists the runs, asks unless `yes`, removes them."""
    from gzcli.store.runs import remove

    rows = [summary(run) for run in runs]
    total = sum(row["bytes"] for row in rows)
    what = f"{len(runs)} run{'' if len(runs) == 1 else 's'} ({size(total)})"
    if runs:
        out.info(out.aligned(COLUMNS, [cells(row) for row in rows]))
    if runs and not confirmed(what, yes):
        runs, total = [], 0
    for run in runs:
        remove(run)
    out.info(f"removed {what}" if runs else "nothing to remove" if not rows else "nothing was removed")
    out.data({"removed": [run.id for run in runs], "bytes": total})
