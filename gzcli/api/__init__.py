"""gz from Python: train, load, sample and score with numpy arrays in and out.

Images are uint8 [N, C, H, W] with C = 1 or 3. As on the command line, a sample depends only on the seed and
the index of the image. An argument `data` is the name or path of a data set, a `Data`, or images in memory
(see `gzcli.data.readers.memory`).
"""

from __future__ import annotations

import base64
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gzcli.api import notebook
from gzcli.api.samples import Samples
from gzcli.api.scoring import request_of
from gzcli.core.devices import pick_device
from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.sections import PRECISIONS, Fit, LaunchSection, renamed
from gzcli.core.spoken import spoken
from gzcli.core.types import Batch, DataInfo, ImageNoise, Progress, no_progress
from gzcli.core.units import Size, by_sides
from gzcli.data.library import listing
from gzcli.data.packs.batches import quantise
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack as Data
from gzcli.data.readers.memory import reference_of
from gzcli.data.sets.labels import class_numbers
from gzcli.data.sets.registry import data_key
from gzcli.engine import sampler
from gzcli.engine.log import Log
from gzcli.engine.pictures import losses_figure
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge import alarm
from gzcli.judge.images import fitting_images, fitting_pick
from gzcli.judge.sample import seen_mask
from gzcli.judge.scores import Scorer, choose
from gzcli.launch.from_file import find_run
from gzcli.launch.jobs import check as check_job
from gzcli.launch.plan import ask, prepare
from gzcli.metrics import features as judges
from gzcli.metrics import pretrained, second
from gzcli.models.base import Model, flat_defaults, group_options
from gzcli.models.catalog import Param, card_of
from gzcli.models.nn import full_fp32, spread_labels
from gzcli.recipe.schema import Rule, check_value, score_options
from gzcli.store import files
from gzcli.store.metrics import metric_lines, summaries
from gzcli.store.pretrained import PREFIX
from gzcli.store.run_folder import Best
from gzcli.store.runs import all_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_AT_ONCE = 100  # images that are scored together
Labels = str | Sequence[int] | Sequence[str] | np.ndarray


@spoken
def train(
    what: str,
    *,
    data: Any = None,
    scale: str | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: bool = False,
    gpus: int | str | None = None,
    cpu: bool = False,
    processes: int | None = None,
    set: Mapping[str, Any] | Iterable[str] = (),
    quiet: bool = False,
) -> LoadedRun:
    """Trains a model in separate processes, as `gz train` does, and loads the result.

    what: name of a model, path of a recipe or of a model's file, or a run to repeat; or, with `data`,
      weights to start from: a run, a file, `pretrained:NAME` or `hf://OWNER/NAME`.
    data: name or path of the data set; or images in memory: an array or tensor [N, H, W], [N, H, W, C] or
      [N, C, H, W], `(images, labels)`, a data set of torch or of `datasets`, a list of images, {"train": …,
      "test": …} of these; None: the set of the recipe.
    scale: "tiny", "small", "full" or "paper"; None: tiny for embedded sets and for up to 15 minutes on a CPU,
      otherwise full on GPUs and small on a CPU.
    steps: number of training steps; None: that of the recipe.
    minutes: time to train, in minutes; None: the recipe's number of steps.
    seed: seed of weights and noise; None: that of the recipe.
    name: an alias for the run.
    resume: whether to resume the newest unfinished run, or the run that `what` or `name` refers to. If there
      is none, a new run starts.
    gpus: number of GPUs, or "all"; None: every visible one.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of processes on a CPU.
    set: new values for keys of the recipe, {"model.hidden": 16} or ["model.hidden=16"].
    quiet: whether to print nothing.

    Raises the errors of `gzcli.core.errors`: UsageError, MissingError, DeviceError, DivergedError,
    Interrupted.
    """
    if steps and minutes:
        raise UsageError("`steps` and `minutes` cannot be used together")
    flags: dict[str, Any] = {"train.steps": steps, "train.minutes": minutes, "seed": seed, "scale": scale}
    flags |= {"launch.gpus": gpus, "launch.cpu": cpu or None, "launch.processes": processes}
    sets = map(_setting, set.items()) if isinstance(set, Mapping) else set
    reference = None if data is None else str(reference_of(data))
    request = ask(what, reference, sets, flags, resume=resume)
    start = prepare(request, alias=name, requeue=resume)
    if start.plan.note:
        warnings.warn(start.plan.note, stacklevel=2)
    recipe, shown = start.recipe(), notebook.is_here() and not quiet
    with notebook.TrainingBar(shown) as bar:
        run = start.train(recipe, mode="quiet" if quiet or shown else "human", announce=bar.begin)
    return LoadedRun(load_trained(run, pick_device(recipe.launch)))


def _setting(pair: tuple[str, Any]) -> str:
    """A key of a recipe with its value in the form of `--set`. JSON serves because it is also YAML."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)

    return f"{pair[0]}={json.dumps(pair[1], default=plain, ensure_ascii=False)}"


@spoken
def load(
    what: str | Path,
    *,
    data: Any = None,
    pretrained: bool = False,
    checkpoint: str | int = "last",
    device: str | None = None,
    precision: str | None = None,
) -> LoadedRun:
    """The trained model that a name refers to.

    what: id, alias or folder of a run, name of a model (its newest finished run), a weights file,
      `hf://OWNER/NAME` on the hub, or `pretrained:MODEL`.
    data: the data set of the run, if `what` is a model.
    pretrained: whether to load the model that comes with gz, as `pretrained:MODEL` does.
    checkpoint: "last", "best" or a step.
    device: device as torch names it; None: a GPU if there is one.
    precision: precision of samples and scores: "fp32", "bf16", "fp16" or "auto"; None: that of the training
      for samples, fp32 for scores. Likelihoods are always in fp32.

    Raises MissingError if there is no such run, UsageError for an unknown name or precision.
    """
    if precision not in (None, *PRECISIONS):
        raise UsageError(
            f"there is no precision `{precision}`", hint=f"choose one of {', '.join(PRECISIONS)}"
        )
    reference = reference_of(data)
    key = None if reference is None else data_key(reference)
    run = find_run(f"{PREFIX}{what}" if pretrained else str(what), data=key)
    torch_device = torch.device(device) if device else pick_device(LaunchSection())
    return LoadedRun(load_trained(run, torch_device, str(checkpoint), precision))


def datasets() -> list[dict[str, Any]]:
    """Each data set as a dict of name, title, classes, cached, …, as `gz list data --json` prints it."""
    return listing()


@spoken
def runs(model: str | None = None, *, data: Any = None) -> list[dict[str, Any]]:
    """Each run as a dict of run, model, data, state, step, best, …, as `gz runs list --json` prints it. The
    newest comes first.

    model: show only runs of this model.
    data: show only runs on this data set.
    """
    reference = reference_of(data)
    return summaries(all_runs(model=model, data=None if reference is None else data_key(reference)))


@spoken
def open_data(name: Any, *, size: Size | None = None, channels: int | None = None, fit: Fit = "crop") -> Data:
    """Opens a data set. If necessary, it is downloaded (up to 200 MB) and packed first.

    name: name of a known or imported set, a path, or images in memory as in `train`.
    size: side of the images in pixels, or width and height such as "48x32"; None: the size of the set.
    channels: 1 or 3; None: the channels of the set.
    fit: how images of another aspect ratio are resized: "crop", "pad", "stretch" or "aspect".

    Raises UsageError for an unknown name, MissingError if files are missing.
    """
    return open_pack(reference_of(name), size=size, channels=channels, fit=fit)


class LoadedRun:
    """A trained model, on its device, with its averaged weights: `gzcli.Run`.

    trained: the model with its recipe and device.
    """

    def __init__(self, trained: Trained):
        self.trained = trained

    @property
    def id(self) -> str:
        """The id of the run, as `gz runs list` shows it."""
        return self.trained.run.owner.id

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.trained.run.owner.path

    @property
    def model(self) -> Model:
        """The torch module, in eval mode, without gradients."""
        return self.trained.model

    @property
    def info(self) -> DataInfo:
        """Shape, grey levels and classes of the images."""
        return self.trained.images

    @cached_property
    def data(self) -> Data:
        """The training data set, at the size that the model was trained on."""
        return open_pack(self.trained.part.data.name, **self.trained.form)

    @property
    def config(self) -> dict[str, Any]:
        """The whole recipe, as in `run.yaml`: `run.config["train"]["steps"]`."""
        return self.trained.run.owner.tree()

    @property
    def history(self) -> Any:
        """The losses and validation metrics that the training recorded, with a row for each step. This is a
        DataFrame if pandas is installed, otherwise a list of dicts."""
        lines = metric_lines(self.trained.run.path)
        try:
            from pandas import DataFrame
        except ImportError:
            return lines
        return DataFrame(lines).groupby("step").first() if lines else DataFrame()

    @property
    def best(self) -> Best | None:
        """The metric, value and step of the best validation; None without any validation."""
        return self.trained.run.best

    def plot(self) -> Figure:
        """The curves of losses and validation, as a Matplotlib figure."""
        return losses_figure(metric_lines(self.trained.run.path))

    @spoken
    def sample(
        self,
        n: int = 16,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        prompts: Sequence[str] = (),
        progress: Progress = no_progress,
        **options: Any,
    ) -> Samples:
        """Draws n images, uint8 [n, C, H, W], with their `labels`. See `Samples`.

        n: number of images.
        seed: seed of the noise; image i is a function of (seed, i).
        labels: classes by name or number, [m] or [m, K], through which the images cycle; None: all classes.
        prompts: texts through which the images cycle.
        progress: called as progress(i, n, x) after step i of n. x is the batch in the model's own space, or
          None if the sampler does not show intermediate states.
        options: keywords of the model's `sample`, such as `steps=20`. They override the recipe's.

        Raises UsageError for a negative n, for an unknown option or a value that it cannot have, and for
        labels if the model is unconditional. Raises DivergedError if no image is finite. If only some are
        finite, the others are black and a warning is shown.
        """
        if n < 0:
            raise UsageError(f"`n` must be 0 or more, not `{n}`")
        if labels is not None and not self.model.conditional:
            raise UsageError(f"`{self.trained.name}` was not trained with labels")
        y = None if labels is None else self._labels(labels, n)
        if y is None and self.model.conditional:
            y = spread_labels(None, n, self.info, torch.device("cpu"))
        texts, keywords = {"prompt": list(prompts)} if prompts else {}, self._options("sample", options)
        settings: dict[str, Any] = {"conditions": texts, "options": keywords}
        with notebook.sampling("sample", progress) as bar:
            drawn = sampler.draw_all(self.trained, n, seed=seed, labels=y, progress=bar, **settings)
        images, values = drawn
        label_array = None if y is None else y.numpy()
        return Samples(images, labels=label_array, classes=self.info.classes, seed=seed, values=values)

    @spoken
    def encode(self, images: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """The latents of images, float32 [N, …] in the shape of the model's latents.

        images: uint8 [N, C, H, W].
        seed: seed for the draw of binary images.

        Raises UsageError if the model has no image latents.
        """
        model: Any = self.model
        if self.trained.space is not None:
            encode = self.trained.space.encode
        elif hasattr(model, "to_latent"):
            encode = model.to_latent
        elif hasattr(model, "encode") and next(iter(flat_defaults(model.encode)), None) == "x":
            encode = model.encode
        else:
            message = f"`{self.trained.name}` has no image latents"
            raise UsageError(message, hint="gz list models --can latent")
        with torch.inference_mode(), full_fp32(self.trained.device):
            parts = [encode(batch.x).float().cpu().numpy() for batch in self._batches(images, seed)]
        return np.concatenate(parts)

    @spoken
    def features(self, images: np.ndarray, by: str = "lenet") -> np.ndarray:
        """The features of images, float64 [N, D], by the network of a metric.

        images: uint8 [N, C, H, W].
        by: "lenet" or "second", which are small networks that are trained once on the data set; or
          "inception", "dinov2", "clip" or "lite", whose weights must be installed.

        Raises UsageError for another network, MissingError if its weights are missing.
        """
        device = self.trained.device
        networks: dict[str, Any] = {
            "lenet": lambda: judges.lenet(self.data, device=device),
            "second": lambda: second.second(self.data, device=device),
            "inception": lambda: pretrained.inception(device=device),
            "dinov2": lambda: pretrained.dinov2(device),
            "clip": lambda: pretrained.clip(device),
            "lite": lambda: pretrained.lite(device),
        }
        if by not in networks:
            raise UsageError(
                f"`{by}` is not the name of a feature network", hint=f"choose one of {', '.join(networks)}"
            )
        return networks[by]().features(np.asarray(images))

    @spoken
    def log_prob(
        self, images: np.ndarray, labels: Labels | None = None, *, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """The log-likelihood of each image, float64 [N] nats of the discrete image.

        images: uint8 [N, C, H, W].
        labels: class number of each image [N], or [N, K]. None: log p(x); for a conditional model, that of
          the mixture of its classes. A model with clusters uses the nearest cluster, a lower bound.
        seed: seed of the noise.
        options: keywords of the model's `log_prob`, such as `steps=100`.

        Raises UsageError if the model has no image likelihood.
        """
        if not self.trained.has_levels or not hasattr(self.model, "log_prob"):
            message = f"`{self.trained.name}` has no image likelihood"
            raise UsageError(message, hint="gz list models --can log_prob")
        keywords = group_options(self.model.log_prob, self._options("log_prob", options))
        y = None if labels is None else self._labels(labels, len(images))
        values = [np.zeros(0)]
        for batch in self._batches(images, seed):
            classes = None if y is None else y[batch.index.cpu()].to(self.trained.device)
            with torch.no_grad(), full_fp32(self.trained.device):
                value = self.model.log_prob(batch.x, classes, noise=batch.noise, **keywords)
            values.append(value.cpu().double().numpy())
        return np.concatenate(values)

    @spoken
    def score(self, images: np.ndarray, name: str, *, seed: int = 0, **options: Any) -> np.ndarray:
        """An out-of-distribution score of each image, float64 [N]; higher is more out-of-distribution.

        images: uint8 [N, C, H, W].
        name: name of the score, as in `gz ood --score`.
        seed: seed of the noise.
        options: keywords of the score.

        Raises UsageError if the model does not have the score or the option.
        """
        (score,) = choose(self.trained, [name.replace("-", "_")])
        scorer = Scorer(self.trained, [score], options=self._checked("score", options), seed=seed)
        if scorer.unused:
            raise UsageError(f"the score `{score}` has no option `{scorer.unused[0]}`")
        if scorer.is_fitted():
            scorer.fit(*fitting_images(self.trained, fitting_pick(self.data), size=IMAGES_AT_ONCE, seed=seed))
        return np.concatenate([np.zeros(0), *(scorer(batch)[score] for batch in self._batches(images, seed))])

    @spoken
    def do(
        self,
        application: str,
        images: np.ndarray,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        y: Labels | None = None,
        mask: np.ndarray | None = None,
        progress: Progress = no_progress,
        **options: Any,
    ) -> Samples:
        """Applies the model to images. Returns the outputs, uint8 [M, C, H, W], in the order of `gz sample
        --do`.

        application: "reconstruct", "inpaint", …, as `gz list models` shows.
        images: uint8 [N, C, H, W].
        seed: seed of the noise.
        labels: class numbers [m] through which the outputs cycle.
        y: class numbers [N] of the images, such as `run.data.labels("test")`. None: unknown.
        mask: [H, W] of 0 and 1; 1 for the pixels to keep.
        progress: called as in `sample`.
        options: keywords of the application.

        Raises UsageError if the model does not have the application, or takes no labels or no mask. Raises
        DivergedError if no output is finite. If only some are finite, the others are black and a warning is
        shown.
        """
        method = getattr(self.model, application, None)
        if method is None:
            able = card_of(self.trained.run, self.trained.part.model).do
            hint = f"choose one of {', '.join(able)}" if able else "gz list models"
            raise UsageError(f"`{self.trained.name}` does not {application}", hint=hint)
        x = self._pixels(images, range(len(images)), seed)
        x = x if self.trained.space is None else self.trained.space.encode(x)
        keywords = dict(self._options(application, options))
        n, device = len(images), self.trained.device
        targets, present = (None if v is None else self._labels(v, n).to(device) for v in (labels, y))
        keywords |= self.trained.label_keywords(application, targets, present)
        if mask is not None:
            if application not in card_of(self.trained.run, self.trained.part.model).masked:
                raise UsageError(f"`{application}` of `{self.trained.name}` takes no mask")
            whole = torch.from_numpy(np.asarray(mask, np.float32))[None, None]
            keywords["mask"] = seen_mask(whole, self.trained).expand(len(images), -1, -1, -1)
        noise = ImageNoise(seed, range(len(images)), self.trained.device)
        with self.trained.applying():
            with notebook.sampling(application, progress) as bar:
                applied = method(x, noise=noise, progress=bar, **group_options(method, keywords))
            applied.images = self.trained.decode(applied.images)
        outputs, finite = sampler.to_images(applied.images)
        sampler.check_finite(finite, self.trained, warnings.warn)
        label_array = None if applied.labels is None else applied.labels.cpu().numpy()
        return Samples(outputs, labels=label_array, classes=self.info.classes, seed=seed)

    @spoken
    def judge(
        self,
        pictures: Any,
        *,
        fpr: float | str | None = None,
        calibrate: Any = None,
        scores: str | Iterable[str] = (),
        n: int | None = None,
        full: bool = False,
        seeds: int | None = None,
        background: str | Path | None = None,
        seed: int = 0,
        maps: bool = False,
        png: bool = False,
        folder: str | Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Flags images that do not resemble the run's data set, in this process. Returns the JSON of `gz ood
        --input --json`.

        pictures: an image, or a folder, zip, tar or npz of images; or images in memory.
        n: number of held-out images to compare with; None: as many as the recipe's time budget allows.
        folder: folder for the table and the images; None: in the run's folder.

        The further parameters are those of `gzcli.alarm`. Raises UsageError if the model lacks the scores or
        maps, or if there are too few held-out images.
        """
        question = dict(locals())
        for name in ("self", "pictures", "folder"):
            del question[name]
        job: Any = request_of(what=[self.path], data=None, input=pictures, quiet=True, **question).job
        check_job(job)
        target = Path(folder) if folder else self.path / "ood" / f"input-{os.urandom(4).hex()}"
        files.make_folder(target)
        return alarm.run(job, target, self.trained.device, Log(mode="quiet"))

    def __repr__(self) -> str:
        name, step = self.trained.title, self.trained.step
        return f"<gzcli.Run {self.id}: {name}, {by_sides(self.info.shape)}, step {step:,}>"

    def _repr_html_(self) -> str:
        """The HTML for notebooks: a description of the run, its validation metrics and its last samples."""
        status, owner = self.trained.run.status(), self.trained.run.owner
        best = self.best and f"{self.best.metric} {self.best.value:.4g} at step {self.best.step:,}"
        pictures = sorted(self.trained.run.samples_folder.glob("*.png"))
        picture = base64.b64encode(pictures[-1].read_bytes()).decode() if pictures else None
        rows = {
            "run": owner.alias or self.id,
            "model": self.trained.title,
            "data": f"{owner.data}, {by_sides(self.info.shape)}",
            "parameters": status.get("params") and f"{status['params']:,}",
            "steps": f"{self.trained.step:,}",
            "best": best,
        }
        return notebook.table_html(rows, picture)

    # ------------------------------------------------------------------------------------------ helpers

    def _options(self, method: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options under their current names. Raises UsageError for an unknown option, and for a value
        outside its range."""
        params = flat_defaults(getattr(self.model, method))
        values = {renamed(name, params, "sample", "do"): value for name, value in options.items()}
        if strange := [name for name in values if name not in params]:
            takes = [*params, "seed", "labels"] if method == "sample" else list(params)
            hint = did_you_mean(strange[0], takes) or f"options: {', '.join(takes) or 'none'}"
            raise UsageError(f"`{method}` of `{self.trained.name}` has no option `{strange[0]}`", hint=hint)
        return self._checked(method, values)

    def _checked(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, checked as on the command line. Raises UsageError for a value outside the range."""
        if not options:
            return {}
        card = card_of(self.trained.run, self.trained.part.model)
        of_method = card.sample if method == "sample" else card.do.get(method, {})
        rules: dict[str, Param | Rule] = {**score_options(card), **of_method}
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in options.items()}
        return {name: check_value(v, rules[name], name) if name in rules else v for name, v in plain.items()}

    def _labels(self, labels: Labels, n: int) -> Tensor:
        """The m labels, repeated to n of them: int64 [n], or float [n, K]."""
        if isinstance(labels, str):
            labels = class_numbers(labels, self.info.classes)
        elif len(labels) and all(isinstance(label, str) for label in labels):
            named = partial(class_numbers, classes=self.info.classes)
            labels = [number for label in labels for number in named(str(label))]
        y = torch.as_tensor(np.asarray(labels))
        if y.ndim == 1 and self.info.multilabel:
            y = torch.nn.functional.one_hot(y.long(), len(self.info.classes))
        y = y[torch.arange(n) % len(y)]
        return y.long() if y.ndim == 1 else y.float()

    def _pixels(self, images: np.ndarray, index: range, seed: int) -> Tensor:
        """The images at these positions, with the model's grey levels: [B, C, H, W] in [-1, 1] on the
        device."""
        if (values := self.trained.values) is not None:
            part = np.asarray(images[index.start : index.stop])
            if part.shape[1:] != self.trained.info.shape or part.dtype.kind not in "iuf":
                shape = ", ".join(map(str, self.trained.info.shape))
                message = f"images must be values [N, {shape}], not {part.dtype} {list(part.shape)}"
                raise UsageError(message, hint="`run.sample(…).values` has all channels")
            part = part if values.levels != 256 else part.astype(np.uint8)
            x = quantise(torch.from_numpy(np.array(values.scaled(part))), self.trained.info.levels)
            return x.to(self.trained.device)
        u8 = torch.from_numpy(np.array(images[index.start : index.stop]))  # a copy: they may be read-only
        if u8.dtype != torch.uint8 or tuple(u8.shape[1:]) != self.info.shape:
            shape = ", ".join(map(str, self.info.shape))
            raise UsageError(f"images must be uint8 [N, {shape}], not {u8.dtype} {list(u8.shape)}")
        return quantise(u8, self.info.levels, ImageNoise(seed, index)).to(self.trained.device)

    def _batches(self, images: np.ndarray, seed: int) -> Iterator[Batch]:
        """The images in batches on the device, without labels."""
        device = self.trained.device
        for start in range(0, len(images), IMAGES_AT_ONCE):
            index = range(start, min(start + IMAGES_AT_ONCE, len(images)))
            positions = torch.arange(index.start, index.stop, device=device)
            noise = ImageNoise(seed, index, device)
            yield Batch(self._pixels(images, index, seed), None, positions, noise)
