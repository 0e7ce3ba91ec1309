"""Pictures of results: histograms of scores, rows of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def histograms(
    path: Path, tables: Mapping[str, Mapping[str, np.ndarray]], inside: str, results: Sequence[Mapping[str, Any]]
) -> None:
    """One panel a score: its density on each set, with the AUROC against `inside` in the legend."""
    auroc = {(row["out"], row["score"]): row["auroc"] for row in results}
    scores = list(dict.fromkeys(row["score"] for row in results))
    baseline = {row["score"] for row in results if row["baseline"]}
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = _pyplot().subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained")
    for ax, score in zip(axes.flat, scores, strict=False):
        values = np.concatenate([table[score] for table in tables.values()])
        low, high = np.quantile(values, [0.005, 0.995])  # a few far scores would leave one bar; the edge bins keep them
        bins = np.linspace(low, high if high > low else low + 1, 51)
        for i, (name, table) in enumerate(tables.items()):
            label = f"{name} (in)" if name == inside else f"{name}, AUROC {auroc[name, score]:.3f}"
            ax.hist(table[score].clip(bins[0], bins[-1]), bins, density=True, alpha=0.55, color=f"C{i}", label=label)
        ax.set_title(f"{score} (baseline)" if score in baseline else score)
        ax.set_yticks([])
        ax.legend(fontsize=7)
    for ax in axes.flat[len(scores) :]:
        ax.set_axis_off()
    _save(figure, path)


def sample_rows(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """One row of images a title: uint8 [N, C, H, W] each, the first 16 shown; every set of images has one size."""
    shown = 16
    figure, axes = _pyplot().subplots(len(rows), 1, figsize=(0.6 * shown, 0.95 * len(rows)), squeeze=False, layout="constrained")
    for ax, (title, images) in zip(axes.flat, rows, strict=True):
        strip = np.concatenate([np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=255) for image in images[:shown]], 2)
        strip = strip.transpose(1, 2, 0)
        ax.imshow(strip.repeat(3, 2) if strip.shape[2] == 1 else strip, interpolation="nearest")
        ax.set_title(title, fontsize=8, loc="left")
        ax.set_axis_off()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part, dpi=110)
    _pyplot().close(figure)
    part.replace(path)
