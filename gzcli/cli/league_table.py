"""A league in words: a line a training, and the final table."""

from __future__ import annotations

from typing import Any

from gzcli.cli import out
from gzcli.cli.ends import end, quoted
from gzcli.cli.plan import wrapped
from gzcli.core.units import count
from gzcli.metrics import standings


def in_short(row: dict[str, Any], metric: str | None) -> str:
    """A row's figure beside its floor, or its error."""
    if row.get("error"):
        return f"failed: {row['error']}"
    value = standings.value_of(row, metric) if metric else None
    if metric is None or value is None:
        return "judged"
    relative = standings.times_floor(row, metric)
    calls = f"{row['calls']} call{'s' if row['calls'] != 1 else ''} an image"
    return f"{metric} {value:.4g}, {short(relative)} × floor, {calls}"


def show(result: dict[str, Any]) -> None:
    """Prints the table, the best first, and where the files are."""
    metric, equal = result["metric"], {}
    if metric and result["equal_calls"]:
        equal = {row["model"]: row for row in standings.summary(result["equal_calls"], metric)}
    at = result["equal_calls"][0]["setting"] if equal else ""
    head = [
        "",
        "model",
        metric or "",
        "× floor",
        *([f"at {at}"] if equal else []),
        "params",
        "calls",
        "s/image",
    ]
    lines = []
    for row in result["summary"]:
        line = [row["place"], row["model"], with_deviation(row, metric), short(row["times_floor"])]
        if equal:
            line.append(short((equal.get(row["model"]) or {}).get("times_floor")))
        params = count(row["params"]) if row["params"] else None
        lines.append([*line, params, short(row["calls"]), short(row["sample_seconds"], 2)])
    floor = next((v for k, v in result.get("floor", {}).items() if k == metric), None)
    lines.append([None, "(real images)", short(floor), *[None] * (len(head) - 3)])
    out.table(head, lines, spare=("calls", "s/image", "params"), elsewhere="`--json` has them")
    for row in result["rows"]:
        if row.get("error"):
            out.info(f"failed: {row['model']}, seed {row['seed']}: {row['error']}")
    if found := result["spearman"]:
        out.info(f"order over seeds: rank correlation {found['mean']:.3f}, {found['min']:.3f} at least")
    for note in result["notes"]:
        for text in wrapped(note, "note: "):
            out.info(text)
    out.info(f"files: {result['folder']}")
    first = result["summary"][0] if result["summary"] else None
    facts = [f"best: {first['model']}, {metric} {with_deviation(first, metric)}"] if first and metric else []
    end(facts, [(f"gz report {quoted(result['folder'])}", "a page of it")])


def with_deviation(row: dict[str, Any], metric: str | None) -> str | None:
    """The mean of a metric, with its standard deviation over seeds where there are several."""
    own = {standings.base(name): name for name in row["metrics"]}
    if metric not in own:
        return None
    spread = row["deviations"][own[metric]]
    return short(row["metrics"][own[metric]]) + (f" ± {short(spread, 2)}" if spread is not None else "")


def short(value: float | None, digits: int = 3) -> str:
    """A number in a few digits, and without a power of ten where it is large; `-` for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
