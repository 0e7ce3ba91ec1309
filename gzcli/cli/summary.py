"""A run as `gz list runs` and `gz runs` print it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from gzcli.cli import out
from gzcli.core.units import count, duration, figure, moment, size
from gzcli.store import index
from gzcli.store.metrics import Curve, curve_of
from gzcli.store.paths import user_dir
from gzcli.store.runs import short_names

if TYPE_CHECKING:
    from gzcli.store.runs import Run

COLUMNS = ("run", "name", "state", "step", "best", "curve", "time", "size", "params", "made")
SPARE = ("params", "name", "made", "size", "curve", "state")  # the first to leave where a table is too wide


def summary(run: Run) -> dict[str, Any]:
    """A run as `--json` shows it.

    Of a run in stages, `stage`, `step` and `steps` are those of the first stage that is not finished. All but
    what a running process changes, or the zone of the reader, is kept in the index.
    """
    if (facts := index.recall(run.path, "summary")) is None:
        marks, total = run.survey()
        facts = _facts(run) | {"bytes": total}
        if run.status().get("state") not in ("running", "damaged"):
            index.keep(run.path, "summary", marks, facts)
    created = facts["created"]
    return {**facts, "created": moment(created) if created else None, "path": run.path}


def summaries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The summaries of many runs, which are kept for the next time."""
    root = user_dir("runs")
    index.begin(root, "summary")
    rows = [summary(run) for run in runs]
    index.save(root, "summary", os.listdir(root) if runs else ())
    return rows


def _facts(run: Run) -> dict[str, Any]:
    """The summary of a run as its files have it; `created` is in seconds."""
    status = run.status()
    parts = run.stages or [run]
    current = next((stage for stage in run.stages if stage.state != "finished"), run.serving)
    progress, best, curve = current.status(), run.serving.best, curve_of(run)
    params = [part.status().get("params") for part in parts]
    return {
        "run": run.id,
        "alias": run.alias,
        "model": run.model,
        "data": run.data,
        "state": run.state,
        "stage": None if current is run else current.path.name,
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "short": ", ".join(run.shortfalls) or None,
        "best": best and asdict(best),
        "curve": curve and asdict(curve),
        "params": None if None in params else sum(params),
        "seconds": round(sum(part.seconds for part in parts), 1),
        "bytes": None,
        "created": status.get("created"),
        "error": (status.get("error") or {}).get("message"),
    }


def table(
    runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], *, wide: bool = False, to_stderr: bool = False
) -> None:
    """Prints a line for each run.

    rows: the summaries of the runs.
    wide: whether ids are printed in full, and every column.
    to_stderr: whether they are printed there, where they are no data.
    """
    named = names(runs, sys.stderr if to_stderr else sys.stdout, wide=wide)
    lines = [cells(row, name) for row, name in zip(rows, named, strict=True)]
    out.table(COLUMNS, lines, spare=SPARE, wide=wide, to_stderr=to_stderr)


def names(runs: Sequence[Run], stream: TextIO, *, wide: bool = False) -> list[str]:
    """How the runs are named in a table: in full for scripts, and else as short as each can be told by."""
    short = {} if wide or out.room(stream) is None else short_names(runs)
    return [short.get(run.id, run.id) for run in runs]


def cells(row: Mapping[str, Any], name: str) -> list[Any]:
    """A summary as a line of a table with these COLUMNS.

    name: of the run.
    """
    step, steps = row["step"], row["steps"]
    unfinished = row["state"] != "finished" and step is not None and steps
    shown = in_words(row)
    place = (name, row["alias"], row["state"], f"{step}/{steps}" if unfinished else step)
    return [*place, *(shown[key] for key in COLUMNS[len(place) :])]


def in_words(row: Mapping[str, Any]) -> dict[str, str | None]:
    """The best figure, the curve, the time of training, the size on disk, the number of parameters and the
    time of creation of a summary, as people read them."""
    best, curve, created = row["best"], row["curve"], row["created"]
    return {
        "best": f"{best['metric']} {figure(best['value'])}" if best else None,
        "curve": Curve(**curve).spark if curve else None,
        "time": duration(row["seconds"]) if row["seconds"] else None,
        "size": size(row["bytes"]),
        "params": count(row["params"]) if row["params"] else None,
        "made": created[:16].replace("T", " ") if created else None,
    }
