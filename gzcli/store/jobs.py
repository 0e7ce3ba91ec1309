"""The engine's jobs other than training. A verb writes them into a folder, as `job.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gzcli.core.sections import LaunchSection, tuples
from gzcli.store import files
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Job:
    """The fields of every job."""

    launch: LaunchSection = field(default_factory=LaunchSection)
    verb: str = ""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Self:
        """The job from its `asdict` tree, which this version or an earlier one wrote."""
        values = tuples({f.name: tree[f.name] for f in fields(cls) if f.name in tree})
        return cls(**values | {"launch": LaunchSection(**tuples(tree["launch"]))})


@dataclass(frozen=True, kw_only=True)
class RunJob(Job):
    """The fields of every job on the weights of runs."""

    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    seed: int = 0  # seed of the noise
    precision: str | None = None  # None: samples as the run was trained, scores in fp32


@dataclass(frozen=True)
class SampleJob(RunJob):
    """Samples of a run, or one of its applications."""

    run: str  # folder of the run
    n: int | None = None  # number of images; None: one for each prompt or input image
    labels: str | None = None  # class names or numbers, separated by commas; images use them in turn
    prompts: tuple[str, ...] = ()  # texts; images use them in turn
    # options of the model's `sample`, or of the application
    options: Mapping[str, Any] = field(default_factory=dict)
    do: str | None = None  # name of the application; None: samples are drawn
    input: str | None = None  # path of an image or of a folder of images
    input_as: str | None = None  # keyword of `sample` for the input images
    mask: str | None = None  # path of an image whose white pixels mark what is kept of the input
    # format of the images besides the sheet; a few are always written as PNGs too
    formats: tuple[str, ...] = ()
    animate: bool = False  # whether the sampler's intermediate states are written as an animation
    # facts written into the images besides
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    verb: str = field(default="sample", kw_only=True)


@dataclass(frozen=True)
class ScoreJob(RunJob):
    """The fields of both jobs with out-of-distribution scores."""

    run: str  # folder of the run; "" for a method without training
    ins: str  # name or path of the in-distribution set
    _: KW_ONLY
    scores: tuple[str, ...] | None = None  # None: those of the recipe, for an alarm the first of them
    n: int | None = None  # images to score in each set; None: as many as the recipe's time budget allows
    full: bool = False  # whether to score every image
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the scores
    background: str | None = None  # folder of the run that `ratio` divides by; None: that of the recipe
    others: tuple[str, ...] = ()  # folders of further runs, which make an ensemble with `run`
    # number of seeds, from `seed` on, for the mean score; None: one, or a few if an alarm draws noise
    seeds: int | None = None
    method: str | None = None  # name of a method without training; None: the run's scores
    size: Any = None  # size of the images for a method; None: their own, up to the largest that it uses


@dataclass(frozen=True)
class OodJob(ScoreJob):
    """Out-of-distribution scores of a run, or of a method without training."""

    outs: tuple[str, ...]  # names or paths of the foreign sets
    benchmark: str | None = None  # name of the benchmark whose conventions the results follow
    imglists: str | None = None  # folder of OpenOOD's lists of the benchmark's images; None: whole splits
    seeds: int = field(default=1, kw_only=True)
    verb: str = field(default="ood", kw_only=True)


@dataclass(frozen=True)
class AlarmJob(ScoreJob):
    """An alarm for each of the user's images. `n` and `full` choose the held-out images that they are
    compared with."""

    input: str  # path of an image, or of a folder, zip, tar or npz with images
    fpr: float = 0.01  # share of in-distribution images that may be flagged
    maps: bool = False  # whether to compute maps of where images are anomalous
    png: bool = False  # whether to write the map of every image as a file
    calibrate: str | None = None  # name or path of further good images to compare with
    verb: str = field(default="alarm", kw_only=True)


@dataclass(frozen=True)
class InspectJob(AlarmJob):
    """An alarm on the test images of an inspection set, whose path is `input`."""

    verb: str = field(default="inspect", kw_only=True)


@dataclass(frozen=True)
class PortableJob(AlarmJob):
    """The alarm of a method without training, exported as files that need neither gz nor torch. The job
    judges no images: `input` is empty, and the rate is an argument of the exported program."""

    out: str = ""  # path of the folder to write
    verb: str = field(default="portable", kw_only=True)


@dataclass(frozen=True)
class BenchJob(RunJob):
    """A comparison of runs and of images from elsewhere with one data set."""

    runs: tuple[str, ...]  # folders of the runs
    data: str  # name or path of the data set
    metrics: tuple[str, ...] | None = None  # None: those that need no weights of Inception
    n: int = 2000  # number of samples from each run, and most images of a folder
    weights: str | None = None  # path of Inception's weights; None: the file in the cache
    images: tuple[str, ...] = ()  # paths or names of images to compare like samples
    split: str = "test"  # the real images: "test", "val", "train" or "all"
    stats: str | None = None  # path of the mean and covariance of other real images, for Fréchet distances
    export_stats: str | None = None  # path to write the mean and covariance of the real images to
    likelihoods: int | None = None  # most test images whose likelihood is computed; None: as many as usual
    patience: float | None = None  # seconds of sampling; a model that needs longer draws fewer images
    few: int = 2000  # number of these
    drawing: str | None = None  # hash of the code that draws; a league reuses samples drawn by the same code
    # how each of the runs is taken, {"checkpoint", "sample", "calls", "quick"}, all of them optional: weights
    # of a step, options of its sampler, at most how many network calls per image, and whether metrics that do
    # not depend on samples are left out; (): all as the job and the runs say
    variants: tuple[Mapping[str, Any], ...] = ()
    verb: str = field(default="bench", kw_only=True)


AUDIT_KINDS = ("unreadable", "blank", "size", "split-copy", "copy", "foreign", "label")  # of faults


@dataclass(frozen=True)
class AuditJob(Job):
    """A search for faults of a data set."""

    data: str  # name or path of the data set
    n: int | None = None  # number of images, drawn at random; None: all
    verb: str = field(default="audit", kw_only=True)


@dataclass(frozen=True)
class ExportJob(Job):
    """A run as one file to share, or its weights in the format of another library."""

    run: str  # folder of the run
    to: str  # "file", or name of the library
    out: str  # path of the folder or file to write
    checkpoint: str = "finished"  # "last", "best", "finished" or a step
    dtype: Literal["fp32", "bf16"] = "fp32"  # dtype of the parameters in a file
    verb: str = field(default="export", kw_only=True)


@dataclass(frozen=True)
class PublishedJob(Job):
    """Published weights of other authors, converted to a file of gz."""

    folder: str  # folder in the layout of diffusers
    name: str  # name of the data that they were trained on, if known
    out: str  # path of the file to write
    verb: str = field(default="published", kw_only=True)


@dataclass(frozen=True)
class EmaJob(Job):
    """An average of the weights of a finished run, to replace its current one."""

    run: str  # folder of the run, or of a stage
    # standard deviation of the averaging profile, as a share of the training; None: the best one
    length: float | None = None
    verb: str = field(default="ema", kw_only=True)


# keys of the result of a part with "draws"
IMAGE_COSTS = ("sample_seconds", "calls", "log_prob_seconds", "classes")
SCORE_COSTS = ("score_seconds", "score_calls", "fit_seconds", "train_fit_seconds", "map_seconds")


@dataclass(frozen=True)
class TrialJob(Job):
    """The cost of recipes' parts: the time of a step, of an image or of its scores."""

    # each {"stage", "tree", "stages", "timed"}: its recipe, those that it is built on by name,
    # whether a step is tried; with "draws" an image is timed instead, and likelihoods of these kinds; with
    # "scores", these scores of an image
    parts: tuple[Mapping[str, Any], ...]
    info: Mapping[str, Any]  # description of the data set: {"shape", "levels", "classes", "multilabel", "n"}
    verb: str = field(default="trial", kw_only=True)


_OF_SCORES: tuple[type[Job], ...] = (OodJob, AlarmJob, InspectJob, PortableJob)
_OF_RUNS: tuple[type[Job], ...] = (BenchJob, ExportJob, PublishedJob, EmaJob, TrialJob)
_KINDS: tuple[type[Job], ...] = (SampleJob, *_OF_SCORES, *_OF_RUNS, AuditJob)


def origin_of(job: Job) -> dict[str, Any]:
    """The origin of a job's images: verb, ids of runs, and settings, but no paths."""
    settings = ("n", "seed", "seeds", "scores", "metrics", "options", "precision", "fpr", "benchmark")
    tree = {key: getattr(job, key, None) for key in (*settings, "run", "runs", "others")}
    paths = [*(tree["runs"] or ()), *filter(None, [tree["run"]]), *(tree["others"] or ())]
    values = {key: tree[key] for key in settings if tree[key] not in (None, (), {})}
    return {"verb": job.verb, "runs": [Path(path).name for path in paths], **values}


def write(folder: Path, job: Job) -> None:
    """Writes the job into the folder that the engine is then started on."""
    files.write_json(Run(folder).job_file, asdict(job))


def read(folder: Path) -> Job | None:
    """The job in a folder; None if there is none, for example in the folder of a run."""
    file = Run(folder).job_file
    if not file.exists():
        return None
    tree = files.read_record(file, {"verb": str, "launch": dict}, hint="run the command again")
    with files.reading(file, hint="run the command again"):
        return {kind.verb: kind for kind in _KINDS}[tree["verb"]].of(tree)


# verb of a job → the keys of its result that other modules read, and their types
RESULTS: dict[str, dict[str, type]] = {
    "bench": {
        "data": str,
        "rows": list,
        "notes": list,
        "directions": dict,
        "floor": dict,
        "provenance": dict,
    },
    "trial": {"parts": list},
}


def result_of(folder: Path, verb: str) -> dict[str, Any]:
    """The result of a job, from its `result.json`. Raises DamagedError unless it is complete."""
    return files.read_record(Run(folder).result_file, RESULTS.get(verb, {}))
