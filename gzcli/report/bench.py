"""The report of `gz bench`, with the additions for a league: standings over seeds, equal network calls,
curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

from gzcli.engine.sheets import grid
from gzcli.metrics.metric import column_of
from gzcli.metrics.standings import (
    AXES,
    Excess,
    base,
    comparable,
    excess_from,
    excess_of,
    first_of,
    interval,
    metric_heading,
)
from gzcli.report import cited
from gzcli.report import document as doc
from gzcli.report.document import Cell, Chart, Column, Dots, Measured, Picture, Section, Series, Table
from gzcli.report.results import Results, Row, facts_of, rows_of, words
from gzcli.store.png import picture_of

GRID_SAMPLES, GRID_COLUMNS = 32, 8  # samples shown for a model, and in a row
DOTTED = 9  # most metrics in charts
# keys of a row that are not costs
NOT_COSTS = ("model", "name", "run", "path", "error", "precision", "conditional", "levels")
# keys of a standing before its metrics
FIRST_KEYS = ("seeds", "failed", "n")

EXCESS = (
    "The excess is a metric minus its value for real images sampled the same way. Ranks are by excess. "
    "A rank such as 1–3 is a range, because some differences may be chance."
)


def document(results: Results, columns: Sequence[str] = ()) -> doc.Document:
    """The report; missing keys of the results are skipped.

    columns: columns of the table for citation; empty for the usual ones.
    """
    result, figures = results.result, Figures(results.result, rows_of(results.result))
    data, summary = str(result.get("data", "?")), rows_of(result, "summary")
    equal = rows_of(result, "equal_calls")
    facts = [("data", data), ("contestants", str(len(figures.rows)))]
    titles = {"n_fake": "samples of each model", "n_real": "real images", "seed": "seed"}
    failed = ", ".join(title for title, row in figures.titled if row.get("error"))
    failed = f"Failed: {failed}." if failed else ""
    title = f"At {equal[0].get('setting', 'equal calls')}" if equal else ""
    to_cite = cited.table(result, columns)
    sections = [
        Section(cited.CITATION_TITLE, [to_cite] if to_cite else []),
        Section("League", [standings(result)] if summary else [], agreement_sentence(result)),
        Section("Curves", curves(result)),
        Section("Figures", [figures.table("Figures")], f"{failed} {second_judge(result)}".strip()),
        Section(title, [Figures(result, equal).table(title)] if equal else []),
        Section("Against the floor", figures.dots()),
        Section("Samples", grids(results, figures)),
        Section("Pictures", results.other_pictures("bench")),
        Section("Costs", costs(figures)),
    ]
    facts += facts_of(result.get("provenance") or {}, titles)
    lead = league_winner(result) or figures.winner()
    return results.document(f"{'League' if summary else 'Benchmark'} on {data}", lead, facts, sections)


def row_labels(rows: Sequence[Row]) -> list[str]:
    """The names of the rows (in a league, their titles, which name the guidance), with seeds if there are
    several. Equal names are numbered."""
    seeds = [row.get("seed") for row in rows]
    keys = ("name", "model", "run") if None in seeds else ("title", "model", "name")
    names = [str(next((row[key] for key in keys if row.get(key)), "?")) for row in rows]
    if len(set(seeds)) > 1:
        names = [f"{name}, seed {seed}" for name, seed in zip(names, seeds, strict=True)]
    repeats = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, repeats, strict=True)]


class Figures:
    """The metrics of all rows, with floor, intervals and directions."""

    def __init__(self, result: Row, rows: Sequence[Row]):
        self.rows, self.titled = rows, list(zip(row_labels(rows), rows, strict=True))
        self.floor: Row = result.get("floor") or {}
        self.foot = [("real images", self.floor, result.get("floor_intervals") or {})] if self.floor else []
        floors = rows_of(result, "floors")
        if len(floors) > 1:  # contestants with fewer images, or drawn differently, have their own
            self.foot = [
                (title_of(floor), floor.get("metrics") or {}, floor.get("intervals") or {})
                for floor in floors
            ]
        self.directions: Row = result.get("directions") or {}
        self.places, self.metric = result.get("places") or {}, str(result.get("metric"))
        names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
        # these compare images; the others compare models
        with_floor = [name for name in self.floor if name in names]
        self.names = [name for name in dict.fromkeys([*with_floor, *names]) if not column_of(name).cost]

    def direction(self, name: str) -> doc.Direction | None:
        """The direction of better values of a metric; `fd@32` has the direction of `fd`."""
        way = self.directions.get(name, self.directions.get(name.partition("@")[0]))
        return way if way in ("down", "up") else None

    def having(self, name: str) -> dict[str, Row]:
        """The rows that have a metric, by their titles."""
        return {
            title: row for title, row in self.titled if doc.is_number((row.get("metrics") or {}).get(name))
        }

    def best(self, name: str) -> list[str]:
        """The titles of the rows of the first rank in a metric, at any grey levels."""
        excesses = {}
        for title, row in self.titled:
            row = {**row, "metrics": row.get("metrics") or {}, "floor": row.get("floor") or self.floor}
            if over := excess_of(row, base(name)):
                excesses[title] = over
        return cited.bold(excesses) if column_of(name).better else []

    def floor_of(self, row: Row, name: str) -> float | None:
        """The metric of real images that were sampled like those of a row; None if unknown."""
        value = (row.get("floor") or self.floor).get(name)
        return value if doc.is_number(value) else None

    def table(self, title: str) -> Table:
        """A row for each contestant, and the floor below."""
        names, small = [name for name, _ in self.titled], []
        for name, row in self.titled:
            run = str(row.get("run") or "")
            small.append(f"failed: {row['error']}" if row.get("error") else run * (run != name))
        columns = [doc.texts("model", names, small)]
        if len(self.places) > 1:
            columns.append(doc.texts("rank", [str(self.places.get(name, "–")) for name in names]))
            columns.append(excess_column(self.metric, [excess_of(row, self.metric) for row in self.rows]))
        for name in self.names:
            rows, best, cells = self.having(name), self.best(name), []
            for title, row in self.titled:
                value = row["metrics"][name] if title in rows else None
                ends = "" if value is None else doc.brackets((row.get("intervals") or {}).get(name))
                cells.append(Cell(doc.number(value), ends, value, title in rows and title in best))
            columns.append(Column(metric_heading(name, self.rows), cells, self.direction(name)))
        foot = [
            [Cell(title), *[Cell("")] * (len(columns) - len(self.names) - 1)]
            + [Cell(doc.number(figures.get(n)), doc.brackets(ends.get(n))) for n in self.names]
            for title, figures, ends in self.foot
        ]
        caption = "The last row is the floor: real images instead of samples. "
        if self.directions:
            caption += f"Brackets show 95 % intervals. {cited.BOLD}"
        return Table(title, columns, foot, caption)

    def dots(self) -> list[Dots]:
        """Drawings of the metrics that have a floor, one for each number of images."""
        charts, titles = [], {id(row): title for title, row in self.titled}
        for name in self.names:
            groups, best = comparable(list(self.having(name).values()), name, self.floor), self.best(name)
            for group in groups:
                floor, n = self.floor_of(group[0], name), group[0].get("n")
                if len(group) < 2 or floor is None:
                    continue
                rows = []
                for row in group:
                    low, high = interval((row.get("intervals") or {}).get(name)) or (None, None)
                    title = titles[id(row)]
                    rows.append(Measured(title, row["metrics"][name], low, high, title in best))
                with_number = len(groups) > 1 and n is not None
                file, title = (f"{name}-{n}", f"{name}, {n:,} images") if with_number else (name, name)
                charts.append(Dots(file, title, rows, floor, self.direction(name)))
        return charts[:DOTTED]

    def winner(self) -> str:
        """A sentence on the contestants that are closest to real images."""
        best = first_of(self.places)
        if not best or len(self.places) < 2:
            return f"{len(self.rows)} contestants side by side."
        tied = "Tied for best" if len(best) > 1 else "Best"
        return f"{tied} by `{self.metric}`: {', '.join(best)}."


def title_of(floor: Row) -> str:
    evenly = "" if floor.get("drawn", "random") == "random" else f", drawn evenly by {floor['drawn']}"
    return f"real images, {floor.get('n')}{evenly}"


def grids(results: Results, figures: Figures) -> list[Picture]:
    """Samples of each contestant, or of each model of a league, the best first; and the sheet of `gz
    bench`."""
    drawings = []
    for title, row in standing(results.result, figures.rows) or figures.titled:
        samples = results.samples(row, GRID_SAMPLES)
        if samples is not None and len(samples):
            sheet, png = grid(samples, GRID_COLUMNS), io.BytesIO()
            picture_of(sheet).save(png, "png", optimize=True)
            drawings.append(Picture(f"samples-{title}", title, png.getvalue()))
    if drawing := results.pictures().get("bench"):
        drawings.append(Picture("bench", "Samples of every contestant and real images", drawing, wide=True))
    return drawings


def costs(figures: Figures) -> list[Table]:
    values: list[dict[str, Any]] = []
    for row in figures.rows:
        metrics = {key: value for key, value in (row.get("metrics") or {}).items() if column_of(key).cost}
        facts = {key: value for key, value in row.items() if key not in NOT_COSTS} | metrics
        values.append({key: value for key, value in facts.items() if doc.is_number(value)})
    columns = [doc.texts("model", [name for name, _ in figures.titled])]
    columns += [cost_column(key, values) for key in dict.fromkeys(key for row in values for key in row)]
    return [Table("Costs", columns)] if len(columns) > 1 else []


def cost_column(key: str, rows: Sequence[Row]) -> Column:
    return doc.numbers(words(key).lower(), [row.get(key) for row in rows], text=partial(doc.cost, key))


# ---------------------------------------------------------------------------- leagues


def agreement_sentence(result: Row) -> str:
    """A sentence on how well the rankings of two seeds agree; empty if that was not computed."""
    by = result.get("spearman") or {}
    if not doc.is_number(by.get("mean")):
        return ""
    lead = f"The rankings of two seeds have a Spearman correlation of {doc.number(by['mean'])}"
    return f"{lead} on average and of at least {doc.number(by['min'])}."


def standing(result: Row, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """For each model of a league, the best first: its first row with metrics, its place and that row's title,
    because other seeds may have another guidance."""
    first_rows = []
    for entry in rows_of(result, "summary"):
        rows_of_model = (row for row in rows if row.get("model") == entry.get("model") and row.get("metrics"))
        if row := next(rows_of_model, None):
            place = f"{entry['place']}. " if entry.get("place") else ""
            first_rows.append((f"{place}{row.get('title') or named(entry)}", row))
    return first_rows


def named(standing: Row) -> str:
    return str(standing.get("title") or standing.get("model", "?"))


def league_winner(result: Row) -> str:
    """A sentence on the winner of a league; empty if there is none."""
    best = first_of({named(row): row.get("place") for row in rows_of(result, "summary")})
    return f"First by `{result.get('metric')}`: {', '.join(best)}." if best else ""


def second_judge(result: Row) -> str:
    """A sentence on how far the second judge agrees with the ranking of the first; empty if that was not
    computed."""
    second = result.get("second") or {}
    if not doc.is_number(second.get("spearman")):
        return ""
    orders = f"The rankings by `{result.get('metric')}` and `{second.get('metric')}`"
    text = f"{orders} have a rank correlation of {doc.number(second['spearman'])}"
    apart = [f"{name} ({first} and {rival})" for name, first, rival in second.get("apart") or ()]
    return f"{text}. Ranks that differ: {', '.join(apart)}." if apart else f"{text}."


def standings(result: Row) -> Table:
    """A row for each model, the best first."""
    summary, groups = rows_of(result, "summary"), cited.models_of(result)
    numbers = dict.fromkeys(key for row in summary for key, value in row.items() if doc.is_number(value))
    columns = [doc.texts("model", list(groups))]
    columns.append(doc.texts("rank", [str(row.get("place") or "–") for row in summary]))
    columns += [cost_column(key, summary) for key in FIRST_KEYS if key in numbers]
    for name in cited.figures_of(summary):
        columns.append(cited.cited_figure(name, groups))
        ends = [(row.get("excess") or {}).get(name) for row in summary]
        if any(ends):
            columns.append(excess_column(name, [each and excess_from(each) for each in ends]))
    columns += [cost_column(key, summary) for key in numbers if key not in FIRST_KEYS]
    return Table("League", columns, caption=f"Means over seeds. {cited.caption(groups)} {EXCESS}")


def excess_column(metric: str, excesses: Sequence[Excess | None]) -> Column:
    halves = ["" if each is None else f"± {doc.number(each.half)}" for each in excesses]
    return doc.numbers(f"{metric}, excess", [each and each.value for each in excesses], halves)


def curves(result: Row) -> list[Chart]:
    """One chart of the metric over steps and one over seconds, with a line for each model and seed."""
    metric, of_kind, charts = result.get("metric"), result.get("curves"), []
    for kind, rows in of_kind.items() if metric and isinstance(of_kind, dict) else ():
        if not rows or kind not in AXES:
            continue
        key, axis = AXES[kind]
        lines: dict[str, list[tuple[float, float]]] = {}
        with_seed = len({row.get("seed") for row in rows}) > 1
        for row in rows:
            x, y = row.get(key), (row.get("metrics") or {}).get(metric)
            if doc.is_number(x) and doc.is_number(y) and x > 0:
                name = f"{row.get('model')}, seed {row.get('seed')}" if with_seed else str(row.get("model"))
                lines.setdefault(name, []).append((float(x), float(y)))
        series = [Series(name, sorted(points)) for name, points in lines.items()]
        charts.append(Chart(f"curve-{kind}: {metric}", f"{metric} over {axis}", axis, str(metric), series))
    return charts
