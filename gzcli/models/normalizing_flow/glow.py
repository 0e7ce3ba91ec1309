"""Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma & Dhariwal 2018, arXiv:1807.03039).

x → dequantise → [squeeze → depth × (ActNorm → 1×1 convolution → coupling) → split] × scales → z, all
invertible, so log p(x) = log p(z) + log |det dz/dx| exactly (eq. 3). The last scale keeps its channels; their
prior is learned and may depend on the class.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow
from gzcli.models.normalizing_flow.dequantise import Dequant, dequantiser
from gzcli.models.normalizing_flow.nets import ConvNet, ResidualNet
from gzcli.models.normalizing_flow.norms import ActNorm
from gzcli.types import DataInfo


class Step(nn.Module):
    """One step of flow (fig. 2a): ActNorm, invertible 1×1 convolution, coupling."""

    def __init__(self, channels: int, hidden: int, coupling: str, net: str):
        super().__init__()
        kept = channels // 2
        changed = channels - kept
        affine = coupling == "affine"
        build = {"conv": ConvNet, "residual": ResidualNet}[net]
        fn = build(kept, 2 * changed if affine else changed, hidden)
        self.norm = ActNorm(channels)
        self.conv = layers.InvertibleConv1x1(channels)
        self.coupling = layers.AffineCoupling(channels, fn) if affine else layers.AdditiveCoupling(fn)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, log_det = self.conv(x, self.norm)
        y, coupling_log_det = self.coupling(h)
        return y, log_det + coupling_log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.norm.inverse(self.conv.inverse(self.coupling.inverse(y)))


class Glow(ImageFlow):
    """A multi-scale flow with exact likelihood of the dequantised image.

    scales: how often the image is squeezed; depth: steps of flow a scale; hidden: channels of the coupling
    nets;
    dequant: noise on the grey levels, uniform or a flow of its own; logit, class_weight: see `ImageFlow`.

    Raises UsageError where height or width cannot be halved `scales` times.
    """

    paper: ClassVar[str] = "arXiv:1807.03039"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int = 2,
        depth: int = 8,
        hidden: int = 64,
        coupling: Literal["affine", "additive"] = "affine",
        net: Literal["conv", "residual"] = "conv",
        dequant: Dequant = "uniform",
        logit: float = 0.0,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        noise = dequantiser(dequant, data)
        super().__init__(
            data, logit=logit, dequantiser=noise, conditional=conditional, class_weight=class_weight
        )
        self.build(scales, lambda i, channels: (Step(channels, hidden, coupling, net) for _ in range(depth)))
