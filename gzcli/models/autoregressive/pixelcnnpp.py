"""PixelCNN++ — Salimans, Karpathy, Chen & Kingma 2017, arXiv:1701.05517.

p(x) = Π p(pixel | pixels before it); each factor is a mixture of discretised logistics over the whole pixel,
and a causal U-net of gated ResNet blocks in two streams computes its parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.autoregressive.base import PixelModel, grey_levels
from gzcli.models.autoregressive.layers import HorizontalConv, PixelCache, RowCache, VerticalConv
from gzcli.models.autoregressive.resnet import Scale, feature, u_net
from gzcli.models.autoregressive.resnet_incremental import IncrementalScale
from gzcli.models.nn.common import Modules, to_fp32
from gzcli.models.nn.logistic import LogisticMixture


class PixelCNNpp(PixelModel):
    """PixelCNN++ with exact likelihood.

    Images of two levels have one Bernoulli logit a channel. The vertical stream gets a learned map of
    positions; the paper's channel of ones shows the border only.

    hidden: channels of each stream; a multiple of 32 is fast in bf16.
    blocks: gated ResNet blocks of each scale of the encoder, from the images' own resolution on, which is
      halved between two scales; in the decoder each scale but the coarsest has one more.
    mixture: logistics in the mixture of a pixel.
    dropout: share of the activations inside the blocks that training sets to zero.
    """

    paper = "Salimans et al. 2017, arXiv:1701.05517"

    def __init__(
        self,
        data: DataInfo,
        *,
        hidden: int = 64,
        blocks: tuple[int, ...] = (1, 2, 2),
        mixture: int = 10,
        dropout: float = 0.0,
        conditional: bool = False,
    ):
        if not blocks or min(blocks) < 0 or mixture < 1:
            raise UsageError(
                "`model.blocks` must name a number of blocks for one scale or more, "
                "`model.mixture` be 1 or more"
            )
        channels, height, width = data.shape
        pixels = LogisticMixture(channels, grey_levels(data), mixture)
        super().__init__(data, conditional, parts=1, uniforms=pixels.uniforms)
        self.pixels = pixels
        self.first_vertical = VerticalConv(channels, hidden, (2, 3), strict=True)
        self.first_above = VerticalConv(channels, hidden, (1, 3), strict=True)
        self.first_left = HorizontalConv(channels, hidden, 1, strict=True)
        self.position = nn.Parameter(torch.zeros(hidden, height, width))
        classes = len(data.classes) if conditional else 0
        self.scales: Modules[Scale] = Modules(
            Scale(hidden, n, coarsest=i == len(blocks) - 1, classes=classes, dropout=dropout)
            for i, n in enumerate(blocks)
        )
        self.head = nn.Conv2d(hidden, pixels.size, 1)
        pixels.start(self.head.get_parameter("bias"))
        # weights are g · v / ‖v‖, with a norm for each output channel (Salimans & Kingma 2016)
        for layer in list(self.modules()):
            if isinstance(layer, (nn.Conv2d, HorizontalConv)):
                weight_norm(layer)
            elif isinstance(layer, nn.ConvTranspose2d):
                weight_norm(layer, dim=1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The parameters of every pixel's distribution given those before it, [B, 1, H, W, size]."""
        v, h = self.first_vertical(x), self.first_above(x) + self.first_left(x)
        v = v + self.position.to(v.dtype)
        # channels_last is faster on a CPU; it is set here, as images of one channel do not pass it on
        v, h = (feature(s.contiguous(memory_format=torch.channels_last)) for s in (v, h))
        _, (h, _) = u_net((v, h), self.scales, labels if self.conditional else None)
        # in full precision: the 8 bits of bf16 are coarser than a grey level
        with torch.autocast(x.device.type, enabled=False):
            return self.head(to_fp32(F.elu(h))).permute(0, 2, 3, 1)[:, None]

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """log p of every pixel given those before it, [B, 1, H, W]."""
        return self.pixels.log_prob(outputs[:, 0], x.movedim(1, -1))[:, None]

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        return self.pixels.draw(outputs, u, temperature)

    def incremental(self, n: int, labels: Tensor | None) -> IncrementalPixelCNNpp:
        return IncrementalPixelCNNpp(self, n, labels)


class IncrementalPixelCNNpp:
    """The net for n images: the vertical stream row by row, the corner one pixel by pixel, see
    `base.Incremental`.

    A coarser scale is computed at every second row and column of the finer one. So a pixel costs a third more
    than with one scale, at any size of the image.
    """

    def __init__(self, net: PixelCNNpp, n: int, labels: Tensor | None):
        width = net.data.shape[2]
        self.net, self.i = net, 0
        self.head = net.head.weight[..., 0, 0].detach()
        self.vertical = RowCache(net.first_vertical, n, width)
        self.above = RowCache(net.first_above, n, width)
        self.left = PixelCache(net.first_left, n, width)
        scales = [IncrementalScale(scale, n, -(-width // 2**s), labels) for s, scale in enumerate(net.scales)]
        self.rows, self.pixels = [s.rows for s in scales], [s.pixels for s in scales]

    def row(self, above: Tensor) -> None:
        self.base = self.above(above).permute(2, 0, 1) + self.left.bias  # [W, n, hidden]
        u_net(feature(self.vertical(above) + self.net.position[:, self.i]), self.rows)
        self.i += 1

    def keep(self, row: Tensor) -> None:
        for j, value in enumerate(row.unbind(-1)):
            self.outputs(j, 0)
            self.put(j, 0, value)

    def outputs(self, j: int, part: int) -> Tensor:
        """The parameters of pixel j's distribution, [n, size]."""
        h, _ = u_net(feature(self.left.left(j, self.base[j])), self.pixels)
        return F.linear(F.elu(h), self.head, self.net.head.bias)

    def put(self, j: int, part: int, value: Tensor) -> None:
        self.left.put(j, 0, value)
