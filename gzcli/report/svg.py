"""Charts of a report as SVG, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from gzcli.report.document import Chart, Dots

WIDTH, HEIGHT, LINE = 5.3, 3.2, 0.3  # inches of a drawing, and of a line of its legend or of an estimate
NAME, LEGEND = 22, 44  # letters of a name at most: beside an estimate, and in the legend
COLOURS = ("#1f5fbf", "#c2500c", "#0a7a5c", "#8a3fa8", "#9a7500", "#0f7f95", "#b52a62", "#5b6472")
INK, SOFT, FLOOR = "#1b202a", "#5a6372", "#b3261e"
# text stays text, a name is no formula, and the same results make the same file
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "gz",
    "font.size": 11,
}
STYLE |= {
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "xtick.color": INK,
    "ytick.color": INK,
}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e5e8"}


def svg(drawing: Chart | Dots) -> bytes:
    """The drawing as a file, on white."""
    if isinstance(drawing, Chart):
        columns = max(1, 64 // (8 + max((len(cut(line.name, LEGEND)) for line in drawing.series), default=0)))
        rows = -(-len(drawing.series) // columns)
        return drawn(HEIGHT + 0.7 * LINE * rows, lambda axes: draw_chart(axes, drawing, columns))
    return drawn(0.8 + LINE * len(drawing.rows), lambda axes: draw_dots(axes, drawing))


def drawn(height: float, draw: Callable[[Any], None]) -> bytes:
    """What a function draws in axes, as a file."""
    import warnings

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    held = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only measured: the browser's fonts show it
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    return held.getvalue()


def draw_chart(axes: Any, drawing: Chart, columns: int) -> None:
    """Lines over one axis, with a legend of so many columns below."""
    lines = []
    for i, line in enumerate(drawing.series):
        colour, points = COLOURS[i % len(COLOURS)], list(zip(*line.points, strict=True)) or [(), ()]
        lines += axes.plot(*points, color=colour, linestyle="--" if line.dashed else "-", linewidth=1.5)
        if drawing.filled:
            axes.fill(*points, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel(drawing.x, loc="right")
    axes.set_ylabel(drawing.y)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    if drawing.ticks:
        axes.set_xticks(*zip(*drawing.ticks, strict=True))
    # a label that starts with `_` would be left out, so that the names are put in afterwards
    legend = axes.figure.legend(
        lines, ["x"] * len(lines), loc="outside lower left", ncols=columns, frameon=False
    )
    for text, line in zip(legend.get_texts(), drawing.series, strict=True):
        text.set_text(cut(line.name, LEGEND))


def draw_dots(axes: Any, drawing: Dots) -> None:
    """Estimates with their intervals below each other, and the floor as a dashed line."""
    for y, row in enumerate(drawing.rows):
        if row.low is not None and row.high is not None:
            axes.plot((row.low, row.high), (y, y), color=COLOURS[0], alpha=0.45, linewidth=3)
        axes.plot(row.value, y, "o", color=COLOURS[0], markersize=8 if row.best else 5.5)
    if drawing.floor is not None:
        axes.axvline(drawing.floor, color=FLOOR, linestyle="--", linewidth=1)
    names = axes.set_yticks(range(len(drawing.rows)), [cut(row.name, NAME) for row in drawing.rows])
    for tick, row in zip(names, drawing.rows, strict=True):
        tick.label1.set_fontweight("bold" if row.best else "normal")
    axes.set_ylim(len(drawing.rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(short)
    way = {"down": "less is better", "up": "more is better", None: ""}[drawing.direction]
    floor = "" if drawing.floor is None else "dashed: floor"
    axes.set_xlabel(" · ".join(filter(None, (way, floor))), loc="right")


def cut(name: str, most: int) -> str:
    """A name of so many letters at most."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def short(value: float, place: object = None) -> str:
    """A number at an axis, as matplotlib asks for it: 20k, 0.25."""
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"
