"""The table of `gz bench`: a line for each contestant and for real images in their place, as wide as fits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gzcli.cli import out
from gzcli.core.units import figure

ARROWS = {"down": "↓", "up": "↑"}
# Beginnings of the names of columns, the first to be left out first, where a table would be too wide.
DISPENSABLE = ("train", "seconds", "density", "swd", "params", "coverage", "samples_per_s", "nats|", "bpd|")
BY_NEIGHBOURS = ("precision", "recall", "density", "coverage")
# Those that are kept longest, the last to be left out first.
FIRST = ("fd", "fid", "kid", "precision", "recall", "bpd", "nats", "tv", "label_accuracy")


def table(result: Mapping[str, Any], *, wide: bool = False) -> None:
    """Prints a line for each contestant, and one for real images in place of samples, with the direction in
    which each figure is better. Behind the first figure stands half its 95 % interval."""
    lines = [*result["rows"], *(real(floor, result["floors"]) for floor in result["floors"])]
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    left: list[str] = []
    columns = [
        name
        for name in ("params", *names, "seconds")
        if name in names or any(line.get(name) is not None for line in lines)
    ]
    room = out.room(sys.stdout)
    while not wide and room and columns and width(result, lines, columns) > room:
        left.append(least(columns))
        columns.remove(left[-1])
    out.table(*cells(result, lines, columns, wide=wide), wide=True)  # its ± leaves with its figure
    out.left_out(left[::-1])


def cells(
    result: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    wide: bool = False,
) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of the table."""
    biased = {name for names in result["biased"].values() for name in names}
    heads, rows = ["name"], [[line["name"]] for line in lines]
    first = next((name for name in columns if name in result["directions"]), None)
    for name in columns:
        mark = "~" if name in biased else ""
        heads.append(short(name, columns) + mark + ARROWS.get(result["directions"].get(name) or "", ""))
        with_interval = wide or name == first
        halves = [half(line, name) for line in lines]
        for row, line in zip(rows, lines, strict=True):
            row.append(number(line["metrics"].get(name, line.get(name))))
        if with_interval and any(halves):
            heads.append("±")
            for row, text in zip(rows, halves, strict=True):
                row.append(text)
    return heads, rows


def short(name: str, columns: Sequence[str]) -> str:
    """The heading of a figure by neighbours, without the name of its features where it is the only one."""
    word, _, features = name.partition("_")
    several = sum(other.startswith(f"{word}_") for other in columns) > 1
    return word if word in BY_NEIGHBOURS and features and not several else name


def width(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> int:
    """Letters of the longest line of the table."""
    return max(map(len, out.aligned(*cells(result, lines, columns)).splitlines()))


def least(columns: Sequence[str]) -> str:
    """The column that can be spared first: those of DISPENSABLE, then a model's own from the last on, then
    from the last of FIRST on."""
    for start in DISPENSABLE:
        if found := [name for name in columns if name.startswith(start)]:
            return found[-1]
    if own := [name for name in columns if not name.startswith(FIRST)]:
        return own[-1]
    return max(columns, key=lambda name: next(i for i, start in enumerate(FIRST) if name.startswith(start)))


def real(floor: Mapping[str, Any], floors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The line of real images in place of samples; it says how many where there are several such lines."""
    several = len(floors) > 1 or floor["images"] < floor["n"]
    count = f", {floor['images']:,}" if several else ""
    return {**floor, "name": f"(real images{count})"}


def half(line: Mapping[str, Any], name: str) -> str | None:
    """Half of a figure's interval, as text."""
    ends = line["intervals"].get(name)
    if ends is None:
        return None
    value = (ends[1] - ends[0]) / 2
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def number(value: Any) -> Any:
    """A figure as text; any other value as it is."""
    return figure(value) if isinstance(value, float) else value
