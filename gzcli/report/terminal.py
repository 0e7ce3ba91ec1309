"""The results of `gz ood` on the terminal: the table, the notes below it, and the last lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.core.errors import FLAGGED_CODE
from gzcli.core.units import counted, percent
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS, is_local
from gzcli.store.jobs import AlarmJob

MAX_FLAGGED_LINES, MAX_FILE_LETTERS = (
    20,
    40,
)  # flagged images in the table, and letters of a name there, at most


@dataclass(frozen=True)
class TerminalTable:
    """A table and the notes below it.

    spare: headings of columns that may be omitted, the first of them first.
    elsewhere: where they are.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str]
    spare: Sequence[str] = ()
    elsewhere: str = ""


def table(result: Mapping[str, Any]) -> TerminalTable:
    """The table of a result: of an inspection, of single images, or of data sets."""
    if "defects" in result:
        return of_defects(result)
    return flagged_table(result) if "thresholds" in result else of_sets(result)


def of_defects(result: Mapping[str, Any]) -> TerminalTable:
    """A line for each kind of defect, then their mean, and the number of flagged good images."""
    rate, lines = f"at {percent(result['fpr'])}", []
    for row in result["defects"]:
        interval = "–".join(f"{end:.3f}".removeprefix("0") for end in row["ci"] or ())
        line = [row["defect"], f"{row['auroc']:.4f}", interval, f"{row['detected_n']} of {row['n']}"]
        figures = (row[key] for key in ("pixel_auroc", "aupro", "pixel_f1"))
        lines.append(line + ["" if value is None else f"{value:.4f}" for value in figures])
    columns = ["defect", "auroc", "(95 %)", rate, "pixel auroc", "aupro", "pixel f1"]
    good = result["good"]
    note = f"good test images flagged {rate}: {good['flagged']:,} of {good['n']:,}"
    return TerminalTable(columns, lines, [note], ("pixel f1", "(95 %)"), "see `--json`")


def of_sets(result: Mapping[str, Any]) -> TerminalTable:
    """A line for each foreign set and score, with 95 % intervals."""
    names, rows = result["names"], result["results"]
    several = len({row["out"] for row in rows}) > 1
    error = "± seeds" if any("spread" in row for row in rows) else "(95 %)"
    lines = []
    for row in rows:
        line = [names.get(row["out"], row["out"])] if several else []
        line.append(row["score"] + "*" * row["baseline"])
        for key in ("auroc", "fpr95"):
            ends = [f"{end:.3f}".removeprefix("0") for end in (row["ci"] or {}).get(key) or ()]
            spread = f"±{row['spread'][key]:.4f}" if "spread" in row else "–".join(ends)
            line += [f"{row[key]:.4f}", spread]
        lines.append(line + [f"{row[key]:.4f}" for key in ("fpr95_id", "aupr_in", "aupr_out")])
    columns = ["score", "auroc", error, "fpr95", error, "fpr95_id", "aupr_in", "aupr_out"]
    counts = {names[row["out"]]: row["n_out"] for row in rows if row["out"] in names}
    sizes = ", ".join(f"{n:,} of `{name}`" for name, n in counts.items())
    inside = f"{rows[0]['n_in']:,} of `{names[result['in']]}`"
    note = f"images: {inside} (in), {sizes} (out); * marks baselines, which use no model"
    spare, elsewhere = ("aupr_in", "aupr_out", "fpr95_id", error), "see `gz report` or `--json`"
    return TerminalTable([*(["out"] if several else []), *columns], lines, [note], spare, elsewhere)


def flagged_table(result: Mapping[str, Any]) -> TerminalTable:
    """The flagged images, the most unusual first, and their number. The table fits 80 columns."""
    flagged = [row for row in result["files"] if row["flagged"]]
    names, draws = list(result["thresholds"]), result["seeds"]
    shown = names[: 1 if draws > 1 else 2]  # as many as fit into 80 columns, with their spread
    heads = ["file", "p", *(head for name in shown for head in ([name, "±"] if draws > 1 else [name]))]
    lines = []
    for row in flagged[:MAX_FLAGGED_LINES]:
        file = (
            row["file"] if len(row["file"]) <= MAX_FILE_LETTERS else f"…{row['file'][1 - MAX_FILE_LETTERS :]}"
        )
        line = [file, f"{row['p']:.4f}"]
        for name in shown:
            score = row["scores"][name]
            line.append("not finite" if score is None else f"{score:.4g}")
            if draws > 1:
                line.append("" if score is None else f"{row['spread'][name]:.2g}")
        lines.append(line)
    return TerminalTable(heads, lines, [*facts_of_alarm(result, flagged)])


def facts_of_alarm(result: Mapping[str, Any], flagged: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The notes below the table of flagged images."""
    total, draws = len(result["files"]), result["seeds"]
    if len(flagged) > MAX_FLAGGED_LINES:
        more = len(flagged) - MAX_FLAGGED_LINES
        yield f"and {more:,} more: `alarm.csv` lists all images, most unusual first"
    by = f"by {', '.join(result['thresholds'])}, against {result['compared']['n']:,} held-out images"
    yield f"flagged: {len(flagged):,} of {counted(total, 'image')} {by}"
    if draws > 1:
        yield f"scores are means over {draws} noise draws; ± is their standard deviation"
    if low := sum(row["side"] == "low" for row in flagged):
        yield f"{low:,} have an unusually low score, which is typical of very simple images"
    of_set, expected = Path(result["in"]).name, result["fpr"] * total
    most = "about" if result["compared"].get("folds", 1) > 1 else "at most"  # the bound by folds is a note
    share = f"on average, {most} {percent(result['fpr'])} of images like those of `{of_set}` are flagged"
    yield f"{share}: {expected:.2g} of {total:,}" if expected >= 1 else share
    if len(flagged) < total and not any(map(is_local, result["thresholds"])):
        yield "the others may still be anomalous: whole-image scores miss small defects"


# ---------------------------------------------------------------------------- the last lines


def ending(result: Mapping[str, Any], name: str, maps: bool) -> tuple[str | None, tuple[str, str]]:
    """The best score or the number of flagged images, and the next command with its purpose.

    name: the words of the command line after `gz ood`.
    maps: whether the run or method has maps.
    """
    if "defects" in result:
        mean = result["defects"][-1]
        detected = f"{mean['detected_n']:,} of {counted(mean['n'], 'defect')} detected"
        single = (f"gz ood {name} --input ./today --fail", "check images one by one")
        return f"{detected}, AUROC {mean['auroc']:.3f}", better_without(result) or single
    if "thresholds" in result:
        flagged = sum(row["flagged"] for row in result["files"])
        again = f"gz ood {name} --input {shlex.quote(result['input'])}{rate_of(result)}"
        more = (f"{again} --fail", f"exit with code {FLAGGED_CODE} if an image is flagged")
        if maps and not result.get("map"):
            more = (f"{again} --map", "show where they are unusual")
        return f"{flagged:,} of {counted(len(result['files']), 'image')} flagged", better_without(
            result
        ) or more
    scores = [row for row in result["results"] if not row["baseline"]]
    best = max(scores, key=lambda row: row["auroc"], default=None)
    best_score = f"best score `{best['score']}`, AUROC {best['auroc']:.3f}" if best else None
    if best and result["run"]:
        best_score = f"{best_score}{beaten_by(best, result['results'])}"
    return best_score, (f"gz ood {name} --input ./pictures", "check your own images one by one")


def beaten_by(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The note on the best score of a run if a method without a model does as well on the same set."""
    tails = {name: method.tails for name, method in METHODS.items()}
    sided = [row for row in rows if row["out"] == best["out"] and tails.get(row["score"]) == 1]
    method = max(sided, key=lambda row: row["auroc"], default=None)
    least = min([best["auroc"], *((best["ci"] or {}).get("auroc") or ())])
    if not method or method["auroc"] < least:
        return ""
    return f", not clearly better than `{method['score']}` without a model ({method['auroc']:.3f})"


def better_without(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """The command for an alarm without a model, if that detects at least as many synthetic defects as the
    run."""
    choice = result["choice"] if result["run"] else {}
    if not choice or max(choice, key=lambda name: (choice[name], name == DEFAULT_METHOD)) != DEFAULT_METHOD:
        return None
    words = f"gz ood --in {shlex.quote(result['in'])}"
    if "defects" not in result:
        words += f" --input {shlex.quote(result['input'])}"
    return words + rate_of(result), "detects at least as many synthetic defects without a model"


def rate_of(result: Mapping[str, Any]) -> str:
    """The words of a command line for the rate of a result; "" for the default."""
    return "" if result["fpr"] == AlarmJob.fpr else f" --fpr {100 * result['fpr']:g}%"
