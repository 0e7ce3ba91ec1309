"""A trained model that samples and scores images: the model of a run and its latent space."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gzcli.core import devices
from gzcli.core.errors import UsageError
from gzcli.core.parts import Part
from gzcli.core.types import Batch, DataInfo
from gzcli.core.units import as_size
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.open import PackOptions
from gzcli.engine.build import load_model
from gzcli.engine.latent import LatentSpace, open_space
from gzcli.models.base import Model
from gzcli.store.runs import Run


@dataclass
class Trained:
    """A model that samples and scores, with its recipe, on its device.

    `load_trained` returns it in eval mode with its averaged weights. The trainer's own is so only while it
    validates and draws (`EMA.evaluating`).

    run: the run, or the stage of a run, of the model.
    model: the model.
    info: description of the data that the model was built for: of images, or of latents.
    part: the recipe of the model.
    device: device of the model.
    step: number of steps that it was trained for; 0 while it is being trained.
    space: the latent space that the model is trained in; None: pixels.
    asked: the precision that a verb asks for; None: samples have that of the training, scores fp32.
      Likelihoods are in fp32 whatever is asked.
    """

    run: Run
    model: Model
    info: DataInfo
    part: Part
    device: torch.device
    step: int
    space: LatentSpace | None = None
    asked: str | None = None

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: that of samples. fp16, which a CPU does not have, is `auto` there."""
        asked, kind = self.asked or self.part.train.precision, self.device.type
        return devices.chosen_precision(
            "auto" if asked == "fp16" and not devices.kind_of(kind).fp16 else asked, kind
        )

    def sampling(self) -> AbstractContextManager[None]:
        """A context in which samples are drawn, in the precision of the training unless asked otherwise."""
        return self._autocast(self.precision)

    def applying(self) -> AbstractContextManager[None]:
        """The same for applications. A model with an exact likelihood computes them in fp32, as a flow goes
        to its latents and back."""
        return self._autocast("fp32" if self.model.likelihood == "exact" else self.precision)

    def scoring(self) -> AbstractContextManager[None]:
        """A context in which images are scored, in fp32 unless asked otherwise: scores are compared over
        devices, and bf16 moves some by 3 %."""
        return self._autocast(self.precision if self.asked else "fp32")

    def _autocast(self, precision: str) -> AbstractContextManager[None]:
        half = devices.half(precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    @property
    def images(self) -> DataInfo:
        """The description of the images, in a latent space too."""
        if self.space is None:
            return self.info
        return replace(self.info, shape=self.space.images.shape, levels=self.space.images.levels)

    @property
    def wanted(self) -> PackOptions:
        """The form in which other images come to the model: that of the images it was trained on."""
        channels, *sides = self.images.shape
        data, patch = self.part.data, patch_of(self.part.data.augment)
        size = data.size if patch else as_size(*sides)
        return PackOptions(size=size, channels=channels, fit=data.fit, patch=patch)

    def seen(self, batch: Batch) -> Batch:
        """A batch of images as the model sees it."""
        return batch if self.space is None else replace(batch, x=self.space.encode(batch.x))

    def shown(self, x: Tensor) -> Tensor:
        """The images [B, C, H, W] in [-1, 1] of what the model made: latents are decoded."""
        return x if self.space is None else self.space.decode(x)

    @property
    def name(self) -> str:
        """The name of the model; of a stage the name of the whole run's model."""
        return self.run.owner.status().get("model") or self.part.model


def load_trained(
    run: Run, device: torch.device | str, checkpoint: str = "finished", precision: str | None = None
) -> Trained:
    """The trained model of a run; `checkpoint` and errors as of `load_model`.

    precision: that of its samples and scores; None: as it was trained, scores in fp32.

    Raises UsageError for fp16 on a CPU.
    """
    if precision == "fp16" and not devices.kind_of(device).fp16:
        raise UsageError("precision `fp16` needs a GPU", hint="`bf16` works on many CPUs, `fp32` on all")
    model, saved = load_model(run, device, checkpoint)
    space = None
    if saved.space is not None:
        beside = run.owner.latent_folder  # a run that came as one file brings its autoencoder
        name = str(beside) if beside.is_dir() else str(saved.part.data.latent)
        space = open_space(name, device, record=saved.space)
    device = torch.device(device)
    return Trained(run.serving, model, saved.info, saved.part, device, saved.step, space, precision)
