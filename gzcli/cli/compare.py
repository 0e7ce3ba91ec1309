"""`gz runs compare`: what became of two runs or more, and what their recipes differ in."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.cli.dry_run import leaves
from gzcli.cli.summary import in_words, names, summary
from gzcli.core.units import counted, figure, size
from gzcli.store.metrics import last_figures

if TYPE_CHECKING:
    from gzcli.store.runs import Run

Row = Sequence[Any]
NARROW = 18  # columns that a run has at least in a table of several
# Keys that say nothing of what is trained: a description, a count, where it ran, and how often it was looked
# at, which each run finds out for itself.
UNTOLD = ("about", "params", "launch.")
LOOKS = "_every"


def compare(runs: Sequence[Run], *, wide: bool = False) -> None:
    """Prints figures and differing keys, a column for each run; where they do not fit beside each other, in
    tables of fewer runs below each other.

    runs: two or more, of any models.
    wide: whether they are printed in one table, and ids in full.
    """
    rows, figures = [summary(run) for run in runs], [last_figures(run) for run in runs]
    trees = [dict(leaves(run.tree())) for run in runs]
    differ = differences(trees)
    shown = names(runs, sys.stdout, wide=wide)
    lines = [*facts(runs, rows), *validations(figures)]
    several = {key for key in differ if wide or _differs([tree[key] for tree in trees if key in tree])}
    lines += [(key, *map(_value, values)) for key, values in differ.items() if key in several]
    for part in blocks(shown, lines, None if wide else out.room(sys.stdout)):
        heads = ("", *(shown[i] for i in part))
        cells = [(line[0], *(line[i + 1] for i in part)) for line in lines]
        cells = [line for line in cells if any(cell is not None for cell in line[1:])]
        out.table(heads, cells, wrap=heads[1:], narrow=NARROW, wide=wide)
        if part[-1] + 1 < len(runs):
            out.text("")
    if not differ:
        out.info("their recipes are the same")
    if alone := len(differ) - len(several):
        out.info(f"left out: {counted(alone, 'key')} that not all have ({out.ELSEWHERE})")
    out.data(
        {
            "runs": [{**row, "figures": found} for row, found in zip(rows, figures, strict=True)],
            "differ": differ,
        }
    )


def facts(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What is told of every run, a line each."""
    told: list[dict[str, Any]] = []
    for run, row in zip(runs, rows, strict=True):
        step, steps, shown = row["step"], row["steps"], in_words(row)
        memory = max((part.status().get("peak_memory") or 0 for part in run.stages or [run]), default=0)
        told.append(
            {
                "name": row["alias"],
                "state": row["state"],
                "step": f"{step:,} of {steps:,}" if step is not None and steps else step,
                "best": shown["best"],
                "at step": f"{row['best']['step']:,}" if row["best"] else None,
                "curve": shown["curve"],
                "time": shown["time"],
                "params": shown["params"],
                "memory": size(memory) if memory else None,
                "size": shown["size"],
                "made": shown["made"],
            }
        )
    return [(key, *(line[key] for line in told)) for key in told[0]]


def validations(figures: Sequence[Mapping[str, float]]) -> list[Row]:
    """The last figures of validation, a line each, in the order in which runs have them."""
    keys = dict.fromkeys(key for found in figures for key in found)
    return [(f"last {key}", *(figure(f[key]) if key in f else None for f in figures)) for key in keys]


def differences(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ, with the value of each run; None where a run has no such key."""
    told = (key for tree in trees for key in tree if not key.startswith(UNTOLD) and not key.endswith(LOOKS))
    keys = dict.fromkeys(told)
    found = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: values for key, values in found.items() if _differs(values)}


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def blocks(names: Sequence[str], lines: Sequence[Row], room: int | None) -> list[list[int]]:
    """Which runs stand beside each other in each table: as many as fit, two at least, shared out evenly.

    room: columns of the terminal; None: all fit.
    """
    every = list(range(len(names)))
    if room is None:
        return [every]
    first = max(len(line[0]) for line in lines)
    each = [min(max(len(str(line[i + 1])) for line in lines), NARROW) for i in every]
    each = [max(own, len(name)) + 2 for own, name in zip(each, names, strict=True)]
    fit = max(2, (room - first) // max(each))
    tables = -(-len(names) // fit)
    return [every[i * len(every) // tables : (i + 1) * len(every) // tables] for i in range(tables)]


def _value(value: Any) -> str | None:
    return None if value is None else str(value)
