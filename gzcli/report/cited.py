"""The table of a bench or league for citation: a few columns, one kind of ±, and bold for the first rank of
each metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.metrics.metric import column_of
from gzcli.metrics.standings import (
    LATE,
    SECOND_METRIC,
    Excess,
    base,
    estimate,
    excess_of,
    first_of,
    metric_heading,
    over_seeds,
    rank_ranges,
    value_of,
)
from gzcli.report import document as doc
from gzcli.report.document import Cell, Column, Table
from gzcli.report.results import Row, rows_of

FACT_KEYS = {"samples": "n", "seconds": "train_seconds", "steps": "train_steps", "params": "params"}
MAX_TABLE_COLUMNS = 7  # columns of metrics and facts without a choice
CITED_LIKELIHOODS = ("bpd", "nats", "bpd|y", "nats|y")
METRIC_ENDINGS = ("", "_lenet", "_rot", "_lite")  # ends of a metric's name: `recall` is `recall_lenet`
CITATION_TITLE = "To cite"
BEST = "no model is significantly better. Values better than those of real images count as equal."
BOLD = f"Bold: {BEST}"
ERRORS_TEXT = (
    "± is half of a 95 % interval, or its larger side near a bound: over images for one seed, over seeds "
    "(Student's t) for several."
)
MARK = " †"  # mark of a model that was trained for too long
LATE_CAPTION = f"†: trained for over {LATE} times the budget, so without a rank."


def table(result: Row, columns: Sequence[str] = ()) -> Table | None:
    """A row for each model, the best first; None without rows.

    columns: metrics, also without their judge, and keys of FACT_KEYS; the default is at most `MOST`.
    """
    groups = {title: rows for title, rows in models_of(result).items() if rows}
    if not groups:
        return None
    every = [row for rows in groups.values() for row in rows]
    figures = figures_of(every)
    of_result = base(str(result.get("metric")))
    names = [column(name, figures) for name in columns] or usual(figures, groups, of_result)
    table_columns = [doc.texts("model", list(groups))]
    for name in names:
        table_columns.append(fact(name, groups) if name in FACT_KEYS else cited_figure(name, groups))
    return Table(CITATION_TITLE, table_columns, caption=caption(groups), cited=True)


def caption(titles: Iterable[str], best: str = BOLD) -> str:
    """What the signs mean. best: a sentence on the mark of the best values."""
    return " ".join([ERRORS_TEXT, best, *[LATE_CAPTION] * any(title.endswith(MARK) for title in titles)])


def figures_of(rows: Sequence[Row]) -> list[str]:
    """The metrics of rows, at any grey levels."""
    return list(dict.fromkeys(base(name) for row in rows for name in row.get("metrics") or {}))


def column(name: str, figures: Sequence[str]) -> str:
    """The full name of a column, which is empty if no row has it."""
    name = base(name)
    return next((name + judge for judge in METRIC_ENDINGS if name + judge in (*figures, *FACT_KEYS)), name)


def check(columns: Sequence[str], figures: Sequence[str]) -> None:
    """Raises UsageError for a column that is not among the metrics. Likelihoods are accepted, because not
    every model has one.

    figures: metrics of results, or columns of the metrics to compute.
    """
    possible = [*figures, *FACT_KEYS, *CITED_LIKELIHOODS]
    for name in columns:
        full = [name + judge for judge in METRIC_ENDINGS]
        if not {*full, *(column_of(each).name for each in full)} & {*possible}:
            hint = did_you_mean(name, possible) or f"choose from {', '.join([*figures, *FACT_KEYS])}"
            raise UsageError(f"there is no column `{name}`", hint=hint)


def models_of(result: Row) -> dict[str, Sequence[Row]]:
    """The complete rows of each contestant, or of each model of a league, by its title, in the order of
    places. A model of a league that failed has none."""
    rows = [row for row in rows_of(result) if row.get("metrics")]
    if not (summary := rows_of(result, "summary")):
        places = result.get("places") or {}
        names = {str(row.get("name")): [row] for row in rows}  # the bench made these names distinct

        def first(name: str) -> int:
            place = str(places.get(name) or "")
            return int(place.split("–")[0]) if place else len(names)

        return {name: names[name] for name in sorted(names, key=first)}
    groups: dict[str, Sequence[Row]] = {}
    for entry in summary:
        title = str(entry.get("title") or entry.get("model")) + (MARK if entry.get("late") else "")
        groups[title] = [row for row in rows if row.get("model") == entry.get("model")]
    return groups


def usual(figures: Sequence[str], groups: dict[str, Sequence[Row]], metric: str) -> list[str]:
    """The usual columns: the metric of the ranking, that of the second judge, companions of both,
    likelihoods, and costs."""
    quality = [name for name in figures if name in (metric, SECOND_METRIC) or column_of(name).rank == 1]
    beside = sorted(
        (name for name in figures if column_of(name).beside and name not in quality),
        key=lambda name: -column_of(name).keep,
    )
    rows = [row for some in groups.values() for row in some]
    facts = [
        name for name, key in FACT_KEYS.items() if name != "params" and any(row.get(key) for row in rows)
    ]
    likelihoods = [name for name in CITED_LIKELIHOODS if name in figures][:1]
    left = MAX_TABLE_COLUMNS - len(quality) - len(likelihoods) - len(facts)
    return [*quality, *beside[: max(0, left)], *likelihoods, *facts][:MAX_TABLE_COLUMNS]


def cited_figure(name: str, groups: Mapping[str, Sequence[Row]]) -> Column:
    """The mean of each model with half its interval. A model that was trained for too long is never the
    best."""
    means, worse, way = dict[str, Excess](), dict[str, Excess](), column_of(name).better
    for title, rows in groups.items():
        having = [row for row in rows if value_of(row, name) is not None]
        if mean := over_seeds([estimate(row, name) for row in having]):
            means[title] = mean
            over = over_seeds([excess_of(row, name) for row in having])
            if over and not title.endswith(MARK):
                worse[title] = over
    best, cells = bold(worse) if way else [], []
    for title in groups:
        one = means.get(title)
        half = f"± {doc.number(float(f'{one.half:.2g}'))}" if one and one.half else ""
        cells.append(Cell(doc.number(one and one.value), half, one and one.value, title in best))
    return Column(metric_heading(name, [row for rows in groups.values() for row in rows]), cells, way)


def bold(excesses: Mapping[str, Excess]) -> list[str]:
    """The names whose values are bold: those of the first rank; none for fewer than two."""
    return first_of(rank_ranges(excesses)) if len(excesses) > 1 else []


def fact(name: str, groups: dict[str, Sequence[Row]]) -> Column:
    values = []
    for rows in groups.values():
        numbers = [row[FACT_KEYS[name]] for row in rows if doc.is_number(row.get(FACT_KEYS[name]))]
        values.append(round(sum(numbers) / len(numbers)) if numbers else None)
    return doc.numbers(name, values, text=partial(doc.cost, FACT_KEYS[name]))
