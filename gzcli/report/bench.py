"""The report of a `gz bench`, and what a league adds to it: standings over seeds, equal network calls,
curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gzcli.core.units import by_sides
from gzcli.engine.sheets import grid
from gzcli.metrics.metric import column_of
from gzcli.metrics.standings import comparable
from gzcli.report.common import (
    behind,
    cost,
    day,
    interval,
    is_number,
    number,
    other_pictures,
    png_of,
    shown,
    training,
    words,
)
from gzcli.report.document import (
    Cell,
    Chart,
    Column,
    Direction,
    Document,
    Dots,
    Estimate,
    Picture,
    Section,
    Series,
    Table,
)
from gzcli.report.results import Results

GRID, COLUMNS = 32, 8  # samples of a model that are shown, in a row
DOTTED = 9  # figures that are drawn at most
TEXTS = ("model", "name", "run", "path", "error", "precision")  # keys of a row that are no costs
FLAGS = ("conditional", "levels")
# (key of a row, name of the axis) of each curve
AXES = {"steps": ("steps", "steps of the sampler"), "time": ("at_seconds", "seconds of training")}
# keys of a standing before its figures
FIRST = ("place", "seeds", "failed", "times_floor", "rank")


def document(results: Results) -> Document:
    """The report; keys that the results lack are left out."""
    made = results.made
    rows = [row for row in made.get("rows") or [] if isinstance(row, dict)]
    names = unique(labels(rows))
    figures = Figures(made, rows)
    data, provenance = str(made.get("data", "?")), made.get("provenance") or {}
    facts = [("data", data), ("contestants", str(len(rows)))]
    for key, title in (("n_fake", "samples of each"), ("n_real", "real images"), ("seed", "seed")):
        if provenance.get(key) is not None:
            facts.append((title, number(provenance[key])))
    if shape := provenance.get("shape"):
        facts.append(("images", by_sides(shape)))
    sections = [
        *league_sections(made, {name: way for name in figures.names if (way := figures.direction(name))}),
        Section("Figures", [figures.table(names)], figures.sentence(names)),
        *equal_calls(made),
        Section("Against the floor", figures.dots(names)),
        Section("Samples", grids(results, rows, names)),
        Section("Pictures", list(other_pictures(results, {"bench"}))),
        Section("Costs", costs(rows, names)),
        training(results),
        behind(results),
    ]
    return Document(
        "bench",
        f"{'League' if made.get('summary') else 'Benchmark'} on {data}",
        league_winner(made) or figures.winner(names),
        [*facts, day(results)],
        [str(note) for note in made.get("notes") or []],
        [section for section in sections if section.items],
        results.command(),
    )


def equal_calls(made: Mapping[str, Any]) -> list[Section]:
    rows = [row for row in made.get("equal_calls") or [] if isinstance(row, dict)]
    if not rows:
        return []
    title = f"At {rows[0].get('setting', 'equal calls')}"
    return [Section(title, [Figures(made, rows).table(unique(labels(rows)), title)])]


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the rows; in a league, where each model has a row a seed, its model, with the seed where
    there are several."""
    seeds = [row.get("seed") for row in rows]
    keys = ("name", "model", "run") if None in seeds else ("model", "name", "run")
    names = [str(next((row[key] for key in keys if row.get(key)), "?")) for row in rows]
    if len(set(seeds)) < 2:
        return names
    return [f"{name}, seed {seed}" for name, seed in zip(names, seeds, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """The names; of equal ones each later one with its number."""
    unique_names: list[str] = []
    for name in names:
        seen = names[: len(unique_names)].count(name)
        unique_names.append(f"{name} ({seen + 1})" if seen else name)
    return unique_names


class Figures:
    """The figures of all rows, with floor, intervals and directions."""

    def __init__(self, made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]):
        self.rows, self.floor = rows, made.get("floor") or {}
        whole = [("real images", self.floor, made.get("floor_intervals") or {})] if self.floor else []
        floors = [floor for floor in made.get("floors") or [] if isinstance(floor, dict)]
        self.by_number = {floor.get("n"): floor.get("metrics") or {} for floor in floors}
        several = [
            (f"real images, {floor.get('n')}", floor.get("metrics") or {}, floor.get("intervals") or {})
            for floor in floors
        ]
        self.floors = several if len(several) > 1 else whole  # contestants of fewer images have their own
        self.directions: Mapping[str, Any] = made.get("directions") or {}
        names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
        with_floor = [name for name in self.floor if name in names]  # these compare images, the rest models
        self.names = [name for name in dict.fromkeys([*with_floor, *names]) if not column_of(name).cost]

    def value(self, row: Mapping[str, Any], name: str) -> float | None:
        """A figure of a row; None where it has none that is finite."""
        value = (row.get("metrics") or {}).get(name)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    def direction(self, name: str) -> Direction | None:
        """Where better values of a figure lie; `fd@32` lies as `fd`."""
        way = self.directions.get(name, self.directions.get(name.partition("@")[0]))
        return way if way in ("down", "up") else None

    def groups(self, name: str) -> list[list[Mapping[str, Any]]]:
        """The rows that have a figure, as `comparable`."""
        return comparable([row for row in self.rows if self.value(row, name) is not None], name, self.floor)

    def best(self, rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
        """The best value of a figure in comparable rows; None without a direction, or for one row."""
        values = [value for row in rows if (value := self.value(row, name)) is not None]
        if not self.direction(name) or len(values) < 2:
            return None
        return min(values) if self.direction(name) == "down" else max(values)

    def is_best(self, row: Mapping[str, Any], name: str) -> bool:
        """Whether a row has the best value of a figure among those that it may be compared with."""
        group = next((rows for rows in self.groups(name) if row in rows), [])
        return (best := self.best(group, name)) is not None and self.value(row, name) == best

    def floor_of(self, row: Mapping[str, Any], name: str) -> float | None:
        """The figure of as many real images as a row has; None where it is not known."""
        value = self.by_number.get(row.get("n"), self.floor).get(name)
        return value if is_number(value) else None

    def cell(self, row: Mapping[str, Any], name: str) -> Cell:
        value = self.value(row, name)
        if value is None:
            return Cell("–")
        ends = shown((row.get("intervals") or {}).get(name))
        return Cell(number(value), value, ends, self.is_best(row, name))

    def table(self, names: Sequence[str], title: str = "Figures") -> Table:
        """A row for each contestant, and the floor below."""
        columns = [Column("model", numeric=False)]
        columns += [Column(name, self.direction(name)) for name in self.names]
        body = [
            [Cell(whose, None, detail(row, whose)), *(self.cell(row, name) for name in self.names)]
            for whose, row in zip(names, self.rows, strict=True)
        ]
        foot = [
            [
                Cell(title),
                *(Cell(number(values.get(name)), None, shown(ends.get(name))) for name in self.names),
            ]
            for title, values, ends in self.floors
        ]
        caption = "Below stands the floor: real images in place of samples. "
        if self.directions:
            of_one = ", of those of one number of images," if len(self.by_number) > 1 else ""
            caption += f"Brackets hold 95 % intervals; the best of a column{of_one} is bold."
        return Table(title, columns, body, foot, caption)

    def dots(self, names: Sequence[str]) -> list[Dots]:
        """Drawings of the figures that have a floor, one for each number of images."""
        drawn, titles = [], {id(row): title for row, title in zip(self.rows, names, strict=True)}
        for name in self.names:
            groups = self.groups(name)
            for group in groups:
                rows = []
                for row in group:
                    low, high = interval((row.get("intervals") or {}).get(name)) or (None, None)
                    value = self.value(row, name) or 0.0
                    rows.append(Estimate(titles[id(row)], value, low, high, self.is_best(row, name)))
                if len(rows) > 1 and (floor := self.floor_of(group[0], name)) is not None:
                    n = group[0].get("n")
                    several = len(groups) > 1 and n is not None
                    file = f"{name}-{n}" if several else name
                    title = f"{name}, {n:,} images" if several else name
                    drawn.append(Dots(file, title, rows, floor, self.direction(name)))
        return drawn[:DOTTED]

    def winner(self, names: Sequence[str]) -> str:
        """The best contestant by the first figure that has a direction, in a sentence."""
        for name in self.names:
            group = next(iter(self.groups(name)), [])
            if (best := self.best(group, name)) is not None:
                row = next(row for row in group if self.value(row, name) == best)
                title = next(
                    title for candidate, title in zip(self.rows, names, strict=True) if candidate is row
                )
                floor = self.floor_of(row, name)
                times = f", {best / floor:.2f} × the floor of {number(floor)}" if floor and floor > 0 else ""
                return f"Best `{name}`: {title}, {number(best)}{times if name.startswith('f') else ''}."
        return f"{len(self.rows)} contestants side by side."

    def sentence(self, names: Sequence[str]) -> str:
        failed = [name for name, row in zip(names, self.rows, strict=True) if row.get("error")]
        return f"Failed: {', '.join(failed)}." if failed else ""


def detail(row: Mapping[str, Any], title: str) -> str:
    if row.get("error"):
        return f"failed: {row['error']}"
    run = str(row.get("run") or "")
    return run if run != title else ""


def grids(results: Results, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Picture]:
    """Samples of each contestant, in a league of each model, the best first; and the sheet that `gz bench`
    drew."""
    items, pictures = [], results.pictures()
    for row, title in standing(results.made, rows) or zip(rows, names, strict=True):
        samples = results.samples(row)
        if samples is not None and len(samples):
            image = png_of(grid(samples[:GRID], COLUMNS))
            items.append(Picture(f"samples-{title}", title, image))
    if "bench" in pictures:
        items.append(
            Picture("bench", "Samples of every contestant and real images", pictures["bench"], wide=True)
        )
    return items


def costs(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Table]:
    values: list[dict[str, Any]] = []
    for row in rows:
        figures = {key: value for key, value in row.items() if key not in (*TEXTS, *FLAGS)}
        figures |= {key: value for key, value in (row.get("metrics") or {}).items() if column_of(key).cost}
        values.append({key: value for key, value in figures.items() if is_number(value)})
    keys = list(dict.fromkeys(key for row in values for key in row))
    columns = [Column("model", numeric=False), *(Column(words(key).lower()) for key in keys)]
    cells = [
        [Cell(name), *(Cell(cost(key, row.get(key)), row.get(key)) for key in keys)]
        for name, row in zip(names, values, strict=True)
    ]
    return [Table("Costs", columns, cells)] if keys else []


# ---------------------------------------------------------------------------- leagues


def league_sections(made: Mapping[str, Any], directions: Mapping[str, Direction]) -> list[Section]:
    """The standings and the curves of a league."""
    summary = [row for row in made.get("summary") or [] if isinstance(row, dict)]
    lead = ""
    agreement = made.get("spearman") or {}
    if is_number(agreement.get("mean")):
        lead = f"The orders of two seeds agree by a Spearman correlation of {number(agreement['mean'])}"
        lead += f" on average, {number(agreement['min'])} at least."
    parts = [Section("League", [standings(summary, directions)], lead)] if summary else []
    metric = made.get("metric")
    curves = made.get("curves") or {}
    charts = [
        curve(f"{kind}: {metric}", rows, str(metric), *AXES[kind])
        for kind, rows in (curves.items() if isinstance(curves, dict) else ())
        if rows and metric and kind in AXES
    ]
    return [*parts, *([Section("Curves", charts)] if charts else [])]


def standing(
    made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], str]]:
    """The first row with figures of each model of a league, the best first, with its place and name."""
    first_rows = []
    for one in made.get("summary") or []:
        rows_of_model = (row for row in rows if row.get("model") == one.get("model") and row.get("metrics"))
        if row := next(rows_of_model, None):
            place = f"{one['place']}. " if one.get("place") else ""
            first_rows.append((row, f"{place}{one.get('model')}"))
    return first_rows


def league_winner(made: Mapping[str, Any]) -> str:
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
