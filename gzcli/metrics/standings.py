"""The standings of a bench or a league: places by the excess over the floor, means and deviations over seeds,
the agreement of seeds and of judges, and CSV tables of all these. The module does not depend on runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, mode, stdev
from typing import Any, NamedTuple

from gzcli.core.units import short
from gzcli.metrics.metric import column_of, ranking

AXES = {"steps": ("calls", "network calls per image"), "time": ("at_seconds", "seconds of training")}
Row = Mapping[str, Any]
SECOND_METRIC = "fd_second"  # the metric of the second judge
LATE = 1.25  # a model whose trainings took longer than this multiple of the budget has no place

STANDING_NUMBERS = (
    "params",
    "train_seconds",
    "train_steps",
    "sample_seconds",
    "steps",
    "calls",
    "peak_memory",
)
IDENTITY = ("model", "title", "seed", "setting", "run", "n", "drawn")
STANDING_FACTS = (*IDENTITY, *STANDING_NUMBERS)  # `sample_seconds` is per image
SAMPLER = ("sampler", "guidance", "temperature")  # keys of the resolved sampler options
ORIGIN = ("commit", "machine")


def ranking_metric(
    rows: Sequence[Row], requested: Sequence[str] | None, directions: Mapping[str, Any]
) -> str | None:
    """The metric by which models are ranked: the first requested metric (otherwise the first of all) that a
    row has and whose judge is alive."""
    names = [name for row in rows for name in row["metrics"]]
    available, ranked = {base(name) for name in names if directions.get(name)}, ranking()
    return next(
        (name for name in (*(requested or ()), *ranked) if name in ranked and name in available), None
    )


def base(name: str) -> str:
    """A metric without the mark of other grey levels: `fd@32` is `fd`. The mark of another size remains."""
    name, _, marks = name.partition("@")
    _, slash, size = marks.partition("/")
    return name + slash + size


def comparable(rows: Sequence[Row], metric: str, floor: Mapping[str, Any]) -> list[list[Row]]:
    """The rows in groups with comparable values of a metric, the largest group first. Distances are larger
    for fewer images, so if the metric has a floor, the rows of a group have equally many images."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("n") if metric in floor else None, []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def name_of(row: Row, metric: str) -> str | None:
    """The name of the metric in a row, at any grey levels unless it names them; None if the row lacks it."""
    values = row["metrics"].items()
    return next((key for key, value in values if metric in (key, base(key)) and value is not None), None)


def value_of(row: Row, metric: str) -> float | None:
    name = name_of(row, metric)
    return None if name is None else row["metrics"][name]


def interval(ends: Any) -> tuple[float, float] | None:
    """The two ends of an interval; None if they are unknown."""
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        return None
    return low, high


def estimate(row: Row, metric: str) -> Excess | None:
    """A metric with the larger side of its interval, or 0 if that is unknown; None for a row without a
    finite value. Near a bound, such as a proportion of 1, half of the interval would contain the true value
    too rarely."""
    if (name := name_of(row, metric)) is None:
        return None
    value = row["metrics"][name]
    low, high = interval((row.get("intervals") or {}).get(name)) or (value, value)
    return finite(Excess(value, max(value - low, high - value), over_floor=False))


def excess_of(row: Row, metric: str) -> Excess | None:
    """How much worse a row is than real images that were sampled in the same way. This makes all rows
    comparable. For a metric without a floor, it is the metric's value. None if it is not finite."""
    if (name := name_of(row, metric)) is None:
        return None
    if name in row.get("excess", {}):
        return finite(excess_from(row["excess"][name]))
    floor, sign = row.get("floor", {}).get(name), -1 if column_of(name).better == "up" else 1
    one = estimate(row, name)
    return one and finite(Excess(sign * (one.value - (floor or 0.0)), one.half, floor is not None))


def excess_from(ends: Sequence[float]) -> Excess:
    value, low, high = ends
    return Excess(value, (high - low) / 2)


class Excess(NamedTuple):
    """An excess over the floor, and half of its 95 % interval; or the value of a metric without a floor."""

    value: float
    half: float
    over_floor: bool = True

    @property
    def size(self) -> float:
        """The excess, or 0 below the floor, because nothing is closer to real images than real images."""
        return max(0.0, self.value) if self.over_floor else self.value

    @property
    def ends(self) -> list[float]:
        """The excess and the ends of its interval, as JSON values."""
        return [self.value, self.value - self.half, self.value + self.half]

    @property
    def words(self) -> str:
        return f"{short(self.value)} ± {short(self.half, 2)}"

    def differs(self, excess: Excess) -> bool:
        return abs(self.size - excess.size) > math.hypot(self.half, excess.half)


def finite(excess: Excess) -> Excess | None:
    """The excess; None if it or its interval is not finite, so that it is not compared."""
    return excess if all(map(math.isfinite, excess)) else None


def over_seeds(excesses: Sequence[Excess | None]) -> Excess | None:
    """The mean over trainings. Its interval comes from their spread (Student's t), but is no narrower than
    the interval over images. None without trainings, or if one of them has no finite excess."""
    from gzcli.metrics.interval import student

    every = [excess for excess in excesses if excess is not None]
    if not every or len(every) < len(excesses):
        return None
    n = len(every)
    half = math.sqrt(sum(excess.half**2 for excess in every)) / n
    if n > 1:
        spread = stdev(excess.value for excess in every)
        half = max(half, student(n) * spread / math.sqrt(n))
    return Excess(fmean(excess.value for excess in every), half, every[0].over_floor)


def rank_ranges(excesses: Mapping[str, Excess]) -> dict[str, str]:
    """The rank of each model by its excess, such as `2–4` for one that cannot be distinguished from its
    neighbours."""
    spans = {}
    for name, excess in excesses.items():
        apart = [rival for rival in excesses.values() if excess.differs(rival)]
        better = sum(rival.size < excess.size for rival in apart)
        worse = len(apart) - better
        first, last = better + 1, len(excesses) - worse
        spans[name] = f"{first}" if first == last else f"{first}–{last}"
    return spans


def first_of(places: Mapping[str, str | None]) -> list[str]:
    """The models that share the first place: no other is significantly better."""
    return [name for name, place in places.items() if place and place.split("–")[0] == "1"]


def second_order(excesses: Mapping[str, Mapping[str, Excess]], metric: str) -> dict[str, Any] | None:
    """Compares the rankings of the two judges: Spearman's rank correlation, and the models whose ranks do not
    overlap. None if both have judged fewer than three models."""
    first, second = (
        {name: by[judge] for name, by in excesses.items() if metric in by and SECOND_METRIC in by}
        for judge in (metric, SECOND_METRIC)
    )
    if metric == SECOND_METRIC or len(first) < 3:
        return None
    by_first, by_second = rank_ranges(first), rank_ranges(second)
    apart = [
        [name, by_first[name], by_second[name]] for name in first if _apart(by_first[name], by_second[name])
    ]
    sizes = ([excess.size for excess in order.values()] for order in (first, second))
    return {"metric": SECOND_METRIC, "spearman": spearman(*sizes), "apart": apart}


def _apart(place: str, place_b: str) -> bool:
    a, b = ([int(rank) for rank in text.split("–")] for text in (place, place_b))
    return a[-1] < b[0] or b[-1] < a[0]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation (1904); 0 if all values of a side are equal."""
    from scipy.stats import spearmanr

    varied = len(set(a)) > 1 and len(set(b)) > 1
    return float(spearmanr(a, b).statistic) if varied else 0.0


def two_judges(
    rows: Sequence[Row], requested: Sequence[str] | None, directions: Mapping[str, Any]
) -> dict[str, Any]:
    """The metric that ranks contestants, their places, and the ranking by the second judge."""
    metric = ranking_metric(rows, requested, directions)
    if metric is None:
        return {"metric": None, "places": {}, "second": None}
    both = {row["name"]: excesses_of(row, (metric, SECOND_METRIC)) for row in rows}
    of_metric = {name: by[metric] for name, by in both.items() if metric in by}
    return {"metric": metric, "places": rank_ranges(of_metric), "second": second_order(both, metric)}


def second_of(summaries: Sequence[Row], metric: str) -> dict[str, Any] | None:
    """The result of `second_order` for the rows of a summary that have a place. So the ranks are those of its
    table."""
    tables = {row["model"]: row["excess"] for row in summaries if row["place"]}
    excesses = {
        name: {key: excess_from(ends) for key, ends in table.items()} for name, table in tables.items()
    }
    return second_order(excesses, metric)


def excesses_of(row: Row, names: Iterable[str]) -> dict[str, Excess]:
    return {name: excess for name in names if (excess := excess_of(row, name)) is not None}


def of_seed(rows: Sequence[Row], seed: int, metric: str) -> dict[str, float]:
    values = {row["model"]: excess_of(row, metric) for row in rows if row["seed"] == seed}
    return {model: excess.size for model, excess in values.items() if excess is not None}


def summary(rows: Sequence[Row], metric: str | None, budget: float | None = None) -> list[dict[str, Any]]:
    """A row for each model, the best first and those without a place last. It has STANDING_NUMBERS and
    metrics as means over the seeds, standard deviations (None for one seed or values that are not finite),
    and excesses with their intervals. It also has the place, the numbers of complete and failed seeds, and
    the details of SAMPLER and ORIGIN.

    budget: seconds of training for each model. A model that took over `LATE` times as long, on average over
      its seeds, has no place.
    """
    summaries: list[dict[str, Any]] = []
    of_metric = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        complete = [row for row in of_model if row["metrics"]]
        names = dict.fromkeys(name for row in complete for name in row["metrics"])
        values = {name: present(row["metrics"].get(name) for row in complete) for name in names}
        with_floor = dict.fromkeys(base(name) for row in complete for name in row.get("excess", {}))
        of_seeds = {
            name: [excess_of(row, name) for row in complete if name_of(row, name)]
            for name in dict.fromkeys([*([metric] if metric else []), *with_floor])
        }
        excesses = {name: excess for name, each in of_seeds.items() if (excess := over_seeds(each))}
        seconds = mean(present(row.get("train_seconds") for row in complete))
        late = bool(budget and seconds and seconds > LATE * budget)
        if metric in excesses and not late:
            of_metric[model] = excesses[metric]
        title = title_of([row["title"] for row in complete if row.get("title")]) or model
        is_taken = any(row["title"] == title for row in summaries)  # two recipes of a model
        summaries.append(
            {
                "model": model,
                "title": f"{title} ({model})" if is_taken else title,
                "seeds": len(complete),
                "failed": len(of_model) - len(complete),
                "late": late,
                "n": min((row["n"] for row in complete if row.get("n")), default=None),
                **{key: mean(present(row.get(key) for row in complete)) for key in STANDING_NUMBERS},
                **{key: joined(detail(row, key) for row in complete) for key in (*SAMPLER, *ORIGIN)},
                "metrics": {name: fmean(samples) for name, samples in values.items() if samples},
                "deviations": {name: deviation(samples) for name, samples in values.items() if samples},
                "excess": {name: excess.ends for name, excess in excesses.items()},
            }
        )
    of_place = rank_ranges(of_metric)
    for row in summaries:
        row["place"] = of_place.get(row["model"])

    def order(row: Row) -> tuple[bool, float]:
        ends = row["excess"].get(metric)
        return not row["place"], excess_from(ends).value if ends else math.inf

    return sorted(summaries, key=order)


def title_of(titles: Sequence[str]) -> str:
    """The title of a model whose seeds have these. If they differ in the guidance: `fm, guided 2; 1.3`."""
    different = list(dict.fromkeys(titles))
    if len({title.rpartition(" ")[0] for title in different}) == 1:
        return "; ".join([different[0], *(title.rpartition(" ")[2] for title in different[1:])])
    return "; ".join(different)


def metric_heading(name: str, rows: Sequence[Row]) -> str:
    """The heading of a metric: a likelihood, which uses no guidance, is marked if samples are guided."""
    return f"{name}, unguided" if any(drawn_by(name, row) == "unguided" for row in rows) else name


def drawn_by(name: str, row: Row) -> str:
    """The guidance of a metric of a row in words; "" if its samples are not guided."""
    scale = detail(row, "guidance")
    if not isinstance(scale, int | float) or scale == 1:
        return ""
    return "unguided" if name.partition("|")[0] in ("bpd", "nats") else f"guided {scale:g}"


def detail(row: Row, key: str) -> Any:
    """A fact of SAMPLER or ORIGIN; None if the row lacks it."""
    if key not in SAMPLER:
        return row.get(key)
    options = row.get("sample")
    return options.get(key) if isinstance(options, Mapping) else None


def joined(values: Iterable[Any]) -> str:
    """The different values, joined in words."""
    return "; ".join(dict.fromkeys(str(value) for value in values if value is not None))


def present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def curve(rows: Sequence[Row], metric: str, key: str) -> dict[str, list[tuple[float, float, float]]]:
    """The points of each model's curve: x, the mean of the metric over seeds, and half of its interval, 0 for
    one seed."""
    curves = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        lines: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["model"] == model and (value := value_of(row, metric)) is not None:
                lines.setdefault(row["seed"], []).append((row[key], value))
        longest = max(map(len, lines.values()), default=0)
        complete = [sorted(line) for line in lines.values() if len(line) == longest]
        curves[model] = [
            (fmean(x for x, _ in points), mean.value, mean.half)
            for points in zip(*complete, strict=True)
            if (mean := over_seeds([finite(Excess(value, 0.0)) for _, value in points]))
        ]
    return {model: points for model, points in curves.items() if points}


def of_one_size(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, with image sizes other than the most frequent one added to the names of metrics
    (`fd/64×64`)."""
    shapes = [tuple(row["shape"]) for row in rows if row.get("shape")]
    usual = mode(shapes) if shapes else None

    def marked(row: Row) -> dict[str, Any]:
        if not row.get("shape") or tuple(row["shape"]) == usual:
            return dict(row)
        mark = "/" + "×".join(map(str, row["shape"][1:]))
        keys = ("metrics", "floor", "intervals", "excess")
        return {**row, **{key: {n + mark: v for n, v in row.get(key, {}).items()} for key in keys}}

    return [marked(row) for row in rows]


def agreement(rows: Sequence[Row], metric: str) -> dict[str, float] | None:
    """The agreement of the rankings of any two seeds: Spearman's rank correlation over the models that both
    have, as {"mean", "min"} over the pairs. None if no two seeds have three models in common."""
    correlations = []
    for pair in combinations(dict.fromkeys(row["seed"] for row in rows), 2):
        first, second = (of_seed(rows, seed, metric) for seed in pair)
        common = [model for model in first if model in second]
        if len(common) > 2:
            a, b = ([first[model] for model in common], [second[model] for model in common])
            correlations.append(spearman(a, b))
    return {"mean": fmean(correlations), "min": min(correlations)} if correlations else None


# ---------------------------------------------------------------------------- CSV


def table_of(rows: Sequence[Row], *extra: str) -> str:
    """Rows as CSV: facts, then each metric with the ends of its interval, if it has one, its floor, and its
    excess over the floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = []
    for row in rows:
        line = {key: row.get(key) for key in (*STANDING_FACTS, *extra)}
        line |= {key: detail(row, key) for key in (*SAMPLER, *ORIGIN)}
        if any(any_row.get("judge_commit") for any_row in rows):  # older rows do not name it
            line["judge_commit"] = row.get("judge_commit")
        for name in names:
            line[name] = row["metrics"].get(name)
            if any(name in any_row.get("intervals", {}) for any_row in rows):
                line[f"{name}_low"], line[f"{name}_high"] = row.get("intervals", {}).get(name) or (None, None)
            line[f"{name}_floor"] = row["floor"].get(name)
            if any(name in any_row.get("excess", {}) for any_row in rows):
                line[f"{name}_excess"] = (row.get("excess", {}).get(name) or [None])[0]
        lines.append(line | {"error": row.get("error")})
    return as_csv(lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Rows of `summary` as CSV: each metric with its standard deviation over seeds, and its excess with half
    of the interval."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    tables, lines = ("place", "metrics", "deviations", "excess"), []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in tables}
        for name in names:
            line[name], line[f"{name}_sd"] = row["metrics"].get(name), row["deviations"].get(name)
            if any(base(name) in any_row["excess"] for any_row in rows):
                excess = excess_from(ends) if (ends := row["excess"].get(base(name))) else None
                line[f"{name}_excess"] = excess and excess.value
                line[f"{name}_excess_half"] = excess and excess.half
        lines.append({"place": row["place"], **line})
    return as_csv(lines)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
