"""What a report says, whatever it is written in: sections of tables, charts, pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["down", "up"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | None = None  # the number by which its column is sorted; None: the text is
    small: str = ""  # what stands beside the text in small letters, as an interval
    best: bool = False  # whether it is the best of its column


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    direction: Direction | None = None  # where better values lie; None: neither way
    numeric: bool = True  # whether it holds numbers, which are aligned to the right


@dataclass(frozen=True)
class Table:
    """A table whose rows may be sorted."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()  # rows that stay below, as the floor
    caption: str = ""  # what the figures mean
    kind: str = "table"

    @property
    def lines(self) -> list[Sequence[Cell]]:
        """All rows, those of the foot last."""
        return [*self.rows, *self.foot]


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[Point]  # (x, y), in order
    dashed: bool = False  # whether it is a line to compare with


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
class Estimate:
    """A figure with its 95 % interval, which may be unknown."""

    name: str  # of what has it
    value: float
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Dots:
    """Estimates of one figure below each other, with the floor as a line."""

    name: str
    title: str  # name of the figure
    rows: Sequence[Estimate]
    floor: float | None  # the figure of real images; None: unknown
    direction: Direction | None  # where better values lie
    kind: str = "dots"


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    name: str  # of its file, without the ending
    title: str
    png: bytes
    wide: bool = False  # whether it takes the page's width
    kind: str = "picture"


@dataclass(frozen=True)
class Text:
    """A text that is shown as it is, when its title is opened."""

    title: str
    body: str
    kind: str = "text"


Item = Table | Chart | Dots | Picture | Text


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    items: Sequence[Item]  # what it holds; small figures stand side by side
    lead: str = ""  # a sentence before them


@dataclass(frozen=True)
class Document:
    """A report. In all of its sentences `…` marks code."""

    verb: str  # the command that made the results
    title: str
    lead: str
    facts: Sequence[tuple[str, str]]  # (name, value) of what the figures depend on
    notes: Sequence[str] = ()  # without which the figures could be misread
    sections: Sequence[Section] = field(default_factory=list)
    command: str = ""  # the line that makes the results again
