"""A trained model that samples and scores images: the model of a run and its latent space."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gzcli.engine.build import load_model
from gzcli.engine.latent import LatentSpace, open_space
from gzcli.models.base import Model
from gzcli.recipe.parts import Part
from gzcli.store.runs import Run
from gzcli.types import Batch, DataInfo


@dataclass
class Trained:
    """A model that samples and scores, with its recipe, on its device.

    `load_trained` gives it in eval mode with its averaged weights. That of the trainer is so only while it
    validates and draws (`EMA.evaluating`).

    info: what the model was told of its data; of latents where it lives on them.
    step: how many steps it was trained for; 0 where it is being trained.
    space: the latent space that the model lives in; None: pixels.
    """

    run: Run
    model: Model
    info: DataInfo
    part: Part
    device: torch.device
    step: int
    space: LatentSpace | None = None

    @property
    def images(self) -> DataInfo:
        """Shape and levels of the images: those that the model was told, or those of the autoencoder."""
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
        """The name of the model, of a last stage that of the whole run."""
        return self.run.owner.status().get("model") or self.part.model


def load_trained(run: Run, device: torch.device | str, checkpoint: str = "finished") -> Trained:
    """The trained model of a run; `checkpoint` and errors as of `load_model`."""
    model, saved = load_model(run, device, checkpoint)
    space = None
    if saved.space is not None:
        space = open_space(str(saved.part.data.latent), device, record=saved.space)
    return Trained(run.serving, model, saved.info, saved.part, torch.device(device), saved.step, space)
