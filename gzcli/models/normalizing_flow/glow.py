"""Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma & Dhariwal 2018, arXiv:1807.03039).

x → dequantise → [squeeze → depth × (ActNorm → 1×1 convolution → coupling) → split] × scales → z, all
invertible, so that log p(x) = log p(z) + log |det dz/dx| exactly (eq. 3). The last scale keeps its channels;
their prior is learned and may depend on the class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor, nn

from gzcli.core.types import DataInfo
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import FlowOptions
from gzcli.models.normalizing_flow.multiscale import MultiscaleFlow, scales_of
from gzcli.models.normalizing_flow.nets import ConvNet, ResidualNet
from gzcli.models.normalizing_flow.norms import ActNorm, Bijection

CouplingKind = Literal["affine", "additive"]
NetKind = Literal["conv", "residual"]
Net = Callable[[int, int, int], nn.Module]  # (input, output, hidden channels) → a coupling's network


def affine(channels: int, hidden: int, net: Net) -> Bijection:
    """A coupling that scales and shifts."""
    kept = channels // 2
    return layers.AffineCoupling(channels, net(kept, 2 * (channels - kept), hidden))


def additive(channels: int, hidden: int, net: Net) -> Bijection:
    """A coupling that shifts."""
    kept = channels // 2
    return layers.AdditiveCoupling(net(kept, channels - kept, hidden))


COUPLINGS: dict[CouplingKind, Callable[[int, int, Net], Bijection]] = {"affine": affine, "additive": additive}
NETS: dict[NetKind, Net] = {"conv": ConvNet, "residual": ResidualNet}


class Step(Bijection):
    """One step of flow (fig. 2a): ActNorm, invertible 1×1 convolution, coupling."""

    def __init__(self, channels: int, hidden: int, coupling: CouplingKind, net: NetKind):
        super().__init__()
        made = COUPLINGS[coupling](channels, hidden, NETS[net])  # first, for the order of random numbers
        self.norm = ActNorm(channels)
        self.conv = layers.InvertibleConv1x1(channels)
        self.coupling = made

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, log_det = self.conv(x, self.norm)
        y, coupling_log_det = self.coupling(h)
        return y, log_det + coupling_log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.norm.inverse(self.conv.inverse(self.coupling.inverse(y)))


class Glow(MultiscaleFlow):
    """A multi-scale flow with exact likelihood of the dequantised image.

    Raises UsageError where height or width cannot be halved `scales` times.

    scales: how often the image is squeezed; null: until a side is odd, or 4 or less.
    depth: steps of flow a scale.
    hidden: channels of a coupling's network.
    coupling: `affine`, or `additive`, which preserves volumes.
    net: a coupling's network, `conv` as in the paper, or `residual` with a larger receptive field.
    """

    paper: ClassVar[str] = "arXiv:1807.03039"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int | None = None,
        depth: int = 8,
        hidden: int = 64,
        coupling: CouplingKind = "affine",
        net: NetKind = "conv",
        options: FlowOptions = FlowOptions(),
    ):
        super().__init__(data, options)
        scales = scales_of(data.shape) if scales is None else scales
        self.build(scales, lambda i, channels: (Step(channels, hidden, coupling, net) for _ in range(depth)))
