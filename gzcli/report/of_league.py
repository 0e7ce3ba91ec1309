"""What a league adds to the report of a `gz bench`: standings over seeds, equal network calls, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gzcli.report.common import cost, is_number, number, words
from gzcli.report.document import Cell, Chart, Column, Direction, Section, Series, Table

# (key of a row, name of the axis) of each curve
AXES = {"steps": ("steps", "steps of the sampler"), "time": ("at_seconds", "seconds of training")}
FIRST = (
    "place",
    "seeds",
    "failed",
    "times_floor",
    "rank",
)  # keys of a standing that stand before its figures


def sections(made: Mapping[str, Any], directions: Mapping[str, Direction]) -> list[Section]:
    """The standings and the curves; nothing where the results are of no league."""
    summary = [row for row in made.get("summary") or [] if isinstance(row, dict)]
    lead = ""
    agreement = made.get("spearman") or {}
    if is_number(agreement.get("mean")):
        lead = f"The orders of two seeds agree by a Spearman correlation of {number(agreement['mean'])}"
        lead += f" on average, {number(agreement['min'])} at least."
    found = [Section("League", [standings(summary, directions)], lead)] if summary else []
    metric = made.get("metric")
    curves = made.get("curves") or {}
    charts = [
        curve(f"{kind}: {metric}", rows, str(metric), *AXES[kind])
        for kind, rows in (curves.items() if isinstance(curves, dict) else ())
        if rows and metric and kind in AXES
    ]
    return [*found, *([Section("Curves", charts)] if charts else [])]


def standing(
    made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], str]]:
    """The first row of each model that has figures, the best first, with its place and name; nothing where
    the results are of no league."""
    found = []
    for one in made.get("summary") or []:
        own = (row for row in rows if row.get("model") == one.get("model") and row.get("metrics"))
        if row := next(own, None):
            place = f"{one['place']}. " if one.get("place") else ""
            found.append((row, f"{place}{one.get('model')}"))
    return found


def winner(made: Mapping[str, Any]) -> str:
    """The first of a league, in a sentence; empty where there is none."""
    for row in made.get("summary") or []:
        if row.get("place") == 1 and is_number(row.get("times_floor")):
            times, metric = number(row["times_floor"]), made.get("metric")
            return f"First: {row.get('model')}, {times} × the floor of `{metric}`."
    return ""


def standings(summary: Sequence[Mapping[str, Any]], directions: Mapping[str, Direction]) -> Table:
    """A row for each model, the best first, with the standard deviation over its seeds beside each mean."""
    figures = list(dict.fromkeys(name for row in summary for name in row.get("metrics") or {}))
    facts = [key for key in FIRST if any(is_number(row.get(key)) for row in summary)]
    rest = dict.fromkeys(key for row in summary for key, value in row.items() if is_number(value))
    costs = [key for key in rest if key not in FIRST]
    columns = [Column("model", numeric=False), *(Column(words(key).lower()) for key in facts)]
    columns += [Column(name, directions.get(name)) for name in figures]
    columns += [Column(words(key).lower()) for key in costs]
    best = {}
    for name, way in directions.items():
        values = [row["metrics"][name] for row in summary if is_number((row.get("metrics") or {}).get(name))]
        if len(values) > 1:
            best[name] = min(values) if way == "down" else max(values)
    body = []
    for row in summary:
        cells = [Cell(str(row.get("model", "?")))]
        cells += [Cell(number(row.get(key)), row.get(key)) for key in facts]
        for name in figures:
            value, spread = ((row.get(key) or {}).get(name) for key in ("metrics", "deviations"))
            small = f"± {number(spread)}" if is_number(spread) else ""
            cells.append(Cell(number(value), value, small, value is not None and value == best.get(name)))
        cells += [Cell(cost(key, row.get(key)), row.get(key)) for key in costs]
        body.append(cells)
    return Table("League", columns, body, caption="Means over seeds, ± one standard deviation.")


def curve(title: str, rows: Sequence[Mapping[str, Any]], metric: str, key: str, axis: str) -> Chart:
    """A line for each model and seed: its figure over steps or seconds."""
    lines: dict[str, list[tuple[float, float]]] = {}
    seeds = {row.get("seed") for row in rows}
    for row in rows:
        x, y = row.get(key), (row.get("metrics") or {}).get(metric)
        if is_number(x) and is_number(y) and x > 0:
            name = f"{row.get('model')}, seed {row.get('seed')}" if len(seeds) > 1 else str(row.get("model"))
            lines.setdefault(name, []).append((float(x), float(y)))
    series = [Series(name, sorted(points)) for name, points in lines.items()]
    return Chart(f"curve-{title}", f"{metric} over {axis}", axis, metric, series)
