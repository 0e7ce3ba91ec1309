"""The figures of a run as it has recorded them, and their curve."""

from __future__ import annotations

import statistics
from pathlib import Path

from gzcli.engine.pictures import pyplot, save_figure
from gzcli.store.metrics import metric_lines
from gzcli.store.run_folder import Run

RATES = ("it_s", "images_s", "tflops", "mfu")  # of a line of losses


def training_speed(folder: Path) -> dict[str, float]:
    """How fast a run was trained, by the medians of what it has recorded: `it_s`, `images_s`, and where they
    are known `tflops` and `mfu`."""
    lines = metric_lines(folder)
    rates = {name: [line[name] for line in lines if name in line] for name in RATES}
    return {name: statistics.median(values) for name, values in rates.items() if values}


def loss_curve(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl: losses by the left axis, validation as dots by the right one."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metric_lines(folder):
        for key, value in line.items():
            if key.rsplit(".", 1)[-1] == "loss" or key.startswith("val_"):
                curves.setdefault(key, []).append((line["step"], value))
    figure, left = pyplot().subplots(figsize=(7, 4), constrained_layout=True)
    right = None
    for i, (name, points) in enumerate(curves.items()):
        if name.startswith("val_"):
            right = right or left.twinx()
            right.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name, markersize=3)
            right.set_ylabel(name)
        else:
            left.plot(*zip(*points, strict=True), color=f"C{i}", label=name, linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("loss")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=left.transAxes)
    save_figure(figure, Run(folder).losses_picture, dpi=100)
