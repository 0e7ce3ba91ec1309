"""A run as `gz list runs` and `gz runs` print it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gzcli.units import duration, moment, size

if TYPE_CHECKING:
    from gzcli.store.runs import Run

COLUMNS = ("run", "name", "state", "step", "best", "time", "size")


def summary(run: Run) -> dict[str, Any]:
    """A run as `--json` shows it.

    Of a run in stages, `stage`, `step` and `steps` are those of the first stage that is not finished.
    """
    status = run.status()
    current = next((stage for stage in run.stages if stage.state != "finished"), run.serving)
    progress, best, created = current.status(), run.serving.best, status.get("created")
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
        "seconds": round(sum(part.seconds for part in run.stages or [run]), 1),
        "bytes": run.bytes,
        "created": moment(created) if created else None,
        "error": (status.get("error") or {}).get("message"),
        "path": run.path,
    }


def cells(row: Mapping[str, Any]) -> list[Any]:
    """A summary as a line of a table with these COLUMNS. The time of creation is part of the run's id."""
    step, steps = row["step"], row["steps"]
    unfinished = row["state"] != "finished" and step is not None and steps
    shown = in_words(row)
    place = (row["run"], row["alias"], row["state"], f"{step}/{steps}" if unfinished else step)
    return [*place, shown["best"], shown["time"], shown["size"]]


def in_words(row: Mapping[str, Any]) -> dict[str, str | None]:
    """The best figure, the time of training and the size on disk of a summary, as people read them."""
    best = row["best"]
    return {
        "best": f"{best['metric']} {best['value']:.4g}" if best else None,
        "time": duration(row["seconds"]) if row["seconds"] else None,
        "size": size(row["bytes"]),
    }
