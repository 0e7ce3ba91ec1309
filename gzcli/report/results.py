"""The folder of a `gz bench` or `gz ood`: its JSON, scores, samples and pictures, and the runs in it."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import MissingError, UsageError, redacted
from gzcli.core.streams import printable
from gzcli.store import files
from gzcli.store.run_folder import Run
from gzcli.store.runs import by_name

# one of them holds the results
FILES = (Run.bench_file, Run.ood_file, Run.league_file, Run.alarm_file, Run.result_file)
NOT_SCORES = ("set", "role", "index", "file")  # the other columns of `scores.csv`


@dataclass(frozen=True)
class Results:
    """What a job left in its folder."""

    folder: Path
    made: dict[str, Any]  # the JSON that the verb printed
    job: dict[str, Any]  # what was asked for; empty where the folder does not say
    time: float  # when the results were written, in seconds since 1970

    @property
    def verb(self) -> str:
        """`bench`, or `ood`."""
        return "bench" if "rows" in self.made else "ood"

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The trained runs by their id, if they still exist."""
        rows = self.made.get("rows") or []
        named = [self.made.get("run"), *(row.get("run") or row.get("path") for row in rows)]
        of_job = [*listed(self.job.get("runs")), *listed(self.job.get("run"))]
        paths = {Path(path).name: path for path in of_job if isinstance(path, str)}
        runs: dict[str, Run] = {}
        for name in dict.fromkeys(name for name in named if isinstance(name, str)):
            run = by_name(str(paths.get(name, name)))
            if run and run.recipe_file.exists():
                runs[name] = run
        return runs

    def recipes(self) -> Iterator[tuple[str, str]]:
        """(title, YAML) of the recipe of each run, with those of its stages."""
        for name, run in self.runs.items():
            yield name, printable(redacted(run.recipe_file.read_text(errors="replace")))

    def samples(self, row: Mapping[str, Any]) -> np.ndarray | None:
        """The samples of a row, uint8 [N, C, H, W], which for a league lie in its runs; None without any."""
        run, file = str(row.get("run") or row.get("name") or ""), row.get("samples")
        places = [Path(file), Run(self.folder).samples_folder / Path(file).name] if file else []
        for path in sorted(Run(self.folder).samples_folder.glob("*.npz")):
            if path.name.startswith(f"{run}-") or path.stem == run:
                places.append(path)
        if "summary" in self.made and run in self.runs:  # a league of before its rows named their files
            drawn = self.runs[run].path.glob(
                f"bench/*/{Run.samples_folder}/*.npz"
            )  # the last judgement's first
            places += sorted(drawn, key=lambda path: (-path.parent.stat().st_mtime, path.stat().st_mtime))
        for path in places:
            if path.is_file():
                return files.read_arrays(path, "samples")["samples"].transpose(0, 3, 1, 2)
        return None

    def pictures(self) -> dict[str, bytes]:
        """The PNGs of the folder by their stem."""
        return {path.stem: path.read_bytes() for path in sorted(self.folder.glob("*.png"))}

    @cached_property
    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each set, the in-distribution one first, float64 [N] of each score; empty without scores."""
        path = Run(self.folder).scores_file
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as f:
            rows = [shown(row) for row in csv.DictReader(f) if row.get("role") in ("in", "out")]
        rows.sort(key=lambda row: row["role"])  # "in" comes first; the order of the sets stays
        columns = [name for name in (rows[0] if rows else {}) if name not in NOT_SCORES]
        sets: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            sets.setdefault(row["set"], []).append(row)
        return {
            name: {column: np.array([float(row[column]) for row in some]) for column in columns}
            for name, some in sets.items()
        }

    def command(self) -> str:
        """The command that makes the results again, by the job; empty where that is lost."""
        if command := self.made.get("command") or (self.made.get("provenance") or {}).get("command"):
            return redacted(command if isinstance(command, str) else shlex.join(command))
        job, script = self.job, self.folder / "command.sh"
        if script.exists():  # a league's
            return redacted(script.read_text(errors="replace").strip().rpartition("\n")[2])
        if not job:
            return ""
        words = ["gz", self.verb]
        for path in [*listed(job.get("runs")), *listed(job.get("run")), *listed(job.get("others"))]:
            words.append(Path(path).name if by_name(Path(path).name) else path)
        words += listed(job.get("images"))
        named = {"data": "--data", "ins": "--in", "outs": "--out", "metrics": "--metrics", "n": "-n"}
        named |= {"scores": "--score", "benchmark": "--benchmark", "checkpoint": "--checkpoint"}
        named |= {"precision": "--precision", "background": "--background", "seed": "--seed"}
        named |= {"split": "--split", "stats": "--real-stats", "weights": "--weights"}
        named |= {"input": "--input", "fpr": "--fpr", "imglists": "--imglists"}
        named |= {"seeds": "--seeds"} if job.get("seeds", 1) > 1 else {}
        for key, option in named.items():
            value = job.get(key)
            if value in (None, [], "") or (key == "outs" and job.get("benchmark")):
                continue
            words += [option, ",".join(map(str, listed(value)))]
        flags = {"full": "--full", "maps": "--map", "png": "--png"}
        words += [flag for key, flag in flags.items() if job.get(key)]
        for key, value in (job.get("options") or {}).items():
            words += [f"--{key.replace('_', '-')}={value}"]
        return redacted(shlex.join(words))


def shown(value: Any) -> Any:
    """The value with its texts made printable: a name may hold half a character, or a zero byte."""
    if isinstance(value, Mapping):
        return {shown(key): shown(below) for key, below in value.items()}
    if isinstance(value, list):
        return [shown(below) for below in value]
    return printable(value) if isinstance(value, str) else value


def read(place: Path) -> Results:
    """The results in a folder, or in the folder of the file that is named."""
    folder = place.parent if place.is_file() else place
    if not folder.is_dir():
        raise MissingError(
            f"there is no folder `{place}`", hint="`gz bench` and `gz ood` print theirs: `files: …`"
        )
    for path in [folder / name for name in FILES]:
        made, job = shown(files.read_json(path)), shown(files.read_object(Run(folder).job_file))
        if isinstance(made, dict) and ("rows" in made or "results" in made or "files" in made):
            return Results(folder, made, job, path.stat().st_mtime)
    raise UsageError(
        f"`{folder}` holds no results of `gz bench` or `gz ood`",
        hint="a report is made of the folder with `bench.json` or `ood.json`",
    )


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
