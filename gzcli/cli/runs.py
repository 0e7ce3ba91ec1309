"""`gz runs`: list, show, compare, export and remove trained runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gzcli.cli import out, share
from gzcli.cli.ends import end
from gzcli.cli.list import alone, list_runs
from gzcli.cli.options import (
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
from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.units import counted, size

if TYPE_CHECKING:
    from gzcli.store.runs import Run

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
    from gzcli.cli.summary import in_words, summary

    found = _find(run)
    tree, facts = found.tree(), summary(found)
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
    from gzcli.cli.compare import compare

    found = list({run.path: run for run in map(_find, runs)}.values())
    if len(found) < 2:
        raise UsageError("`gz runs compare` needs two runs or more", hint="`gz runs list` shows them")
    compare(found, wide=wide)


@app.command()
def path(run: _Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Print the folder of a run."""
    found = _find(run)
    out.text(str(found.path))
    out.data({"run": found.id, "path": found.path})


app.command("export")(share.export)
app.command("push")(share.push)
app.command("pull")(share.pull)


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
    from gzcli.store import claims, runs
    from gzcli.store.runs import outdated

    if keep is None and not unfinished:
        raise UsageError("`gz runs prune` needs `--keep K` or `--unfinished`", hint="gz runs prune --keep 1")
    runs.tidy()
    doomed = [] if keep is None else outdated(keep)
    if unfinished:
        doomed += [run for run in runs.all_runs() if run.state not in ("finished", "running", "damaged")]
    _remove([run for run in doomed if not run.alias and claims.is_removable(run.path)], yes, skip=True)


@app.command()
def remove(runs: _Refs, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove runs for good."""
    from gzcli.store.runs import check_removable

    found = list({run.path: run for run in map(_exact, runs)}.values())
    for run in found:
        check_removable(run)
    _remove(found, yes)


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
    return share.find(ref)


def _remove(runs: list[Run], yes: bool, *, skip: bool = False) -> None:
    """Lists the runs, asks unless `yes`, removes them.

    skip: whether one that a process has taken meanwhile stays, in place of an error.
    """
    from gzcli.cli.summary import summaries, table
    from gzcli.store.runs import all_runs, remove

    rows = summaries(runs)
    total = sum(row["bytes"] for row in rows)
    what = f"{counted(len(runs), 'run')} ({size(total)})"
    if runs:
        table(runs, rows, to_stderr=True)
    if runs and not may_remove(what, yes):
        runs, total = [], 0
    gone = []
    for run in runs:
        try:
            remove(run)
            gone.append(run.id)
        except UsageError as error:
            if not skip:
                raise
            out.info(f"left: {error.message}")
            total -= rows[runs.index(run)]["bytes"]
    if gone:
        left = [("gz runs list", "what is left")] if all_runs() else []
        end([f"removed {counted(len(gone), 'run')} ({size(total)})"], left)
    else:
        out.info("nothing was removed" if rows else "nothing to remove")
    out.data({"removed": gone, "bytes": total})
