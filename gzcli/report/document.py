"""What a report says, whatever it is written in: sections of tables, charts, pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["down", "up"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    text: what it says.
    value: the number by which its column is sorted; None: the text is.
    small: what stands beside the text in small letters, as an interval.
    best: whether it is the best of its column.
    """

    text: str
    value: float | None = None
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    name: its head.
    direction: where better values lie; None: neither way.
    numeric: whether it holds numbers, which are aligned to the right.
    """

    name: str
    direction: Direction | None = None
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table whose rows may be sorted.

    title: its heading.
    columns: of each row.
    rows: its cells.
    foot: rows that stay below, as the floor.
    caption: what the figures mean.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()
    caption: str = ""
    kind: str = "table"

    @property
    def lines(self) -> list[Sequence[Cell]]:
        """All rows, those of the foot last."""
        return [*self.rows, *self.foot]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    name: in the legend.
    points: (x, y), in order.
    dashed: whether it is a line to compare with.
    """

    name: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    name: of its file.
    title: its heading.
    x, y: names of the axes.
    series: the lines; all share one scale.
    ticks: (place, label) along x where the axis is not linear; (): round numbers.
    filled: whether the areas below the lines are shaded, as in a histogram.
    """

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]] = ()
    filled: bool = False
    kind: str = "chart"


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, which may be unknown.

    name: of what has it.
    value: the figure.
    low, high: the ends of the interval.
    best: whether it is the best.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Dots:
    """Estimates of one figure below each other, with the floor as a line.

    name: of its file.
    title: name of the figure.
    rows: the estimates.
    floor: the figure of real images; None: unknown.
    direction: where better values lie.
    """

    name: str
    title: str
    rows: Sequence[Estimate]
    floor: float | None
    direction: Direction | None
    kind: str = "dots"


@dataclass(frozen=True)
class Picture:
    """A PNG.

    name: of its file, without the ending.
    title: what it shows.
    png: the file's bytes.
    wide: whether it takes the page's width.
    """

    name: str
    title: str
    png: bytes
    wide: bool = False
    kind: str = "picture"


@dataclass(frozen=True)
class Text:
    """A text that is shown as it is, when its title is opened.

    title: its heading.
    body: the text.
    """

    title: str
    body: str
    kind: str = "text"


Item = Table | Chart | Dots | Picture | Text


@dataclass(frozen=True)
class Section:
    """A part of a report.

    title: its heading.
    items: what it holds; small figures stand side by side.
    lead: a sentence before them.
    """

    title: str
    items: Sequence[Item]
    lead: str = ""


@dataclass(frozen=True)
class Document:
    """A report. In all of its sentences `…` marks code.

    verb: the command that made the results.
    title: of the page.
    lead: the result in a sentence.
    facts: (name, value) of what the figures depend on.
    notes: without which the figures could be misread.
    sections: the parts.
    command: the line that makes the results again.
    """

    verb: str
    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)
    command: str = ""
