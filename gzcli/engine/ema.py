"""Averages of the weights, on every rank. The exponential average is the one that is sampled; after n updates
its decay is min(decay, (1 + n) / (10 + n)). From power-function averages, `averages` computes others after
the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.types import Batch
from gzcli.data.packs.batches import TrainImages
from gzcli.models.nn import with_rows

LENGTHS = (0.05, 0.1)  # lengths of the power-function averages, as in Karras et al. 2024
QUICK_CALIBRATION_IMAGES, CALIBRATION_IMAGES = (
    1_000,
    10_000,
)  # images for the calibration of an average: during training, and at its end


@cache
def exponent(length: float) -> float:
    """γ of the power-function average ∝ ∫₀ᵗ τ^γ θ(τ) dτ whose standard deviation in τ is `length` · t.
    `length` must be below 0.288: γ + 1 = length² (γ + 2)² (γ + 3) (Karras et al. 2024, arXiv:2312.02696,
    §3.1)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def random_images(images: TrainImages, positions: np.ndarray, n: int) -> Iterator[Batch]:
    """A random subset of the training images at these positions, each augmented by one draw."""
    index = np.random.default_rng(0).permutation(positions)[:n]
    yield from images.scan(index, purpose="calibrate", batch_size=128)


class EMA:
    """Averages the parameters of `model`; with decay 0, the average is the model itself. A model with
    `calibrate` recomputes buffers, such as those of batch norm, for its averaged weights. If the parameters
    are sharded, each rank averages its part, and `unsharded` is a second model, with whole weights, for
    samples and scores. `lengths` are the lengths of the additional power-function averages."""

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        images: Callable[[], Iterable[Batch]] = tuple,
        unsharded: nn.Module | None = None,
        lengths: Iterable[float] = (),
    ):
        self.unsharded = unsharded
        self.model, self.decay, self.updates = model, decay, 0
        parameters = dict(model.named_parameters()) if decay else {}
        self.names, self.sources = list(parameters), list(parameters.values())
        self.params = [ranks.part_of(p.detach()) for p in self.sources]
        self.shadow = [p.clone() for p in self.params]
        self.powers = {length: [p.clone() for p in self.params] for length in lengths}
        self.images = images
        self.calibrate: Callable[[Iterable[Batch]], None] | None = getattr(model, "calibrate", None)
        self.fitting: dict[str, Tensor] | None = None  # buffers for the average; None: not computed yet

    def restart(self) -> None:
        """Sets the average to the current weights of the model."""
        for shadow, p in zip(self.shadow, self.params, strict=True):
            shadow.copy_(p)

    def update(self) -> None:
        """Updates the averages; called after every step. Each average takes three multi-tensor kernels, for
        any number of parameters."""
        self.fitting = None
        if not self.params:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.params, 1 - decay)
        for length, average in self.powers.items():  # with β = (1 − 1/t)^(γ + 1)
            beta = (1 - 1 / self.updates) ** (exponent(length) + 1)
            torch._foreach_lerp_(average, self.params, 1 - beta)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block, the sampled model has the averaged weights and their buffers. Every rank must
        call it."""
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
                with torch.no_grad(), ranks.alone():  # all ranks use the same images
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
        """The buffers that `calibrate` changes for the average, by name. Every rank must call it."""
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
            weights = p.clone()
            p.copy_(s)
            s.copy_(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, each sharded if its parameter is."""
        return self._named(self.shadow)

    def power_state(self) -> dict[str, dict[str, Tensor]]:
        """The state dicts of the power-function averages, by length."""
        return {f"{length:g}": self._named(average) for length, average in self.powers.items()}

    def load_state_dict(
        self,
        state: Mapping[str, Tensor],
        updates: int,
        powers: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.updates, self.fitting = updates, None
        self._load(self.shadow, state)
        for length, average in self.powers.items():
            self._load(average, (powers or {})[f"{length:g}"])

    def _named(self, values: list[Tensor]) -> dict[str, Tensor]:
        whole = (ranks.put_together(v, p) for v, p in zip(values, self.sources, strict=True))
        return dict(zip(self.names, whole, strict=True))

    def _load(self, values: list[Tensor], state: Mapping[str, Tensor]) -> None:
        for name, value, p in zip(self.names, values, self.sources, strict=True):
            value.copy_(ranks.part_of(ranks.part_like(with_rows(state[name].to(p.device), p), p)))
