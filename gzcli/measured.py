"""What was measured and is shipped: leagues, and how the validation of their runs went, by set and scale.

`docs/measured/<set>/<scale>/` holds `league.csv` and `summary.csv` as `gz bench --train-missing` writes them,
`about.json`, which says how they came about, `curves/<recipe>[.<stage>].csv`, and `samples/<recipe>.png`.
`docs/measured/costs.csv` says what trainings cost. Only the standard library is needed: the trainer looks a
step up in a curve.
"""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.units import figure

ROOT = Path(__file__).parent / "docs" / "measured"
CURVE = ("metric", "step", "seconds", "value")  # the columns of a curve


@dataclass(frozen=True)
class Curve:
    """The validation of a reference run.

    metric: what was validated; less is better.
    points: (step, seconds of training until then, value), in order.
    """

    metric: str
    points: tuple[tuple[int, float, float], ...]

    def at(self, step: int) -> float | None:
        """The value at a step, on straight lines between the points; None outside of them."""
        steps = [point[0] for point in self.points]
        i = bisect_left(steps, step)
        if i == len(steps) or step < steps[0]:
            return None
        (high, _, above), (low, _, below) = self.points[i], self.points[max(0, i - 1)]
        return above if high in (step, low) else below + (above - below) * (step - low) / (high - low)


def places() -> Iterator[tuple[str, str]]:
    """(set, scale) of each league that is shipped."""
    for path in sorted(ROOT.glob("*/*/about.json")):
        yield path.parent.parent.name, path.parent.name


def about(data: str, scale: str) -> dict[str, Any]:
    """How a league came about: command, budget, machine, version, metric and floor."""
    found: dict[str, Any] = json.loads((ROOT / data / scale / "about.json").read_text())
    return found


def standings(data: str, scale: str) -> list[dict[str, str]]:
    """The rows of a league's `summary.csv`, the best first."""
    return rows_of(ROOT / data / scale / "summary.csv")


def costs(model: str) -> list[dict[str, str]]:
    """What the trainings of a recipe cost, by set and scale: parameters, operations and seconds."""
    return [row for row in rows_of(ROOT / "costs.csv") if row["model"] == model]


@cache
def curve(recipe: str, data: str, scale: str, stage: str = "") -> Curve | None:
    """The curve of a recipe, or of a stage of it; None: it is not shipped."""
    rows = rows_of(ROOT / data / scale / "curves" / f"{curve_name(recipe, stage)}.csv")
    points = tuple((int(row["step"]), float(row["seconds"]), float(row["value"])) for row in rows)
    return Curve(rows[0]["metric"], points) if rows else None


def curve_name(recipe: str, stage: str = "") -> str:
    """The name of a curve's file."""
    return f"{recipe}.{stage}" if stage else recipe


def beside(recipe: str, data: str, scale: str | None, stage: str, step: int, metric: str) -> str | None:
    """Where the reference stood at this step, in words; None where there is none, or it validated
    another figure.

    recipe: name of the recipe, or of the model.
    data: key of the data set.
    scale: of the run; None: the recipe has no scales, and there is no reference.
    stage: name of the stage; "" of a recipe without stages.
    """
    found = curve(recipe, data, scale, stage) if scale else None
    if found is None or found.metric != metric:
        return None
    last, _, end = found.points[-1]
    if (value := found.at(step)) is not None:
        return f"the reference, a run of {last:,} steps, stood at {metric} {figure(value)} there"
    return f"the reference ended at step {last:,} with {metric} {figure(end)}" if step > last else None


def picture(recipe: str, data: str, scale: str) -> Path:
    """Where the picture of samples of a recipe's run lies, if there is one."""
    return ROOT / data / scale / "samples" / f"{recipe}.png"


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where the file is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
