"""A normalizing flow of checkerboard couplings (Rezende & Mohamed 2015, arXiv:1505.05770; couplings: Dinh
2014, 2017).

x → dequantise → depth × (ActNorm → coupling) → z. Each coupling changes the squares of one colour given those
of the other, so that log p(x) = log p(z) + Σ log |det| (Rezende 2015, eq. 13) with triangular Jacobians. With
`scales` > 1, half of the channels leave the flow after each scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.types import DataInfo
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlowOptions, MultiscaleFlow
from gzcli.models.normalizing_flow.layers import ActNorm, ActNormConv, Bijection, ZeroConv


class GatedNet(nn.Module):
    """`depth` gated convolutions h + a · σ(b), where (a, b) is a 3×3 convolution of relu(h)."""

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


class Flow(MultiscaleFlow):
    """Checkerboard affine couplings with gated convolutional networks.

    Raises UsageError if height or width cannot be halved `scales` times.

    scales: number of times that the image is squeezed. Default: until a side is odd, or 4 or less.
    depth: couplings per scale.
    hidden: channels of a coupling's network.
    blocks: gated convolutions of a coupling's network.
    """

    takes: ClassVar[str] = "levels"

    paper: ClassVar[str] = "arXiv:1505.05770"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int | None = None,
        depth: int = 8,
        hidden: int = 32,
        blocks: int = 2,
        options: ImageFlowOptions = ImageFlowOptions(),
    ):
        super().__init__(data, options)

        def steps(channels: int, last: bool) -> Iterator[Bijection]:
            yield layers.Permute(layers.checkerboard(channels))
            for k in range(depth):
                net = GatedNet(channels // 2, channels, hidden, blocks)
                yield ActNorm(channels)
                yield layers.AffineCoupling(channels, net, flip=k % 2 == 1)

        self.build(scales, steps)
