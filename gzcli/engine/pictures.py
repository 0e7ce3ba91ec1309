"""Figures by matplotlib: loss curves, histograms of scores, rows of samples. Sheets are in `sheets.py`."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.streams import printable
from gzcli.store.files import make_folder, replacing
from gzcli.store.metrics import curves, metric_lines
from gzcli.store.png import text_chunks
from gzcli.store.run_folder import Run

RATE_KEYS = ("it_s", "images_s", "tflops", "mfu")  # of a line of losses
LOGARITHMIC_FACTOR = (
    12  # factor between ranges of scores from which an axis is logarithmic far from the median
)


def histograms(
    path: Path, tables: Mapping[str, Mapping[str, np.ndarray]], inside: str, results: list[dict[str, Any]]
) -> None:
    """Writes a figure with a panel for each score. A panel shows the share of each set's images in every bin;
    the legend below shows the AUROC."""
    auroc = {(row["out"], row["score"]): row["auroc"] for row in results}
    scores = list(dict.fromkeys(row["score"] for row in results))
    baseline = {row["score"] for row in results if row["baseline"]}
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    height = 2.6 + 0.17 * len(tables)
    shape = {"figsize": (4 * columns, height * rows), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(rows, columns, **shape)
    for ax, score in zip(axes.flat, scores, strict=False):
        sides = {name: np.asarray(table[score], np.float64) for name, table in tables.items()}
        bins, scale = score_bins(list(sides.values()))
        if scale:
            ax.set_xscale("function", functions=scale)
            ax.set_xticks(_apart([np.median(values) for values in sides.values()], scale[0], bins))
            ax.xaxis.set_major_formatter("{x:.3g}")
            ax.minorticks_off()
        for i, (name, values) in enumerate(sides.items()):
            label = f"{name} (in)" if name == inside else f"{name}, AUROC {auroc[name, score]:.3f}"
            look = {"weights": np.full(len(values), 1 / len(values)), "alpha": 0.55, "color": f"C{i}"}
            ax.hist(values.clip(bins[0], bins[-1]), bins, label=label, **look)
        ax.set_title(f"{score} (baseline)" if score in baseline else score)
        ax.set_yticks([])
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    for ax in axes.flat[len(scores) :]:
        ax.set_axis_off()
    save_figure(figure, path)


AxisScale = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def score_bins(sides: Sequence[np.ndarray], count: int = 50) -> tuple[np.ndarray, AxisScale | None]:
    """Edges [count + 1] of bins for the scores of every set, and the axis scale with its inverse (None if it
    is linear). The edges span the quantiles .005 … .995 of each set. If this span is more than `APART` times
    that of one set, equal bins would show that set as a single bar. The bins are then equal in arsinh((s −
    median) / w), w being an eighth of the span of the first set."""
    ranges = [np.quantile(values, [0.005, 0.995]) for values in sides]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    widths = [r[1] - r[0] for r in ranges if r[1] > r[0]]
    if high <= low:
        return np.linspace(low - 0.5, low + 0.5, count + 1), None
    if not widths or high - low <= LOGARITHMIC_FACTOR * min(widths):
        return np.linspace(low, high, count + 1), None
    center, width = float(np.median(sides[0])), (float(np.ptp(ranges[0])) or min(widths)) / 8

    def forward(s: np.ndarray) -> np.ndarray:
        return np.arcsinh((s - center) / width)

    def inverse(t: np.ndarray) -> np.ndarray:
        return center + width * np.sinh(t)

    edges = inverse(np.linspace(forward(low), forward(high), count + 1))
    edges[0], edges[-1] = low, high  # exactly, so that no clipped score falls outside
    return edges, (forward, inverse)


def _apart(ticks: Sequence[float], forward: Callable[[Any], Any], bins: np.ndarray) -> list[float]:
    """The ticks whose labels do not overlap on an axis over the bins. Of two that overlap, the first
    stays."""
    chosen: list[float] = []
    least = 0.18 * (forward(bins[-1]) - forward(bins[0]))
    for tick in (*ticks, bins[0], bins[-1]):
        if all(abs(forward(tick) - forward(taken)) > least for taken in chosen):
            chosen.append(float(tick))
    return chosen


def sample_rows(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """Writes an image of rows (title, images uint8 [N, C, H, W]), with the first 16 images of each row."""
    limit = 16
    shape = {"figsize": (0.6 * limit, 0.95 * len(rows)), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(rows), 1, **shape)
    for ax, (title, images) in zip(axes.flat, rows, strict=True):
        framed = [np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=255) for image in images[:limit]]
        strip = np.concatenate(framed, 2).transpose(1, 2, 0)
        ax.imshow(strip.repeat(3, 2) if strip.shape[2] == 1 else strip, interpolation="bicubic")
        ax.set_title(title, fontsize=8, loc="left")
        ax.set_axis_off()
    save_figure(figure, path)


def training_speed(folder: Path) -> dict[str, float]:
    """The median recorded speed of a training: `it_s`, `images_s` and, if known, `tflops` and `mfu`."""
    lines = metric_lines(folder)
    rates = {name: [line[name] for line in lines if name in line] for name in RATE_KEYS}
    return {name: statistics.median(values) for name, values in rates.items() if values}


def loss_curve(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl."""
    save_figure(losses_figure(metric_lines(folder)), Run(folder).losses_picture, dpi=100)


def losses_figure(lines: Sequence[Mapping[str, Any]]) -> Any:
    """The figure of the recorded curves: losses on the left axis, validation as dots on the right one. It
    belongs to no window, so that a notebook shows it only once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, right = figure.subplots(), None
    for i, (name, points) in enumerate(curves(lines).items()):
        if name.startswith("val_"):
            right = right or axes.twinx()
            right.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name, markersize=3)
            right.set_ylabel(name)
        else:
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=axes.transAxes)
    return figure


def pyplot() -> Any:
    """Matplotlib's pyplot, for figures that are only written to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Writes a figure as a PNG, completely or not at all, and closes it."""
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    numbers = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    for text in set(figure.findobj(Text)) - numbers:  # names are not formulas, and may not be printable
        if content := text.get_text():
            text.set_parse_math(False)
            text.set_text(printable(content))
    make_folder(path.parent)
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # a letter that the font lacks becomes a box
        figure.savefig(part, dpi=dpi, metadata=text_chunks(), format="png")
    pyplot().close(figure)
