"""Charts as SVG: drawn with the page's colours within a page, with colours of their own as a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from gzcli.report.document import Chart, Dots, Series

WIDTH, HEIGHT, LINE = 380, 230, 16  # of a drawing and of a line of text, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 36  # margins of the axes
COLOURS = 8  # of lines; more lines take them in turn
LETTER = 6.2  # approximate width of a letter
NAMES = 22  # letters of a name beside a dot at most

# for a file that is looked at alone; within a page the page's style sheet says the same in its colours
STYLE = Markup(
    "<style>svg{background:#fff;color:#1d2330;font:11px system-ui,sans-serif}text{fill:currentColor}"
    ".soft{opacity:.65}.grid,.axis{stroke:#1d2330;stroke-opacity:.12}.line{fill:none;stroke-width:1.6}"
    ".area{fill-opacity:.16;stroke:none}.dashed{stroke-dasharray:4 3}"
    ".floor{stroke:#b3261e;stroke-dasharray:3 3}.bar{stroke-width:3;stroke-opacity:.45}"
    ".c0{stroke:#1f5fbf;fill:#1f5fbf}.c1{stroke:#c2500c;fill:#c2500c}.c2{stroke:#0a7a5c;fill:#0a7a5c}"
    ".c3{stroke:#8a3fa8;fill:#8a3fa8}.c4{stroke:#9a7500;fill:#9a7500}.c5{stroke:#0f7f95;fill:#0f7f95}"
    ".c6{stroke:#b52a62;fill:#b52a62}.c7{stroke:#5b6472;fill:#5b6472}.line{fill:none}</style>"
)


def chart(drawing: Chart, *, alone: bool = False) -> Markup:
    """The drawing of lines, with a legend below.

    alone: whether it is a file of its own.
    """
    xs = [x for line in drawing.series for x, _ in line.points]
    ys = [y for line in drawing.series for _, y in line.points]
    if not xs:
        return Markup("")
    x_range, y_range = (min(xs), max(xs)), (min(ys), max(ys))
    x_marks = list(drawing.ticks) or [(at, short(at)) for at in round_numbers(*x_range)]
    y_marks = [(at, short(at)) for at in round_numbers(*y_range, 4)]
    across = scale(*x_range, LEFT, WIDTH - RIGHT)
    up = scale(*y_range, HEIGHT - BOTTOM, TOP)
    parts = [rule(LEFT, up(at), WIDTH - RIGHT, up(at), "grid") for at, _ in y_marks]
    parts += [text(LEFT - 6, up(at) + 4, mark, "end") for at, mark in y_marks]
    parts += [text(across(at), HEIGHT - BOTTOM + 15, mark, "middle") for at, mark in x_marks]
    parts += [rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")]
    parts += [
        text(WIDTH - RIGHT, HEIGHT - 6, drawing.x, "end", "soft"),
        text(LEFT, 11, drawing.y, "start", "soft"),
    ]
    for i, line in enumerate(drawing.series):
        at = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        if drawing.filled:
            parts.append(Markup('<polygon class="area c{}" points="{}"/>').format(i % COLOURS, at))
        look = f"line c{i % COLOURS}{' dashed' if line.dashed else ''}"
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(look, at))
    below, rows = legend(drawing.series)
    return framed(drawing.title, [*parts, *below], HEIGHT + LINE * rows, alone)


def dots(drawing: Dots, *, alone: bool = False) -> Markup:
    """The drawing of estimates with their intervals, and of the floor as a dashed line.

    alone: whether it is a file of its own.
    """
    floor = [] if drawing.floor is None else [drawing.floor]
    ends = [x for row in drawing.rows for x in (row.low, row.value, row.high) if x is not None] + floor
    low, high = min(ends), max(ends)
    left = 16 + LETTER * min(NAMES, max(len(row.name) for row in drawing.rows))
    height = 24 * len(drawing.rows) + BOTTOM
    across = scale(low, high, left + 8, WIDTH - RIGHT - 8)
    bottom = height - BOTTOM + 6
    parts = [rule(across(at), 4, across(at), bottom, "grid") for at in round_numbers(low, high)]
    parts += [text(across(at), bottom + 14, short(at), "middle") for at in round_numbers(low, high)]
    parts += [rule(across(at), 4, across(at), bottom, "floor") for at in floor]
    for i, row in enumerate(drawing.rows):
        y = 20 + 24 * i
        name = row.name if len(row.name) <= NAMES else f"{row.name[: NAMES - 1]}…"
        parts.append(text(left - 4, y + 4, name, "end", "strong" if row.best else ""))
        if row.low is not None and row.high is not None:
            parts.append(rule(across(row.low), y, across(row.high), y, "c0 bar"))
        circle = Markup('<circle class="c0" cx="{:.1f}" cy="{}" r="{}"/>')
        parts.append(circle.format(across(row.value), y, 5 if row.best else 3.5))
    way = {"down": "less is better", "up": "more is better", None: ""}[drawing.direction]
    note = "dashed: floor" if floor else ""
    parts.append(text(WIDTH - RIGHT, height - 2, " · ".join(filter(None, (way, note))), "end", "soft"))
    return framed(drawing.title, parts, height + 4, alone)


def framed(title: str, parts: Sequence[Markup], height: float, alone: bool) -> Markup:
    """A drawing from its parts, with its title for those who do not see it."""
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {:.0f}" role="img"').format(
        WIDTH, height
    )
    name = Markup("<title>{}</title>").format(title)
    size = Markup(' width="{}" height="{:.0f}"').format(2 * WIDTH, 2 * height) if alone else Markup("")
    return Markup("").join(
        [head, size, Markup(">"), name, STYLE if alone else Markup(""), *parts, Markup("</svg>")]
    )


def legend(series: Sequence[Series]) -> tuple[list[Markup], int]:
    """The names of the lines in as many rows as they need, and how many these are."""
    parts, x, y = [], float(LEFT), HEIGHT + 8
    for i, line in enumerate(series):
        name = line.name if len(line.name) <= 44 else f"{line.name[:43]}…"
        width = 24 + LETTER * len(name) + 12
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LINE
        look = f"line c{i % COLOURS}{' dashed' if line.dashed else ''}"
        parts += [rule(x, y - 4, x + 18, y - 4, look), text(x + 23, y, name, "start")]
        x += width
    return parts, (y - HEIGHT - 8) // LINE + 1


def text(x: float, y: float, words: str, anchor: str, look: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, look, words
    )


def rule(x: float, y: float, x_end: float, y_end: float, look: str) -> Markup:
    line = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    return line.format(x, y, x_end, y_end, look)


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The function that maps low … high onto start … end; one value alone comes into the middle."""
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number at an axis: 20k, 0.25."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"
