"""Optional methods of a model as types: `isinstance(model, Prepares)` tells whether it has `prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from gzcli.types import Batch, Noise


@runtime_checkable
class Prepares(Protocol):
    """Makes {key: rows [B, …]} of a batch, once of every training image, for `batch.extra`."""

    def prepare(self, batch: Batch) -> dict[str, Tensor]: ...


@runtime_checkable
class SeesBatch(Protocol):
    """Makes {key: rows [B, …]} of the whole batch of a step, for `batch.extra` of its parts."""

    def on_batch(self, batch: Batch) -> dict[str, Tensor]: ...


@runtime_checkable
class Calibrates(Protocol):
    """Finds anew what its buffers keep of training images, for the weights that it has."""

    def calibrate(self, batches: Iterable[Batch]) -> None: ...


@runtime_checkable
class HasLikelihood(Protocol):
    """Gives the log-likelihood of discrete images x [B, C, H, W] in nats, [B]."""

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise) -> Tensor: ...


@runtime_checkable
class Autoencoder(Protocol):
    """Turns images [B, C, H, W] into latents [B, c, h, w] and back."""

    def to_latent(self, x: Tensor) -> Tensor: ...

    def from_latent(self, z: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
