"""The content of a report in any format: sections with tables, charts, images and texts. Also the formatting
of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from gzcli.core.units import count, figure, size
from gzcli.metrics.standings import interval

Direction = Literal["down", "up"]  # direction of better values of a metric


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""  # small print beside the text, such as an interval
    value: float | None = None  # number to sort its column by; None: the text is used
    best: bool = False  # whether it is the best of its column


@dataclass(frozen=True)
class Column:
    name: str
    cells: Sequence[Cell]
    direction: Direction | None = None
    numeric: bool = True  # whether it contains numbers, which are aligned to the right


@dataclass(frozen=True)
class Table:
    """A table whose rows may be sorted."""

    title: str
    columns: Sequence[Column]
    foot: Sequence[Sequence[Cell]] = ()  # rows that stay at the bottom, such as the floor
    caption: str = ""  # what the metrics mean
    cited: bool = False  # whether it is the only table written as LaTeX
    kind: str = "table"

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]  # (x, y), in order
    dashed: bool = False  # whether it is a reference line


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]] = ()
    filled: bool = False  # whether the areas below the lines are shaded, as in a histogram
    kind: str = "chart"


@dataclass(frozen=True)
class Measured:
    """The metric of a row called `name`, with its 95 % interval, which may be unknown."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Dots:
    """Estimates of one metric, one below the other, with the floor as a line."""

    name: str
    title: str
    rows: Sequence[Measured]
    floor: float  # the metric of real images
    direction: Direction | None
    kind: str = "dots"


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    name: str  # name of its file, without the extension
    title: str
    png: bytes
    wide: bool = False  # whether it takes the page's width
    kind: str = "picture"


@dataclass(frozen=True)
class Text:
    """A preformatted text that is shown when its title is opened."""

    title: str
    body: str
    kind: str = "text"


@dataclass(frozen=True)
class Section:
    title: str
    items: Sequence[Table | Chart | Dots | Picture | Text]
    lead: str = ""  # a sentence before the items


@dataclass(frozen=True)
class Document:
    """A report. In all its sentences, backticks mark code."""

    verb: str  # command that made the results
    title: str
    lead: str
    facts: Sequence[tuple[str, str]]  # (name, value) of what the metrics depend on
    notes: Sequence[str] = ()  # facts without which the metrics could be misread
    sections: Sequence[Section] = field(default_factory=list)
    command: str = ""  # command that makes the results again

    @property
    def tables(self) -> list[Table]:
        """The tables for LaTeX: those to cite, or all if there is none."""
        every = [item for section in self.sections for item in section.items if isinstance(item, Table)]
        return [table for table in every if table.cited] or every


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else figure(value)


def cost(key: str, value: Any) -> str:
    """Parameters or bytes in readable units; any other number in the form of a metric."""
    if is_number(value) and key in ("params", "peak_memory"):
        return count(value) if key == "params" else size(value)
    return number(value)


def brackets(ends: Any) -> str:
    """An interval as text, such as `[1.2, 1.5]`; empty if it is unknown."""
    bounds = interval(ends)
    return f"[{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""


def texts(name: str, values: Sequence[str], small: Sequence[str] = ()) -> Column:
    """A column of texts, each followed by a further text in small letters."""
    cells = [Cell(*pair) for pair in zip(values, small or [""] * len(values), strict=True)]
    return Column(name, cells, numeric=False)


def numbers(
    name: str, values: Sequence[Any], small: Sequence[str] = (), text: Callable[[Any], str] = number
) -> Column:
    """A column of numbers, none of which is marked as the best."""
    pairs = zip(values, small or [""] * len(values), strict=True)
    return Column(name, [Cell(text(value), small_text, value) for value, small_text in pairs])
