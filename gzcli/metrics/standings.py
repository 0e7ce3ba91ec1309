"""The standings of a league: ranks for each seed, means and deviations over seeds, how well seeds agree, and
tables of them as CSV. Nothing here knows of runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import correlation, fmean, mode, stdev
from typing import Any

from gzcli.metrics.metric import ranking

Row = Mapping[str, Any]

NUMBERS = ("params", "train_seconds", "train_steps", "sample_seconds", "steps", "calls", "peak_memory")
FACTS = ("model", "seed", "setting", "run", *NUMBERS)  # `sample_seconds` are of an image


def ranking_metric(rows: Sequence[Row], requested: Sequence[str] | None) -> str | None:
    """The metric that models are ranked by: the first requested one, else the first one, that a row has."""
    available, ranked = {base(name) for row in rows for name in row["metrics"]}, ranking()
    return next(
        (name for name in (*(requested or ()), *ranked) if name in ranked and name in available), None
    )


def base(name: str) -> str:
    """A metric without the mark of other grey levels: `fd@32` is `fd`."""
    return name.partition("@")[0]


def comparable(rows: Sequence[Row], metric: str, floor: Mapping[str, Any]) -> list[list[Row]]:
    """The rows in groups with comparable values of a metric, the largest group first. Distances are larger
    for fewer images, so the rows of a group have one number of images if the metric has a floor."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("n") if metric in floor else None, []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def name_of(row: Row, metric: str) -> str | None:
    """The name under which a row has the metric, at whatever grey levels; None where it has none."""
    names = (name for name, value in row["metrics"].items() if base(name) == metric and value is not None)
    return next(names, None)


def value_of(row: Row, metric: str) -> float | None:
    name = name_of(row, metric)
    return None if name is None else row["metrics"][name]


def times_floor(row: Row, metric: str) -> float | None:
    """The value as a multiple of the floor at the same grey levels, which makes all rows comparable. It is
    the value itself if the floor is not above 0, as that of an unbiased KID may be."""
    if (name := name_of(row, metric)) is None:
        return None
    value, floor = row["metrics"][name], row["floor"].get(name)
    return value / floor if floor and floor > 0 else value


def of_seed(rows: Sequence[Row], seed: int, metric: str) -> dict[str, float]:
    values = {row["model"]: times_floor(row, metric) for row in rows if row["seed"] == seed}
    return {model: value for model, value in values.items() if value is not None}


def ranks(rows: Sequence[Row], metric: str) -> dict[tuple[str, int], float]:
    """The rank of each (model, seed) among the models of its seed, 1 for the best; equal values share the
    mean of their ranks. Rows without the metric have none."""
    places: dict[tuple[str, int], float] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        values = of_seed(rows, seed, metric)
        ordered = sorted(values.values())
        for model, value in values.items():
            places[model, seed] = ordered.index(value) + (ordered.count(value) + 1) / 2
    return places


def summary(rows: Sequence[Row], metric: str | None) -> list[dict[str, Any]]:
    """A row for each model, the best first: NUMBERS, metrics and rank as means over its seeds, standard
    deviations (None for one seed), its place, and the numbers of complete and failed seeds."""
    by_rank = ranks(rows, metric) if metric else {}
    summaries = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        complete = [row for row in of_model if row["metrics"]]
        names = dict.fromkeys(name for row in complete for name in row["metrics"])
        values = {name: present(row["metrics"].get(name) for row in complete) for name in names}
        summaries.append(
            {
                "model": model,
                "seeds": len(complete),
                "failed": len(of_model) - len(complete),
                **{key: mean(present(row.get(key) for row in complete)) for key in NUMBERS},
                "metrics": {name: fmean(samples) for name, samples in values.items() if samples},
                "deviations": {name: deviation(samples) for name, samples in values.items() if samples},
                "times_floor": mean(present(times_floor(row, metric) for row in complete) if metric else []),
                "rank": mean([rank for (name, _), rank in by_rank.items() if name == model]),
            }
        )
    summaries.sort(key=lambda row: (row["times_floor"] is None, row["times_floor"] or 0.0))
    for place, row in enumerate(summaries, 1):
        row["place"] = None if row["times_floor"] is None else place
    return summaries


def present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def curve(rows: Sequence[Row], metric: str, key: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """The points of each model's curve: x, mean and deviation over seeds of the multiple of the floor."""
    curves = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        lines: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["model"] == model and (value := times_floor(row, metric)) is not None:
                lines.setdefault(row["seed"], []).append((row[key], value))
        longest = max(map(len, lines.values()), default=0)
        complete = [sorted(line) for line in lines.values() if len(line) == longest]
        points = [tuple(zip(*column, strict=True)) for column in zip(*complete, strict=True)]
        curves[model] = [(fmean(x), fmean(y), deviation(y)) for x, y in points]
    return {model: points for model, points in curves.items() if points}


def of_one_size(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows. An image size other than the most frequent one is added to metrics' names (`fd/64×64`)."""
    shapes = [tuple(row["shape"]) for row in rows if row.get("shape")]
    usual = mode(shapes) if shapes else None

    def marked(row: Row) -> dict[str, Any]:
        if not row.get("shape") or tuple(row["shape"]) == usual:
            return dict(row)
        mark = "/" + "×".join(map(str, row["shape"][1:]))
        keys = ("metrics", "floor", "intervals")
        return {**row, **{key: {n + mark: v for n, v in row.get(key, {}).items()} for key in keys}}

    return [marked(row) for row in rows]


def agreement(rows: Sequence[Row], metric: str) -> dict[str, float] | None:
    """How well the orders of any two seeds agree: Spearman's rank correlation (1904), {"mean", "min"} over
    the pairs, each over the models that both have. None where no two seeds have three models in common."""
    correlations = []
    for pair in combinations(dict.fromkeys(row["seed"] for row in rows), 2):
        first, second = (of_seed(rows, seed, metric) for seed in pair)
        common = [model for model in first if model in second]
        order = ranks([row for row in rows if row["model"] in common and row["seed"] in pair], metric)
        if len(common) > 2:
            a, b = ([order[model, seed] for model in common] for seed in pair)
            varied = len(set(a)) > 1 and len(set(b)) > 1
            correlations.append(correlation(a, b) if varied else 0.0)
    return {"mean": fmean(correlations), "min": min(correlations)} if correlations else None


# ---------------------------------------------------------------------------- CSV


def table_of(rows: Sequence[Row], *extra: str) -> str:
    """Rows as CSV: facts, then each metric with the ends of its interval, where it has one, and its floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = []
    for row in rows:
        line = {key: row.get(key) for key in (*FACTS, *extra)}
        for name in names:
            line[name] = row["metrics"].get(name)
            if any(name in any_row.get("intervals", {}) for any_row in rows):
                line[f"{name}_low"], line[f"{name}_high"] = row.get("intervals", {}).get(name) or (None, None)
            line[f"{name}_floor"] = row["floor"].get(name)
        lines.append(line | {"error": row.get("error")})
    return as_csv(lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Rows of `summary` as CSV: each metric with its standard deviation over seeds."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in ("place", "metrics", "deviations")}
        for name in names:
            line[name], line[f"{name}_sd"] = row["metrics"].get(name), row["deviations"].get(name)
        lines.append({"place": row["place"], **line})
    return as_csv(lines)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
