"""Normalisation inside flows, invertible and with a log-det, and the data-dependent start of what has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gzcli import ranks
from gzcli.models.nn.common import to_fp32

MIN_STD = (
    1e-4  # a channel that varies less is constant: it keeps its scale (dequantised 8-bit noise has 1.1e-3)
)


class ActNorm(nn.Module):
    """y = (x + bias) · exp(log_scale) for each channel, zero mean and unit variance on the first batch (Glow,
    §3.1)."""

    initialized: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self.initialising = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialising:
            self.initialise(x)
        y = (x + per_channel(self.bias)) * per_channel(self.log_scale.exp())
        return y, self.log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        return y * per_channel((-self.log_scale).exp()) - per_channel(self.bias)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Fits scale and bias to the batch of all ranks, once; a constant channel is centred and keeps its
        scale."""
        x = to_fp32(x)
        mean = ranks.mean(x.mean((0, 2, 3)), self)
        std = ranks.mean((x - per_channel(mean)).square().mean((0, 2, 3)), self).sqrt()
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.where(std > MIN_STD, std, 1.0).log())
        self.initialized.fill_(True)


class BatchNorm(nn.Module):
    """y = (x − m) / √(v + ε) for each channel (RealNVP, §3.7 and appendix E); it inverts, and has a log-det,
    as it stands.

    In training m and v are those of the batch of all ranks, with their gradient: a scale that is to be undone
    here gains nothing. In eval mode they are running averages, so that the density of an image does not
    depend on its batch.
    """

    mean: Tensor
    var: Tensor
    initialized: Tensor

    def __init__(self, channels: int, momentum: float = 0.05, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self.initialising = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.statistics(x) if self.training or self.initialising else (self.mean, self.var)
        log_scale = -0.5 * (var + self.eps).log()
        return (x - per_channel(mean)) * per_channel(log_scale.exp()), log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        """With the running averages; the statistics of a batch are not known from its outputs."""
        return y * per_channel((self.var + self.eps).sqrt()) + per_channel(self.mean)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch, towards which the averages move; on the first batch they become
        them."""
        mean = AllMean.apply(x.mean((0, 2, 3)), self)
        var = AllMean.apply((x - per_channel(mean)).square().mean((0, 2, 3)), self)
        weight = 1.0 if self.initialising else self.momentum
        self.mean.lerp_(mean.detach(), weight)
        self.var.lerp_(var.detach(), weight)
        if self.initialising:
            self.initialized.fill_(True)
        return mean, var


class AllMean(torch.autograd.Function):
    """`ranks.mean` with a gradient: the mean over the ranks of theirs, as each rank's loss depends on every
    rank's input."""

    @staticmethod
    def forward(ctx, t: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return ranks.mean(t, module).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ranks.mean(grad, ctx.module), None


@contextmanager
def initialising(model: nn.Module) -> Iterator[bool]:
    """Inside, each layer with a data-dependent start, if it has not had it, fits itself to what passes
    through it.

    Yields whether there are any.
    """
    fresh = [m for m in model.modules() if hasattr(m, "initialising") and not m.initialized]
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
