"""Exponential moving average of the weights, on every rank, with the warm-up min(decay, (1 + n) / (10 + n))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages the parameters of `model`; its buffers are the model's own. With decay 0 the average is the model."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        named = dict(model.named_parameters()) if decay else {}
        self.names, self.params = list(named), [p.detach() for p in named.values()]
        self.shadow = [p.clone() for p in self.params]

    def update(self) -> None:
        """After a step; three multi-tensor kernels whatever the number of parameters."""
        if not self.params:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.params, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model carries the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

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
        self.updates = updates
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(state[name])
