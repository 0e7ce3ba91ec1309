"""Out-of-distribution scores and alarms from Python: `gzcli.ood` and `gzcli.alarm`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.api.compare import done, row_of
from gzcli.core.errors import UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.spoken import spoken
from gzcli.core.types import silent
from gzcli.core.units import canonical_size
from gzcli.data.readers.memory import reference_of
from gzcli.launch.scoring import Question, Request, ask
from gzcli.models.catalog import ModelCard
from gzcli.recipe.schema import check_value, score_options
from gzcli.store import claims
from gzcli.store.paths import user_dir

PATH_ARGUMENTS = (
    "input",
    "calibrate",
    "export",
    "imglists",
    "background",
)  # arguments that are names or paths
SIZE_KEY = "data.size"  # the key of a recipe that a method without training has


@dataclass(frozen=True)
class OodRow:
    """How well a score detects a foreign set. A `baseline` score uses no model."""

    out: str
    score: str
    baseline: bool
    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    n_in: int
    n_out: int


@dataclass(frozen=True)
class OodResult:
    """Out-of-distribution scores of a run, an ensemble or a method without training. `scores.csv` in `folder`
    contains the scores of single images.

    run: id of the (first) run; None for a method.
    """

    run: str | None
    rows: tuple[OodRow, ...]
    notes: tuple[str, ...]
    folder: Path

    @property
    def best(self) -> OodRow | None:
        """The model's score with the highest AUROC."""
        return max((row for row in self.rows if not row.baseline), key=lambda row: row.auroc, default=None)


@dataclass(frozen=True)
class AlarmRow:
    """The verdict on an image.

    p: p-value: approximately the share of good images that are at least as unusual.
    scores: each score by name; None if it is not finite.
    """

    file: str
    p: float
    flagged: bool
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class DefectRow:
    """How well a kind of defect is detected; the last row is the mean.

    detected: share of the n images that are flagged.
    pixel_auroc, aupro, pixel_f1: metrics of the maps; None without masks.
    """

    defect: str
    n: int
    auroc: float
    detected: float
    pixel_auroc: float | None
    aupro: float | None
    pixel_f1: float | None


@dataclass(frozen=True)
class AlarmResult:
    """The verdicts of an alarm, the most unusual image first.

    run, method: id of the (first) run, or name of the method without training.
    fpr: false-positive rate.
    rows: a row for each image; () for an inspection set.
    defects: a row for each kind of defect of an inspection set.
    unreadable: a message for each image that could not be read.
    folder: folder with the table, the sheet and the maps; None if nothing was checked.
    exported: the files of the exported alarm.
    """

    run: str | None
    method: str | None
    fpr: float | None
    rows: tuple[AlarmRow, ...]
    defects: tuple[DefectRow, ...]
    unreadable: tuple[str, ...]
    notes: tuple[str, ...]
    folder: Path | None
    exported: tuple[Path, ...] = ()

    @property
    def flagged(self) -> list[str]:
        """The files of the flagged images."""
        return [row.file for row in self.rows if row.flagged]


@spoken
def ood(
    *what: str | Path,
    out: Any = (),
    data: Any = None,
    benchmark: str | None = None,
    imglists: str | Path | None = None,
    pretrained: bool = False,
    scores: str | Iterable[str] = (),
    n: int | None = None,
    full: bool = False,
    seeds: int | None = None,
    background: str | Path | None = None,
    checkpoint: str = "last",
    seed: int = 0,
    precision: str | None = None,
    gpus: int | str | None = None,
    cpu: bool = False,
    processes: int | None = None,
    set: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **options: Any,
) -> OodResult:
    """Scores how foreign images of other data sets are, as `gz ood` does.

    what: name of a model (its newest finished run), or id, alias, folder or file of a run; several runs form
      an ensemble. Or a method without training, such as "combined". None: "combined".
    out: name or path of the foreign set, or images in memory, or a list of sets.
    data: the in-distribution set; None: that of the run.
    benchmark: "openood-mnist", "openood-cifar10" or "openood-cifar100" instead of `out`.
    imglists: OpenOOD's folder `data`, whose image lists define the images of the benchmark.
    pretrained: whether to use the model that comes with gz.
    scores: names of scores, or "all"; (): those of the recipe, and `local`.
    n: number of images of each set; None: as many as the recipe's time budget allows.
    full: whether to score all images.
    seeds: number of noise seeds, whose results are averaged; None: 1.
    background: run that the score `ratio` divides by; None: that of the recipe.
    checkpoint: "last", "best" or a step.
    seed: seed of the noise.
    precision: precision of the scores; None: fp32.
    gpus: number of GPUs, or "all"; None: one, if there is one.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of processes on a CPU.
    set: {"data.size": 64}: size of the images for a method without training.
    quiet: whether to print nothing.
    options: keywords of the scores, such as `starts=8`.

    Raises UsageError for a name or an option that does not exist, MissingError if there is no such run or
    set. For single images, use `gzcli.alarm`.
    """
    request = request_of(**locals())
    folder = request.new_folder()
    result = done(folder, request.job, quiet)
    rows = tuple(row_of(OodRow, row) for row in result["results"])
    return OodResult(request.run.id if request.run else None, rows, tuple(result["notes"]), folder)


@spoken
def alarm(
    data: Any = None,
    input: Any = None,
    *what: str | Path,
    fpr: float | str | None = None,
    calibrate: Any = None,
    export: str | Path | None = None,
    maps: bool = False,
    png: bool = False,
    pretrained: bool = False,
    scores: str | Iterable[str] = (),
    n: int | None = None,
    full: bool = False,
    seeds: int | None = None,
    background: str | Path | None = None,
    checkpoint: str = "last",
    seed: int = 0,
    precision: str | None = None,
    gpus: int | str | None = None,
    cpu: bool = False,
    processes: int | None = None,
    set: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **options: Any,
) -> AlarmResult:
    """Flags images that do not resemble good ones, as `gz ood --input` does.

    data: name or path of the good images, or images in memory; or an inspection set with defects, such as
      MVTec's. None: the data set of the run.
    input: an image, or a folder, zip, tar or npz of images, or images in memory. None: detect the defects of
      an inspection set, or only export the alarm.
    what: a method without training, or runs, as in `gzcli.ood`. None: "combined".
    fpr: false-positive rate: the share of good images that may be flagged, such as 0.05 or "5%".
      None: 1 %.
    calibrate: more good images for calibration. Methods are not fitted to them.
    export: folder for the alarm of a method as an ONNX graph and a script.
    maps: whether to draw maps of the most unusual images. Methods always draw them.
    png: whether to draw the map of every image.
    seeds: number of draws of noise, which are averaged; None: 4 if the score draws noise.

    The further parameters are those of `gzcli.ood`. Of a run, the default score is the one that detects the
    most synthetic defects. Raises UsageError for too few good images, an unknown name or an unknown option;
    MissingError if there are no images, or no such run.
    """
    request, exported, paths = request_of(**locals()), {}, ()
    if portable := request.portable:
        exported = done(claims.new_folder(user_dir("ood"), "export"), portable, quiet)
        paths = tuple(Path(exported["path"]) / name for name in exported["files"])
    if portable and input is None:
        return AlarmResult(None, exported["method"], None, (), (), (), (), None, paths)
    folder = request.new_folder()
    result = done(folder, request.job, quiet)
    return AlarmResult(
        run=request.run.id if request.run else None,
        method=result.get("method"),
        fpr=result["fpr"],
        rows=tuple(row_of(AlarmRow, row) for row in result.get("files", ())),
        defects=tuple(row_of(DefectRow, row) for row in result.get("defects", ())),
        unreadable=tuple(result["unreadable"]),
        notes=tuple(result["notes"]),
        folder=folder,
        exported=paths,
    )


def request_of(
    *,
    what: Sequence[str | Path],
    data: Any,
    options: Mapping[str, Any],
    quiet: bool,
    set: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Request:
    """The request for the arguments of `ood` or `alarm`, which have the names of a `Question`'s fields."""
    sets = settings.pop("out", ())
    if not (isinstance(sets, list | tuple) and all(isinstance(name, str | Path) for name in sets)):
        sets = [sets]
    devices = {name: settings.pop(name) for name in ("gpus", "cpu", "processes") if name in settings}
    settings |= {name: _reference(value) for name, value in settings.items() if name in PATH_ARGUMENTS}
    scores = settings.pop("scores")
    names = tuple(scores.split(",") if isinstance(scores, str) else scores)
    question = Question(
        **settings,
        launch=LaunchSection(**devices),
        scores=names,
        what=tuple(map(str, what)),
        ins=_reference(data),
        outs=tuple(str(reference_of(one)) for one in sets),
        keywords=partial(_keywords, options=options, set=set or {}),
    )
    return ask(question, say=silent if quiet else partial(print, file=sys.stderr))


def _reference(data: Any) -> str | None:
    """A data set, a file or images in memory by their name or path."""
    return None if data is None else str(reference_of(data))


def _keywords(
    card: ModelCard | None, *, options: Mapping[str, Any], set: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords of the scores of a model or, for None, the settings of a method without training."""
    keys = {SIZE_KEY} if card is None else {f"ood.{name}" for name in score_options(card)}
    if strange := next((key for key in set if key not in keys), None):
        raise UsageError(f"`set` has no key `{strange}` here", hint=f"keys: {', '.join(sorted(keys))}")
    if card is None:
        if options:
            message = f"a method that requires no training has no option `{next(iter(options))}`"
            raise UsageError(message, hint='it has only `set={"data.size": 64}`')
        return {"size": canonical_size(set[SIZE_KEY])} if set else {}
    rules, values = score_options(card), {key.partition(".")[2]: value for key, value in set.items()}
    if strange := next((name for name in options if name not in rules), None):
        hint = f"options of the scores: {', '.join(rules)}"
        raise UsageError(f"no score of `{card.name}` has the option `{strange}`", hint=hint)
    return {name: check_value(value, rules[name], name) for name, value in {**values, **options}.items()}
