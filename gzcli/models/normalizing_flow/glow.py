"""Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma & Dhariwal 2018, arXiv:1807.03039).

x → dequantise → [squeeze → depth × (ActNorm → 1×1 convolution → coupling) → split] × scales → z, all
invertible, so that log p(x) = log p(z) + log |det dz/dx| exactly (eq. 3). The last scale keeps its channels;
their prior is learned and may depend on the class.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.types import DataInfo
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlowOptions, MultiscaleFlow
from gzcli.models.normalizing_flow.layers import ActNorm, ActNormConv, Bijection, ConvNet, ZeroConv


class ResidualNet(nn.Module):
    """Glow's network with a residual block instead of the 1×1 convolution, for a larger receptive field."""

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


COUPLINGS: dict[str, Any] = {"affine": layers.AffineCoupling, "additive": layers.AdditiveCoupling}
COUPLING_NETS: dict[str, type[ConvNet] | type[ResidualNet]] = {"conv": ConvNet, "residual": ResidualNet}


class Step(Bijection):
    """One step of flow (fig. 2a): ActNorm, invertible 1×1 convolution, coupling."""

    def __init__(self, channels: int, hidden: int, coupling: str, net: str):
        super().__init__()
        # the coupling is built first, for the order of random numbers, and registered last
        kind, unchanged = COUPLINGS[coupling], channels // 2
        layer = kind(channels, COUPLING_NETS[net](unchanged, kind.outputs * (channels - unchanged), hidden))
        self.norm = ActNorm(channels)
        self.conv = layers.InvertibleConv1x1(channels)
        self.coupling = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, log_det = self.conv(x, self.norm)
        y, coupling_log_det = self.coupling(h)
        return y, log_det + coupling_log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.norm.inverse(self.conv.inverse(self.coupling.inverse(y)))


class Glow(MultiscaleFlow):
    """A multi-scale flow with exact likelihood of the dequantised image.

    Raises UsageError if height or width cannot be halved `scales` times.

    scales: number of times that the image is squeezed. Default: until a side is odd, or 4 or less.
    depth: flow steps per scale.
    hidden: channels of a coupling's network.
    coupling: `affine`, or `additive`, which preserves volumes.
    net: network of a coupling: `conv` (the paper's), or `residual` with a larger receptive field.
    """

    paper: ClassVar[str] = "arXiv:1807.03039"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int | None = None,
        depth: int = 8,
        hidden: int = 64,
        coupling: Annotated[str, COUPLINGS] = "affine",
        net: Annotated[str, COUPLING_NETS] = "conv",
        options: ImageFlowOptions = ImageFlowOptions(),
    ):
        super().__init__(data, options)
        self.build(
            scales, lambda channels, last: (Step(channels, hidden, coupling, net) for _ in range(depth))
        )
