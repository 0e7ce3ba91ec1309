"""The networks inside couplings: images [B, channels, H, W] → [B, out, H, W], zero at the start. None
normalises by its batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.models.nn.common import Modules, to_fp32
from gzcli.models.normalizing_flow.layers import ZeroConv
from gzcli.models.normalizing_flow.norms import MIN_STD, ActNorm, Initialised, per_channel


class ConvNet(nn.Module):
    """Glow's network: convolutions of 3×3, 1×1 and 3×3, the first two with ActNorm and ReLU."""

    def __init__(self, channels: int, out: int, hidden: int):
        super().__init__()
        self.first = ActNormConv(channels, hidden, 3)
        self.second = ActNormConv(hidden, hidden, 1)
        self.last = ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        return self.last(F.relu(self.second(h), inplace=True))


class ResidualNet(nn.Module):
    """Glow's network with a residual block, of a 3×3 and a 1×1 convolution, in place of the 1×1 convolution,
    for a larger receptive field."""

    def __init__(self, channels: int, out: int, hidden: int):
        super().__init__()
        self.first = ActNormConv(channels, hidden, 3)
        self.second = ActNormConv(hidden, hidden, 3)
        self.third = ActNormConv(hidden, hidden, 1)
        self.last = ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = h + self.third(F.relu(self.second(h), inplace=True))
        return self.last(F.relu(h, inplace=True))


class GatedNet(nn.Module):
    """A residual network of `depth` gated convolutions h + a · σ(b), where (a, b) is a 3×3 convolution of
    relu(h)."""

    def __init__(self, channels: int, out: int, hidden: int, depth: int):
        super().__init__()
        self.first = ActNormConv(channels, hidden, 3)
        self.gated = nn.ModuleList(ActNormConv(hidden, 2 * hidden, 3) for _ in range(depth))
        self.last = ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for conv in self.gated:
            h = h + F.glu(conv(F.relu(h)), 1)
        return self.last(F.relu(h, inplace=True))


class ResNet(nn.Module):
    """RealNVP's network: `depth` residual blocks of two weight-normalised 3×3 convolutions (§3.2)."""

    def __init__(self, channels: int, out: int, hidden: int, depth: int):
        super().__init__()
        self.first = WeightNormConv(channels, hidden)
        self.blocks: Modules[Modules[WeightNormConv]] = Modules(
            Modules([WeightNormConv(hidden, hidden), WeightNormConv(hidden, hidden)]) for _ in range(depth)
        )
        self.last = ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for first, second in self.blocks:
            h = h + second(F.relu(first(F.relu(h)), inplace=True))
        return self.last(F.relu(h, inplace=True))


class ActNormConv(nn.Module):
    """A convolution followed by ActNorm, with its scale folded into the weights, which costs nothing per
    pixel."""

    def __init__(self, channels: int, out: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
        self.norm = ActNorm(out)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm.initialising:
            self.norm.initialise(self.conv(h))
        scale = self.norm.log_scale.exp()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.norm.bias * scale
        return F.conv2d(h, weight, bias, padding=self.conv.padding)


class WeightNormConv(Initialised):
    """A 3×3 convolution with weights g · v / ‖v‖ for each output channel (Salimans & Kingma 2016,
    arXiv:1602.07868).

    g and the bias are initialised so that the outputs of the first batch have zero mean and unit variance
    (§3).
    """

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
        y = to_fp32(self(h))
        mean = ranks.mean(y.mean((0, 2, 3)), self)
        std = ranks.mean((y - per_channel(mean)).square().mean((0, 2, 3)), self).sqrt()
        scale = torch.where(std > MIN_STD, 1 / std, 1.0)
        self.g.mul_(scale)
        self.bias.sub_(mean).mul_(scale)
        self.initialized.fill_(True)
