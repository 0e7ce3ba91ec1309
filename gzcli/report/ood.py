"""The report of a `gz ood`, between sets or of single pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.units import by_sides
from gzcli.engine.pictures import score_bins
from gzcli.metrics.detection import FIGURES
from gzcli.report.common import behind, day, number, other_pictures, shown, thinned, training
from gzcli.report.document import Cell, Chart, Column, Document, Section, Series, Table
from gzcli.report.results import Results

LISTED = 500  # files of single pictures that are listed


def document(results: Results) -> Document:
    """The report; keys that the results lack are left out."""
    made = results.made
    rows = [row for row in made.get("results") or [] if isinstance(row, dict)]
    of_files = made["files"] if isinstance(made.get("files"), list) else []
    names = {str(key): str(value) for key, value in (made.get("names") or {}).items()}
    inside = names.get(str(made.get("in")), str(made.get("in", "?")))
    facts = [("run", str(made.get("run", "?"))), ("in-distribution", inside)]
    for key, title in (
        ("step", "step"),
        ("seed", "seed"),
        ("likelihood", "likelihood"),
        ("fpr", "FPR asked"),
    ):
        if made.get(key) is not None:
            facts.append((title, number(made[key])))
    if shape := made.get("shape"):
        facts.append(("images", by_sides(shape)))
    outs = list(dict.fromkeys(str(row.get("out")) for row in rows))
    sections = [
        Section("Detection", [detection(rows, names, out) for out in outs]),
        Section("Pictures", list(other_pictures(results, {"histograms"} if results.scores else set()))),
        Section("All pictures", flagged(of_files)),
        Section("ROC", rocs(results, rows, names)),
        Section("Scores", histograms(results, rows, names, str(made.get("in")))),
        training(results),
        behind(results),
    ]
    return Document(
        "ood",
        f"Anomalies against {inside}" if of_files else f"Out-of-distribution detection: {inside}",
        of_flags(made, of_files) if of_files else winner(rows, names),
        [*facts, day(results)],
        [str(note) for note in made.get("notes") or []],
        [section for section in sections if section.items],
        results.command(),
    )


def winner(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The model's best score of each foreign set, in a sentence."""
    sentences = []
    for out in dict.fromkeys(str(row.get("out")) for row in rows):
        scores = [row for row in rows if str(row.get("out")) == out and not row.get("baseline")]
        if scores:
            best = max(scores, key=lambda row: row.get("auroc") or 0)
            sentences.append(
                f"{names.get(out, out)}: AUROC {number(best.get('auroc'))} by `{best.get('score')}`"
            )
    return "; ".join(sentences) + "." if sentences else ""


def detection(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], out: str) -> Table:
    of_set = [row for row in rows if str(row.get("out")) == out]
    of_set.sort(key=lambda row: bool(row.get("baseline")))
    columns = [Column("score", numeric=False), *(Column(head, way) for head, way in FIGURES.values())]
    body = []
    for row in of_set:
        cells = [Cell(str(row.get("score")), None, "baseline" if row.get("baseline") else "")]
        for key, (_, way) in FIGURES.items():
            values = [rival[key] for rival in of_set if isinstance(rival.get(key), (int, float))]
            best = (max if way == "up" else min)(values) if len(values) > 1 else None
            value = row.get(key)
            ends = shown((row.get("ci") or {}).get(key))
            text = "–" if value is None else f"{value:.4f}"
            cells.append(Cell(text, value, ends, value is not None and value == best))
        body.append(cells)
    n_in, n_out = (next((row[key] for row in of_set if row.get(key)), None) for key in ("n_in", "n_out"))
    caption = f"{number(n_in)} images inside, {number(n_out)} outside. " if n_in and n_out else ""
    caption += "A baseline uses no model. Brackets hold 95 % intervals; the best of a column is bold."
    return Table(names.get(out, out), columns, body, caption=caption)


def rocs(results: Results, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Chart]:
    """The curve of each score on each foreign set, from the kept scores; foreign images are positive."""
    from sklearn.metrics import roc_curve

    tables, charts = results.scores, []
    baselines = {row.get("score") for row in rows if row.get("baseline")}
    inside, *outside = tables or [""]
    for out in outside:
        lines = []
        for score in tables[out]:
            values = np.concatenate([tables[inside][score], tables[out][score]])
            labels = np.repeat([0, 1], [len(tables[inside][score]), len(tables[out][score])])
            if not np.isfinite(values).all():
                continue
            fpr, tpr, _ = roc_curve(labels, values)
            points = thinned(list(zip(fpr.tolist(), tpr.tolist(), strict=True)))
            lines.append(Series(score, points, score in baselines))
        title = f"{names.get(inside, inside)} against {names.get(out, out)}"
        charts.append(Chart(f"roc-{out}", title, "false-positive rate", "true-positive rate", lines))
    return charts


def histograms(
    results: Results, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], inside: str
) -> list[Chart]:
    """The share of each set's images in every bin of a score."""
    tables, charts = results.scores, []
    order = dict.fromkeys(row.get("score") for row in rows)
    scored = list(dict.fromkeys(chain.from_iterable(tables.values())))
    for score in [name for name in order if name in scored] or scored:
        edges, scale = score_bins([table[score] for table in tables.values()], 40)
        place = scale[0] if scale else lambda values: values
        x = np.asarray(place(edges), float)
        lines = []
        for name, table in tables.items():
            seen = table[score].clip(edges[0], edges[-1])
            share = np.histogram(seen, edges)[0] / max(1, len(seen))
            steps = [(x[0], 0.0), *zip(x.repeat(2)[1:-1], share.repeat(2), strict=True), (x[-1], 0.0)]
            title = f"{names.get(name, name)}{' (in)' if name == inside else ''}"
            lines.append(Series(title, [(float(a), float(b)) for a, b in steps]))
        marks = edges[[0, len(edges) // 2, -1]]
        ticks = [(float(at), number(float(mark))) for at, mark in zip(place(marks), marks, strict=True)]
        charts.append(Chart(f"scores-{score}", score, score, "share", lines, ticks if scale else (), True))
    return charts


def of_flags(made: Mapping[str, Any], of_files: Sequence[Mapping[str, Any]]) -> str:
    """How many pictures were flagged, in a sentence."""
    count = sum(bool(file.get("flagged")) for file in of_files)
    at = f" at a false-positive rate of {number(made['fpr'])}" if made.get("fpr") is not None else ""
    return f"{count:,} of {len(of_files):,} pictures are flagged{at}."


def flagged(of_files: Sequence[Mapping[str, Any]]) -> list[Table]:
    order = sorted(of_files, key=lambda file: (not file.get("flagged"), file.get("p") or 0))[:LISTED]
    scores = list(dict.fromkeys(chain.from_iterable(file.get("scores") or {} for file in order)))
    columns = [Column("file", numeric=False), Column("flagged", numeric=False), Column("p")]
    body = []
    for file in order:
        values = [(file.get("scores") or {}).get(score) for score in scores]
        path = Path(str(file.get("file")))
        cells = [Cell(path.name, None, str(path.parent) if path.parent != Path(".") else "")]
        cells += [Cell("yes" if file.get("flagged") else "no"), Cell(number(file.get("p")), file.get("p"))]
        body.append([*cells, *(Cell(number(value), value) for value in values)])
    left = len(of_files) - len(body)
    caption = f"{left:,} more, of larger p-values, are in the JSON." if left else ""
    columns += [Column(score) for score in scores]
    return [Table("All pictures", columns, body, caption=caption)] if body else []
