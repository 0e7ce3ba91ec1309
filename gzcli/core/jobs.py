"""What `gz sample`, `gz ood`, `gz bench`, `gz runs export` and the plan of `gz train` hand to the engine: a
job, as `job.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gzcli.core.sections import LaunchSection, tuples
from gzcli.store import files
from gzcli.store.run_folder import Run


@dataclass(frozen=True)
class SampleJob:
    """Samples of a run, or one of its applications."""

    run: str  # folder of the run
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    # number of images; None: as many as there are prompts or input pictures, whichever are more
    n: int | None = None
    seed: int = 0  # seed of the noise
    labels: str | None = None  # class names or numbers, separated by commas; the images take turns
    prompts: tuple[str, ...] = ()  # texts; the images take turns
    # keywords of the model's `sample`, or of the application
    options: Mapping[str, Any] = field(default_factory=dict)
    do: str | None = None  # name of the application; None: samples are drawn
    input: str | None = None  # path of a picture or of a folder of pictures
    input_as: str | None = None  # the keyword of `sample` that gets the input pictures
    mask: str | None = None  # path of a picture that is white where the input is kept
    npz: bool = False  # whether all images are written into one file
    png: bool = False  # whether each image is written as a file, even if there are many
    animate: bool = False  # whether the sampler's intermediate states are written as an animation
    # of samples and scores; None: samples as the run was trained, scores in fp32
    precision: str | None = None
    # what the pictures say of their making, beside what the engine knows
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["sample"] = "sample"


@dataclass(frozen=True)
class OodJob:
    """Out-of-distribution scores of a run."""

    run: str  # folder of the run
    ins: str  # name or path of the in-distribution set
    outs: tuple[str, ...]  # names or paths of the foreign sets
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    scores: tuple[str, ...] | None = None  # names of the scores; None: those of the recipe
    # number of images scored of each set; None: as many as the time budget of the recipe allows
    n: int | None = None
    full: bool = False  # whether every image is scored
    seed: int = 0  # seed of the noise
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the scores
    benchmark: str | None = None  # name of the benchmark whose conventions the results follow
    # folder of the run that the score `ratio` divides by; None: that of the recipe
    background: str | None = None
    others: tuple[str, ...] = ()  # folders of further runs, which make an ensemble with `run`
    seeds: int = 1  # number of seeds, from `seed` on; figures are their means
    # folder of OpenOOD's image lists, which then say the images of the benchmark; None: whole splits
    imglists: str | None = None
    # of samples and scores; None: samples as the run was trained, scores in fp32
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["ood"] = "ood"


@dataclass(frozen=True)
class AlarmJob:
    """An alarm for each of the user's pictures."""

    run: str  # folder of the run
    ins: str  # name or path of the in-distribution set
    input: str  # path of a picture, or of a folder, zip, tar or npz of pictures
    fpr: float = 0.01  # share of in-distribution pictures that may be flagged
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    scores: tuple[str, ...] | None = None  # names of the scores; None: the first of the recipe
    # number of held-out images that the pictures are compared with; None: as many as the time budget of the
    # recipe allows
    n: int | None = None
    full: bool = False  # whether the pictures are compared with every held-out image
    seed: int = 0  # seed of the noise
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the scores
    # folder of the run that the score `ratio` divides by; None: that of the recipe
    background: str | None = None
    others: tuple[str, ...] = ()  # folders of further runs, which make an ensemble with `run`
    # number of seeds, from `seed` on; scores are their means. None: a few where scores depend on noise
    seeds: int | None = None
    maps: bool = False  # whether maps show where the pictures are anomalous
    png: bool = False  # whether the map of every picture is written as a file
    precision: str | None = None  # of scores; None: fp32
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["alarm"] = "alarm"


@dataclass(frozen=True)
class BenchJob:
    """A comparison of runs and of images from elsewhere with one data set."""

    runs: tuple[str, ...]  # folders of the runs
    data: str  # name or path of the data set
    # names of the metrics; None: those that need no weights of Inception
    metrics: tuple[str, ...] | None = None
    n: int = 2000  # number of samples drawn of each run, and of images that are taken at most
    seed: int = 0  # seed of the noise
    weights: str | None = None  # path of Inception's weights; None: the file in the cache
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    # of samples and scores; None: samples as the run was trained, scores in fp32
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)
    images: tuple[str, ...] = ()  # paths or names of images that are compared as samples are
    split: str = "test"  # the real images: "test", "train" or "all"
    # path of the mean and covariance of other real images, for the Fréchet distance among the metrics
    stats: str | None = None
    export_stats: str | None = None  # path to which those of the real images are written
    # how each of the runs is taken, {"checkpoint", "sample", "calls", "quick"}, all of them optional: weights
    # of a step, options of its sampler, at most how many network calls an image, and whether figures that do
    # not depend on samples are left out; (): all as the job and the runs say
    variants: tuple[Mapping[str, Any], ...] = ()
    verb: Literal["bench"] = "bench"


@dataclass(frozen=True)
class ExportJob:
    """A run as one file to share, or its weights in the format of another library."""

    run: str  # folder of the run
    to: str  # "file", or name of the library
    out: str  # path of the folder, or of the file, that is written
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the parameters in a file, "fp32" or "bf16"
    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: Literal["export"] = "export"


@dataclass(frozen=True)
class TrialJob:
    """What parts of recipes cost, and how long a step of them takes."""

    # each {"stage", "tree", "stages", "timed"}: its recipe, those that it is built on by name, and whether a
    # step is tried
    parts: tuple[Mapping[str, Any], ...]
    info: Mapping[str, Any]  # description of the data set: {"shape", "levels", "classes", "multilabel", "n"}
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
    files.write_json(Run(folder).job_file, asdict(job))


def read(folder: Path) -> Job | None:
    """The job in a folder; None where there is none, as in the folder of a run."""
    tree = files.read_json(Run(folder).job_file)
    if tree is None:
        return None
    kind = _KINDS[tree["verb"]]
    values = {f.name: tree[f.name] for f in fields(kind) if f.name in tree}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**values | {"launch": LaunchSection(**tuples(tree["launch"]))})
