"""Exponential moving average of the weights, on every rank.

Its decay warms up: after n updates it is min(decay, (1 + n) / (10 + n)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.types import Batch


class EMA:
    """Averages the parameters of `model`; with decay 0 the average is the model. A model with `calibrate`
    recomputes buffers such as those of batch norm for its averaged weights. If the parameters are sharded,
    each rank averages its part, and `unsharded` is another model with whole weights, which samples and
    scores."""

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        images: Callable[[], Iterable[Batch]] = tuple,
        unsharded: nn.Module | None = None,
    ):
        self.unsharded = unsharded
        self.model, self.decay, self.updates = model, decay, 0
        parameters = dict(model.named_parameters()) if decay else {}
        self.names, self.sources = list(parameters), list(parameters.values())
        self.params = [ranks.part_of(p.detach()) for p in self.sources]
        self.shadow = [p.clone() for p in self.params]
        self.images = images
        self.calibrate: Callable[[Iterable[Batch]], None] | None = getattr(model, "calibrate", None)
        self.fitting: dict[str, Tensor] | None = None  # buffers that fit the average; None: not known yet

    def restart(self) -> None:
        """Sets the average to the current weights of the model."""
        for shadow, p in zip(self.shadow, self.params, strict=True):
            shadow.copy_(p)

    def update(self) -> None:
        """After a step; three multi-tensor kernels whatever the number of parameters."""
        self.fitting = None
        if not self.params:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.params, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block, the sampled model has the averaged weights and their buffers. A call of every
        rank."""
        if self.unsharded is not None:
            values = dict(self.model.named_parameters()) | self.state_dict()
            with torch.no_grad():
                for name, p in self.unsharded.named_parameters():
                    p.copy_(ranks.whole(values[name]))
                for name, b in self.model.named_buffers():
                    self.unsharded.get_buffer(name).copy_(b)
            yield
            return
        self._swap()
        buffers = {name: b.clone() for name, b in self.model.named_buffers()} if self.calibrate else {}
        try:
            if self.calibrate and self.fitting is None:
                training = self.model.training
                self.model.eval()
                with torch.no_grad(), ranks.alone():  # all ranks have the same images
                    self.calibrate(self.images())
                self.model.train(training)
                now = self.model.named_buffers()
                self.fitting = {name: b.clone() for name, b in now if not torch.equal(b, buffers[name])}
            self._fill(self.fitting or {})
            yield
        finally:
            self._fill(buffers)
            self._swap()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block, the model has its averaged weights, in eval mode, without gradients."""
        with self.swapped():
            (self.model if self.unsharded is None else self.unsharded).eval()
            try:
                with torch.inference_mode():
                    yield
            finally:
                self.model.train()

    def statistics(self) -> dict[str, Tensor]:
        """The buffers that `calibrate` changes for the average, by name. A call of every rank."""
        if self.calibrate and self.fitting is None:
            with self.swapped():
                pass
        return self.fitting or {}

    @torch.no_grad()
    def _fill(self, buffers: dict[str, Tensor]) -> None:
        for name, value in buffers.items():
            self.model.get_buffer(name).copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        for p, s in zip(self.params, self.shadow, strict=True):
            held = p.clone()
            p.copy_(s)
            s.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name → average, shared out among ranks where the parameter is."""
        pairs = zip(self.shadow, self.sources, strict=True)
        return dict(zip(self.names, (ranks.put_together(s, p) for s, p in pairs), strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        self.updates, self.fitting = updates, None
        for name, shadow, p in zip(self.names, self.shadow, self.sources, strict=True):
            shadow.copy_(ranks.part_of(ranks.part_like(state[name], p)))
