"""The results folder of `gz bench` or `gz ood`: its JSON, scores, samples, images and runs. Also the sections
that the reports of both verbs share."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import DamagedError, MissingError, UsageError, redacted
from gzcli.core.streams import printable
from gzcli.core.units import by_sides
from gzcli.report.document import Chart, Document, Picture, Section, Series, Text, number
from gzcli.store import files
from gzcli.store.metrics import curves, metric_lines
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run
from gzcli.store.runs import by_name

# one of them contains the results
RESULT_FILES = (
    Run.bench_file,
    Run.ood_file,
    Run.league_file,
    Run.alarm_file,
    Run.inspection_file,
    Run.result_file,
)
NOT_SCORES = ("set", "role", "index", "file")  # the other columns of `scores.csv`
MAX_CURVE_POINTS = 240  # most points of a curve
VALIDATED = 2  # most metrics of validation in the charts of a run
MAX_TABLE_ROWS = 2_000  # rows of a table: of 60 models 33 seeds
RESULT_TABLES = ("rows", "summary", "equal_calls", "floors", "defects")
ANEW = "repeat the command that wrote it"
CURVES = 36  # most charts of training
WITHOUT = "remove it, and the report will omit these samples"
# keys of a job → options of its command, in the order in which they are written
JOB_OPTIONS = {"data": "--data", "ins": "--in", "outs": "--out", "metrics": "--metrics", "n": "-n"}
JOB_OPTIONS |= {"scores": "--score", "benchmark": "--benchmark", "checkpoint": "--checkpoint"}
JOB_OPTIONS |= {"precision": "--precision", "background": "--background", "seed": "--seed"}
JOB_OPTIONS |= {"split": "--split", "stats": "--real-stats", "weights": "--weights"}
JOB_OPTIONS |= {"input": "--input", "fpr": "--fpr", "imglists": "--imglists", "seeds": "--seeds"}
JOB_OPTIONS |= {"full": "--full", "maps": "--map", "png": "--png"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The results of a job in its folder."""

    file: Path  # of the results
    result: dict[str, Any]  # the JSON that the verb printed
    job: dict[str, Any]  # the request; empty if the folder does not record it
    time: float  # when the results were written, in seconds since 1970

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def verb(self) -> str:
        """`bench`, or `ood`."""
        return "bench" if "rows" in self.result else "ood"

    @cached_property
    def is_own(self) -> bool:
        """Whether the folder is in the user's store. A folder from elsewhere may name any file of this
        machine, so gz reads only files inside it."""
        return user_dir().resolve() in self.folder.resolve().parents

    def may_read(self, path: Path, root: Path | None = None) -> bool:
        """Whether a file exists and may be read: it must be below the folder (or `root`), reached through no
        link."""
        return path.is_file() if self.is_own else files.is_below(path, root or self.folder)

    def run_of(self, name: str, place: str) -> tuple[Run | None, Path]:
        """A run that the results name, and the folder that must contain its files. For the user's own results
        it is a run of the store. For results from elsewhere, it is a run below their folder, otherwise the
        run of this name in the store."""
        if self.is_own:
            return by_name(place), self.folder
        below, store = Run(self.folder / place), user_dir("runs")
        if files.is_below(below.status_file, self.folder):
            return below, self.folder
        return by_name(Path(place).name), store

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The trained runs by id, if they still exist."""
        names = [self.result.get("run"), *(row.get("run") or row.get("path") for row in rows_of(self.result))]
        paths = [*listed(self.job.get("runs")), *listed(self.job.get("run"))]
        places = {Path(path).name: path for path in paths if isinstance(path, str)}
        runs: dict[str, Run] = {}
        for name in dict.fromkeys(name for name in names if isinstance(name, str)):
            run, root = self.run_of(name, places.get(name, name))
            if run and self.may_read(run.recipe_file, root):
                runs[name] = run
        return runs

    def samples(self, row: Row, n: int) -> np.ndarray | None:
        """The first n samples of a row, uint8 [N, C, H, W]; None without any."""
        run, file = str(row.get("run") or row.get("name") or ""), str(row.get("samples") or "")
        samples = Run(self.folder).samples_folder
        places = [self.folder / file, samples / Path(file).name] if file else []
        archives = sorted(samples.glob("*.npz"))
        places += [path for path in archives if path.name.startswith(f"{run}-") or path.stem == run]
        path = next(filter(self.may_read, places), None)
        return files.first_rows(path, "samples", n, WITHOUT).transpose(0, 3, 1, 2) if path else None

    def pictures(self) -> dict[str, bytes]:
        """The PNGs in the folder, by the stem of their names."""
        pictures = filter(self.may_read, sorted(self.folder.glob("*.png")))
        return {path.stem: path.read_bytes() for path in pictures}

    @cached_property
    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """The scores of each set, the in-distribution one first, float64 [N]; empty without scores."""
        path = Run(self.folder).scores_file
        if not self.may_read(path):
            return {}
        with path.open(newline="", errors="surrogateescape") as file:
            lines = (printable(line.replace("\0", "")) for line in file)
            rows = [row for row in csv.DictReader(lines) if row.get("role") in ("in", "out")]
        rows.sort(key=lambda row: row["role"])  # "in" comes first; the sets keep their order
        columns = [name for name in (rows[0] if rows else {}) if name not in NOT_SCORES]
        sets: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            sets.setdefault(row["set"], []).append(row)
        return {
            name: {column: np.array([float(row[column]) for row in some]) for column in columns}
            for name, some in sets.items()
        }

    def command(self) -> str:
        """The command that reproduces the results, from the job file; empty if that is lost."""
        if command := self.result.get("command") or (self.result.get("provenance") or {}).get("command"):
            return redacted(command if isinstance(command, str) else shlex.join(command))
        job, script = self.job, self.folder / "command.sh"
        if self.may_read(script):  # a league's
            return redacted(script.read_text(errors="replace").strip().rpartition("\n")[2])
        if not job:
            return ""
        words = ["gz", self.verb]
        for path in (path for key in ("runs", "run", "others") for path in listed(job.get(key))):
            words.append(Path(path).name if by_name(Path(path).name) else path)
        words += listed(job.get("images"))
        for key, option in JOB_OPTIONS.items():
            value = job.get(key)
            default = (key == "seeds" and value == 1) or (key == "outs" and job.get("benchmark"))
            if value is True:
                words.append(option)
            elif value not in (None, [], "") and value is not False and not default:
                words += [option, ",".join(map(str, listed(value)))]
        words += [f"--{key.replace('_', '-')}={value}" for key, value in (job.get("options") or {}).items()]
        return redacted(shlex.join(words))

    def document(
        self, title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
    ) -> Document:
        """The report with these sections, followed by those common to all reports."""
        day = datetime.fromtimestamp(self.time).strftime("%Y-%m-%d %H:%M")
        nonempty = [section for section in (*sections, self.training(), self.behind()) if section.items]
        notes = [str(note) for note in self.result.get("notes") or []]
        return Document(self.verb, title, lead, [*facts, ("made", day)], notes, nonempty, self.command())

    def training(self) -> Section:
        """Charts of the losses of every run, and of its first validation metrics."""
        charts = []
        for name, run in self.runs.items():
            for part in run.stages or [run]:
                is_read = self.may_read(part.metrics_file, run.path)
                points = curves(metric_lines(part.path)) if is_read else {}
                checks = [key for key in points if key.startswith("val_")]
                losses = [key for key in points if key not in checks]
                whose = name if part is run else f"{name}, {part.path.name}"
                for title, keys in (("loss", losses), *((key, [key]) for key in checks[:VALIDATED])):
                    series = [Series(key, thinned(points[key])) for key in keys if len(points[key]) > 1]
                    if series:
                        charts.append(Chart(f"{title}-{whose}", f"{whose}: {title}", "step", title, series))
        return Section("Training", charts[:CURVES])

    def behind(self) -> Section:
        """The recipes, versions and everything else on which the metrics depend."""
        provenance, texts = dict(self.result.get("provenance") or {}), dict[str, str]()
        for name, run in self.runs.items():
            texts[f"Recipe of {name}"] = printable(redacted(run.recipe_file.read_text(errors="replace")))
        texts["Versions that computed the metrics"] = aligned(provenance.pop("versions", None) or {})
        for name, run in self.runs.items():
            facts = run.environment if self.may_read(run.environment_file, run.path) else {}
            system = {key: facts[key] for key in ("python", "platform", "processes", "gpus") if key in facts}
            texts[f"Versions that trained {name}"] = aligned((facts.get("packages") or {}) | system)
        filled = {key: value for key, value in provenance.items() if value not in (None, {}, [])}
        texts["Provenance"] = aligned(filled)
        return Section("Recipes and versions", [Text(title, text) for title, text in texts.items() if text])

    def other_pictures(self, *excluded: str) -> list[Picture]:
        """The PNGs of the folder, except for those that the report shows elsewhere."""
        pngs = self.pictures().items()
        return [Picture(stem, words(stem), png, wide=True) for stem, png in pngs if stem not in excluded]


def read(place: Path) -> Results:
    """The results in a folder, or in the folder of a named file."""
    folder = place.parent if place.is_file() else place
    if not folder.is_dir():
        hint = "give the folder that `gz bench` or `gz ood` prints after `files:`"
        raise MissingError(f"there is no folder `{place}`", hint=hint)
    empty = Results(folder / RESULT_FILES[0], {}, {}, 0.0)
    job = clean(files.read_object(path, ANEW)) if empty.may_read(path := Run(folder).job_file) else {}
    for path in filter(empty.may_read, (folder / name for name in RESULT_FILES)):
        result = files.read_object(path, ANEW)
        if not result.keys().isdisjoint(("rows", "results", "files", "defects")):
            check(path, result)
            return Results(path, clean(result), job, path.stat().st_mtime)
    hint = "give the folder that contains `bench.json` or `ood.json`"
    raise UsageError(f"`{folder}` contains no results of `gz bench` or `gz ood`", hint=hint)


def check(path: Path, result: Row) -> None:
    """Raises DamagedError if a table of the results is malformed, and UsageError if it is too long."""
    tables = [(key, result.get(key)) for key in RESULT_TABLES]
    curves = result.get("curves")
    tables += list(curves.items()) if isinstance(curves, dict) else []
    for key, rows in tables:
        if not (rows is None or (isinstance(rows, list) and all(isinstance(row, dict) for row in rows))):
            raise DamagedError(
                f"`{path}` is damaged, or was not written by gz: `{key}` is not a table", hint=ANEW
            )
        if rows and len(rows) > MAX_TABLE_ROWS:
            hint = "compare fewer models or seeds, or read the file with a program"
            raise UsageError(
                f"`{path}` has {len(rows):,} rows, but a report shows at most {MAX_TABLE_ROWS:,}", hint=hint
            )


def clean(value: Any) -> Any:
    """The value with its texts made printable, because a name may contain a lone surrogate or a zero byte."""
    if isinstance(value, Mapping):
        return {clean(key): clean(below) for key, below in value.items()}
    if isinstance(value, list):
        return [clean(below) for below in value]
    return printable(value) if isinstance(value, str) else value


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def rows_of(result: Row, key: str = "rows") -> list[dict[str, Any]]:
    """The rows of a table of the results; none if it is missing."""
    rows = result.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def facts_of(tree: Row, titles: Mapping[str, str]) -> list[tuple[str, str]]:
    """(title, value) for the existing keys and for the shape of the images."""
    facts = [(title, number(tree[key])) for key, title in titles.items() if tree.get(key) is not None]
    return [*facts, ("images", by_sides(tree["shape"]))] if tree.get("shape") else facts


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The line with at most MAX_CURVE_POINTS of its points, including both ends."""
    if len(line) <= MAX_CURVE_POINTS:
        return list(line)
    return [line[i] for i in np.unique(np.linspace(0, len(line) - 1, MAX_CURVE_POINTS).round().astype(int))]


def aligned(values: Row) -> str:
    """Lines of name and value, aligned."""
    width = max(map(len, values), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in values.items())


def words(name: str) -> str:
    """The name of a file or key as words: `nearest_neighbours` as "Nearest neighbours"."""
    text = re.sub(r"[_-]+", " ", name).strip() or name
    return text[:1].upper() + text[1:]
