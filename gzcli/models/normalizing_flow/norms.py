"""Invertible normalisation with a log-det, and the data-dependent initialisation of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.models.nn.common import to_fp32
from gzcli.models.nn.whole_batch import AllMean

# a channel of a smaller standard deviation is constant and keeps its scale; dequantised 8-bit noise has
# 1.1e-3
MIN_STD = 1e-4


class Bijection(nn.Module):
    """An invertible layer.

    forward(x) -> (y, log_det), with log |det dy/dx| [B], or a scalar where it is the same for every image;
    inverse(y) -> x
    """

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Initialised(nn.Module):
    """A layer that is initialised by the first batch that passes while `initialising` is true."""

    initialized: Tensor  # boolean scalar, a buffer
    initialising: bool = False


class ActNorm(Bijection, Initialised):
    """y = (x + bias) · exp(log_scale) for each channel, with zero mean and unit variance on the first batch
    (Glow, §3.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialising:
            self.initialise(x)
        y = (x + per_channel(self.bias)) * per_channel(self.log_scale.exp())
        return y, self.log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        return y * per_channel((-self.log_scale).exp()) - per_channel(self.bias)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Fits scale and bias to the batch of all ranks, once. A constant channel is centred and keeps its
        scale."""
        x = to_fp32(x)
        mean = ranks.mean(x.mean((0, 2, 3)), self)
        std = ranks.mean((x - per_channel(mean)).square().mean((0, 2, 3)), self).sqrt()
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.where(std > MIN_STD, std, 1.0).log())
        self.initialized.fill_(True)


class BatchNorm(Bijection, Initialised):
    """y = (x − m) / √(v + ε) for each channel (RealNVP, §3.7 and appendix E).

    In training m and v are those of the batch of all ranks, with a gradient: without it, training would scale
    activations up without effect. In eval mode they are running averages, so that the density of an image
    does not depend on its batch.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, momentum: float = 0.05, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.statistics(x) if self.training or self.initialising else (self.mean, self.var)
        log_scale = -0.5 * (var + self.eps).log()
        return (x - per_channel(mean)) * per_channel(log_scale.exp()), log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        """The inverse by the running averages, as outputs do not determine the statistics of their batch."""
        return y * per_channel((self.var + self.eps).sqrt()) + per_channel(self.mean)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch. The first batch sets the running averages, later ones move them."""
        mean = AllMean.apply(x.mean((0, 2, 3)), self)
        var = AllMean.apply((x - per_channel(mean)).square().mean((0, 2, 3)), self)
        weight = 1.0 if self.initialising else self.momentum
        self.mean.lerp_(mean.detach(), weight)
        self.var.lerp_(var.detach(), weight)
        if self.initialising:
            self.initialized.fill_(True)
        return mean, var


@contextmanager
def initialising(model: nn.Module) -> Iterator[bool]:
    """A context in which the first batch initialises the layers that are not initialised yet. Yields whether
    there are any."""
    fresh = [m for m in model.modules() if isinstance(m, Initialised) and not m.initialized]
    for m in fresh:
        m.initialising = True
    try:
        yield bool(fresh)
    finally:
        for m in fresh:
            m.initialising = False


def per_channel(t: Tensor) -> Tensor:
    """[C] as [C, 1, 1]."""
    return t[:, None, None]
