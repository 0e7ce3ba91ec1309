"""What `gz sample`, `gz ood`, `gz bench`, `gz runs export` and the plan of `gz train` hand to the engine: a
job, as `job.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gzcli.core.sections import LaunchSection, tuples
from gzcli.store import files

FILE = "job.json"


@dataclass(frozen=True)
class SampleJob:
    """Samples of a run, or one of its applications.

    run: folder of the run.
    checkpoint: "last", "best", "finished" or a step.
    n: number of images; None: as many as there are prompts or input pictures, whichever are more.
    seed: seed of the noise.
    labels: class names or numbers, separated by commas; the images take turns.
    prompts: texts; the images take turns.
    options: keywords of the model's `sample`, or of the application.
    do: name of the application; None: samples are drawn.
    input: path of a picture or of a folder of pictures.
    input_as: the keyword of `sample` that gets the input pictures.
    mask: path of a picture that is white where the input is kept.
    npz: whether all images are written into one file.
    png: whether each image is written as a file, even if there are many.
    animate: whether the sampler's intermediate states are written as an animation.
    precision: of samples and scores; None: samples as the run was trained, scores in fp32.
    origin: what the pictures say of their making, beside what the engine knows.
    launch: number and kind of processes.
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
    precision: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["sample"] = "sample"


@dataclass(frozen=True)
class OodJob:
    """Out-of-distribution scores of a run.

    run: folder of the run.
    ins: name or path of the in-distribution set.
    outs: names or paths of the foreign sets.
    checkpoint: "last", "best", "finished" or a step.
    scores: names of the scores; None: those of the recipe.
    n: number of images scored of each set; None: as many as the time budget of the recipe allows.
    full: whether every image is scored.
    seed: seed of the noise.
    options: keywords of the scores.
    benchmark: name of the benchmark whose conventions the results follow.
    background: folder of the run that the score `ratio` divides by; None: that of the recipe.
    others: folders of further runs, which make an ensemble with `run`.
    seeds: number of seeds, from `seed` on; figures are their means.
    imglists: folder of OpenOOD's image lists, which then say the images of the benchmark; None: whole splits.
    precision: of samples and scores; None: samples as the run was trained, scores in fp32.
    launch: number and kind of processes.
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
    others: tuple[str, ...] = ()
    seeds: int = 1
    imglists: str | None = None
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["ood"] = "ood"


@dataclass(frozen=True)
class AlarmJob:
    """An alarm for each of the user's pictures.

    run: folder of the run.
    ins: name or path of the in-distribution set.
    input: path of a picture, or of a folder, zip, tar or npz of pictures.
    fpr: share of in-distribution pictures that may be flagged.
    checkpoint: "last", "best", "finished" or a step.
    scores: names of the scores; None: the first of the recipe.
    n: number of held-out images that the pictures are compared with; None: as many as the time budget of the
      recipe allows.
    full: whether the pictures are compared with every held-out image.
    seed: seed of the noise.
    options: keywords of the scores.
    background: folder of the run that the score `ratio` divides by; None: that of the recipe.
    others: folders of further runs, which make an ensemble with `run`.
    seeds: number of seeds, from `seed` on; scores are their means. None: a few where scores depend on noise.
    maps: whether maps show where the pictures are anomalous.
    png: whether the map of every picture is written as a file.
    precision: of scores; None: fp32.
    launch: number and kind of processes.
    """

    run: str
    ins: str
    input: str
    fpr: float = 0.01
    checkpoint: str = "finished"
    scores: tuple[str, ...] | None = None
    n: int | None = None
    full: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    background: str | None = None
    others: tuple[str, ...] = ()
    seeds: int | None = None
    maps: bool = False
    png: bool = False
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["alarm"] = "alarm"


@dataclass(frozen=True)
class BenchJob:
    """A comparison of runs and of images from elsewhere with one data set.

    runs: folders of the runs.
    data: name or path of the data set.
    metrics: names of the metrics; None: those that need no weights of Inception.
    n: number of samples drawn of each run, and of images that are taken at most.
    seed: seed of the noise.
    weights: path of Inception's weights; None: the file in the cache.
    checkpoint: "last", "best", "finished" or a step.
    precision: of samples and scores; None: samples as the run was trained, scores in fp32.
    launch: number and kind of processes.
    images: paths or names of images that are compared as samples are.
    split: the real images: "test", "train" or "all".
    stats: path of the mean and covariance of other real images, for the Fréchet distance among the metrics.
    export_stats: path to which those of the real images are written.
    variants: how each of the runs is taken, {"checkpoint", "sample", "calls", "quick"}, all of them optional:
      weights of a step, options of its sampler, at most how many network calls an image, and whether figures
      that do not depend on samples are left out; (): all as the job and the runs say.
    """

    runs: tuple[str, ...]
    data: str
    metrics: tuple[str, ...] | None = None
    n: int = 2000
    seed: int = 0
    weights: str | None = None
    checkpoint: str = "finished"
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    images: tuple[str, ...] = ()
    split: str = "test"
    stats: str | None = None
    export_stats: str | None = None
    variants: tuple[Mapping[str, Any], ...] = ()
    verb: Literal["bench"] = "bench"


@dataclass(frozen=True)
class ExportJob:
    """A run as one file to share, or its weights in the format of another library.

    run: folder of the run.
    to: "file", or name of the library.
    out: path of the folder, or of the file, that is written.
    checkpoint: "last", "best", "finished" or a step.
    dtype: of the parameters in a file, "fp32" or "bf16".
    launch: number and kind of processes.
    """

    run: str
    to: str
    out: str
    checkpoint: str = "finished"
    dtype: Literal["fp32", "bf16"] = "fp32"
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["export"] = "export"


@dataclass(frozen=True)
class TrialJob:
    """What parts of recipes cost, and how long a step of them takes.

    parts: each {"stage", "tree", "stages", "timed"}: its recipe, those that it is built on by name, and
      whether a step is tried.
    info: description of the data set: {"shape", "levels", "classes", "multilabel", "n"}.
    launch: number and kind of processes.
    """

    parts: tuple[Mapping[str, Any], ...]
    info: Mapping[str, Any]
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["trial"] = "trial"


Job = SampleJob | OodJob | AlarmJob | BenchJob | ExportJob | TrialJob
_KINDS: dict[str, type[Job]] = {
    "sample": SampleJob,
    "ood": OodJob,
    "alarm": AlarmJob,
    "bench": BenchJob,
    "export": ExportJob,
    "trial": TrialJob,
}


def told(job: Job) -> dict[str, Any]:
    """What the pictures of a job say of their making: verb, ids of runs, and what was asked, without places
    of files."""
    asked = ("n", "seed", "seeds", "scores", "metrics", "options", "precision", "fpr", "benchmark")
    paths = [
        *getattr(job, "runs", ()),
        *filter(None, [getattr(job, "run", None)]),
        *getattr(job, "others", ()),
    ]
    facts = {key: getattr(job, key) for key in asked if getattr(job, key, None) not in (None, (), {})}
    return {"verb": job.verb, "runs": [Path(path).name for path in paths], **facts}


def write(folder: Path, job: Job) -> None:
    """Writes the job into the folder that the engine is then started on."""
    files.write_json(folder / FILE, asdict(job))


def read(folder: Path) -> Job | None:
    """The job in a folder; None where there is none, as in the folder of a run."""
    tree = files.read_json(folder / FILE)
    if tree is None:
        return None
    kind = _KINDS[tree["verb"]]
    values = {f.name: tree[f.name] for f in fields(kind) if f.name in tree}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**values | {"launch": LaunchSection(**tuples(tree["launch"]))})
