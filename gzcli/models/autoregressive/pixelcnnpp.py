"""PixelCNN++ — Salimans, Karpathy, Chen & Kingma 2017, arXiv:1701.05517.

p(x) = Π p(pixel | pixels before it). Each factor is a mixture of discretised logistics over the whole pixel.
A causal U-net of gated ResNet blocks in two streams computes its parameters (figure 2).

The vertical stream at row i depends on the image's rows < i; the corner stream at (i, j) also depends on the
pixels < j of row i. A corner convolution has 2×2 taps, the last of which is the current position. A coarser
scale has every second row and column of the next finer one; its position (i, j) depends on the same pixels as
(2i, 2j) there. A feature of a stream is a pair (h, e) with e = [elu(h), elu(−h)], because several
convolutions take the same e. For sampling, each class `Incremental…` computes a module row by row and pixel
by pixel, from caches of its earlier inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.autoregressive.base import (
    HorizontalConv,
    PixelCache,
    PixelModel,
    RowCache,
    VerticalConv,
    grey_levels,
)
from gzcli.models.nn import ClassEmbedding, Labels, Modules, to_fp32
from gzcli.models.nn.pixels import LogisticMixture

Feature = tuple[Tensor, Tensor]
Streams = tuple[Feature, Feature]  # vertical and corner streams
Conv = TypeVar("Conv", bound=nn.Conv2d)


def feature(h: Tensor) -> Feature:
    """The pair (h, e)."""
    return h, concat_elu(h)


def concat_elu(h: Tensor) -> Tensor:
    """[elu(h), elu(−h)] along the channels of h [B, C, …]."""
    return F.elu(torch.cat([h, -h], 1))


def glu(y: Tensor) -> Tensor:
    """a · σ(b) for y = [a, b] along the channels."""
    # b is copied for speed: on a CPU the sigmoid of a slice of channels_last memory is slow
    a, b = y.chunk(2, 1)
    return a * torch.sigmoid(b.clone())


class CornerConv(nn.Conv2d):
    """A 2×2 convolution whose last tap is the current position."""

    bias: Tensor

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1):
        super().__init__(n_in, n_out, 2, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


def vertical_conv(n_in: int, n_out: int, *, stride: int = 1) -> VerticalConv:
    return VerticalConv(n_in, n_out, (2, 3), stride=stride)


class GatedResNet(nn.Module, Generic[Conv]):
    """A block of one stream: h + a σ(b), where [a, b] = conv_out(elus(y)) + label bias and y = conv_in(e) + Σ
    1×1(side)."""

    def __init__(
        self, conv: Callable[[int, int], Conv], hidden: int, sides: int, classes: int, dropout: float
    ):
        super().__init__()
        self.conv_in = conv(2 * hidden, hidden)
        self.sides: Modules[nn.Conv2d] = Modules(
            nn.Conv2d(2 * hidden, hidden, 1, bias=False) for _ in range(sides)
        )
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(2 * hidden, 2 * hidden)
        self.label = ClassEmbedding(classes, 2 * hidden) if classes else None
        if self.label is not None:
            self.label.init_weights(0.05)

    def forward(self, x: Feature, labels: Labels, *sides: Tensor) -> Feature:
        h, e = x
        y = self.conv_in(e)
        for conv, side in zip(self.sides, sides, strict=True):
            y = y + conv(side)
        y = self.conv_out(self.dropout(concat_elu(y)))
        if self.label is not None:
            y = y + self.label(labels, len(h))[..., None, None]
        return feature(h + glu(y))


class Pair(nn.Module):
    """A block of each stream; the corner block also gets the output of the vertical one."""

    def __init__(self, hidden: int, skip: bool, classes: int, dropout: float):
        super().__init__()
        self.vertical = GatedResNet(vertical_conv, hidden, skip, classes, dropout)
        self.corner = GatedResNet(CornerConv, hidden, 1 + skip, classes, dropout)

    def forward(self, x: Streams, labels: Labels, *skip: Streams) -> Streams:
        v = self.vertical(x[0], labels, *(s[0][1] for s in skip))
        return v, self.corner(x[1], labels, v[1], *(s[1][1] for s in skip))


class Shrink(nn.Module):
    """Both streams to the next coarser scale."""

    def __init__(self, hidden: int):
        super().__init__()
        self.vertical = vertical_conv(hidden, hidden, stride=2)
        self.corner = CornerConv(hidden, hidden, stride=2)

    def forward(self, x: Streams) -> Streams:
        return feature(self.vertical(x[0][0])), feature(self.corner(x[1][0]))


class Grow(nn.Module):
    """Both streams back to the next finer scale."""

    def __init__(self, hidden: int):
        super().__init__()
        self.vertical = nn.ConvTranspose2d(
            hidden, hidden, (2, 3), stride=2, padding=(0, 1), output_padding=(0, 1)
        )
        self.corner = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)

    def forward(self, x: Streams, finer: Streams) -> Streams:
        """x of the coarser scale, enlarged to the size of the finer one."""
        height, width = finer[0][0].shape[2:]
        v, h = (
            grow(s[0])[:, :, :height, :width] for grow, s in zip((self.vertical, self.corner), x, strict=True)
        )
        return feature(v), feature(h)


class Scale(nn.Module):
    """The blocks of one resolution, towards coarser ones (`up` in the paper) and back (`down`). It includes
    the layers between this resolution and the next coarser one."""

    def __init__(self, hidden: int, blocks: int, *, coarsest: bool, classes: int, dropout: float):
        super().__init__()
        back = blocks if coarsest else blocks + 1
        self.up: Modules[Pair] = Modules(Pair(hidden, False, classes, dropout) for _ in range(blocks))
        self.down: Modules[Pair] = Modules(Pair(hidden, True, classes, dropout) for _ in range(back))
        self.shrink = None if coarsest else Shrink(hidden)
        self.grow = None if coarsest else Grow(hidden)


def u_net(
    x: Any, scales: Iterable[Any], *labels: Any, call: Callable[..., Any] = lambda layer, *x: layer(*x)
) -> Any:
    """Passes x through the scales, finest first, and back, with shortcuts between the blocks of one scale.
    `call` applies a layer to the image, a row or a pixel. For a row or a pixel, a coarser scale may have no
    new position."""
    scale, *coarser = scales
    skips = [x]
    for block in scale.up:
        x = call(block, x, *labels)
        skips.append(x)
    if coarser:
        y = call(scale.shrink, x)
        x = call(scale.grow, y if y is None else u_net(y, coarser, *labels, call=call), x)
    else:
        skips.pop()
    for block in scale.down:
        x = call(block, x, *labels, skips.pop())
    return x


class CornerCache:
    """Computes a `CornerConv` pixel by pixel, after the contribution of the row above."""

    base: Tensor  # [n, W, n_out], the row above's contribution

    def __init__(self, conv: CornerConv, n: int, width: int):
        taps = conv.weight.detach().permute(2, 3, 1, 0).flatten(1, 2)  # [2, 2 · n_in, n_out]
        self.above, self.left = taps[0], taps[1]
        self.bias, self.n_in, self.stride = conv.bias.detach(), conv.in_channels, conv.stride[0]
        self.input = self.left.new_zeros(n, (width + 1) * self.n_in)
        self.i = self.j = -1

    def row(self, extra: Tensor | float = 0.0) -> None:
        """Begins the next row; `extra` [n, W, n_out] is added to its outputs."""
        self.i, self.j = self.i + 1, -1
        if self.i % self.stride == 0:
            taps = self.input.unfold(1, 2 * self.n_in, self.stride * self.n_in)  # [n, W, 2 · n_in]
            self.base = taps @ self.above + (self.bias + extra)

    def pixel(self, value: Tensor) -> Any:
        """The output [n, n_out] at the next pixel, whose input is `value` [n, n_in]; None if the stride
        skips it."""
        self.j += 1
        self.input[:, (self.j + 1) * self.n_in : (self.j + 2) * self.n_in] = value
        if self.i % self.stride or self.j % self.stride:
            return None
        taps = self.input[:, self.j * self.n_in : (self.j + 2) * self.n_in]
        return torch.addmm(self.base[:, self.j // self.stride], taps, self.left)


class IncrementalPair:
    """Computes a `Pair` position by position: rows are [n, hidden, W], pixels [n, hidden]."""

    def __init__(self, pair: Pair, n: int, width: int, labels: Labels):
        v, h = pair.vertical, pair.corner
        self.v_in, self.v_out = RowCache(v.conv_in, n, width), RowCache(v.conv_out, n, width)
        self.h_in, self.h_out = CornerCache(h.conv_in, n, width), CornerCache(h.conv_out, n, width)
        self.v_sides = [conv.weight[..., 0] for conv in v.sides]
        self.across, *self.h_sides = (conv.weight[:, :, 0, 0].T.contiguous() for conv in h.sides)
        self.v_label = v.label(labels, n)[:, :, None] if v.label else 0.0  # [n, 2 · hidden, 1]
        self.h_label = h.label(labels, n)[:, None] if h.label else 0.0  # [n, 1, 2 · hidden]

    def row(self, x: Feature, *skip: Feature) -> Feature:
        v, e = x
        y = self.v_in(e)
        for weight, s in zip(self.v_sides, skip, strict=True):
            y = y + F.conv1d(s[1], weight)
        y = self.v_out(concat_elu(y))
        v, e = feature(v + glu(y + self.v_label))
        self.h_in.row(e.mT @ self.across)
        self.h_out.row(self.h_label)
        return v, e

    def pixel(self, x: Feature, *skip: Feature) -> Feature:
        h, e = x
        y = self.h_in.pixel(e)
        for weight, s in zip(self.h_sides, skip, strict=True):
            y = torch.addmm(y, s[1], weight)
        return feature(h + glu(self.h_out.pixel(concat_elu(y))))


class IncrementalShrink:
    """Computes a `Shrink` position by position; None if the coarser scale has no new position."""

    def __init__(self, shrink: Shrink, n: int, width: int):
        self.vertical, self.corner = RowCache(shrink.vertical, n, width), CornerCache(shrink.corner, n, width)

    def row(self, x: Feature) -> Feature | None:
        self.corner.row()
        v = self.vertical(x[0])
        return None if v is None else feature(v)

    def pixel(self, x: Feature) -> Feature | None:
        h = self.corner.pixel(x[0])
        return None if h is None else feature(h)


class IncrementalGrow:
    """Computes a `Grow` position by position."""

    v: Tensor  # [n, hidden, W of the coarser scale]

    def __init__(self, grow: Grow):
        self.v_weight, self.v_bias = grow.vertical.weight.detach(), grow.vertical.bias
        self.weight = grow.corner.weight.detach().permute(2, 3, 0, 1)  # [2, 2, hidden, hidden]
        self.bias = grow.corner.get_parameter("bias")
        self.i = self.j = -1
        self.pixels: dict[int, Tensor] = {}  # column of the coarser scale → [n, hidden]

    def row(self, x: Feature | None, finer: Feature) -> Feature:
        """The next row, given the coarser scale's new row, if any."""
        self.i, self.j = self.i + 1, -1
        self.v = self.v if x is None else x[0]
        weight = self.v_weight[:, :, self.i % 2]
        v = F.conv_transpose1d(self.v, weight, self.v_bias, stride=2, padding=1, output_padding=1)
        return feature(v[..., : finer[0].shape[-1]])

    def pixel(self, x: Feature | None, finer: Feature) -> Feature:
        """The next pixel, given the coarser scale's new pixel, if any."""
        self.j += 1
        if x is not None:
            self.pixels[self.j // 2] = x[0]
        return feature(torch.addmm(self.bias, self.pixels[self.j // 2], self.weight[self.i % 2, self.j % 2]))


class IncrementalScale:
    """Computes a `Scale` with rows of `width` pixels position by position."""

    def __init__(self, scale: Scale, n: int, width: int, labels: Labels):
        self.up = [IncrementalPair(pair, n, width, labels) for pair in scale.up]
        self.down = [IncrementalPair(pair, n, width, labels) for pair in scale.down]
        self.shrink = IncrementalShrink(scale.shrink, n, width) if scale.shrink else None
        self.grow = IncrementalGrow(scale.grow) if scale.grow else None


class PixelCNNpp(PixelModel):
    """PixelCNN++ with exact likelihood.

    Images of two levels have one Bernoulli logit per channel. The vertical stream gets a learned map of
    positions; the paper's channel of ones reveals only the border.

    hidden: channels of each stream. Multiples of 32 are fast in bf16.
    blocks: gated ResNet blocks of each scale of the encoder, finest first. Each scale of the decoder except
      the coarsest has one more.
    mixture: number of logistics in a pixel's mixture.
    dropout: dropout rate inside the blocks.
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
            message = "`model.blocks` must give a number of blocks for each scale"
            raise UsageError(f"{message}, and `model.mixture` must be at least 1")
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
        pixels.init_bias(self.head.get_parameter("bias"))
        # weights are g · v / ‖v‖, with a norm for each output channel (Salimans & Kingma 2016)
        for layer in list(self.modules()):
            if isinstance(layer, (nn.Conv2d, HorizontalConv)):
                weight_norm(layer)
            elif isinstance(layer, nn.ConvTranspose2d):
                weight_norm(layer, dim=1)

    def forward(self, x: Tensor, labels: Labels = None) -> Tensor:
        """The parameters of every pixel's distribution given the pixels before it, [B, 1, H, W, size]."""
        v, h = self.first_vertical(x), self.first_above(x) + self.first_left(x)
        v = v + self.position.to(v.dtype)
        # channels_last is faster on a CPU; it is set here, as images of one channel do not pass it on
        v, h = (feature(s.contiguous(memory_format=torch.channels_last)) for s in (v, h))
        _, (h, _) = u_net((v, h), self.scales, labels if self.conditional else None)
        # in full precision: the 8 bits of bf16 are coarser than a grey level
        with torch.autocast(x.device.type, enabled=False):
            return self.head(to_fp32(F.elu(h))).permute(0, 2, 3, 1)[:, None]

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        return self.pixels.log_prob(outputs[:, 0], x.movedim(1, -1))[:, None]

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        return self.pixels.draw(outputs, u, temperature)

    def incremental(self, n: int, labels: Labels) -> IncrementalPixelCNNpp:
        return IncrementalPixelCNNpp(self, n, labels)


class IncrementalPixelCNNpp:
    """Computes the vertical stream row by row, and the corner stream pixel by pixel."""

    def __init__(self, net: PixelCNNpp, n: int, labels: Labels):
        width = net.data.shape[2]
        self.net, self.i = net, 0
        self.head = net.head.weight[..., 0, 0].detach()
        self.vertical = RowCache(net.first_vertical, n, width)
        self.above = RowCache(net.first_above, n, width)
        self.left = PixelCache(net.first_left, n, width)
        self.scales = [IncrementalScale(s, n, -(-width // 2**i), labels) for i, s in enumerate(net.scales)]

    def row(self, above: Tensor) -> None:
        self.base = self.above(above).permute(2, 0, 1) + self.left.bias  # [W, n, hidden]
        v = feature(self.vertical(above) + self.net.position[:, self.i])
        u_net(v, self.scales, call=lambda layer, *x: layer.row(*x))
        self.i += 1

    def keep(self, row: Tensor) -> None:
        for j, value in enumerate(row.unbind(-1)):
            self.outputs(j, 0)
            self.put(j, 0, value)

    def outputs(self, j: int, part: int) -> Tensor:
        """The parameters of pixel j's distribution, [n, size]."""
        h = feature(self.left.past_sum(j, self.base[j]))
        h, _ = u_net(h, self.scales, call=lambda layer, *x: layer.pixel(*x))
        return F.linear(F.elu(h), self.head, self.net.head.bias)

    def put(self, j: int, part: int, value: Tensor) -> None:
        self.left.put(j, 0, value)
