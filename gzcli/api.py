"""gz from Python: train, load, sample and score with numpy arrays in and out.

Images are uint8 [N, C, H, W] with C = 1 or 3. What is drawn depends on the seed and the number of the image
alone, as on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli import launch, planning
from gzcli.data.batches import quantise, to_uint8
from gzcli.data.library import listing
from gzcli.data.open import open_named
from gzcli.data.pack import Pack
from gzcli.engine import sampler
from gzcli.engine.devices import pick_device
from gzcli.engine.images import Images
from gzcli.engine.scores import Scorer, choose
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.options import grouped
from gzcli.recipe.from_file import find_run
from gzcli.recipe.parts import LaunchSection
from gzcli.types import Batch, DataInfo, ImageNoise, no_progress

BATCH = 100  # images that are scored together
FITTED_ON = 500  # validation images that a score is fitted on, as `gz ood` does
BANK = 10_000  # training images, for the scores that are fitted on these


class Data:
    """A packed data set.

    pack: its arrays and what is known of them.
    """

    def __init__(self, pack: Pack):
        self.pack = pack

    @property
    def name(self) -> str:
        """How it is called."""
        return self.pack.meta.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.pack.meta.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; () where it has no labels."""
        return self.pack.meta.classes

    def images(self, split: str = "train") -> Any:
        """uint8 [N, C, H, W] of "train", "val" or "test": a memory-map, or, of a streamed set, what decodes
        the rows that are asked for."""
        return self.pack.images(split)

    def labels(self, split: str = "train") -> np.ndarray | None:
        """int64 [N], uint8 [N, K] where several classes hold at once, or None."""
        return self.pack.labels(split)

    def __repr__(self) -> str:
        return f"<gzcli.Data {self.name}: {self.pack.meta.words}>"


class Run:
    """A trained model, on its device, with its averaged weights.

    trained: what the engine knows of it.
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        self._data: Data | None = None

    @property
    def id(self) -> str:
        """What `gz` calls it."""
        return self.trained.run.owner.id

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.trained.run.owner.path

    @property
    def model(self) -> Model:
        """The torch module, in eval mode, without gradients."""
        return self.trained.model

    @property
    def info(self) -> DataInfo:
        """Shape, grey levels and classes of its images."""
        return self.trained.images

    @property
    def data(self) -> Data:
        """The data set that it was trained on, in the size that it was trained in."""
        if self._data is None:
            section = self.trained.part.data
            self._data = Data(open_named(section.name, size=section.size, channels=section.channels))
        return self._data

    def sample(
        self,
        n: int = 16,
        *,
        seed: int = 0,
        labels: Sequence[int] | np.ndarray | None = None,
        prompts: Sequence[str] = (),
        **options: Any,
    ) -> np.ndarray:
        """n images, uint8 [n, C, H, W].

        n: how many.
        seed: of the noise; image i is a function of (seed, i).
        labels: classes [m] by number, or [m, K], that the images take in turn; None: each class in turn.
        prompts: texts that the images take in turn.
        options: keywords of the model's `sample`, as `steps=20`; they go before those of the recipe.

        Raises UsageError for an option that the model does not have, or labels where it takes none.
        """
        y = None if labels is None else self._labels(labels, n)
        given = {"prompt": list(prompts)} if prompts else {}
        keywords = self._known("sample", options)
        return sampler.draw(self.trained, n, seed=seed, labels=y, given=given, options=keywords)

    def log_prob(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """The log-likelihood of each image, float64 [N] nats of the discrete image.

        images: uint8 [N, C, H, W].
        labels: the class of each image [N] by number, or [N, K]; None: without labels.
        seed: of the noise.
        options: keywords of the model's `log_prob`, as `steps=100`.

        Raises UsageError where the model has no likelihood of images.
        """
        if self.trained.space is not None or not hasattr(self.model, "log_prob"):
            raise UsageError(
                f"`{self.trained.name}` has no likelihood of images", hint="gz list models --can log_prob"
            )
        keywords = grouped(self.model.log_prob, self._known("log_prob", options))
        y = None if labels is None else self._labels(labels, len(images))
        found = [np.zeros(0)]
        for batch in self._batches(images, seed):
            own = None if y is None else y[batch.index.cpu()].to(self.trained.device)
            with torch.no_grad():
                value = self.model.log_prob(batch.x, own, noise=batch.noise, **keywords)
            found.append(value.cpu().double().numpy())
        return np.concatenate(found)

    def score(self, images: np.ndarray, name: str, *, seed: int = 0, **options: Any) -> np.ndarray:
        """An out-of-distribution score of each image, float64 [N]; higher is more out-of-distribution.

        images: uint8 [N, C, H, W].
        name: of the score, as `gz ood --score` has it.
        seed: of the noise.
        options: keywords of the score.

        Raises UsageError for a score, or an option of it, that the model does not have.
        """
        (known,) = choose(self.trained, [name.replace("-", "_")])
        scorer = Scorer(self.trained, [known], options=options, seed=seed)
        if scorer.unused:
            raise UsageError(f"the score `{known}` does not take `{scorer.unused[0]}`")
        if scorer.is_fitted():
            scorer.fit(self._split("val", FITTED_ON, seed), self._split("train", BANK, seed))
        return np.concatenate([np.zeros(0), *(scorer(batch)[known] for batch in self._batches(images, seed))])

    def do(
        self,
        application: str,
        images: np.ndarray,
        *,
        seed: int = 0,
        labels: Sequence[int] | np.ndarray | None = None,
        mask: np.ndarray | None = None,
        **options: Any,
    ) -> np.ndarray:
        """What an application makes of images, uint8 [M, C, H, W], in the order of `gz sample --do`.

        application: "reconstruct", "inpaint", … as `gz list models` tells.
        images: uint8 [N, C, H, W].
        seed: of the noise.
        labels: classes [m] by number that the images take in turn.
        mask: 0/1 [H, W], 1 where the images are kept.
        options: keywords of the application.

        Raises UsageError for an application that the model does not have.
        """
        method = getattr(self.model, application, None)
        if method is None:
            raise UsageError(f"`{self.trained.name}` does not {application}", hint="gz list models")
        x = self._seen(images, range(len(images)), seed)
        keywords = dict(self._known(application, options))
        if labels is not None:
            keywords["labels"] = self._labels(labels, len(images)).to(self.trained.device)
        if mask is not None:
            kept = torch.from_numpy(np.asarray(mask, np.float32)).to(self.trained.device)
            keywords["mask"] = kept.expand(len(images), 1, *kept.shape[-2:])
        noise = ImageNoise(seed, range(len(images)), self.trained.device)
        made = method(x, noise=noise, progress=no_progress, **grouped(method, keywords))
        return to_uint8(self.trained.shown(made.images)).cpu().numpy()

    def __repr__(self) -> str:
        size = "×".join(map(str, self.info.shape))
        return f"<gzcli.Run {self.id}: {self.trained.part.model}, {size}, step {self.trained.step:,}>"

    # ------------------------------------------------------------------------------------------ helpers

    def _known(self, method: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options. Raises UsageError for one that the method does not have."""
        from gzcli.models.options import defaults

        known = defaults(getattr(self.model, method))
        for name in options:
            if name not in known:
                raise UsageError(f"`{method}` of `{self.trained.name}` takes no `{name}`")
        return options

    def _labels(self, labels: Sequence[int] | np.ndarray, n: int) -> Tensor:
        """[n] int64, or float [n, K], of the m labels that are taken in turn."""
        y = torch.as_tensor(np.asarray(labels))
        if y.ndim == 1 and self.info.multilabel:
            y = torch.nn.functional.one_hot(y.long(), len(self.info.classes))
        y = y[torch.arange(n) % len(y)]
        return y.long() if y.ndim == 1 else y.float()

    def _pixels(self, images: np.ndarray, index: range, seed: int) -> Tensor:
        """Images of these numbers as the model's grey levels, [B, C, H, W] in [-1, 1] on the device."""
        u8 = torch.from_numpy(np.ascontiguousarray(images))
        if u8.dtype != torch.uint8 or tuple(u8.shape[1:]) != self.info.shape:
            raise UsageError(
                f"images must be uint8 [N, {', '.join(map(str, self.info.shape))}], not {u8.dtype} "
                f"{list(u8.shape)}"
            )
        x = quantise(u8[index.start : index.stop], self.info.levels, ImageNoise(seed, index))
        return x.to(self.trained.device)

    def _seen(self, images: np.ndarray, index: range, seed: int) -> Tensor:
        x = self._pixels(images, index, seed)
        return x if self.trained.space is None else self.trained.space.encode(x)

    def _batches(self, images: np.ndarray, seed: int) -> Iterator[Batch]:
        device = self.trained.device
        for start in range(0, len(images), BATCH):
            index = range(start, min(start + BATCH, len(images)))
            x = self._pixels(images, index, seed)
            positions = torch.arange(index.start, index.stop, device=device)
            yield Batch(x, None, positions, ImageNoise(seed, index, device))

    def _split(self, split: str, most: int, seed: int) -> Images:
        pack = self.data.pack
        index = np.sort(np.random.default_rng(0).permutation(pack.meta.counts[split])[:most])
        return Images.of(self.trained, pack, split, index, size=BATCH, seed=seed)


def train(
    what: str,
    *,
    data: str | Path | None = None,
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
) -> Run:
    """Trains a model in processes of its own, as `gz train` does, and loads what came out.

    what: a model, a recipe's path, a model's file, or a run to repeat.
    data: the set, a name or path; None: that of the recipe.
    steps: how many; None: as the recipe says.
    minutes: as many steps as fit in this time.
    seed: of weights and noise.
    name: an alias of the run.
    resume: go on with the newest unfinished run, or the run that `what` names.
    gpus: how many, or "all"; None: every visible one.
    cpu: leave GPUs alone.
    processes: of a CPU.
    set: keys of the recipe, {"model.hidden": 16} or ["model.hidden=16"].
    quiet: print nothing meanwhile.

    Raises the errors of `gzcli.errors`: UsageError, MissingError, DeviceError, DivergedError, Interrupted.
    """
    if steps and minutes:
        raise UsageError("`steps` and `minutes` exclude each other")
    given = {
        "train.steps": steps,
        "train.minutes": minutes,
        "seed": seed,
        "launch.gpus": gpus,
        "launch.cpu": cpu or None,
        "launch.processes": processes,
    }
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if isinstance(set, Mapping):
        flags |= {key: list(v) if isinstance(v, tuple) else v for key, v in set.items()}
    sets = [] if isinstance(set, Mapping) else set
    asked = planning.ask(what, None if data is None else str(data), sets, flags)
    run = asked.to_resume(extend=steps is not None) if resume else None
    plan = launch.plan(asked.recipe.launch, every_gpu=True)
    recipe = planning.ready(asked, run, steps, plan.processes)
    run = planning.start(asked, recipe, plan, run, alias=name, mode="quiet" if quiet else "human")
    return Run(load_trained(run, pick_device(recipe.launch)))


def load(
    what: str | Path, *, data: str | None = None, checkpoint: str | int = "last", device: str | None = None
) -> Run:
    """The trained model that a name means.

    what: a run's id, alias or folder, a model, whose newest finished run is taken, or a `model.safetensors`.
    data: the set of that run, where a model is named.
    checkpoint: "last", "best" or a step.
    device: as torch names it; None: a GPU if there is one.

    Raises MissingError where there is none, UsageError where nothing is called so.
    """
    run = find_run(str(what), data=data)
    where = torch.device(device) if device else pick_device(LaunchSection())
    return Run(load_trained(run, where, str(checkpoint)))


def datasets() -> list[dict[str, Any]]:
    """What is known of each data set, as `gz list data --json` has it: name, title, classes, cached, …"""
    return listing()


def open_data(name: str | Path, *, size: int | None = None, channels: int | None = None) -> Data:
    """A data set, fetched (up to 200 MB) and packed now if need be.

    name: a known set, an imported one, or a path.
    size: side of the images in pixels; None: as the set has it.
    channels: 1 or 3; None: as the set has it.

    Raises UsageError for an unknown name, MissingError where its files are not there.
    """
    return Data(open_named(name, size=size, channels=channels))
