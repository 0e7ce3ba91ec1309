"""`gz runs`: what has been trained, where it lies, and getting rid of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from gzcli.errors import UsageError, did_you_mean

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
    from gzcli.cli.plan import size

    found = _find(run)
    tree, facts = found.tree(), summary(found)
    shown = facts | {"best": best_of(facts), "seconds": None, "bytes": None}
    shown |= {"time": duration(facts["seconds"]), "size": size(facts["bytes"])}
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
    to: Annotated[
        Literal["diffusers"], typer.Option("--to", help="The library that is to load it.")
    ] = "diffusers",
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; by default in the run.")
    ] = None,
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's weights in the format of another library."""
    from gzcli.cli.jobs import do_job, stamp, tell_run
    from gzcli.store.owned import check_empty

    found = _find(run)
    tell_run(found, run)
    if folder:
        check_empty(folder)
    place = (folder or found.path / "export" / to).resolve()
    job = {"verb": "export", "run": str(found.path), "checkpoint": checkpoint, "to": to, "out": str(place)}
    result = do_job(found.path / "export" / stamp(), job, gpus=None, cpu=True)
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

    Runs that were cut short (`--steps 10`, another image size) are older than any whole one.

    `--keep 0` keeps no best one.
    """
    from gzcli.store import owned, runs

    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint="gz runs prune --keep 1")
    doomed = [] if keep is None else runs.outdated(keep)
    if unfinished:
        doomed += [run for run in runs.all_runs() if run.state not in ("finished", "running")]
    _remove([run for run in doomed if not run.alias and owned.is_removable(run.path)], yes)


@app.command()
def remove(runs: _Refs, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove runs for good."""
    _remove(list({run.path: run for run in map(_exact, runs)}.values()), yes)


def summary(run: Run) -> dict[str, Any]:
    """What the lists and `--json` tell of a run."""
    status = run.status()
    at = next((stage for stage in run.stages if stage.state != "finished"), run.serving)
    created, best = status.get("created"), run.serving.best
    return {
        "run": run.id,
        "alias": run.alias,
        "model": run.model,
        "data": run.data,
        "state": run.state,
        "stage": None if at is run else at.path.name,
        "step": at.status().get("step"),
        "steps": at.status().get("steps"),
        "short": ", ".join(run.shortfalls) or None,
        "best": best and {key: best[key] for key in ("metric", "value", "step")},
        "seconds": round(sum(part.seconds for part in run.stages or [run]), 1),
        "bytes": run.bytes,
        "created": moment(created) if created else None,
        "error": (status.get("error") or {}).get("message"),
        "path": run.path,
    }


COLUMNS = ("run", "name", "state", "step", "best", "time", "size")


def cells(row: dict[str, Any]) -> list[Any]:
    """A `summary` as a line of a table with these columns. When a run was made stands in its id."""
    from gzcli.cli.plan import size

    step, of = row["step"], row["steps"]
    progress = f"{step}/{of}" if row["state"] != "finished" and step is not None and of else step
    worth = (best_of(row), duration(row["seconds"]), size(row["bytes"]))
    return [row["run"], row["alias"], row["state"], progress, *worth]


def best_of(row: dict[str, Any]) -> str | None:
    return f"{row['best']['metric']} {row['best']['value']:.4g}" if row["best"] else None


def moment(seconds: float) -> str:
    """A time of `time.time()` with its zone: 2026-01-31T14:25:01+01:00."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def duration(seconds: float) -> str | None:
    """12s · 3m40s · 5h02m; None of what never ran."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return (f"{minutes}m{rest:02d}s" if minutes else f"{rest}s") if seconds else None


def _exact(ref: str) -> Run:
    """The run of that id, alias or folder, in whatever state."""
    from gzcli.store.runs import all_runs, by_name

    if found := by_name(ref):
        return found
    known = [name for run in all_runs() for name in (run.alias, run.id) if name]
    raise UsageError(
        f"no run is called `{ref}`", hint=did_you_mean(ref, known) or "`gz runs list` shows them"
    )


def _find(ref: str) -> Run:
    """The same, or a model's newest finished run."""
    from gzcli.store.runs import by_name, find

    return by_name(ref) or find(ref)


def _remove(runs: list[Run], yes: bool) -> None:
    from gzcli.cli.plan import size
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
