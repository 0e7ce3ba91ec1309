"""RealNVP: Density Estimation Using Real NVP (Dinh et al. 2017, arXiv:1605.08803).

x → dequantise → [checkerboard couplings → squeeze → channel-wise couplings → split] × scales → checkerboard
couplings → z, with batch norm after each coupling (§3.4–3.7). The prior of the split channels is learned; it
starts as the paper's N(0, 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.types import Batch, DataInfo
from gzcli.models.nn import Modules, fresh_statistics
from gzcli.models.nn.shared_batch_norm import AllMean
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlowOptions, MultiscaleFlow
from gzcli.models.normalizing_flow.layers import Bijection, Initialised, per_channel


class BatchNorm(Bijection, Initialised):
    """y = (x − m) / √(v + ε) for each channel (RealNVP, §3.7 and appendix E). In training, m and v are the
    statistics of the batch of all ranks, with their gradient, without which training would inflate
    activations. In evaluation, they are running averages."""

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
        """The inverse, with the running averages, because outputs do not determine the statistics of their
        batch."""
        return y * per_channel((self.var + self.eps).sqrt()) + per_channel(self.mean)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and variance of the batch. The first batch sets the running averages, later ones move
        them."""
        mean = AllMean.apply(x.mean((0, 2, 3)), self)
        var = AllMean.apply((x - per_channel(mean)).square().mean((0, 2, 3)), self)
        weight = 1.0 if self.initialising else self.momentum
        self.mean.lerp_(mean.detach(), weight)
        self.var.lerp_(var.detach(), weight)
        if self.initialising:
            self.initialized.fill_(True)
        return mean, var


class ResNet(nn.Module):
    """RealNVP's network: `depth` residual blocks of two weight-normalised 3×3 convolutions (§3.2)."""

    def __init__(self, channels: int, out: int, hidden: int, depth: int):
        super().__init__()
        self.first = WeightNormConv(channels, hidden)
        self.blocks: Modules[Modules[WeightNormConv]] = Modules(
            Modules([WeightNormConv(hidden, hidden), WeightNormConv(hidden, hidden)]) for _ in range(depth)
        )
        self.last = layers.ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for first, second in self.blocks:
            h = h + second(F.relu(first(F.relu(h)), inplace=True))
        return self.last(F.relu(h, inplace=True))


class WeightNormConv(Initialised):
    """A 3×3 convolution with weights g · v / ‖v‖, fitted to the first batch (Salimans 2016, §3)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.v = nn.Parameter(0.05 * torch.randn(out, channels, 3, 3))
        self.g = nn.Parameter(torch.ones(out))
        self.bias = nn.Parameter(torch.zeros(out))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, h: Tensor) -> Tensor:
        if self.initialising:
            self.initialise(h)
        scale = self.g / torch.linalg.vector_norm(self.v, dim=(1, 2, 3))
        return F.conv2d(h, self.v * scale[:, None, None, None], self.bias, padding=1)

    @torch.no_grad()
    def initialise(self, h: Tensor) -> None:
        """Fits g and the bias to the batch of all ranks, once. A constant channel keeps its scale."""
        self.initialising = False
        mean, std = layers.moments(self(h), self)
        scale = torch.where(std > layers.MIN_STD, 1 / std, 1.0)
        self.g.mul_(scale)
        self.bias.sub_(mean).mul_(scale)
        self.initialized.fill_(True)


class RealNVP(MultiscaleFlow):
    """Multi-scale affine couplings with residual networks and batch normalisation.

    Raises UsageError if height or width cannot be halved `scales` times.

    scales: number of times that the image is squeezed. Default: until a side is odd, or 4 or less.
    couplings: couplings for each of the two masks of a scale. The last scale has only checkerboard masks, and
      one more coupling.
    hidden: channels of a coupling's network.
    blocks: residual blocks of a coupling's network.
    batch_norm: whether batch norm follows each coupling.
    """

    takes: ClassVar[str] = "levels"

    paper: ClassVar[str] = "arXiv:1605.08803"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int | None = None,
        couplings: int = 3,
        hidden: int = 64,
        blocks: int = 2,
        batch_norm: bool = True,
        options: ImageFlowOptions = ImageFlowOptions(logit=0.05),
    ):
        super().__init__(data, options)

        def alternate(channels: int, count: int) -> Iterator[Bijection]:
            for k in range(count):
                net = ResNet(channels // 2, channels, hidden, blocks)
                yield layers.AffineCoupling(channels, net, flip=k % 2 == 1)
                if batch_norm:
                    yield BatchNorm(channels)

        def steps(channels: int, last: bool) -> Iterator[Bijection]:
            board = layers.checkerboard(channels)
            yield layers.Permute(board)
            yield from alternate(channels, couplings + last)
            if not last:
                yield layers.Permute([board.index(c) for c in range(channels)])
                yield from alternate(channels, couplings)

        self.build(scales, steps)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes the statistics of batch norm for the current weights."""
        with fresh_statistics(self) as count:
            for batch in islice(batches, count):
                self.codes(batch.x, batch.noise)
