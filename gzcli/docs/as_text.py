"""A page for a terminal: plain text in a given number of columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gzcli.core.units import about, count, duration, figure
from gzcli.docs.page import Page, Reference
from gzcli.recipe.yaml import flow

LEFT = 24  # columns of the left of two columns at most
NARROWEST = 40  # columns that a page takes where there are fewer
POINTS = 6  # of a curve


def as_text(page: Page, width: int = 80) -> str:
    """The page; equations and commands that are longer than a line are not broken."""
    return "\n".join(_lines(page, max(width, NARROWEST))).rstrip()


def _lines(page: Page, width: int) -> Iterator[str]:
    words = page.words
    title = words.title if words else page.about or page.name
    yield from _wrapped(f"{page.name}: {title}", width)
    yield from _wrapped(f"{page.family.replace('_', ' ')} · {page.paper}", width)
    if words:
        yield ""
        yield from _wrapped(words.text, width)
        yield ""
        yield from (f"  {line}" for line in _equation(words.equation, width - 2))
        yield ""
        yield from _wrapped(words.source, width)
    if page.likelihood:
        yield from ("", f"Likelihood: {page.likelihood}.")
    for one in page.ready:
        best, params, seconds, _ = one.cells
        told = f"{seconds} of a CPU core, {params} parameters, {best}"
        yield from _wrapped(f"Comes with gz, trained on {one.data} ({told}):", width)
        yield f"  gz sample pretrained:{one.name}"
    for stage, model in page.stages.items():
        if model != page.name:
            yield from _wrapped(f"Its stage `{stage}` is a `{model}`: gz show {model}", width)
    yield from ("", "Try")
    for command, remark in page.commands:
        yield from folded(command, width, "  ")
        if remark:
            yield from _wrapped(f"({remark})", width, "      ")
    yield from ("", "What it can do")
    for command, what in page.can:
        yield from _wrapped(what, width, "  ")
        yield from folded(command, width, "      ")
    if page.scores:
        yield from ("", "Out-of-distribution scores")
        yield from _pairs(page.scores, width)
    for group in page.groups:
        yield from ("", f"{group.title.replace('`', '')}: {group.how}")
        yield from _pairs(
            ((f"{o.name}={flow(o.default)}", _told(o.kind, o.text)) for o in group.options), width
        )
    yield from _measured(page, width)
    if page.remarks:
        yield from ("", "Notes of the recipe")
        yield from _wrapped(" ".join(page.remarks), width, "  ")
    if words:
        yield from ("", "Limits")
        for limit in words.limits:
            yield from _wrapped(limit, width, "- ", "  ")
        yield from ("", "Code by others")
        for repository, what in words.code:
            yield from _wrapped(f"https://github.com/{repository} ({what})", width, "  ")


def _measured(page: Page, width: int) -> Iterator[str]:
    """What was measured: costs, places in leagues, curves of reference runs."""
    if page.costs:
        yield from ("", "What a training costs")
        rows = [("data", "scale", "params", "steps", "on a CPU", "on an H100"), *map(cost_cells, page.costs)]
        yield from _table(rows)
        yield from _wrapped(
            f"CPU: {page.costs[0]['machine']}. On yours: gz train {page.name} --dry-run", width, "  "
        )
    for data, scale, row in page.places:
        yield ""
        place = f"{row['place']}. " if row["place"] else ""
        yield from _wrapped(f"In the league of {data}, {scale}: {place}{place_in_words(row)}", width)
    for reference in page.references:
        yield ""
        yield from _wrapped(f"Reference curve, {curve_title(reference)}", width)
        yield from _table(curve_rows(reference))


def cost_cells(row: Mapping[str, str]) -> tuple[str, ...]:
    """A row of costs as people read it."""
    seconds = [about(float(row[key])) if row[key] else "-" for key in ("seconds", "seconds_on_h100")]
    return (row["data"], row["scale"], count(float(row["params"])), f"{int(row['steps']):,}", *seconds)


def place_in_words(row: Mapping[str, str]) -> str:
    """A row of a league's summary: multiple of the floor, time of training, seconds an image."""
    relative = f"{float(row['times_floor']):.3g} × the floor" if row["times_floor"] else "no figure"
    trained = duration(float(row["train_seconds"])) if row["train_seconds"] else "-"
    speed = f", {float(row['sample_seconds']):.2g} s an image" if row["sample_seconds"] else ""
    return f"{relative} after {trained} of training{speed}"


def curve_title(reference: Reference) -> str:
    stage = f", stage {reference.stage}" if reference.stage else ""
    return (
        f"{reference.data} at scale {reference.scale}{stage}: {reference.curve.metric} on validation images"
    )


def curve_rows(reference: Reference) -> list[tuple[str, ...]]:
    """Some points of a curve, with a head: step, seconds of training, value."""
    points = reference.curve.points
    last = len(points) - 1
    chosen = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})
    rows = [(f"{points[i][0]:,}", duration(points[i][1]), figure(points[i][2])) for i in chosen]
    return [("step", "time", reference.curve.metric), *rows]


def _told(kind: str, text: str) -> str:
    """The meaning of an option; its choices, where the type says them and the text does not."""
    choices = re.findall(r"`([^`]+)`", kind)
    missing = choices and not all(choice in text for choice in choices)
    return f"{text} {kind}".strip() if missing else text


def _pairs(pairs: Iterable[Sequence[str]], width: int) -> Iterator[str]:
    """Two columns, the right one wrapped."""
    rows = [(left, right.replace("`", "")) for left, right in pairs]
    column = min(LEFT, max((len(left) for left, _ in rows), default=0)) + 4
    for left, right in rows:
        lines = textwrap.wrap(right, width - column, break_on_hyphens=False) or [""]
        if len(left) + 4 > column:
            yield f"  {left}"
        else:
            yield f"  {left}".ljust(column) + lines.pop(0)
        yield from (" " * column + line for line in lines)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def folded(command: str, width: int, indent: str = "") -> Iterator[str]:
    """A command in lines that a shell joins again, broken before options."""
    line = ""
    for part in re.split(r" (?=--?\w)", command):
        if line and len(indent) + len(line) + len(part) > width - 3:
            yield f"{indent}{line} \\"
            line = f"    {part}"
        else:
            line = f"{line} {part}" if line else part
    yield indent + line


def _equation(text: str, width: int) -> Iterator[str]:
    """The equation; where a line is too long, it goes on below at a wide gap."""
    for line in text.splitlines():
        parts = re.split(r" {3,}", line) if len(line) > width else [line]
        yield from parts


def _wrapped(text: str, width: int, first: str = "", further: str | None = None) -> list[str]:
    further = first if further is None else further
    plain = text.replace("`", "")
    return textwrap.wrap(
        plain,
        width,
        initial_indent=first,
        subsequent_indent=further,
        break_on_hyphens=False,
        break_long_words=False,
    )
