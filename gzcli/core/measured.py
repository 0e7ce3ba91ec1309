"""The measurements that are shipped: leagues, and the validation curves of their runs, by set and scale.
`docs/measured/<set>/<scale>/` contains `league.csv` and `summary.csv` of `gz league`,
`about.json` on how they were made, `curves/<recipe>[.<stage>].csv` and `samples/<recipe>.png`. In
`docs/measured/<set>`, `peers.csv` contains the results of other packages' models, and `ood.csv` how well
models of the set detect foreign images. `docs/measured/costs.csv` contains the cost of trainings, and
`parity.csv` the differences from published code. This module imports nothing heavy, because the trainer reads
it."""

from __future__ import annotations

import csv
import io
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.units import figure

MEASURED_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "measured"
ADDED_ROWS = MEASURED_FOLDER.parents[2] / ".github" / "rows"  # rows by others, only in a clone: SET/NAME.json
LIKELIHOODS = ("bpd", "nats")
PAGE_METRICS = ("fd", "fd_second", "kid", "precision", "recall", "legible", *LIKELIHOODS)  # metrics on pages
COLUMN_SUFFIXES = ("_sd", "_excess", "_half")  # suffixes of columns about a metric
CURVE_COLUMNS = ("metric", "step", "seconds", "value")  # the columns of a curve


@dataclass(frozen=True)
class Curve:
    """The validation curve of a reference run by one metric (lower is better)."""

    metric: str
    points: tuple[tuple[int, float, float], ...]

    def at(self, step: int) -> float | None:
        """The value at a step, interpolated linearly between the points; None outside their range."""
        steps = [point[0] for point in self.points]
        i = bisect_left(steps, step)
        if i == len(steps) or step < steps[0]:
            return None
        (high, _, above), (low, _, below) = self.points[i], self.points[max(0, i - 1)]
        return above if high in (step, low) else below + (above - below) * (step - low) / (high - low)


@dataclass(frozen=True)
class ReferenceRun:
    """A run of a recipe or of one of its stages, on a set at a scale, whose validation is shipped."""

    recipe: str
    data: str
    scale: str
    stage: str = ""

    @property
    def name(self) -> str:
        return f"{self.recipe}.{self.stage}" if self.stage else self.recipe

    @property
    def curve(self) -> Curve | None:
        """The run's validation curve; None if it is not shipped."""
        return read_curve(MEASURED_FOLDER / self.data / self.scale / "curves" / f"{self.name}.csv")

    def stood_at(self, step: int, metric: str) -> str | None:
        """A sentence with the run's value at this step; None if there is none, or if its metric is another
        one."""
        if self.curve is None or self.curve.metric != metric:
            return None
        last, _, end = self.curve.points[-1]
        if (value := self.curve.at(step)) is not None:
            return f"the reference run, of {last:,} steps, had {metric} {figure(value)} at this step"
        return (
            f"the reference run ended at step {last:,} with {metric} {figure(end)}" if step > last else None
        )


@cache
def read_curve(path: Path) -> Curve | None:
    rows = rows_of(path)
    points = tuple((int(row["step"]), float(row["seconds"]), float(row["value"])) for row in rows)
    return Curve(rows[0]["metric"], points) if rows else None


def places() -> Iterator[tuple[str, str]]:
    """(set, scale) of each shipped league, those with the longest trainings first."""
    leagues = [(path.parent.parent.name, path.parent.name) for path in MEASURED_FOLDER.glob("*/*/about.json")]
    yield from sorted(leagues, key=lambda place: (-about(*place)["budget"], place))


def about(data: str, scale: str) -> dict[str, Any]:
    """How a league was produced: commands, budget, seeds, commit, machine, versions, judges, metric,
    floor."""
    facts: dict[str, Any] = json.loads((MEASURED_FOLDER / data / scale / "about.json").read_text())
    return facts


def standings(data: str, scale: str) -> list[dict[str, str]]:
    """The rows of a league's `summary.csv`, the best first."""
    return rows_of(MEASURED_FOLDER / data / scale / "summary.csv")


def shipped_league(data: str, scale: str) -> list[dict[str, str]]:
    """The rows of a league's `league.csv`, one for each model and seed."""
    return rows_of(MEASURED_FOLDER / data / scale / "league.csv")


def results() -> str:
    """The rows of every league as one CSV, each with the set, scale, machine, commit and budget."""
    rows = []
    for data, scale in places():
        facts = {key: about(data, scale)[key] for key in ("machine", "commit", "budget")}
        rows += [{"data": data, "scale": scale, **facts, **row} for row in standings(data, scale)]
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def peers(data: str) -> list[dict[str, str]]:
    """The results of other packages' models, measured by gz. A row has the name, version, comparable `model`
    of gz, seconds, steps and machine of training, the number of samples, and the metrics of `summary.csv`.
    The simplest model of a set has no comparable model."""
    return rows_of(MEASURED_FOLDER / data / "peers.csv")


def added(data: str) -> list[dict[str, str]]:
    """The rows that others added to the leagues of a set. A row has its author's name for it, the model, the
    title, the numbers of samples and parameters, sampler, temperature, and the metrics of `summary.csv`."""
    rows = []
    for path in sorted((ADDED_ROWS / data).glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))["rows"][0]
        line = {"by": path.stem} | {key: row[key] for key in ("model", "title", "n", "params")}
        line |= {key: row["sample"].get(key) for key in ("sampler", "temperature")}
        line |= row["metrics"]
        for name, (value, low, high) in row["excess"].items():
            line |= {f"{name}_excess": value, f"{name}_excess_half": (high - low) / 2}
        rows.append({key: "" if value is None else str(value) for key, value in line.items()})
    return rows


def detections() -> dict[tuple[str, str, str], str]:
    """For each (set, foreign set, model): the AUROC of each score, best first, the number of images of both
    sets, and the length of the training. Each AUROC has its 95 % interval and the one that papers report."""
    facts: dict[tuple[str, str, str], str] = {}
    cells: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    rows = (row for path in MEASURED_FOLDER.glob("*/ood.csv") for row in rows_of(path))
    for row in sorted(rows, key=lambda row: (row["in"], row["out"])):
        ends = [f"{float(row[f'auroc_{end}']):.3f}" for end in ("low", "high") if row[f"auroc_{end}"]]
        notes = filter(None, ["–".join(ends), row["paper_auroc"] and f"papers {row['paper_auroc']}"])
        text = f"{float(row['auroc']):.3f} by {row['score']} ({'; '.join(notes)})".removesuffix(" ()")
        key = row["in"], row["out"], row["model"]
        cells.setdefault(key, []).append((float(row["auroc"]), text))
        facts[key] = f"; {row['n_in']} and {row['n_out']} images"
        if row.get("train_seconds"):
            clock = "CPU time" if row["clock"] == "cpu" else "wall-clock time"
            facts[key] += f", trained for {float(row['train_seconds']):.0f} s of {clock}"
    joined = {key: ", ".join(text for _, text in sorted(texts, reverse=True)) for key, texts in cells.items()}
    return {key: text + facts[key] for key, text in joined.items()}


def figures(row: Mapping[str, str], kind: str | None) -> dict[str, str]:
    """The metrics of a row that pages show, in their order. Each has its excess over the floor and half the
    95 % interval of the excess, if known. Likelihoods of different kinds (exact, bound, ode) are different
    metrics. They are those of the model without guidance, also if its samples are guided.

    kind: kind of the row's likelihoods; "" if unknown, None for a model of codes, which has none.
    """
    cells = {}
    for name, value in row.items():
        if name.startswith(LIKELIHOODS) and kind is None:
            continue
        if value and order(name) < len(PAGE_METRICS) and not name.endswith(COLUMN_SUFFIXES):
            excess, half = (row.get(f"{name}_excess{end}") for end in ("", "_half"))
            title = f"{name} ({kind}, unguided)" if kind and name.startswith(LIKELIHOODS) else name
            cells[title] = figure(float(value))
            if excess and half:
                cells[title] += f" ({signed(float(excess))} ± {figure(float(f'{float(half):.2g}'))})"
    return dict(sorted(cells.items(), key=lambda cell: order(cell[0])))


def signed(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"


def order(name: str) -> int:
    """The position of a metric among those that pages show; their number for any other metric."""
    word = re.split(r"[@| /]", name)[0].removesuffix("_rot")  # of a judge that was trained on rotations
    words = (word, word.partition("_")[0] if word.startswith(("kid_", "precision_", "recall_")) else word)
    return min(
        (PAGE_METRICS.index(word) for word in words if word in PAGE_METRICS), default=len(PAGE_METRICS)
    )


def parity() -> list[dict[str, str]]:
    """Comparisons of gz with published code: models, part, reference, version, largest difference."""
    return rows_of(MEASURED_FOLDER / "parity.csv")


def costs(model: str) -> list[dict[str, str]]:
    """The cost of a recipe's trainings, by set and scale: parameters, operations and seconds."""
    return [row for row in rows_of(MEASURED_FOLDER / "costs.csv") if row["model"] == model]


def picture(recipe: str, data: str, scale: str) -> Path:
    """The path of a reference run's image of samples; the file may be missing."""
    return MEASURED_FOLDER / data / scale / "samples" / f"{recipe}.png"


def title(recipe: str, data: str, scale: str) -> str:
    """The title of the reference run in `picture`, that of the model's first seed. It names the guidance."""
    titles = (row["title"] for row in shipped_league(data, scale) if row["model"] == recipe)
    return next(filter(None, titles), recipe)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if the file is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
