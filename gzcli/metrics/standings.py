"""The standings of a league: ranks for each seed, means and deviations over seeds, how well seeds agree, and
tables of them as CSV. Nothing here knows of runs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from gzcli.metrics.metric import ranking

Row = Mapping[str, Any]

FACTS = (
    "model",
    "seed",
    "setting",
    "run",
    "params",
    "train_seconds",
    "train_steps",
    "sample_seconds",  # an image
    "steps",
    "calls",
    "peak_memory",
)


def ranking_metric(rows: Sequence[Row], asked: Sequence[str] | None) -> str | None:
    """The metric that models are ranked by: the first that was asked for of those that rank, else the first
    that a row has; None where no row has any."""
    there, ranked = {base(name) for row in rows for name in row["metrics"]}, ranking()
    return next((name for name in (*(asked or ()), *ranked) if name in ranked and name in there), None)


def base(name: str) -> str:
    """A metric without the mark of other grey levels: `fd@32` is `fd`."""
    return name.partition("@")[0]


def comparable(rows: Sequence[Row], metric: str, floor: Mapping[str, Any]) -> list[list[Row]]:
    """The rows in groups whose values of a metric may be compared, the largest group first: a distance of few
    images is larger than that of many, so rows are of one number of images where real images have it too."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("n") if metric in floor else None, []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def value_of(row: Row, metric: str) -> float | None:
    """The metric's value in a row, at whatever grey levels; None where it has none."""
    values = (value for name, value in row["metrics"].items() if base(name) == metric)
    return next((value for value in values if value is not None), None)


def times_floor(row: Row, metric: str) -> float | None:
    """The value as a multiple of the floor at the same grey levels, in which all rows are comparable; where
    the floor is not above 0, as that of an unbiased KID may be, the value itself."""
    for name, value in row["metrics"].items():
        if base(name) == metric and value is not None:
            floor = row["floor"].get(name)
            return value / floor if floor and floor > 0 else value
    return None


def ranks(rows: Sequence[Row], metric: str) -> dict[tuple[str, int], float]:
    """The rank of each (model, seed) among the models of its seed, 1 for the best; equal values share the
    mean of their ranks. Rows without the metric have none."""
    places: dict[tuple[str, int], float] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        relative = {row["model"]: times_floor(row, metric) for row in rows if row["seed"] == seed}
        values = {model: value for model, value in relative.items() if value is not None}
        for model, value in values.items():
            less = sum(other < value for other in values.values())
            equal = sum(other == value for other in values.values())
            places[model, seed] = less + (equal + 1) / 2
    return places


def summary(rows: Sequence[Row], metric: str | None) -> list[dict[str, Any]]:
    """A row for each model, the best first: means and standard deviations over its seeds, and its place.

    Keys: those of FACTS that are numbers, as means; "metrics", "deviations" (of the sample; None for one
    seed), "times_floor" and "rank", its mean rank; "place"; "seeds" that are whole, and "failed" ones.
    """
    by_rank = ranks(rows, metric) if metric else {}
    summaries = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        whole = [row for row in of_model if row["metrics"]]
        names = dict.fromkeys(name for row in whole for name in row["metrics"])
        values = {
            name: [row["metrics"][name] for row in whole if row["metrics"].get(name) is not None]
            for name in names
        }
        relative = [v for row in whole if metric and (v := times_floor(row, metric)) is not None]
        places = [rank for (name, _), rank in by_rank.items() if name == model]
        numbers = {key: [row[key] for row in whole if row.get(key) is not None] for key in FACTS[4:]}
        summaries.append(
            {
                "model": model,
                "seeds": len(whole),
                "failed": len(of_model) - len(whole),
                **{key: statistics.fmean(known) if known else None for key, known in numbers.items()},
                "metrics": {name: statistics.fmean(known) for name, known in values.items() if known},
                "deviations": {name: deviation(known) for name, known in values.items() if known},
                "times_floor": statistics.fmean(relative) if relative else None,
                "rank": statistics.fmean(places) if places else None,
            }
        )
    summaries.sort(key=lambda row: (row["times_floor"] is None, row["times_floor"] or 0.0))
    for place, row in enumerate(summaries, 1):
        row["place"] = None if row["times_floor"] is None else place
    return summaries


def curve(rows: Sequence[Row], metric: str, key: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """The points of each model's curve in order: x, mean and standard deviation over seeds of the metric as a
    multiple of its floor."""
    curves = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for seed in dict.fromkeys(row["seed"] for row in rows if row["model"] == model):
            of_seed = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
            known = [(row[key], value) for row in of_seed if (value := times_floor(row, metric)) is not None]
            lines.append(sorted(known))
        same = [line for line in lines if line and len(line) == max(map(len, lines))]
        curves[model] = [
            (statistics.fmean(x), statistics.fmean(y), deviation(y))
            for x, y in (zip(*at, strict=True) for at in zip(*same, strict=True))
        ]
    return {model: points for model, points in curves.items() if points}


def of_one_size(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, those whose images have another size than most with that size in their metrics' names
    (`fd/64×64`): figures of two sizes are not compared."""
    shapes = [tuple(row["shape"]) for row in rows if row.get("shape")]
    usual = statistics.mode(shapes) if shapes else None

    def marked(row: Row) -> dict[str, Any]:
        if not row.get("shape") or tuple(row["shape"]) == usual:
            return dict(row)
        mark = "/" + "×".join(map(str, row["shape"][1:]))
        keys = ("metrics", "floor", "intervals")
        return {**row, **{key: {n + mark: v for n, v in row.get(key, {}).items()} for key in keys}}

    return [marked(row) for row in rows]


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def agreement(rows: Sequence[Row], metric: str) -> dict[str, float] | None:
    """How well the orders of any two seeds agree: Spearman's rank correlation, {"mean", "min"} over the
    pairs, each over the models that both have. None where no two seeds have three models in common.

    Spearman, The proof and measurement of association between two things (1904): Pearson's correlation of the
    ranks, equal values sharing the mean of theirs.
    """
    seeds, correlations = dict.fromkeys(row["seed"] for row in rows), []
    for pair in combinations(seeds, 2):
        values = [{row["model"]: times_floor(row, metric) for row in rows if row["seed"] == s} for s in pair]
        both = [m for m, value in values[0].items() if value is not None and values[1].get(m) is not None]
        shared = [row for row in rows if row["model"] in both and row["seed"] in pair]
        order = ranks(shared, metric)
        if len(both) > 2:
            a, b = ([order[model, seed] for model in both] for seed in pair)
            varied = len(set(a)) > 1 and len(set(b)) > 1
            correlations.append(statistics.correlation(a, b) if varied else 0.0)
    return {"mean": statistics.fmean(correlations), "min": min(correlations)} if correlations else None


# ---------------------------------------------------------------------------- CSV


def table_of(rows: Sequence[Row], *extra: str) -> str:
    """Rows as CSV: facts, then each metric with the ends of its interval, where it has one, and its floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = []
    for row in rows:
        line = {key: row.get(key) for key in (*FACTS, *extra)}
        for name in names:
            line[name] = row["metrics"].get(name)
            if any(name in other.get("intervals", {}) for other in rows):
                line[f"{name}_low"], line[f"{name}_high"] = row.get("intervals", {}).get(name) or (None, None)
            line[f"{name}_floor"] = row["floor"].get(name)
        lines.append(line | {"error": row.get("error")})
    return as_csv(lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Rows of `summary` as CSV: each metric with its standard deviation over seeds."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in ("metrics", "deviations")}
        for name in names:
            line[name], line[f"{name}_sd"] = row["metrics"].get(name), row["deviations"].get(name)
        lines.append({"place": line.pop("place"), **line})
    return as_csv(lines)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of equal keys as CSV with a head; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
