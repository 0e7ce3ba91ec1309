"""Pictures of a league: quality against the steps of samplers, and against the time of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gzcli.engine.pictures import pyplot, save_figure

MARKERS = "osD^vP*X"
Point = tuple[float, float, float | None]  # x, mean over seeds, standard deviation over seeds


def draw_curves(
    path: Path, curves: Mapping[str, Sequence[Point]], *, x: str, y: str, title: str, floor: float | None
) -> None:
    """Writes a figure of a line for each model on logarithmic axes, with a bar of a deviation to each
    side."""
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    colours = pyplot().get_cmap("tab10").colors
    for i, (model, points) in enumerate(curves.items()):
        axes.errorbar(
            [point[0] for point in points],
            [point[1] for point in points],
            yerr=[point[2] or 0.0 for point in points],
            color=colours[i % len(colours)],
            marker=MARKERS[i // len(colours) % len(MARKERS)],
            markersize=5,
            linewidth=1.3,
            capsize=2,
            label=model,
        )
    if floor is not None and floor > 0:
        axes.axhline(floor, color="0.4", linestyle="--", linewidth=1, label="real images")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, path)
