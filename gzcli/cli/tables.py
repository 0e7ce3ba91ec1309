"""Tables and texts that fit the terminal: the least important columns leave first, texts are wrapped between
words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GAP = "  "
NARROW = 24  # see `Table.narrow`


@dataclass(frozen=True)
class Table:
    """A table of text, its head first.

    columns: the headings.
    rows: the cells of each line; None and "" are shown as `-`.
    spare: headings of the columns that may be left out, the first to leave first.
    wrap: headings of the columns whose texts may take several lines.
    narrow: columns that such a text has at least, while another column can be left out in its place.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    spare: Sequence[str] = ()
    wrap: Sequence[str] = ()
    narrow: int = NARROW

    def lines(self, room: int | None = None) -> tuple[list[str], list[str]]:
        """The lines that fit `room` columns (None: any number), and the headings of the columns that were
        left out. A spare column without any value leaves first, and is not named."""
        cells = [["-" if cell is None or cell == "" else str(cell) for cell in row] for row in self.rows]
        kept, widths = list(range(len(self.columns))), self._widths(cells)
        left: list[str] = []
        if room is not None:
            empty = {i for i in kept if cells and self.columns[i] in self.spare and _empty(cells, i)}
            kept = [i for i in kept if i not in empty] if _total(widths, kept) > room else kept
            while (short := self._wrapped(cells, widths, kept, room, self.narrow)) is None:
                # of two of one name the last leaves first
                leaving = next(
                    (i for name in self.spare for i in kept[::-1] if self.columns[i] == name), None
                )
                if leaving is None:
                    short = self._wrapped(cells, widths, kept, room, 0) or self._narrowest(cells, widths)
                    break
                kept.remove(leaving)
                left.append(self.columns[leaving])
            widths = {**widths, **short}
        right = {i for i in kept if cells and all(is_number(row[i]) for row in cells)}
        heads = ([self.columns[i] for i in kept], *([row[i] for i in kept] for row in cells))
        sizes, aligned = [widths[i] for i in kept], [i in right for i in kept]
        return [line for row in heads for line in _row(row, sizes, aligned)], left

    def _widths(self, cells: Sequence[Sequence[str]]) -> dict[int, int]:
        """The full width of each column."""
        return {i: max(len(row[i]) for row in (self.columns, *cells)) for i in range(len(self.columns))}

    def _wrapped(
        self,
        cells: Sequence[Sequence[str]],
        widths: Mapping[int, int],
        kept: list[int],
        room: int,
        least: int,
    ) -> dict[int, int] | None:
        """The widths of the wrapped columns, of at least `least`, with which the table fits `room`; None
        where it cannot."""
        found = {i: widths[i] for i in kept if self.columns[i] in self.wrap}
        words = {i: max(_longest(row[i]) for row in (self.columns, *cells)) for i in found}
        floors = {i: max(words[i], min(widths[i], least)) for i in found}
        over = _total(widths, kept) - room
        while over > 0:  # the widest gives first
            able = [i for i in found if found[i] > floors[i]]
            if not able:
                return None
            widest = max(able, key=lambda i: found[i])
            found[widest] -= 1
            over -= 1
        return found

    def _narrowest(self, cells: Sequence[Sequence[str]], widths: Mapping[int, int]) -> dict[int, int]:
        """The wrapped columns at the width of their longest words."""
        wrapped = [i for i in widths if self.columns[i] in self.wrap]
        return {i: max(_longest(row[i]) for row in (self.columns, *cells)) for i in wrapped}


def wrapped(text: str, head: str = "", width: int = 80) -> list[str]:
    """The text in lines of `width` columns, broken at spaces; those after the first are indented as `head` is
    wide."""
    import textwrap

    lines = textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
    return lines or [head.rstrip()]


def is_number(cell: str) -> bool:
    """Whether a cell is a number, or stands for a missing one."""
    return (
        cell in ("-", "nan", "inf", "-inf") or cell.lstrip("-").replace(",", "").replace(".", "").isdecimal()
    )


def _row(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    """The lines of one row."""
    parts = [wrapped(cell, "", w) if len(cell) > w else [cell] for cell, w in zip(row, widths, strict=True)]
    for i in range(max(map(len, parts))):
        cells = (part[i] if i < len(part) else "" for part in parts)
        shown = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        yield GAP.join(shown).rstrip()


def _total(widths: Mapping[int, int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + len(GAP) * (len(kept) - 1)


def _longest(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _empty(cells: Sequence[Sequence[str]], i: int) -> bool:
    return all(row[i] == "-" for row in cells)
