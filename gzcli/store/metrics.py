"""The metrics that a run recorded during training, their curves in a few points, and the run's summary."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gzcli.core.units import count, duration, figure, moment, size
from gzcli.store import index
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import RECORDS, Run

SPARK_POINTS = 12  # of a curve
MIN_CURVE_POINTS = 4  # least points of a curve of a validation metric; with fewer, the loss is shown
BARS = "▁▂▃▄▅▆▇█"
# most lines to read; of a longer file, SPACED_LINES evenly spaced ones, the LAST_LINES, and up to
# MAX_VALIDATION_LINES of validation
MAX_LINES = 15_000
SPACED_LINES, LAST_LINES, MAX_VALIDATION_LINES = 2_000, 40, 5_000
LOGARITHMIC_SPAN = 10.0  # a curve that spans more than this factor is drawn on a logarithmic scale


@dataclass(frozen=True)
class Curve:
    """The course of a metric in a few points."""

    name: str  # name of the metric in `metrics.jsonl`
    steps: tuple[int, ...]  # the last step of each point
    values: tuple[float, ...]  # values, each the mean of the lines since the previous point

    @classmethod
    def of(cls, name: str, points: Sequence[tuple[int, float]]) -> Curve:
        n = min(SPARK_POINTS, len(points))
        parts = [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]
        means = tuple(sum(value for _, value in part) / len(part) for part in parts)
        return cls(name, tuple(part[-1][0] for part in parts), means)

    @property
    def spark(self) -> str:
        """The curve as bars, one character per point; the lowest bar is the smallest value."""
        values = list(self.values)
        if min(values) > 0 and max(values) > LOGARITHMIC_SPAN * min(values):
            values = [math.log(value) for value in values]
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without any that a kill has cut short. A large file is
    subsampled, because a million lines take long to parse."""
    path = Run(folder).metrics_file
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if (n := len(lines)) > MAX_LINES:
        checks = [i for i, line in enumerate(lines) if b'"val_' in line]
        numbers = {i * n // SPACED_LINES for i in range(SPACED_LINES)} | {*range(n - LAST_LINES, n)}
        lines = [
            lines[i] for i in sorted(numbers.union(checks if len(checks) <= MAX_VALIDATION_LINES else ()))
        ]
    return list(filter(None, map(_values, lines)))


def every_line(folder: Path) -> Iterator[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`, without any that a kill has cut short."""
    path = Run(folder).metrics_file
    if path.is_file():
        with open(path, "rb") as file:
            yield from filter(None, map(_values, file))


def _values(line: bytes) -> dict[str, Any]:
    """The metrics in a line; none if the line is cut short."""
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    return {}


def last_figures(run: Run, step: int | None = None) -> dict[str, float]:
    """The last value of each validation metric by name, or its value at a step. For a run in stages, these
    are the metrics of the last stage."""
    figures: dict[str, float] = {}
    for line in metric_lines(run.serving.path):
        if step in (None, line["step"]):
            figures |= {key.removeprefix("val_"): v for key, v in line.items() if key.startswith("val_")}
    return figures


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The finite points (step, value) of each loss and each validation metric, `val_…`, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            recorded = key.startswith("val_") or key.rpartition(".")[2] == "loss"
            if recorded and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, []).append((line["step"], value))
    return points


def curve_of(run: Run) -> Curve | None:
    """The curve of the metric that selects the best checkpoint of a run, or of its newest started stage. If
    that metric has fewer than MIN_CURVE_POINTS points, it is the curve of the loss. None if there is
    neither."""
    started = [stage for stage in run.stages if stage.metrics_file.exists()]
    part = started[-1] if started else run
    points, best = curves(metric_lines(part.path)), part.best
    losses = [key for key in points if not key.startswith("val_")]
    keys = [*([f"val_{best.metric}"] if best else []), *losses[:1]]
    candidates = [Curve.of(key, points[key]) for key in keys if key in points]
    long = [curve for curve in candidates if len(curve.values) >= MIN_CURVE_POINTS]
    return next(iter(long or candidates[::-1]), None)


# ---------------------------------------------------------------------------- the summary of a run


def summary(run: Run) -> dict[str, Any]:
    """A run as shown by `--json`. For stages, `step` and `steps` are those of the first unfinished stage."""
    if (facts := index.recall(run.path, "summary")) is None:
        marks, total = index.survey(run.path, RECORDS)
        facts = _facts(run) | {"bytes": total}
        if run.status().get("state") not in ("running", "damaged"):
            index.store_value(run.path, "summary", marks, facts)
    created = moment(facts["created"]) if facts["created"] else None
    return {"name": facts["model"], **facts, "created": created, "path": run.path}


def summaries(chosen: Sequence[Run]) -> list[dict[str, Any]]:
    """The summaries of many runs. They are cached for the next call."""
    root = user_dir("runs")
    index.begin(root, "summary")
    rows = [summary(run) for run in chosen]
    index.save(root, "summary", os.listdir(root) if chosen else ())
    return rows


def _facts(run: Run) -> dict[str, Any]:
    """The summary of a run from its files; `created` is in seconds."""
    status = run.status()
    parts = run.stages or [run]
    current = next((stage for stage in run.stages if stage.state != "finished"), run.serving)
    progress, best, curve = current.status(), run.serving.best, curve_of(run)
    params = [part.status().get("params") for part in parts]
    return {
        "run": run.id,
        "alias": run.alias,
        "model": run.model,
        "name": run.title,
        "data": run.data,
        "state": run.state,
        "stage": None if current is run else current.path.name,
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "short": ", ".join(run.shortfalls) or None,
        "ended_by_patience": current.ended_by_patience,
        "served": run.served,
        "best": best and asdict(best),
        "curve": curve and asdict(curve),
        "params": None if None in params else sum(params),
        "clock": run.clock,
        "seconds": round(run.training_seconds, 1),
        "bytes": None,
        "created": status.get("created"),
        "error": (status.get("error") or {}).get("message"),
    }


def in_words(row: Mapping[str, Any]) -> dict[str, str | None]:
    """The metrics and times of a summary, formatted for people."""
    best, curve, created = row["best"], row["curve"], row["created"]
    time_is = " CPU time" if row.get("clock") == "cpu" else ""
    return {
        "best": f"{best['metric']} {figure(best['value'])}" if best else None,
        "curve": Curve(**curve).spark if curve else None,
        "time": duration(row["seconds"]) + time_is if row["seconds"] else None,
        "size": size(row["bytes"]),
        "params": count(row["params"]) if row["params"] else None,
        "made": created[:16].replace("T", " ") if created else None,
    }
