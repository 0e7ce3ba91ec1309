"""From a run directory to a model that samples and scores; from a job to its device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gzcli.engine import checkpoint as checkpoints
from gzcli.errors import DeviceError, MissingError
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.recipe.parts import LaunchSection, Part
from gzcli.store.files import checksum
from gzcli.store.runs import Run
from gzcli.types import Batch, DataInfo

if TYPE_CHECKING:
    from gzcli.engine.latent import LatentSpace


@dataclass
class Trained:
    """A trained model with its recipe, on its device, in eval mode, with its averaged weights."""

    run: Run
    model: Model
    info: DataInfo
    part: Part
    device: torch.device
    step: int
    space: LatentSpace | None = None  # where the model lives on latents of images

    @property
    def images(self) -> DataInfo:
        """What the images are like: what the model is told, or what its latents are of."""
        if self.space is None:
            return self.info
        return replace(self.info, shape=self.space.images.shape, levels=self.space.images.levels)

    def seen(self, batch: Batch) -> Batch:
        """A batch of images as the model sees it."""
        return batch if self.space is None else replace(batch, x=self.space.encode(batch.x))

    def shown(self, x: Tensor) -> Tensor:
        """What the model made, as images [B, C, H, W] in [-1, 1]."""
        return x if self.space is None else self.space.decode(x)

    @property
    def name(self) -> str:
        """What the model is called: that of the whole run, of which this may be the last stage."""
        return self.run.owner.status().get("model") or self.part.model


def build_model(part: Part, info: DataInfo, stages: Mapping[str, Model] | None = None) -> Model:
    """The model of a recipe on the CPU, initialised by its seed alone, whatever the device will be; `stages`
    are the trained models that it is built on."""
    cls = catalog.load(part.model)
    torch.manual_seed(part.seed)
    return cls.of(info, **part.options, **(stages or {}))


def stages_for(run: Run, name: str, device: torch.device | str) -> dict[str, Model]:
    """The trained models of earlier stages that a model of this name is built on."""
    return {stage: load_trained(run.owner.stage(stage), device).model for stage in catalog.card(name).stages}


def built_on(run: Run, name: str) -> dict[str, str]:
    """The sha256 of the weights of each of those stages."""
    return {
        stage: checksum(run.owner.stage(stage).path / "model.safetensors")
        for stage in catalog.card(name).stages
    }


def load_trained(run: Run, device: torch.device | str, checkpoint: str = "finished") -> Trained:
    """The model of a run, of one in stages that of the last.

    `checkpoint` is "last", "best" or a step; the last one of a run that is being trained is its newest. What
    else is trained on takes none that will change: "finished" is the run's `model.safetensors`.

    Raises MissingError where there is no such checkpoint, or it is damaged, or an earlier stage is not the
    one that this one was trained with.
    """
    run = run.serving
    folder = run.path / "checkpoints"
    if checkpoint in ("last", "finished"):
        newest = run.weights if checkpoint == "last" else None
        path = newest or run.path / "model.safetensors"
    else:
        step = _best(folder) if checkpoint == "best" else int(checkpoint)
        path = folder / f"{step:08d}" / "ema.safetensors"
        if not path.exists():
            have = ", ".join(map(str, checkpoints.steps_of(folder))) or "none"
            raise MissingError(f"`{run.id}` has no checkpoint of step {step}", hint=f"it has: {have}")
    saved = checkpoints.read_weights(path)
    part, info = saved.part, saved.info
    for stage, found in built_on(run, part.model).items():
        if found != saved.built_on.get(stage):
            raise MissingError(
                f"`{run.id}` was trained with another stage `{stage}` than `{run.owner.stage(stage).path}`",
                hint=f"gz train {run.owner.model} --data {run.owner.data}",
            )
    model = build_model(part, info, stages_for(run, part.model, device))
    model.load_state_dict(saved.weights, strict=False)  # per-rank extra state is not part of the weights
    space = None
    if saved.space is not None:
        from gzcli.engine.latent import open_space  # which itself loads trained runs

        space = open_space(str(part.data.latent), device, record=saved.space)
    model = model.to(device).eval().requires_grad_(False)
    return Trained(run, model, info, part, torch.device(device), saved.step, space)


def _best(folder: Path) -> int:
    path = folder / "best.json"
    if not path.exists():
        raise MissingError(
            f"no best checkpoint in `{folder}`", hint="it is chosen where `train.best` is not `none`"
        )
    return json.loads(path.read_text())["step"]


def pick_device(launch: LaunchSection) -> torch.device:
    """The device of a verb that runs in one process. Raises DeviceError where a GPU was asked for and there
    is none."""
    gpus = launch.gpus
    if launch.cpu or gpus == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if gpus:
        raise DeviceError("torch sees no GPU", hint="gz doctor")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
