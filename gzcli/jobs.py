"""What `gz sample`, `gz ood` and `gz bench` hand over to the engine: a job, as `job.json` in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gzcli.recipe.parts import LaunchSection
from gzcli.store import files

FILE = "job.json"


@dataclass(frozen=True)
class SampleJob:
    """Images from one run, or one of its applications.

    run: folder of the run.
    checkpoint: "last", "best", "finished" or a step.
    n: how many images; None: as many as there are prompts or input pictures, whichever are more.
    seed: of the noise.
    labels: what `--label` names; of these the images take turns.
    prompts: texts, of which the images take turns.
    options: keywords of `sample`, or of the application.
    do: the application; None: `sample`.
    input: a picture or a folder of them.
    input_as: the keyword of `sample` that gets these.
    mask: a picture, white where the input is kept.
    npz: whether all images are written into one file.
    png: whether each image is written whatever their number.
    animate: whether what the sampler shows on its way is written.
    launch: on which processes.
    """

    run: str
    checkpoint: str = "finished"
    n: int | None = None
    seed: int = 0
    labels: str | None = None
    prompts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    do: str | None = None
    input: str | None = None
    input_as: str | None = None
    mask: str | None = None
    npz: bool = False
    png: bool = False
    animate: bool = False
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["sample"] = "sample"


@dataclass(frozen=True)
class OodJob:
    """Out-of-distribution scores of one run.

    run: folder of the run.
    ins: the in-distribution set, a name or path.
    outs: the foreign sets, names or paths.
    checkpoint: "last", "best", "finished" or a step.
    scores: which; None: those of the recipe.
    n: images of each set; None: as many as the budget pays for.
    full: whether every image is scored.
    seed: of the noise.
    options: keywords of the scores.
    benchmark: whose conventions the table follows.
    background: folder of the run that the score `ratio` divides by; None: that of the recipe.
    launch: on which processes.
    """

    run: str
    ins: str
    outs: tuple[str, ...]
    checkpoint: str = "finished"
    scores: tuple[str, ...] | None = None
    n: int | None = None
    full: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    benchmark: str | None = None
    background: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["ood"] = "ood"


@dataclass(frozen=True)
class BenchJob:
    """Runs side by side on one set.

    runs: folders of the runs.
    data: the set, a name or path.
    metrics: which; None: those whose weights are at hand.
    n: samples of each run.
    seed: of the noise.
    weights: the file of Inception's weights; None: that of the cache.
    checkpoint: "last", "best", "finished" or a step.
    launch: on which processes.
    """

    runs: tuple[str, ...]
    data: str
    metrics: tuple[str, ...] | None = None
    n: int = 2000
    seed: int = 0
    weights: str | None = None
    checkpoint: str = "finished"
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["bench"] = "bench"


@dataclass(frozen=True)
class ExportJob:
    """A run's weights in the format of another library.

    run: folder of the run.
    to: the library.
    out: the folder that is written.
    checkpoint: "last", "best", "finished" or a step.
    launch: on which processes.
    """

    run: str
    to: str
    out: str
    checkpoint: str = "finished"
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["export"] = "export"


Job = SampleJob | OodJob | BenchJob | ExportJob
_KINDS: dict[str, type[Job]] = {"sample": SampleJob, "ood": OodJob, "bench": BenchJob, "export": ExportJob}


def write(folder: Path, job: Job) -> None:
    """Writes the job into the folder that an engine is started on."""
    files.write_json(folder / FILE, asdict(job))


def read(folder: Path) -> Job | None:
    """The job of a folder; None where it holds none, as a run does."""
    tree = files.read_json(folder / FILE)
    if tree is None:
        return None
    kind = _KINDS[tree["verb"]]
    values = {f.name: tree[f.name] for f in fields(kind) if f.name in tree}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**values | {"launch": LaunchSection(**tree["launch"])})
