"""Samples in separate processes from Python, written to files: `gzcli.sample`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.api.compare import done
from gzcli.core.errors import MissingError, UsageError, choose, did_you_mean
from gzcli.core.sections import LaunchSection, renamed
from gzcli.core.spoken import spoken
from gzcli.data.readers.memory import reference_of
from gzcli.data.sets.registry import local
from gzcli.launch import sampling
from gzcli.models.catalog import Param
from gzcli.recipe.schema import check_value
from gzcli.store import pretrained as shipped
from gzcli.store.jobs import SampleJob
from gzcli.store.png import FORMATS


@dataclass(frozen=True)
class SampleResult:
    """Images that a run drew, in files.

    n, seconds: number of images, and the time to draw them.
    grid: the sheet of samples.
    files: a PNG of each image; () for a sheet alone.
    npz: the file with all images as one array, if it was a format.
    animation: the GIF of the sampling process, if there is one.
    figures: metrics of an application, such as its accuracy.
    difference: for `like`, how the image differs from its repetition.
    folder: the folder of all of them.
    """

    run: str
    n: int
    seconds: float
    grid: Path
    files: tuple[Path, ...]
    npz: Path | None
    animation: Path | None
    figures: Mapping[str, float]
    notes: tuple[str, ...]
    difference: sampling.Difference | None
    folder: Path


@spoken
def sample(
    what: str | Path = "",
    *,
    pretrained: bool = False,
    data: Any = None,
    n: int | None = None,
    labels: str | Sequence[str | int] = (),
    prompts: Iterable[str] | Path = (),
    seed: int = 0,
    do: str | None = None,
    like: str | Path | None = None,
    input: str | Path | None = None,
    mask: str | Path | None = None,
    checkpoint: str = "last",
    gpus: int | None = None,
    cpu: bool = False,
    processes: int | None = None,
    precision: str | None = None,
    out: str | Path | None = None,
    formats: Iterable[str] = (),
    animate: bool = False,
    quiet: bool = False,
    **options: Any,
) -> SampleResult:
    """Draws images from a trained model, or applies it to images, as `gz sample` does: in separate processes,
    on several GPUs, with files as the result. `Run.sample` draws arrays in this process.

    what: name of a model (its newest finished run), or id, alias, folder or file of a run.
    pretrained: whether to use the model that comes with gz.
    data: the data set of the run, if `what` is a model.
    n: number of images; None: about 64, or one for each prompt or input image.
    labels: classes by name or number, through which the images cycle; (): all classes.
    prompts: texts through which the images cycle, or the path of a file with a prompt in each line.
    seed: seed of the noise.
    do: an application, such as "inpaint".
    like: an image of `gz sample` to draw again.
    input: input images of an application or of a conditional model: an image, or a folder or zip of images.
      `Run.do` takes arrays.
    mask: mask of an application: white is kept.
    checkpoint: "last", "best" or a step.
    gpus: number of GPUs; None: one, if there is one.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of processes on a CPU.
    precision: precision of the samples; None: that of the training.
    out: folder for the files; None: inside the run's folder.
    formats: files to write besides the sheet: "npz", "png".
    animate: whether to write an animation of the sampling process.
    quiet: whether to print nothing.
    options: keywords of the model's `sample` or of the application, such as `steps=20`.

    Raises UsageError for what the model cannot do, MissingError if there is no such run.
    """
    if not (what or like or pretrained):
        raise UsageError("`gzcli.sample` needs a model, a run or a file", hint='gzcli.sample("vae")')
    texts = sampling.read_prompts([], prompts) if isinstance(prompts, Path) else prompts
    classes = labels if isinstance(labels, str) else ",".join(map(_quoted, labels))
    typed = SampleJob(
        "",
        n,
        classes or None,
        tuple(texts),
        do=do,
        input=_path(input),
        mask=_path(mask),
        formats=tuple(choose("format", name, FORMATS) for name in formats),
        animate=animate,
        checkpoint=checkpoint,
        seed=seed,
        precision=precision,
        launch=LaunchSection(gpus, cpu, processes),
    )
    keywords = partial(_keywords, options) if options else None
    reference = None if data is None else str(reference_of(data))
    model, again = shipped.spelled(str(what), pretrained), Path(like).expanduser() if like else None
    request = sampling.ask(model, typed, keywords, data=reference, like=again)
    folder = Path(out).expanduser().absolute() if out else request.new_folder()
    result = done(folder, request.with_origin(), quiet)
    return SampleResult(
        run=result["run"],
        n=result["n"],
        seconds=result["seconds"],
        grid=Path(result["grid"]),
        files=tuple(map(Path, result["files"])),
        npz=Path(result["npz"]) if result["npz"] else None,
        animation=Path(result["animation"]) if result["animation"] else None,
        figures=result.get("figures", {}),
        notes=tuple(result["notes"]),
        difference=sampling.compare(again, result) if again else None,
        folder=folder,
    )


def _path(images: str | Path | None) -> str | None:
    """The absolute path of images. Raises MissingError if it does not exist, UsageError for
    images in memory."""
    if images is None:
        return None
    if not isinstance(images, str | Path):
        raise UsageError("`input` and `mask` are paths", hint="`run.do(…)` takes arrays")
    if not (path := local(str(images))).exists():
        raise MissingError(f"`{images}` does not exist", hint="pass an image, or a folder of images")
    return str(path.resolve())


def _quoted(label: str | int) -> str:
    """A label as an item of `--label`, which is a line of CSV."""
    return '"{}"'.format(str(label).replace('"', '""'))


def _keywords(
    options: Mapping[str, Any], what: str, takes: Mapping[str, Param], by_method: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """The options of a method, checked as on the command line."""
    values = {renamed(name, takes, "sample", "do"): value for name, value in options.items()}
    if strange := next((name for name in values if name not in takes), None):
        hint = did_you_mean(strange, takes) or f"options: {', '.join(takes) or 'none'}"
        raise UsageError(f"{what} has no option `{strange}`", hint=hint)
    plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
    return {name: check_value(value, takes[name], name) for name, value in plain.items()}
