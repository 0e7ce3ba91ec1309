"""Tables and texts that fit the terminal: the least important columns leave first, texts are wrapped between
words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GAP = "  "
NARROW = 24


@dataclass(frozen=True)
class Table:
    """A table of text, its head first."""

    columns: Sequence[str]  # the headings
    rows: Sequence[Sequence[Any]]  # the cells of each line; None and "" are shown as `-`
    spare: Sequence[str] = ()  # headings of the columns that may be left out, the first to leave first
    wrap: Sequence[str] = ()  # headings of the columns whose texts may take several lines
    narrow: int = NARROW  # the least width of such a text while a spare column can leave in its place

    def lines(self, room: int | None = None) -> tuple[list[str], list[str]]:
        """The lines that fit `room` columns (None: any number), and the headings of the columns that were
        left out. A spare column without any value leaves first, and is not named."""
        cells = [["-" if cell is None or cell == "" else str(cell) for cell in row] for row in self.rows]
        columns = list(zip(self.columns, *cells, strict=False))
        widths = [max(map(len, column)) for column in columns]
        # the longest word of each column that may be wrapped
        words = {i: max(map(_longest, c)) for i, c in enumerate(columns) if c[0] in self.wrap}
        kept, left = list(range(len(columns))), []
        if room is not None:
            if _total(widths, kept) > room:
                empty = [bool(cells) and set(column[1:]) == {"-"} for column in columns]
                kept = [i for i in kept if not (empty[i] and columns[i][0] in self.spare)]
            while (narrowed := _narrowed(widths, words, kept, room, self.narrow)) is None:
                # of two columns of one name the last leaves first
                leaving = next((i for name in self.spare for i in kept[::-1] if columns[i][0] == name), None)
                if leaving is None:
                    narrowed = _narrowed(widths, words, kept, room, 0) or words
                    break
                kept.remove(leaving)
                left.append(self.columns[leaving])
            widths = [narrowed.get(i, width) for i, width in enumerate(widths)]
        right = [bool(cells) and all(map(is_number, columns[i][1:])) for i in kept]
        sizes = [widths[i] for i in kept]
        rows = ([row[i] for i in kept] for row in (self.columns, *cells))
        return [line for row in rows for line in _lines(row, sizes, right)], left


def _narrowed(
    widths: Sequence[int], words: Mapping[int, int], kept: Sequence[int], room: int, least: int
) -> dict[int, int] | None:
    """The widths of the wrapped columns, of at least `least`, with which the kept ones fit; None where they
    cannot."""
    narrowed = {i: widths[i] for i in kept if i in words}
    floors = {i: max(words[i], min(width, least)) for i, width in narrowed.items()}
    for _ in range(_total(widths, kept) - room):  # the widest gives first
        able = [i for i in narrowed if narrowed[i] > floors[i]]
        if not able:
            return None
        narrowed[max(able, key=lambda i: narrowed[i])] -= 1
    return narrowed


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


def _lines(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    """The lines of one row."""
    parts = [wrapped(cell, "", w) if len(cell) > w else [cell] for cell, w in zip(row, widths, strict=True)]
    for i in range(max(map(len, parts))):
        cells = (part[i] if i < len(part) else "" for part in parts)
        shown = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        yield GAP.join(shown).rstrip()


def _total(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + len(GAP) * (len(kept) - 1)


def _longest(text: str) -> int:
    return max(map(len, text.split()), default=0)
