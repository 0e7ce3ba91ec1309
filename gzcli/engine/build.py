"""From a recipe, or the folder of a trained run, to its model and to the stages that it is built on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from gzcli.core.devices import kind_of
from gzcli.core.errors import DamagedError, GzError, MissingError, first_line
from gzcli.core.parts import Part
from gzcli.core.types import DataInfo
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine.checkpoint import Saved
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.models.catalog import ModelCard
from gzcli.store import files
from gzcli.store.files import checksum
from gzcli.store.runs import Run

USUAL = 16_384  # up to which numbers of a recipe are taken as they are


def build_model(
    part: Part, info: DataInfo, stages: Mapping[str, Model] | None = None, card: ModelCard | None = None
) -> Model:
    """The model of a recipe on the CPU: so its weights are a function of the seed on every device.

    stages: the trained models of earlier stages that it is built on, by stage.
    card: card of the model, where a run holds the model's file; None: that of the name in the recipe.
    """
    cls = catalog.load_class(card or catalog.card(part.model))
    torch.manual_seed(part.seed)
    return cls.of(info, **part.options, **(stages or {}))


def stages_for(run: Run, name: str, device: torch.device | str) -> dict[str, Model]:
    """The trained models of earlier stages of `run` that a model called `name` is built on, by stage."""
    return {
        stage: load_model(run.owner.stage(stage), device)[0] for stage in catalog.card_of(run, name).stages
    }


def built_on(run: Run, name: str) -> dict[str, str]:
    """The sha256 of the weights of each stage that a model called `name` is built on, by stage."""
    return {stage: checksum(run.owner.stage(stage).model_file) for stage in catalog.card_of(run, name).stages}


def load_model(run: Run, device: torch.device | str, checkpoint: str = "finished") -> tuple[Model, Saved]:
    """The model of a run in eval mode with its averaged weights, and what was saved with them.

    run: one in stages stands for its last stage.
    checkpoint: "last", "best", "finished" or a step. "finished" is `model.safetensors`, which does not change
      any more, for what is trained on top of it; "last" is the newest checkpoint while the run is trained.

    Raises MissingError where there is no such checkpoint, where it is damaged, or where an earlier stage has
    other weights than the model was trained with.
    """
    run = run.serving
    saved = checkpoints.read_weights(weights_file(run, checkpoint))
    for stage, found in built_on(run, saved.part.model).items():
        if found != saved.built_on.get(stage):
            raise MissingError(
                f"`{run.id}` was trained with another stage `{stage}` than `{run.owner.stage(stage).path}`",
                hint=f"gz train {run.owner.model} --data {run.owner.data}",
            )
    name = saved.part.model
    stages = stages_for(run, name, device)
    model = restored(saved, stages, catalog.card_of(run, name))
    return placed(model, device).eval().requires_grad_(False), saved


def restored(saved: Saved, stages: Mapping[str, Model] | None = None, card: ModelCard | None = None) -> Model:
    """The model of saved weights, on the CPU.

    stages, card: as of `build_model`.

    Raises DamagedError where recipe and weights do not belong together: a file may be a stranger's.
    """
    _check_sizes(saved)
    try:
        model = build_model(saved.part, saved.info, stages, card)
        found = model.load_state_dict(saved.weights, strict=False)
    except GzError:
        raise
    except Exception as e:  # a model may do anything with a value that makes no sense
        message = f"no `{saved.part.model}` can be made of the recipe in its weights' file: {first_line(e)}"
        raise DamagedError(message, hint="use another checkpoint, or the file as it was written") from e
    # per-rank extra state is not part of the weights
    missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
    if amiss := [*missing, *found.unexpected_keys]:
        more = f" and {len(amiss) - 1:,} more" if len(amiss) > 1 else ""
        raise DamagedError(
            f"the weights of `{saved.part.model}` are of another version of it: `{amiss[0]}`{more} "
            f"{'missing' if missing else 'unknown'}",
            hint="use the version of gz that wrote them, or train it again",
        )
    for name, _ in model.named_parameters():  # a buffer may be infinite, as a mask is
        if not saved.weights[name].isfinite().all():
            raise DamagedError(
                f"the weights `{name}` of `{saved.part.model}` are not finite",
                hint="use another checkpoint, or train it again",
            )
    return model


def _check_sizes(saved: Saved) -> None:
    """Raises DamagedError for a number that no model with these weights has: it would take all memory."""
    shapes = [tensor.shape for tensor in saved.weights.values()]
    most = max(USUAL, len(shapes), *(side for shape in shapes for side in shape))
    numbers = [*_numbers(saved.part.options), *saved.info.shape, len(saved.info.classes)]
    if beyond := [number for number in numbers if abs(number) > most]:
        raise DamagedError(
            f"the recipe in the weights' file has the number {beyond[0]:g}, and its largest tensor "
            f"the side {most:,}: it is no recipe of these weights"
        )


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a value, in lists and maps too."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for below in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(below)


def placed(model: Model, device: torch.device | str) -> Model:
    """The model on its device. On a GPU, weights of convolutions lie with channels last, as its matrix units
    read them, and so do the feature maps that they make. On a CPU that gains nothing: oneDNN has layouts of
    its own."""
    model = model.to(device)
    if kind_of(device).channels_last:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                for p in module.parameters(recurse=False):
                    if p.ndim == 4:
                        p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def weights_file(run: Run, checkpoint: str) -> Path:
    """The file of the averaged weights of a checkpoint of a run that is not in stages, or of a stage. Raises
    MissingError."""
    if checkpoint == "last" and run.weights:
        return run.weights
    if checkpoint in ("last", "finished"):
        return run.model_file
    step = _best(run) if checkpoint == "best" else int(checkpoint)
    path = run.checkpoint(step).averaged
    if not path.exists():
        have = ", ".join(map(str, run.saved_steps)) or "none"
        raise MissingError(f"`{run.id}` has no checkpoint of step {step}", hint=f"it has: {have}")
    return path


def _best(run: Run) -> int:
    """The step of the best checkpoint. Raises MissingError where there is none."""
    path = run.best_file
    if not path.exists():
        raise MissingError(
            f"no best checkpoint in `{path.parent}`", hint="it is chosen where `train.best` is not `none`"
        )
    step = files.read_object(path).get("step")
    if not isinstance(step, int):
        raise DamagedError(f"`{path}` is damaged: it has no step", hint="--checkpoint STEP")
    return step
