"""Builds the model of a recipe, or loads that of a run: its weights, the stages that it is built on, and the
latent space in which it was trained.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gzcli.core import devices
from gzcli.core.errors import DamagedError, GzError, MissingError, UsageError, canonical, first_line
from gzcli.core.hints import Option, advice, gz
from gzcli.core.sections import RECIPE_FORMAT, Part, part_of, renamed
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.core.units import as_size
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.open import PackOptions
from gzcli.data.packs.pack import Pack, ValuePack
from gzcli.data.readers.values import Values
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine.checkpoint import Saved, SpaceRecord
from gzcli.engine.log import Log
from gzcli.models import catalog
from gzcli.models.base import Model, flat_defaults
from gzcli.models.catalog import ModelCard
from gzcli.models.nn import within
from gzcli.store import layout, rates, runs
from gzcli.store.files import check_folder, checksum, read_tensors
from gzcli.store.hub import repository
from gzcli.store.paths import recipe_names
from gzcli.store.runs import Run

MAX_NAMED_LAYERS = 4  # maximum number of layers that a log line names
UNCHECKED_NUMBER = 16_384  # largest number of a recipe that needs no check against its weights


def build_model(
    part: Part, info: DataInfo, stages: Mapping[str, Model] | None = None, card: ModelCard | None = None
) -> Model:
    """The model of a recipe, on the CPU so that its weights depend only on the seed, not on the device."""
    cls = catalog.load_class(card or catalog.card(part.model))
    torch.manual_seed(part.seed)
    defaults = flat_defaults(cls)
    options = {renamed(key, defaults, "model"): value for key, value in part.options.items()}  # of older runs
    model = cls.of(info, **options, **(stages or {}))
    if part.format < RECIPE_FORMAT:
        model.on_format(part.format)
    return model


def stages_for(run: Run, card: ModelCard, device: torch.device | str) -> dict[str, Model]:
    """The trained models of earlier stages of `run` that a model is built on, by stage."""
    return {stage: load_model(run.owner.stage(stage), device)[0] for stage in card.stages}


def built_on(run: Run, card: ModelCard) -> dict[str, str]:
    """The sha256 of the weights of each stage that a model is built on, by stage."""
    return {stage: checksum(run.owner.stage(stage).model_file) for stage in card.stages}


def load_model(run: Run, device: torch.device | str, checkpoint: str = "finished") -> tuple[Model, Saved]:
    """The model of a run in eval mode with its averaged weights, and what was saved with them. `checkpoint`
    is "last" (the newest, also during the training), "best", a step, or "finished" (`model.safetensors`,
    which no longer changes)."""
    run = run.serving
    with _named(run):
        saved = checkpoints.read_weights(weights_file(run, checkpoint))
        card = catalog.card_of(run, saved.part.model)
        for stage, digest in built_on(run, card).items():
            if digest != saved.built_on.get(stage):
                message = f"`{run.id}` was trained with a different stage `{stage}`"
                hint = gz("train", run.owner.model, data=run.owner.data)
                raise MissingError(f"{message} than `{run.owner.stage(stage).path}`", hint=hint)
        model = restore_model(saved, stages_for(run, card, device), card)
    return to_device(model, device).eval().requires_grad_(False), saved


@contextmanager
def _named(run: Run) -> Iterator[None]:
    """In errors within the block, names the file that the user passed instead of its copy in the cache."""
    try:
        yield
    except DamagedError as e:
        if not (file := run.owner.status().get("file")):
            raise
        copy = f"`{run.model_file}`"
        message = e.message.replace(copy, f"`{file}`") if copy in e.message else f"`{file}`: {e.message}"
        raise DamagedError(message, hint="get a new copy of the file, or use its run") from e


def restore_model(
    saved: Saved, stages: Mapping[str, Model] | None = None, card: ModelCard | None = None
) -> Model:
    """The model of saved weights, on the CPU."""
    _check_sizes(saved)
    try:
        model = build_model(saved.part, saved.info, stages, card)
        keys = model.load_state_dict(saved.weights, strict=False)
    except GzError:
        raise
    except Exception as e:  # a model may do anything with a nonsensical value
        message = f"the recipe in the weights file does not build a `{saved.part.model}`: {first_line(e)}"
        raise DamagedError(message, hint="use another checkpoint, or the original file") from e
    # per-rank extra state is not part of the weights
    missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
    if wrong := [*missing, *keys.unexpected_keys]:
        further = f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        raise DamagedError(
            f"the weights are from another version of `{saved.part.model}`: "
            f"{'missing' if missing else 'unknown'} `{wrong[0]}`{further}",
            hint="use the version of gz that wrote the weights, or train the model again",
        )
    for name, _ in model.named_parameters():  # a buffer may be infinite, as a mask is
        if not saved.weights[name].isfinite().all():
            message = f"the weights `{name}` of `{saved.part.model}` are not finite"
            raise DamagedError(message, hint="use another checkpoint, or train the model again")
    return model


def _check_sizes(saved: Saved) -> None:
    """Raises DamagedError for a recipe's number that is too large for these weights. Building such a model
    would take all memory."""
    shapes = [tensor.shape for tensor in saved.weights.values()]
    most = max(UNCHECKED_NUMBER, len(shapes), *(side for shape in shapes for side in shape))
    numbers = [*tree_leaves(saved.part.options), *saved.info.shape, len(saved.info.classes)]
    if beyond := [n for n in numbers if isinstance(n, int | float) and abs(n) > most]:
        raise DamagedError(
            f"the recipe in the weights file does not match the weights: it contains "
            f"the number {beyond[0]:g}, but no tensor has a side above {most:,}"
        )


def to_device(model: Model, device: torch.device | str) -> Model:
    """The model on its device. On a GPU, weights of convolutions are in channels-last format, which its
    matrix units require."""
    model = model.to(device)
    if devices.device_kind(device).channels_last:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                for p in module.parameters(recurse=False):
                    if p.ndim == 4:
                        p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def weights_file(run: Run, checkpoint: str) -> Path:
    """The file with the averaged weights of a checkpoint, for a stage or a run without stages. Raises
    MissingError."""
    if checkpoint == "last" and run.weights:
        return run.weights
    if checkpoint in ("last", "finished"):
        return run.model_file
    if checkpoint != "best":
        step = int(checkpoint)
    elif run.best:
        step = run.best.step
    else:
        message = f"no best checkpoint in `{run.checkpoints_folder}`"
        hint = advice("use {}; `train.best: none` keeps no best checkpoint", Option("checkpoint", "STEP"))
        raise MissingError(message, hint=hint)
    path = run.checkpoint(step).averaged
    if not path.exists():
        have = ", ".join(map(str, run.saved_steps)) or "none"
        raise MissingError(
            f"`{run.id}` has no checkpoint of step {step}", hint=f"steps with checkpoints: {have}"
        )
    return path


# ---------------------------------------------------------------------------- weights to start from


def init_from(model: Model, part: Part, run: Run, log: Log) -> None:
    """Initialises a new model of `run` from the weights that `train.init` names: an earlier stage, another
    run, or a safetensors file. If the data differ, layers whose shape depends on the data start from scratch,
    which is reported. Raises MissingError if there are no weights, UsageError if they are of another
    architecture."""
    file, present = _file_to_start_from(part, run), model.state_dict()
    try:
        values, texts = read_tensors(file)
        earlier = _earlier(texts)
    except DamagedError as e:
        hint = "use the name of a run or a stage, or a `model.safetensors`"
        raise UsageError(f"`train.init`: {e.message}", hint=hint) from e
    changed: list[str] = []
    anew: dict[str, Tensor] = {}
    weights, wider = values, list[str]()
    if earlier is None or earlier[1].shape[0] == model.data.shape[0]:
        weights, wider = with_zero_inputs(values, present)
    if earlier:
        _check_architecture(model, part, *earlier, values, run)
        if changed := _changes(earlier[1], model.data):
            weights, anew = _of_other_data(model, *earlier, weights, log)
        else:
            weights = {name: value for name, value in weights.items() if name in present}
    if wider:
        log.info(f"`train.init`: inputs that are new to these weights start at zero: {', '.join(wider)}")
    initial = {name: value for name, value in present.items() if earlier and name not in weights} | anew
    if fresh := [name for name in initial if not name.endswith(checkpoints.EXTRA_STATE)]:
        numbers = {name: p.numel() for name, p in model.named_parameters()}
        share = sum(numbers.get(name, 0) for name in fresh) / max(1, sum(numbers.values()))
        if share == 1:
            raise UsageError(f"`train.init`: the weights of `{file}` share no layer with this `{part.model}`")
        why = f" ({', '.join(changed)})" if changed else ""
        log.info(
            f"`train.init`: these layers start from scratch{why}, {100 * share:.2g} % of the parameters: "
            f"{_some(fresh)}"
        )
    try:
        checkpoints.load(model, weights | initial | checkpoints.extra_of(present))
    except RuntimeError as e:
        message = f"`train.init`: the weights of `{file}` do not fit this model"
        raise UsageError(message, hint=str(e).splitlines()[-1].strip()) from e


def _of_other_data(
    model: Model,
    options: Mapping[str, Any],
    earlier: DataInfo,
    weights: Mapping[str, Tensor],
    log: Log,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model for earlier data that `model` can use, and the values that restart although
    their shapes match. A log line names the missing layers."""
    present, parameters = model.state_dict(), dict(model.named_parameters())
    info = replace(earlier, classes=earlier.classes if options.get("conditional") else ())
    anew = model.begins_anew(info, weights)
    if dropped := [
        name for name in weights if name not in present and not name.endswith(checkpoints.EXTRA_STATE)
    ]:
        log.info(f"`train.init`: unused layers of the weights: {_some(dropped)}")
    fit = {n: v for n, v in weights.items() if n in present and v.shape == present[n].shape}
    changed = {n: v for n, v in anew.items() if n in fit and n in parameters}  # because of missing layers
    suitable = {n: v for n, v in fit.items() if n not in anew} | changed
    return suitable, {n: v for n, v in anew.items() if n not in changed}


def _some(names: Sequence[str]) -> str:
    """The first of some names, in words."""
    return ", ".join(f"`{name}`" for name in names[:MAX_NAMED_LAYERS]) + (
        " …" if len(names) > MAX_NAMED_LAYERS else ""
    )


def with_zero_inputs(
    weights: dict[str, Tensor], present: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights, padded with zeros for convolutions that have more input channels now, and the names of the
    padded ones. A model with a condition as additional channels thus starts like the unconditional one."""
    wider = {}
    for name, value in weights.items():
        shape = present[name].shape if name in present else value.shape
        missing = shape[1] - value.shape[1] if value.ndim == 4 and len(shape) == 4 else 0
        if missing > 0 and (shape[0], *shape[2:]) == (value.shape[0], *value.shape[2:]):
            wider[name] = torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)
    return weights | wider, list(wider)


def _file_to_start_from(part: Part, run: Run) -> Path:
    """The file that `train.init` names. Raises MissingError if it is missing, or if it is not the file of
    `parent`."""
    file, parent = Path(str(part.train.init)).expanduser(), part.train.parent
    if not file.is_file() and not parent:
        stage = next((stage for stage in run.owner.stages if stage.path.name == part.train.init), None)
        file = (stage or runs.find(str(part.train.init)).serving).model_file
    if not file.exists():
        raise MissingError(f"`train.init`: no weights at `{file}`", hint=parent or gz("runs list"))
    if parent and checksum(file) != parent.rpartition(":")[2]:
        message = f"`train.init`: `{file}` is no longer `{parent.partition(' ')[0]}`"
        raise MissingError(message, hint="restore those weights, or set `train.init` again")
    return file


def _earlier(texts: Mapping[str, str]) -> tuple[Mapping[str, Any], DataInfo] | None:
    """The model's options and data that a weights file records; None for a file that gz did not write."""
    try:
        return json.loads(texts["recipe"])["model"], DataInfo.of(json.loads(texts["data"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _changes(earlier: DataInfo, data: DataInfo) -> list[str]:
    """In words, the properties of the data that determine the shapes of layers and differ from the earlier
    data."""
    pairs = {
        "channels": (earlier.shape[0], data.shape[0]),
        "classes": (len(earlier.classes), len(data.classes)),
        "levels": (earlier.levels or 0, data.levels or 0),
        "pixels": (earlier.shape[1:], data.shape[1:]),
    }
    words = lambda value: "×".join(map(str, value)) if isinstance(value, tuple) else value  # noqa: E731
    return [f"{words(now)} {n} instead of {words(was)}" for n, (was, now) in pairs.items() if was != now]


def _check_architecture(
    model: Model,
    part: Part,
    options: Mapping[str, Any],
    earlier: DataInfo,
    shapes: Mapping[str, Tensor],
    run: Run,
) -> None:
    """Raises UsageError if the model, built for the data of some weights, has other shapes than these
    weights."""
    differ = {
        key: (options[key], value)
        for key, value in {"name": part.model, **part.tree()["model"]}.items()
        if key in options and options[key] != value
    }
    if not differ:
        return
    if len(earlier.classes) != len(model.data.classes) and differ.keys() == {"conditional"}:
        return
    info, card = replace(earlier, classes=earlier.classes or model.data.classes), catalog.card(part.model)
    try:
        with torch.device("meta"):
            twin = build_model(part, info, stages_for(run, card, "cpu"), card).state_dict()
    except Exception:  # a model may need values when it is built; then its shapes are compared at loading
        return
    shared = {name for name in shapes if name in twin}
    padded = with_zero_inputs({name: shapes[name].to("meta") for name in shared}, twin)[0]
    numbers = sum(value.numel() for name, value in twin.items() if not name.endswith(checkpoints.EXTRA_STATE))
    if 2 * sum(twin[name].numel() for name in shared) < numbers or any(
        padded[name].shape != twin[name].shape for name in shared
    ):
        there = ", ".join(f"`model.{key}` {was} instead of {now}" for key, (was, now) in differ.items())
        raise UsageError(
            f"`train.init`: the weights have a different architecture from this `{part.model}`",
            hint=f"they have {there}",
        )


# ---------------------------------------------------------------------------- latent spaces


class LatentSpace:
    """The latents (to_latent(x) − shift) · scale of images x, with about unit standard deviation per
    channel."""

    def __init__(self, autoencoder: Any, record: SpaceRecord):
        """`autoencoder` has `to_latent`, [B, C, H, W] → [B, c, h, w], and its inverse `from_latent`."""
        self.autoencoder, self.record = autoencoder, record
        self.shift, self.scale = (torch.tensor(v)[:, None, None] for v in (record.shift, record.scale))

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents [B, c, h, w] of images x [B, C, H, W]. With `noise` they are drawn from the posterior,
        which only a `DiffusersVAE` supports."""
        z = self.autoencoder.to_latent(x, *([] if noise is None else [noise]))
        return (z - self.shift.to(z)) * self.scale.to(z)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of latents z [B, c, h, w]."""
        return within(self.autoencoder.from_latent(z / self.scale.to(z) + self.shift.to(z)))

    def info(self, data: DataInfo) -> DataInfo:
        """The description of the data for a model on latents, with the latents' shape."""
        device = next(self.autoencoder.parameters()).device
        shape = tuple(self.encode(torch.zeros(1, *self.record.shape, device=device)).shape[1:])
        return replace(data, shape=shape, levels=None)


class DiffusersVAE(nn.Module):
    """An `AutoencoderKL` of diffusers, which encodes to the mode of its posterior or to a draw from it."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae: Any = vae

    def to_latent(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        if noise is None:
            return posterior.mode().float()
        mean, std = posterior.mean.float(), posterior.std.float()
        return mean + std * noise.randn(*mean.shape)

    def from_latent(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


def find_autoencoder(name: str, device: torch.device | str) -> tuple[Any, DataInfo | None, str]:
    """The autoencoder, the data that it was trained on (None for any images) and the sha256 of its weights.
    It is the model of a run, or the `DiffusersVAE` of a folder or a hub repository."""
    if run := autoencoder_run(name):
        model, saved = load_model(run, device)
        return model, saved.info, checksum(run.model_file)
    from diffusers import AutoencoderKL

    patterns = ["*.json", "vae/*.json", "*model.safetensors", "vae/*model.safetensors"]
    folder = repository(name, key="data.latent", files=patterns)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    check_folder(folder)
    try:
        weights, _ = autoencoder_weights(folder)
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as e:  # of gz, diffusers, safetensors and torch, which share no error class
        message = f"`data.latent`: `{folder}` contains no `AutoencoderKL` in safetensors: {first_line(e)}"
        raise MissingError(message, hint=layout.COPY) from e
    return DiffusersVAE(vae.to(device).eval().requires_grad_(False)), None, checksum(weights)


def autoencoder_weights(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file of an `AutoencoderKL`, and its configuration. The sizes of both agree, so that
    building it takes no more memory than the file has. Raises MissingError if a part is missing or
    damaged."""
    from diffusers import AutoencoderKL

    config_file = folder / layout.CONFIG
    config = layout.config(config_file, ("block_out_channels", "latent_channels", "out_channels"))
    paths = layout.weight_files(folder, "*model.safetensors")
    if len(paths) > 1:
        raise MissingError(f"`{folder}` contains several autoencoders", hint=f"remove `{paths[1].name}`")
    try:
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(config)
    except Exception as e:  # the sizes are bounded, but a layer may refuse them
        message = f"`{config_file}` describes no `AutoencoderKL`: {first_line(e)}"
        raise DamagedError(message, hint=layout.COPY) from e
    described = sum(p.numel() for p in vae.parameters())
    stored = sum(map(math.prod, layout.shapes(paths).values()))
    if described != stored:
        message = f"`{paths[0]}` contains {stored:,} numbers, but its `{layout.CONFIG}` describes"
        raise DamagedError(f"{message} {described:,}", hint=layout.COPY)
    return paths[0], config


def autoencoder_run(name: str) -> Run | None:
    """The run, or the stage of a run, that `data.latent` refers to; None for an `AutoencoderKL`."""
    is_model = canonical(name) in map(canonical, recipe_names())
    run = runs.by_name(name) or (runs.find(name) if is_model else None)
    if run is None:
        return None
    for stage in run.stages or [run]:
        if "latent" in catalog.card_of(stage, part_of(stage.tree()).model).can:
            return stage
    message = f"`data.latent`: `{run.id}` has no image latents"
    raise UsageError(message, hint=gz("list", "models", can="latent"))


# ---------------------------------------------------------------------------- trained models


@dataclass
class Trained:
    """A model that samples and scores, with its recipe: on its device, in eval mode, with its averaged
    weights. The trainer's model is in this state only within `EMA.evaluating`."""

    run: Run  # the model's run, or the stage of a run
    model: Model
    info: DataInfo  # description of the images or latents for which the model was built
    part: Part
    device: torch.device
    step: int  # number of steps of its training; 0 during the training
    space: LatentSpace | None = None  # None: pixels
    values: Values | None = None  # kind of its images, if these are not 8-bit; the model reads all channels
    # None: the precision of the training for samples, fp32 for scores. Likelihoods are always in fp32.
    requested_precision: str | None = None
    # outputs of `prepare` for validation images, by the first one of a batch and their number
    memory: dict[tuple[int, int], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The precision of samples: fp32, bf16 or fp16. On a CPU, which lacks fp16, fp16 becomes `auto`."""
        requested, kind = self.requested_precision or self.part.train.precision, self.device.type
        lacks = requested == "fp16" and not devices.device_kind(kind).fp16
        return rates.chosen_precision("auto" if lacks else requested, kind)

    def sampling(self) -> AbstractContextManager[None]:
        """The autocast of samples, in the precision of the training unless another is requested."""
        return self._autocast(self.precision)

    def applying(self) -> AbstractContextManager[None]:
        """The autocast of applications. For a model with an exact likelihood it is fp32, because a flow must
        invert its latents."""
        return self._autocast("fp32" if self.model.likelihood == "exact" else self.precision)

    def label_keywords(self, do: str, labels: Tensor | None, y: Tensor | None) -> dict[str, Tensor]:
        """The labels for an application, by the keywords that it takes.

        labels: the labels that the user named, or None.
        y: the labels of the images, or None if they are unknown. An application without a separate keyword
          for them gets them as `labels`, because its outputs keep the class of their images.

        Raises UsageError for labels that the application or the model does not take.
        """
        takes = inspect.signature(getattr(self.model, do)).parameters
        if labels is not None and "labels" not in takes:
            raise UsageError(f"`{do}` of `{self.name}` takes no labels")
        if labels is not None and not (self.model.conditional or do in self.model.labels_for):
            raise UsageError(f"`{self.name}` was not trained with labels")
        keywords = {"labels": labels, "y": y}
        if labels is None and "y" not in takes and self.model.conditional:
            keywords["labels"] = y
        return {key: value for key, value in keywords.items() if key in takes and value is not None}

    def scoring(self) -> AbstractContextManager[None]:
        """The autocast of scores: fp32 unless another precision is requested. Scores are compared across
        devices, and bf16 changes some by 3 %."""
        return self._autocast(self.precision if self.requested_precision else "fp32")

    def _autocast(self, precision: str) -> AbstractContextManager[None]:
        half = devices.half(precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    @property
    def images(self) -> DataInfo:
        """The description of the images, even for a model on latents. For values beyond 8 bits, it describes
        their 8-bit images."""
        if self.values is not None:
            return replace(self.info, shape=(len(self.values.bands), *self.info.shape[1:]), levels=256)
        if self.space is None:
            return self.info
        return replace(self.info, shape=tuple(self.space.record.shape), levels=self.space.record.levels)

    @property
    def form(self) -> PackOptions:
        """The form of the training images. Other images are read for the model in the same form."""
        channels, *sides = self.images.shape
        data, patch = self.part.data, patch_of(self.part.data.augment)
        size = data.size if patch else as_size(*sides)
        return PackOptions(size=size, channels=channels, fit=data.fit, patch=patch)

    @property
    def has_levels(self) -> bool:
        """Whether the model's likelihood is one of discrete images, rather than of latents or real
        numbers."""
        return self.space is None and self.info.levels is not None

    def seen(self, pack: Pack) -> Pack:
        """Images in the form that the model reads. Raises UsageError for 8-bit images if it models other
        values."""
        if self.values is None:
            return pack
        channels, values = self.info.shape[0], pack.meta.values or {}
        if values.get("channels") != channels or (values["levels"] is None) != (self.values.levels is None):
            kind = Values.of(values).words if values else "8-bit images"
            message = f"`{pack.meta.name}` has {kind}, but `{self.title}` was trained on {self.values.words}"
            raise UsageError(message, hint="pass images of the same kind: `.npy`, `.npz` or TIFF")
        seen = pack.seen(values["levels"])
        return seen.scaled_as(self.values) if isinstance(seen, ValuePack) else seen

    def encode(self, batch: Batch) -> Batch:
        """A batch of images in the model's space: latents if it has a latent space."""
        return batch if self.space is None else replace(batch, x=self.space.encode(batch.x))

    def decode(self, x: Tensor) -> Tensor:
        """The images [B, C, H, W] in [-1, 1] of the model's output, decoded if it is latent. For values
        beyond 8 bits, these are their 8-bit images."""
        if self.values is not None:
            return x[:, list(self.values.bands)]
        return x if self.space is None else self.space.decode(x)

    @property
    def name(self) -> str:
        """The name of the model; for a stage, that of the whole run's model."""
        return self.run.owner.status().get("model") or self.part.model

    @property
    def title(self) -> str:
        """The model's name for the user, such as `fm +100 clusters`."""
        owner = self.run.owner
        return owner.title if owner.status().get("model") else self.part.title

    @property
    def guidance(self) -> float | None:
        """The guidance scale of its samples; None for a model that cannot be guided."""
        scale = getattr(self.model, "guidance_scale", None)
        return float(scale(self.part.sample.get("guidance"))) if scale else None

    @property
    def title_of_samples(self) -> str:
        """The title of its samples, such as `fm +100 clusters, guided 1.3`. Likelihoods are computed without
        guidance."""
        return self.title if self.guidance in (None, 1.0) else f"{self.title}, guided {self.guidance:g}"


def load_trained(
    run: Run, device: torch.device | str, checkpoint: str = "finished", precision: str | None = None
) -> Trained:
    """The trained model of a run; `checkpoint` and errors are those of `load_model`."""
    if precision == "fp16" and not devices.device_kind(device).fp16:
        raise UsageError(
            "precision `fp16` needs a GPU", hint="use `bf16`, which works on many CPUs, or `fp32`"
        )
    model, saved = load_model(run, device, checkpoint)
    space = None
    if saved.space is not None:
        bundled = run.owner.latent_folder  # a run that came as one file brings its autoencoder
        name = str(bundled) if bundled.is_dir() else str(saved.part.data.latent)
        autoencoder, _, digest = find_autoencoder(name, device)
        if digest != saved.space.digest:
            message = f"`data.latent`: `{name}` is not the autoencoder that this run was trained with"
            raise MissingError(message)
        space = LatentSpace(autoencoder, saved.space)
    device = torch.device(device)
    facts = (saved.info, saved.part, device, saved.step, space, saved.values, precision)
    return Trained(run.serving, model, *facts)
