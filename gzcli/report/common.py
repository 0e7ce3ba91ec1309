"""Parts that reports of `gz bench` and of `gz ood` share: facts, recipes, versions, training curves."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from gzcli.core.units import count, figure, size
from gzcli.report.document import Chart, Picture, Section, Series, Text
from gzcli.report.results import Results
from gzcli.store import files
from gzcli.store.metrics import metric_lines

CURVE = 240  # points of a curve at most
VALIDATED = 2  # figures of validation that are drawn of a run
CURVES = 36  # charts of training at most


def number(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return figure(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def cost(key: str, value: Any) -> str:
    """Parameters or bytes as people read them; any other number as a figure."""
    if is_number(value) and key in ("params", "peak_memory"):
        return count(value) if key == "params" else size(value)
    return number(value)


def interval(ends: Any) -> tuple[float, float] | None:
    """The two ends of an interval; None where they are not known."""
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        return None
    return low, high


def shown(ends: Any) -> str:
    """An interval as text: `[1.2, 1.5]`; empty where it is not known."""
    both = interval(ends)
    return f"[{number(both[0])}, {number(both[1])}]" if both else ""


def day(results: Results) -> tuple[str, str]:
    return "made", datetime.fromtimestamp(results.time).strftime("%Y-%m-%d %H:%M")


def training(results: Results) -> Section:
    """The losses of every run, and the first two figures of its validations."""
    charts = []
    for name, run in results.runs.items():
        for part in run.stages or [run]:
            lines = metric_lines(part.path)
            keys = dict.fromkeys(key for line in lines for key in line)
            losses = [key for key in keys if key.rsplit(".", 1)[-1] == "loss"]
            checks = [key for key in keys if key.startswith("val_")][:VALIDATED]
            whose = name if part is run else f"{name}, {part.path.name}"
            for title, some in (("loss", losses), *((key, [key]) for key in checks)):
                series = [Series(key, thinned(points(lines, key))) for key in some]
                series = [line for line in series if len(line.points) > 1]
                if series:
                    charts.append(Chart(f"{title}-{whose}", f"{whose}: {title}", "step", title, series))
    return Section("Training", charts[:CURVES])


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values of a key."""
    pairs = [(line.get("step"), line.get(key)) for line in lines]
    numbers = [(x, y) for x, y in pairs if isinstance(x, (int, float)) and isinstance(y, (int, float))]
    return [(float(x), float(y)) for x, y in numbers if np.isfinite(y)]


def thinned(line: Sequence[tuple[float, float]], most: int = CURVE) -> list[tuple[float, float]]:
    """The line with at most so many of its points, both ends among them."""
    if len(line) <= most:
        return list(line)
    return [line[i] for i in np.unique(np.linspace(0, len(line) - 1, most).round().astype(int))]


def behind(results: Results) -> Section:
    """Recipes, versions and everything else that the figures depend on."""
    items = [Text(f"Recipe of {name}", recipe) for name, recipe in results.recipes()]
    provenance = results.made.get("provenance") or {}
    versions = {f"{name}": version for name, version in (provenance.get("versions") or {}).items()}
    if versions:
        items.append(Text("Versions that made the figures", table_of(versions)))
    for name, run in results.runs.items():
        environment = files.read_object(run.environment_file)
        packages = environment.get("packages") or {}
        packages |= {
            key: environment[key] for key in ("python", "platform", "processes", "gpus") if key in environment
        }
        if packages:
            items.append(Text(f"Versions that trained {name}", table_of(packages)))
    rest = {
        key: value for key, value in provenance.items() if key != "versions" and value not in (None, {}, [])
    }
    if rest:
        items.append(Text("Provenance", table_of(rest)))
    return Section("Recipes and versions", items)


def table_of(values: Mapping[str, Any]) -> str:
    width = max(map(len, values))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in values.items())


def other_pictures(results: Results, used: set[str]) -> Iterator[Picture]:
    """The PNGs of the folder that the report has not shown yet."""
    for stem, png in results.pictures().items():
        if stem not in used:
            yield Picture(stem, words(stem), png, wide=True)


def words(name: str) -> str:
    """The name of a file or key as words: `nearest_neighbours` as "Nearest neighbours"."""
    text = re.sub(r"[_-]+", " ", name).strip() or name
    return text[:1].upper() + text[1:]


def png_of(image: np.ndarray) -> bytes:
    held = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(held, "png", optimize=True)
    return held.getvalue()
