"""PixelCNN++ — Salimans, Karpathy, Chen & Kingma 2017, arXiv:1701.05517.

p(x) = Π p(pixel | pixels before it), each factor a mixture of discretised logistics over the whole pixel,
whose parameters are computed by a causal U-net of gated ResNet blocks in two streams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gzcli.errors import UsageError
from gzcli.models.autoregressive.base import PixelModel
from gzcli.models.autoregressive.layers import HorizontalConv, PixelCache, RowCache, VerticalConv
from gzcli.models.autoregressive.resnet import Scale, feature, u_net, walks
from gzcli.models.nn.common import to_fp32
from gzcli.models.nn.logistic import LogisticMixture
from gzcli.types import DataInfo


class PixelCNNpp(PixelModel):
    """PixelCNN++ with exact likelihood.

    hidden: channels of each stream (a multiple of 32 for speed in bf16); blocks: gated ResNet blocks of each
    scale on the way to coarser ones, from the images' own resolution on, halved each time; the way back has
    one more, but at the coarsest scale; mixture: logistics a pixel; dropout: inside the blocks. Two levels
    have one Bernoulli logit a channel. The vertical stream gets a learned map of positions, in place of the
    paper's channel of ones, which shows the border only.
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
                "`model.blocks` must name a number of blocks for one scale or more, `model.mixture` be 1 "
                "or more"
            )
        channels, height, width = data.shape
        pixels = LogisticMixture(channels, data.levels, mixture)
        super().__init__(data, conditional=conditional, parts=1, uniforms=pixels.uniforms)
        self.pixels = pixels
        self.first_vertical = VerticalConv(channels, hidden, (2, 3), strict=True)
        self.first_above = VerticalConv(channels, hidden, (1, 3), strict=True)
        self.first_left = HorizontalConv(channels, hidden, 1, strict=True)
        self.position = nn.Parameter(torch.zeros(hidden, height, width))
        classes = len(data.classes) if conditional else 0
        self.scales = nn.ModuleList(
            Scale(hidden, n, coarsest=i == len(blocks) - 1, classes=classes, dropout=dropout)
            for i, n in enumerate(blocks)
        )
        self.head = nn.Conv2d(hidden, pixels.size, 1)
        pixels.start(self.head.bias)
        for layer in list(
            self.modules()
        ):  # g · v / ‖v‖, a norm for each output channel (Salimans & Kingma 2016)
            if isinstance(layer, (nn.Conv2d, HorizontalConv)):
                weight_norm(layer)
            elif isinstance(layer, nn.ConvTranspose2d):
                weight_norm(layer, dim=1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The parameters of every pixel's distribution given those before it, [B, 1, H, W, size]."""
        v, h = self.first_vertical(x), self.first_above(x) + self.first_left(x)
        v = v + self.position.to(v.dtype)
        # channels_last is faster on a CPU; set here, as an image of one channel has no format to hand on
        v, h = (feature(s.contiguous(memory_format=torch.channels_last)) for s in (v, h))
        _, (h, _) = u_net((v, h), self.scales, labels if self.conditional else None)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # a mean of 8 bits of mantissa is coarser than a grey level
            return self.head(to_fp32(F.elu(h))).permute(0, 2, 3, 1)[:, None]

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """log p of every pixel given those before it, [B, 1, H, W]."""
        return self.pixels.log_prob(outputs[:, 0], x.movedim(1, -1))[:, None]

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        return self.pixels.draw(outputs, u, temperature)

    def steps(self, n: int, labels: Tensor | None) -> Steps:
        return Steps(self, n, labels)


class Steps:
    """The net computed incrementally for n images: the vertical stream by row, the corner one by pixel, see
    `base.Steps`.

    A coarser scale takes part at every second row and column of the finer one, so a pixel costs a third more
    than at one scale, whatever the size of the image.
    """

    def __init__(self, net: PixelCNNpp, n: int, labels: Tensor | None):
        width = net.data.shape[2]
        self.net, self.i = net, 0
        self.head = net.head.weight[..., 0, 0].detach()
        self.vertical, self.above = (
            RowCache(net.first_vertical, n, width),
            RowCache(net.first_above, n, width),
        )
        self.left = PixelCache(net.first_left, n, width)
        sizes = [-(-width // 2**s) for s in range(len(net.scales))]
        self.rows, self.pixels = zip(
            *(walks(s, n, w, labels) for s, w in zip(net.scales, sizes, strict=True)), strict=True
        )

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
