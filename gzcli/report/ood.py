"""The report of `gz ood`, for data sets or single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from gzcli.core.units import percent
from gzcli.engine.pictures import score_bins
from gzcli.metrics.detection import DETECTION_METRICS
from gzcli.metrics.standings import estimate
from gzcli.report import cited
from gzcli.report import document as doc
from gzcli.report.document import Cell, Chart, Column, Section, Series, Table
from gzcli.report.results import Results, Row, facts_of, rows_of, thinned

# metrics of a kind of defect, and the keys of their intervals
OF_DEFECTS = {"auroc": "ci", "detected": "detected_ci", "pixel_auroc": "", "aupro": "", "pixel_f1": ""}
TABLE_CAPTION = (
    "A baseline uses no model. Brackets show 95 % intervals. Bold: no score is significantly better."
)
LISTED = 500  # most files of single images in a list


def document(results: Results) -> doc.Document:
    """The report; missing keys of the results are skipped."""
    result = results.result
    rows, pictures = rows_of(result, "results"), rows_of(result, "files")
    names = {str(key): str(value) for key, value in (result.get("names") or {}).items()}
    inside = names.get(str(result.get("in")), str(result.get("in", "?")))
    of_method = bool(result.get("method"))  # without a run
    names_of = {"name": "method"} if of_method else {"run": "run", "name": "name"}
    facts = [*((title, str(result.get(key, "?"))) for key, title in names_of.items())]
    facts += [("in-distribution", inside)]
    facts += [("requested FPR", percent(result["fpr"]))] if result.get("fpr") is not None else []
    titles = {"step": "step", "seed": "seed", "likelihood": "likelihood"}
    of_files = isinstance(result.get("files"), list)
    kinds = rows_of(result, "defects")
    sections = [
        Section("Defects", defects(kinds, result)),
        Section("Detection", detection_tables(rows, names)),
        Section("Pictures", results.other_pictures(*(["histograms"] if results.scores else []))),
        Section("All images", all_pictures(pictures)),
        Section("ROC", rocs(results, rows, names)),
        Section("Scores", histograms(results, rows, names)),
    ]
    home = Path(inside).name
    title = f"Anomalies against {home}" if of_files else f"Out-of-distribution detection: {home}"
    lead = flags(result, pictures) if of_files else winner(rows, names)
    if kinds:
        title, mean = f"Defects of {Path(str(result.get('inspection'))).name}", kinds[-1]
        lead = f"{mean.get('detected_n')} of {mean.get('n')} defects detected, mean AUROC "
        lead += f"{doc.number(mean.get('auroc'))}."
    return results.document(title, lead, facts + facts_of(result, titles), sections)


def winner(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """A sentence on the model's best score for each foreign set."""
    sentences = []
    detections = [row for row in rows if not row.get("baseline")]
    for out in dict.fromkeys(str(row.get("out")) for row in detections):
        best = max((r for r in detections if str(r.get("out")) == out), key=lambda r: r.get("auroc") or 0)
        figure = f"AUROC {doc.number(best.get('auroc'))} by `{best.get('score')}`"
        sentences.append(f"{names.get(out, out)}: {figure}")
    return "; ".join(sentences) + "." if sentences else ""


def defects(rows: Sequence[Row], result: Row) -> list[Table]:
    """A line for each kind of defect, the mean last."""
    if not rows:
        return []
    columns = [doc.texts("defect", [str(row.get("defect")) for row in rows])]
    for key, ends in OF_DEFECTS.items():
        intervals = [doc.brackets(row.get(ends)) for row in rows]
        head, values = key.replace("_", " "), [row.get(key) for row in rows]
        columns.append(doc.numbers(head, values, intervals, number))
    good = result.get("good") or {}
    caption = f"{good.get('flagged', '?')} of {good.get('n', '?')} good test images are flagged. "
    return [Table("Kinds of defects", columns, caption=caption + "Brackets show 95 % intervals.")]


def detection_tables(rows: Sequence[Row], names: Mapping[str, str]) -> list[Table]:
    """A table for each foreign set, with a row for each score."""
    tables = []
    for out in dict.fromkeys(str(row.get("out")) for row in rows):
        of_set = [row for row in rows if str(row.get("out")) == out]
        of_set.sort(key=lambda row: bool(row.get("baseline")))
        baselines = ["baseline" * bool(row.get("baseline")) for row in of_set]
        columns = [doc.texts("score", [str(row.get("score")) for row in of_set], baselines)]
        for key, (head, way) in DETECTION_METRICS.items():
            columns.append(figure(key, head, way, of_set))
        n_in, n_out = (next((row[key] for row in of_set if row.get(key)), None) for key in ("n_in", "n_out"))
        counts = (
            f"{doc.number(n_in)} in-distribution images, {doc.number(n_out)} out-of-distribution images. "
            if n_in and n_out
            else ""
        )
        tables.append(Table(names.get(out, out), columns, caption=counts + TABLE_CAPTION))
    return tables


def figure(key: str, head: str, way: doc.Direction, rows: Sequence[Row]) -> Column:
    """A metric of each score with its interval. Values of the first rank are bold, as in a bench."""
    worse = {}
    for i, row in enumerate(rows):
        if one := estimate({"metrics": row, "intervals": row.get("ci")}, key):
            worse[str(i)] = one if way == "down" else one._replace(value=-one.value)
    best = cited.bold(worse)
    ends = [doc.brackets((row.get("ci") or {}).get(key)) for row in rows]
    values = [row.get(key) for row in rows]
    cells = [Cell(number(v), ends[i], v, str(i) in best) for i, v in enumerate(values)]
    return Column(head, cells, way)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def rocs(results: Results, rows: Sequence[Row], names: Mapping[str, str]) -> list[Chart]:
    """The ROC curve of each score on each foreign set, from the stored scores; foreign images are
    positive."""
    from sklearn.metrics import roc_curve

    tables, charts = results.scores, []
    baselines = {row.get("score") for row in rows if row.get("baseline")}
    inside, *outside = tables or [""]
    for out in outside:
        lines = []
        for score in tables[out]:
            values = np.concatenate([tables[inside][score], tables[out][score]])
            labels = np.repeat([0, 1], [len(tables[inside][score]), len(tables[out][score])])
            if np.isfinite(values).all():
                fpr, tpr, _ = roc_curve(labels, values)
                points = thinned(list(zip(fpr.tolist(), tpr.tolist(), strict=True)))
                lines.append(Series(score, points, score in baselines))
        title = f"{names.get(inside, inside)} against {names.get(out, out)}"
        charts.append(Chart(f"roc-{out}", title, "false-positive rate", "true-positive rate", lines))
    return charts


def histograms(results: Results, rows: Sequence[Row], names: Mapping[str, str]) -> list[Chart]:
    """The share of each set's images in every bin of a score."""
    tables, charts = results.scores, []
    scored = list(dict.fromkeys(chain.from_iterable(tables.values())))
    order = dict.fromkeys(row.get("score") for row in rows)
    for score in [name for name in order if name in scored] or scored:
        edges, scale = score_bins([table[score] for table in tables.values()], 40)
        place = scale[0] if scale else lambda values: values
        x = np.asarray(place(edges), float)
        lines = []
        for name, table in tables.items():
            seen = table[score].clip(edges[0], edges[-1])
            share = np.histogram(seen, edges)[0] / max(1, len(seen))
            steps = [(x[0], 0.0), *zip(x.repeat(2)[1:-1], share.repeat(2), strict=True), (x[-1], 0.0)]
            title = f"{names.get(name, name)}{' (in)' if name == str(results.result.get('in')) else ''}"
            lines.append(Series(title, [(float(a), float(b)) for a, b in steps]))
        marks = edges[[0, len(edges) // 2, -1]]
        ticks = [(float(at), doc.number(float(mark))) for at, mark in zip(place(marks), marks, strict=True)]
        charts.append(Chart(f"scores-{score}", score, score, "share", lines, ticks if scale else (), True))
    return charts


def flags(result: Row, pictures: Sequence[Row]) -> str:
    """A sentence on how many images were flagged."""
    count = sum(bool(picture.get("flagged")) for picture in pictures)
    at = f" at a false-positive rate of {percent(result['fpr'])}" if result.get("fpr") is not None else ""
    return f"{count:,} of {len(pictures):,} images are flagged{at}."


def all_pictures(pictures: Sequence[Row]) -> list[Table]:
    """The images: flagged ones first, then by ascending p-value."""
    order = sorted(pictures, key=lambda picture: (not picture.get("flagged"), picture.get("p") or 0))[:LISTED]
    paths = [Path(str(picture.get("file"))) for picture in order]
    folders = [str(path.parent) if path.parent != Path(".") else "" for path in paths]
    flagged = ["yes" if picture.get("flagged") else "no" for picture in order]
    columns = [doc.texts("file", [path.name for path in paths], folders), doc.texts("flagged", flagged)]
    columns.append(doc.numbers("p", [picture.get("p") for picture in order]))
    for score in dict.fromkeys(chain.from_iterable(picture.get("scores") or {} for picture in order)):
        values = [(picture.get("scores") or {}).get(score) for picture in order]
        columns.append(doc.numbers(score, values))
    left = len(pictures) - len(order)
    caption = f"{left:,} more, with larger p-values, are in the JSON." if left else ""
    return [Table("All images", columns, caption=caption)] if order else []
