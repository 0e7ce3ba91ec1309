"""The work of `gz demo`: the models to choose from and, for each request, images with their code."""

from __future__ import annotations

import itertools
import queue
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from gzcli import api
from gzcli.api import LoadedRun
from gzcli.core.errors import UsageError
from gzcli.core.types import Progress
from gzcli.data.packs.batches import to_uint8
from gzcli.data.packs.open import PackOptions, open_pack, peek
from gzcli.data.sets.labels import class_numbers
from gzcli.data.sets.registry import DataSet, locate
from gzcli.engine.sheets import grid
from gzcli.judge.sample import shown_pictures
from gzcli.models.catalog import card_of
from gzcli.models.labelled import Labelled
from gzcli.recipe.schema import literal_values
from gzcli.store import pretrained, runs
from gzcli.store.png import save_png
from gzcli.store.run_folder import Run

FIRST_MODEL = "cfm"  # the best of the models that come with gz
SLIDER_OPTIONS = ("steps", "guidance", "temperature")  # options with a slider, if the sampler takes them
FOREIGN = ("patches", "digits")  # embedded sets that offer an image to judge
SHOWN_SIDE = 900  # side in pixels to which images are enlarged
MAX_STATES_SHOWN = 48  # maximum number of states shown of one sampling
PAINT = (232, 89, 12)  # colour of the brush
STATE_SECONDS = 0.05  # minimum seconds between two states, so that a fast sampler can be watched


class Code(NamedTuple):
    """The code that reproduces the images on the page, for a shell and in Python."""

    shell: str
    python: str


Shown = tuple[np.ndarray, Code | None]  # an image [H, W, C] uint8, and the code once it is the last one
Work = Callable[[Progress], np.ndarray]  # draws images and calls progress(i, n, x) at every step


# ---------------------------------------------------------------------------- the models to choose from


class StudioModel(NamedTuple):
    """A model that can be chosen."""

    name: str  # in the form that `gz sample` and `gzcli.load` accept
    title: str  # its name for the user


def choices(named: Sequence[Run] = ()) -> list[StudioModel]:
    """The choices in the order of the menu. These are the named runs. Otherwise they are all runs of the
    store with weights, newest first, followed by the models that come with gz."""
    menu = []
    for run in named or [run for run in runs.all_runs() if run.weights is not None]:
        status = run.serving.status()
        step = f", {status['step']:,} steps" if status.get("step") else ""
        title = f"{run.alias or run.title} on {run.data}{step} ({run.id.rsplit('-', 1)[-1]})"
        # a run outside the store by its origin or its folder
        name = run.id if runs.by_name(run.id) else str(run.status().get("from") or run.path)
        menu.append(StudioModel(name, title))
    if not named:
        every, first = pretrained.every(), pretrained.PREFERRED_SETS
        shipped = sorted(every, key=lambda model: (*first, model.data).index(model.data))
        title = "{0.title} on {0.data}, comes with gz"
        menu += [StudioModel(pretrained.PREFIX + model.name, title.format(model)) for model in shipped]
    return menu


def opening(choices: Sequence[StudioModel]) -> str:
    """The name of the choice with which the page opens. It is preferably a model that comes with gz, because
    the newest run may have been trained for only three steps."""
    best = pretrained.PREFIX + pretrained.file_of(pretrained.PREFIX + FIRST_MODEL).stem
    return best if any(choice.name == best for choice in choices) else choices[0].name


@dataclass(frozen=True)
class Controls:
    """The controls of the page for a run, from the signatures of its model and the values of its recipe."""

    classes: tuple[str, ...]  # classes to choose from; () without labels
    numbers: Mapping[
        str, float
    ]  # the options of SLIDER_OPTIONS that the sampler takes, with the recipe's values
    samplers: tuple[str, ...]  # () if there is only one
    sampler: str | None  # value in the recipe
    prompts: bool  # whether it draws from a text
    way: bool  # whether it interpolates
    inpaints: bool
    maps: bool  # whether it shows where an image is anomalous
    scores: bool  # whether it can judge images

    @classmethod
    def of(cls, run: LoadedRun) -> Controls:
        part, model = run.trained.part, run.model
        card = card_of(run.trained.run, part.model)
        values: dict[str, Any] = {name: param.default for name, param in card.sample.items()}
        values |= part.sample
        guided = isinstance(model, Labelled) and model.labelled and model.label_dropout > 0
        if isinstance(model, Labelled):
            values["guidance"] = model.guidance_scale(values.get("guidance"))
        numbers = [name for name in SLIDER_OPTIONS if isinstance(values.get(name), int | float)]
        return cls(
            classes=run.info.classes if model.conditional else (),
            numbers={name: values[name] for name in numbers if name != "guidance" or guided},
            samplers=tuple(literal_values(card.sample["sampler"].annotation))
            if "sampler" in card.sample
            else (),
            sampler=values.get("sampler"),
            prompts="prompt" in card.can,
            way="frames" in card.do.get("interpolate", ()),
            inpaints="inpaint" in card.masked,
            maps="map" in card.can,
            scores="ood" in card.can and run.trained.space is None,
        )


# ---------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Request:
    """The settings of a drawing."""

    run: str
    n: int = 16
    seed: int = 0
    label: str | None = None  # name of the images' class; None: each class in turn
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the model's `sample`


class Studio:
    """The run on the page, which is loaded once and serves one request at a time. Its `folder` is removed
    with the object, or when the program ends."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="gz-demo-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.shown = self.folder / "shown"  # folder of the images on the page; no file in it is written twice
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: tuple[str, LoadedRun, Controls] | None = None

    def open(self, name: str) -> tuple[LoadedRun, Controls]:
        """Loads a run. Returns what the page offers for it."""
        with self._lock:
            if self._open is None or self._open[0] != name:
                run = api.load(name)
                self._open = name, run, Controls.of(run)
            return self._open[1:]

    def words(self, request: Request) -> dict[str, Any]:
        """The keywords of `Run.sample`, without those that have the recipe's values."""
        run, can = self.open(request.run)
        values = {**can.numbers, "sampler": can.sampler, "prompt": None}
        label = request.label
        labels = {} if label is None else {"labels": [class_numbers(label, run.info.classes)[0]]}
        options = {key: value for key, value in request.options.items() if value != values.get(key)}
        return {"seed": request.seed, **labels, **options}

    def draw(self, request: Request) -> Iterator[Shown]:
        """Yields the states of the sampler, then the samples."""
        run, words = self.open(request.run)[0], self.words(request)

        def work(progress: Progress) -> np.ndarray:
            return run.sample(request.n, progress=progress, **words)

        yield from self._pictures(run, work, drawing(request, words), request.n)

    def interpolate(self, first: Request, last: Request, frames: int) -> Iterator[Shown]:
        """The interpolation from the image of one seed to that of another."""
        run, words = self.open(first.run)[0], [self.words(end) for end in (first, last)]

        def work(progress: Progress) -> np.ndarray:
            images = np.concatenate([run.sample(1, **of_end) for of_end in words])
            return run.do("interpolate", images, progress=progress, frames=frames)

        yield from self._pictures(run, work, interpolating((first, last), words, frames), frames, frames)

    def canvas(self, request: Request) -> np.ndarray:
        """A sample large enough to paint on, [H, W, 3]."""
        run, words = self.open(request.run)[0], self.words(request)
        with self._lock:
            image = run.sample(1, **words)
        large = enlarged(image[0].transpose(1, 2, 0), 480)
        return large.repeat(3, 2) if large.shape[2] == 1 else large

    def inpaint(self, request: Request, picture: np.ndarray, painted: np.ndarray) -> Iterator[Shown]:
        """Fills in the painted part, bool [H, W], of an image, uint8 [H, W, C] of any size."""
        if not painted.any():
            raise UsageError("nothing is painted over", hint="brush over the area to fill in")
        run, words = self.open(request.run)[0], self.words(request)
        image = self._sized(run, picture, run.info.shape[0])
        mask = self._sized(run, np.where(painted, 0, 255).astype(np.uint8), 1) > 127
        save_png(self.folder / "picture.png", image[0].transpose(1, 2, 0))
        save_png(self.folder / "mask.png", (mask[0] * np.uint8(255)).transpose(1, 2, 0))

        def work(progress: Progress) -> np.ndarray:
            return run.do("inpaint", image, mask=mask[0, 0], progress=progress, **words)

        yield from self._pictures(run, work, inpainting(request, words), 1)

    def to_judge(self, run: LoadedRun) -> list[tuple[np.ndarray, str]]:
        """An image of the run's set (a sample, if the set is not packed) and one of another set, each [H, W,
        C] with a caption."""
        home, form = locate(run.trained.part.data.name), run.trained.form
        foreign = next(name for name in FOREIGN if name != home.key)
        packed = is_packed(home, form)
        with self._lock:
            at_home = open_pack(home, **form).images("test")[:1] if packed else run.sample(1)
            away = open_pack(foreign, **form, foreign=True).images("test")[:1]
        pairs = (at_home, f"one of {home.key}" if packed else "a sample"), (away, f"one of {foreign}")
        return [(np.asarray(images)[0].transpose(1, 2, 0), caption) for images, caption in pairs]

    def judge(self, name: str, picture: np.ndarray, n: int) -> tuple[dict[str, Any], np.ndarray, Code]:
        """Judges whether an image, uint8 [H, W, C], belongs to the run's set, compared with n held-out
        images. Returns the result of `gz ood --input`, an image and the code. The image, [H, W, 3], is the
        model's input, beside the model's map if it has one.
        """
        run, can = self.open(name)
        with self._lock:
            place = Path(tempfile.mkdtemp(prefix="judged-", dir=self.folder))
            save_png(place / "picture.png", picture)
            result = run.judge(place / "picture.png", n=n, maps=can.maps, folder=place)
            prepared = shown_pictures(run.trained, place / "picture.png", run.info.shape[0], 1)
        pictures = [prepared.repeat(3, 1) if prepared.shape[1] == 1 else prepared]
        for path in (result["outputs"].get("maps") or {}).values():
            pictures.append(np.asarray(Image.open(path)).transpose(2, 0, 1)[None])
        return result, sheet(np.concatenate(pictures), len(pictures)), judging(name, n, can.maps)

    def file(self, picture: np.ndarray) -> str:
        """Writes an image [H, W, C] to a new file and returns its path. The browser may still be reading the
        file of an equal image."""
        path = self.shown / f"{next(self._numbers):06}.png"
        save_png(path, picture)
        return str(path)

    def _pictures(
        self, run: LoadedRun, work: Work, code: Code, n: int, columns: int | None = None
    ) -> Iterator[Shown]:
        """Yields images of those states of `work` that contain n images, without code, and then its result
        with code."""

        def locked(progress: Progress) -> np.ndarray:
            with self._lock:
                return work(progress)

        last: np.ndarray | None = None
        for last in watched(locked, lambda x: to_uint8(run.trained.decode(x)).cpu().numpy()):
            if len(last) == n:
                yield sheet(last, columns), None
        assert last is not None
        yield sheet(last, columns), code

    def _sized(self, run: LoadedRun, picture: np.ndarray, channels: int) -> np.ndarray:
        """An image in the form of the run's images, uint8 [1, channels, H, W]. An enlarged image is reduced
        to its original size."""
        picture = np.atleast_3d(picture)
        scale = max(1, picture.shape[0] // run.info.shape[1])
        small, path = picture[::scale, ::scale], self.folder / "painted.png"
        fits = small.shape[:2] == run.info.shape[1:]
        was_enlarged = fits and np.array_equal(enlarged(small, len(picture[0])), picture)
        save_png(path, small if was_enlarged else picture)
        return shown_pictures(run.trained, path, channels, 1)


def is_packed(data: DataSet, form: PackOptions) -> bool:
    """Whether the images of a set can be shown at once."""
    return bool(getattr(data, "embedded", False)) or peek(data, **form) is not None


def watched(work: Work, to_images: Callable[[Tensor], np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the states of `work`, which runs in a thread, as images uint8 [n, C, H, W], at most
    MAX_STATES_SHOWN; then its result. Raises the errors of `work`."""
    states: queue.Queue[np.ndarray | BaseException | None] = queue.Queue()
    result: list[np.ndarray] = []
    last_state = -1

    def progress(i: float, n: float, x: Tensor | None = None) -> None:
        nonlocal last_state
        if x is not None and int(MAX_STATES_SHOWN * i / n) > last_state:
            last_state = int(MAX_STATES_SHOWN * i / n)
            states.put(to_images(x))

    def run() -> None:
        try:
            result.append(work(progress))
            states.put(None)
        except BaseException as e:
            states.put(e)

    threading.Thread(target=run, daemon=True).start()
    while (state := states.get()) is not None:
        if isinstance(state, BaseException):
            raise state
        yield state
        time.sleep(STATE_SECONDS)
    yield result[0]


def sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images uint8 [N, C, H, W] as one image [H', W', C] that fills the page. The grid is about square,
    unless the number of columns is set."""
    return enlarged(images[0].transpose(1, 2, 0) if len(images) == 1 else grid(images, columns), SHOWN_SIDE)


def enlarged(picture: np.ndarray, least: int) -> np.ndarray:
    """An image [H, W, C], enlarged by an integer factor to a width of about `least` pixels."""
    scale = max(1, least // picture.shape[1])
    return picture.repeat(scale, 0).repeat(scale, 1)


def painted_example(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A layer [H, W, 4] of the editor that covers the middle third of an image [H, W, 3], and the image
    itself."""
    layer, composite = np.zeros((*image.shape[:2], 4), np.uint8), image.copy()
    third = slice(len(image) // 3, 2 * len(image) // 3)
    layer[third], composite[third] = (*PAINT, 255), PAINT
    return layer, composite


# ---------------------------------------------------------------------------- code

# arguments of `Run.sample`: seed, labels, and options that differ from the recipe's
Words = Mapping[str, Any]


def drawing(request: Request, words: Words) -> Code:
    shell = _line("gz sample", request.run, {"-n": request.n} | _flags(request, words))
    return Code(shell, _python(request.run, f"images = {_call(request.n, words)}"))


def interpolating(ends: Sequence[Request], words: Sequence[Words], frames: int) -> Code:
    name, shell = ends[0].run, ["mkdir ends"]
    for place, end, of_end in zip("ab", ends, words, strict=True):
        shell.append(_line("gz sample", name, {"-n": 1, "--out": place} | _flags(end, of_end)))
        shell.append(f"cp {place}/images/000000.png ends/{place}.png")
    shell.append(_line("gz sample", name, {"--do": "interpolate", "--input": "ends", "--frames": frames}))
    calls = ", ".join(_call(1, of_end) for of_end in words)
    lines = f'ends = np.concatenate([{calls}])\nimages = run.do("interpolate", ends, frames={frames})'
    return Code("\n".join(shell), _python(name, lines, "import numpy as np\n\n"))


def inpainting(request: Request, words: Words) -> Code:
    """The code that fills in `picture.png` where `mask.png` is black."""
    flags = {"--do": "inpaint", "--input": "picture.png", "--mask": "mask.png"} | _flags(request, words)
    lines = f"""image = np.atleast_3d(Image.open("picture.png")).transpose(2, 0, 1)[None]
mask = np.asarray(Image.open("mask.png")) > 127
images = run.do("inpaint", image, mask=mask, {_keywords(words)})"""
    imports = "import numpy as np\nfrom PIL import Image\n\n"
    return Code(_line("gz sample", request.run, flags), _python(request.run, lines, imports))


def judging(name: str, n: int, maps: bool) -> Code:
    """The code that compares `picture.png` with n held-out images."""
    shell = _line("gz ood", name, {"--input": "picture.png", "-n": n}) + (" --map" if maps else "")
    return Code(shell, _python(name, f'result = run.judge("picture.png", n={n}, maps={maps})'))


def _line(verb: str, name: str, flags: Mapping[str, Any]) -> str:
    """A command line; flags whose value is None are omitted."""
    words = [f"{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None]
    return " ".join([verb, shlex.quote(name), *words])


def _flags(request: Request, words: Words) -> dict[str, Any]:
    """The flags of a drawing. A class with a comma in its name is quoted, because `--label` accepts a
    list."""
    label = f'"{request.label}"' if request.label and "," in request.label else request.label
    options = {f"--{key.replace('_', '-')}": value for key, value in words.items() if key != "labels"}
    return {"--seed": request.seed, "--label": label, "--prompt": None, **options}


def _call(n: int, words: Words) -> str:
    return f"run.sample({n}, {_keywords(words)})"


def _keywords(words: Words) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in words.items())


def _python(name: str, lines: str, imports: str = "") -> str:
    return f"{imports}import gzcli\n\nrun = gzcli.load({name!r})\n{lines}"
