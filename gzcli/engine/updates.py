"""The updates of a training step, phase by phase, for the trainer and for timing trials."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.sections import PER_DIMENSION, Part
from gzcli.core.types import Batch, Noise
from gzcli.engine import optim
from gzcli.engine.step import precision
from gzcli.models import catalog
from gzcli.models.base import Model, Phase


class Accelerating(Protocol):
    """The part of accelerate's Accelerator that updates use."""

    scaler: Any

    def autocast(self) -> AbstractContextManager[Any]: ...
    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...


class Updates:
    """The phases of a model, their optimizers, and the gradient and update of each.

    kind: precision of the losses.
    wrapped: the module whose forward returns the losses of a batch and a phase.
    """

    def __init__(
        self, model: Model, part: Part, accelerator: Accelerating, wrapped: nn.Module, kind: str = ""
    ):
        self.model, self.part, self.train, self.steps = model, part, part.train, part.train.steps
        self.accelerator, self.wrapped, self.parts = accelerator, wrapped, part.train.accumulate
        self.phases: list[Phase] = model.phases()
        self.params = {phase.name: phase.parameters() for phase in self.phases}
        self.trainable = list({id(p): p for params in self.params.values() for p in params}.values())
        possible = catalog.phases(catalog.card(part.model)) or ()
        self.settings = optim.phase_settings(part.optim, self.phases, possible)
        shared: dict[str, Any] = {"model": model, "precision": kind or precision(part)}
        self.optimizers = {p.name: optim.build(p, self.settings[p.name], **shared) for p in self.phases}
        # number of dimensions over which the loss of a phase is a sum, by which its gradient is divided
        dims = math.prod(model.data.shape) if part.format >= PER_DIMENSION else 1
        self.dims = {phase.name: dims if phase.name in model.sums else 1 for phase in self.phases}

    def noise(self, step: int, key: str, start: int) -> Noise:
        """The noise of the rows of a global batch from `start` on."""
        raise NotImplementedError

    def extend(self, batch: Batch, step: int) -> None:
        """Adds to a batch what the model computes from the whole batch of a step."""
        if hasattr(self.model, "on_batch"):
            local_batch = batch.rows(slice(None), self.noise(step, "batch", ranks.rank() * len(batch)))
            with self.accelerator.autocast():
                batch.extra |= self.model.on_batch(local_batch)

    def backward(self, batch: Batch, step: int, phase: Phase) -> dict[str, Tensor]:
        """The gradient of the phase's mean loss over the global batch, in micro-batches. Returns the losses
        by name. A loss that is a sum over dimensions also appears per dimension under the name `loss_dim`."""
        parts, dims = self.parts, self.dims[phase.name]
        micro = len(batch) // parts
        first = ranks.rank() * len(batch)
        losses: dict[str, Tensor] = {}
        for i in range(parts):
            noise = self.noise(step, phase.name, first + i * micro)
            part = batch.rows(slice(i * micro, (i + 1) * micro), noise)
            with contextlib.nullcontext() if i + 1 == parts else self.accelerator.no_sync(self.wrapped):
                out = self.wrapped(part, phase.name)
                share = parts * dims
                self.accelerator.backward(out["loss"] if share == 1 else out["loss"] / share)
            for name, value in out.items():
                value = value.detach() if parts == 1 else value.detach() / parts
                losses[name] = losses[name] + value if name in losses else value
        return losses if dims == 1 else losses | {"loss_dim": losses["loss"] / dims}

    def update(self, step: int, phase: Phase) -> Tensor:
        """Takes one optimizer step, and clears all gradients. A step whose gradient norm is above
        `train.skip` or not finite is skipped, so that one bad batch does not end a run. Returns the norm."""
        optimizer, scaler = self.optimizers[phase.name], self.accelerator.scaler
        optim.set_lr(optimizer, self.settings[phase.name], step, self.steps)
        if scaler is not None:
            scaler.unscale_(optimizer)
        params = self.params[phase.name]
        norm = optim.clip(params, self.train.clip or self.train.skip)
        optim.step(optimizer, params, norm, scaler, self.train.skip)
        if scaler is not None:
            scaler.update()
        for p in self.trainable:
            p.grad = None
        return norm

    def only(self, phase: Phase) -> None:
        """Sets `requires_grad` for the phase's parameters alone."""
        if len(self.phases) > 1:
            for p in self.trainable:
                p.requires_grad_(False)
            for p in self.params[phase.name]:
                p.requires_grad_(True)


class Alone:
    """The part of an Accelerator that updates need, for one process. It replaces accelerate, which takes
    seconds to load.

    half: dtype of losses under autocast. None: fp32.
    """

    scaler = None

    def __init__(self, device: torch.device, half: torch.dtype | None):
        self.device, self.half = device, half

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
