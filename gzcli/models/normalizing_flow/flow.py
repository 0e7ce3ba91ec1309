"""A normalizing flow of checkerboard couplings (Rezende & Mohamed 2015, arXiv:1505.05770; couplings: Dinh
2014, 2017).

x → dequantise → depth × (ActNorm → coupling) → z: each coupling changes the squares of one colour given those
of the other, so log p(x) = log p(z) + Σ log |det| (Rezende 2015, eq. 13) with triangular Jacobians. With
`scales` > 1 half of the channels leave the flow after each scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow
from gzcli.models.normalizing_flow.dequantise import Dequant, dequantiser
from gzcli.models.normalizing_flow.nets import GatedNet
from gzcli.models.normalizing_flow.norms import ActNorm
from gzcli.types import DataInfo


class Flow(ImageFlow):
    """Checkerboard affine couplings with gated convolutional nets.

    scales: how often the image is squeezed; depth: couplings a scale; hidden, blocks: channels and gated
    layers of their nets; dequant: noise on the grey levels, uniform or a flow of its own; logit,
    class_weight: see `ImageFlow`.

    Raises UsageError where height or width cannot be halved `scales` times.
    """

    paper: ClassVar[str] = "arXiv:1505.05770"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int = 1,
        depth: int = 8,
        hidden: int = 32,
        blocks: int = 2,
        dequant: Dequant = "uniform",
        logit: float = 0.0,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        noise = dequantiser(dequant, data)
        super().__init__(
            data, logit=logit, dequantiser=noise, conditional=conditional, class_weight=class_weight
        )

        def steps(i: int, channels: int) -> Iterator[nn.Module]:
            yield layers.Permute(layers.checkerboard(channels))
            for k in range(depth):
                net = GatedNet(channels // 2, channels, hidden, blocks)
                yield ActNorm(channels)
                yield layers.AffineCoupling(channels, net, flip=k % 2 == 1)

        self.build(scales, steps)
