"""Exponential moving average of the weights, on every rank, with the warm-up min(decay, (1 + n) / (10 +
n))."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.data.batches import scan
from gzcli.types import Batch, mix

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer

ALL, FEW = 10_000, 1_000  # images that the statistics of a finished run are of, and those on the way


class EMA:
    """Averages the parameters of `model`, not its buffers. With decay 0 the average is the model.

    What buffers say of training images, such as the statistics of batch norm, is true of the weights that
    were trained and not of their average: a model that has `calibrate` finds it anew with the averaged
    weights, in eval mode, of `images()`. Every rank does so alike, at most once a step, and the trained model
    gets its own back.
    """

    def __init__(self, model: nn.Module, decay: float, images: Callable[[], Iterable[Batch]] | None = None):
        self.model, self.decay, self.updates = model, decay, 0
        named = dict(model.named_parameters()) if decay else {}
        self.names, self.params = list(named), [p.detach() for p in named.values()]
        self.shadow = [p.clone() for p in self.params]
        self.images = images if hasattr(model, "calibrate") else None
        self.found: dict[str, Tensor] | None = None  # buffers that are of the average, if they are known

    def restart(self) -> None:
        """The average is the model as it is now."""
        for shadow, p in zip(self.shadow, self.params, strict=True):
            shadow.copy_(p)

    def update(self) -> None:
        """After a step; three multi-tensor kernels whatever the number of parameters."""
        self.found = None
        if not self.params:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.params, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model carries the averaged weights, and what it finds of them, inside. A call of every rank."""
        self._swap()
        own = {} if self.images is None else {name: b.clone() for name, b in self.model.named_buffers()}
        try:
            if self.images is not None:
                self._calibrate(own)
            yield
        finally:
            self._fill(own)
            self._swap()

    def statistics(self) -> dict[str, Tensor]:
        """Buffer name → what `calibrate` finds of the average, where it differs. A call of every rank."""
        if self.images is not None and self.found is None:
            with self.swapped():
                pass
        return self.found or {}

    def _calibrate(self, own: dict[str, Tensor]) -> None:
        if self.found is not None:
            return self._fill(self.found)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.model.calibrate(self.images())
        self.model.train(training)
        now = self.model.named_buffers()
        self.found = {name: b.clone() for name, b in now if not torch.equal(b, own[name])}

    @torch.no_grad()
    def _fill(self, buffers: dict[str, Tensor]) -> None:
        for name, value in buffers.items():
            self.model.get_buffer(name).copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        held = [p.clone() for p in self.params]
        for p, s, h in zip(self.params, self.shadow, held, strict=True):
            p.copy_(s)
            s.copy_(h)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name → average."""
        return dict(zip(self.names, self.shadow, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        self.updates, self.found = updates, None
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(state[name])


def training_images(t: Trainer) -> Iterator[Batch]:
    """The images that a run is trained on, augmented by one draw each, in one random order."""
    rows = t.batches.positions()
    rows = rows[np.random.default_rng(0).permutation(len(rows))[: ALL if t.done == t.steps else FEW]]
    return scan(
        t.data,
        "train",
        batch_size=128,
        levels=t.info.levels,
        device=t.device,
        index=rows,
        seed=mix(t.tree["seed"], "calibrate"),
        augment=t.augment,
    )
