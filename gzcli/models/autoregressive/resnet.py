"""The two-stream gated ResNet of PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517, figure 2) and its
incremental twin.

The vertical stream at row i sees the image's rows < i, the corner stream at (i, j) also the pixels < j of row
i: a corner convolution has 2×2 taps of which the last is the current position. Each coarser scale has every
second row and column of the one above it and sees what position (2i, 2j) there sees.

A stream's feature is a pair (h, e), e = [elu(h), elu(−h)]: several convolutions take e, which costs as much
as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.autoregressive.layers import RowCache, VerticalConv
from gzcli.models.nn.common import ClassEmbedding

Feature = tuple[Tensor, Tensor]


def feature(h: Tensor) -> Feature:
    return h, concat_elu(h)


def concat_elu(h: Tensor) -> Tensor:
    return F.elu(torch.cat([h, -h], 1))


def glu(y: Tensor) -> Tensor:
    """a · σ(b) for y = [a, b]. The copy is for speed: on a CPU a sigmoid of half of channels_last memory is
    slow."""
    a, b = y.chunk(2, 1)
    return a * torch.sigmoid(b.clone())


class CornerConv(nn.Conv2d):
    """A 2×2 convolution whose last tap is the current position."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1):
        super().__init__(n_in, n_out, 2, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


def vertical_conv(n_in: int, n_out: int, *, stride: int = 1) -> VerticalConv:
    return VerticalConv(n_in, n_out, (2, 3), stride=stride)


class Block(nn.Module):
    """A gated ResNet block of one stream: h + a σ(b), [a, b] = conv_out(elu±(conv_in(e) + Σ 1×1(side))) +
    label bias."""

    def __init__(self, conv, hidden: int, sides: int, classes: int, dropout: float):
        super().__init__()
        self.conv_in = conv(2 * hidden, hidden)
        self.sides = nn.ModuleList(nn.Conv2d(2 * hidden, hidden, 1, bias=False) for _ in range(sides))
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(2 * hidden, 2 * hidden)
        self.label = ClassEmbedding(classes, 2 * hidden) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.table.weight, std=0.05)

    def forward(self, x: Feature, labels: Tensor | None, *sides: Tensor) -> Feature:
        h, e = x
        y = self.conv_in(e)
        for conv, side in zip(self.sides, sides, strict=True):
            y = y + conv(side)
        y = self.conv_out(self.dropout(concat_elu(y)))
        if self.label is not None:
            y = y + self.label(labels, len(h))[..., None, None]
        return feature(h + glu(y))


class Pair(nn.Module):
    """A block of each stream. The corner one also gets the vertical one's result; `skip`: both get a feature
    of the way up."""

    def __init__(self, hidden: int, skip: bool, classes: int, dropout: float):
        super().__init__()
        self.vertical = Block(vertical_conv, hidden, skip, classes, dropout)
        self.corner = Block(CornerConv, hidden, 1 + skip, classes, dropout)

    def forward(self, x: tuple[Feature, Feature], labels: Tensor | None, *skip: tuple[Feature, Feature]):
        v = self.vertical(x[0], labels, *(s[0][1] for s in skip))
        return v, self.corner(x[1], labels, v[1], *(s[1][1] for s in skip))


class Shrink(nn.Module):
    """Both streams to the next coarser scale."""

    def __init__(self, hidden: int):
        super().__init__()
        self.vertical = vertical_conv(hidden, hidden, stride=2)
        self.corner = CornerConv(hidden, hidden, stride=2)

    def forward(self, x: tuple[Feature, Feature]) -> tuple[Feature, Feature]:
        return feature(self.vertical(x[0][0])), feature(self.corner(x[1][0]))


class Grow(nn.Module):
    """Both streams back to the next finer scale."""

    def __init__(self, hidden: int):
        super().__init__()
        self.vertical = nn.ConvTranspose2d(
            hidden, hidden, (2, 3), stride=2, padding=(0, 1), output_padding=(0, 1)
        )
        self.corner = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)

    def forward(self, x: tuple[Feature, Feature], like: tuple[Feature, Feature]) -> tuple[Feature, Feature]:
        """x of the coarser scale at the size of `like`."""
        height, width = like[0][0].shape[2:]
        v, h = (
            grow(s[0])[:, :, :height, :width] for grow, s in zip((self.vertical, self.corner), x, strict=True)
        )
        return feature(v), feature(h)


class Scale(nn.Module):
    """The blocks of one resolution, on the way to coarser ones (`up`, as the paper says) and back, and the
    steps between."""

    def __init__(self, hidden: int, blocks: int, *, coarsest: bool, classes: int, dropout: float):
        super().__init__()
        self.up = nn.ModuleList(Pair(hidden, False, classes, dropout) for _ in range(blocks))
        self.down = nn.ModuleList(
            Pair(hidden, True, classes, dropout) for _ in range(blocks + (not coarsest))
        )
        self.shrink, self.grow = (None, None) if coarsest else (Shrink(hidden), Grow(hidden))


def u_net(x: Any, scales: Iterable[Any], *given: Any) -> Any:
    """x through the scales, finest first, and back, with shortcuts between blocks of one scale.

    The one walk of the whole net, of a row and of a pixel: `shrink` gives None where the coarser scale has no
    new position.
    """
    scale, *coarser = scales
    skips = [x]
    for block in scale.up:
        x = block(x, *given)
        skips.append(x)
    if coarser:
        y = scale.shrink(x)
        x = scale.grow(y if y is None else u_net(y, coarser, *given), x)
    else:
        skips.pop()
    for block in scale.down:
        x = block(x, *given, skips.pop())
    return x


# ---------------------------------------------------------------------------- incremental


class CornerCache:
    """The incremental twin of a `CornerConv`: per row what the row above contributes, then pixel by pixel the
    rest.

    Inputs lie as [n, (W + 1) · n_in], the first pixel zero, so that two neighbours are one run of memory.
    """

    def __init__(self, conv: CornerConv, n: int, width: int):
        self.above, self.left = (
            conv.weight.detach().permute(2, 3, 1, 0).flatten(1, 2)
        )  # [2 · n_in, n_out] each
        self.bias, self.n_in, self.stride = conv.bias.detach(), conv.in_channels, conv.stride[0]
        self.input = self.left.new_zeros(n, (width + 1) * self.n_in)
        self.i = -1

    def row(self, more: Tensor | float = 0.0) -> None:
        """Enters the next row, whose outputs get `more` [n, W, n_out] besides."""
        self.i, self.j = self.i + 1, 0
        if self.i % self.stride == 0:
            taps = self.input.unfold(1, 2 * self.n_in, self.stride * self.n_in)  # [n, W, 2 · n_in]
            self.base = taps @ self.above + (self.bias + more)

    def pixel(self, value: Tensor) -> Tensor | None:
        """The output [n, n_out] at the next pixel, whose input is `value`; None between two positions of a
        strided one."""
        j, start = self.j, self.j * self.n_in
        self.j += 1
        self.input[:, start + self.n_in : start + 2 * self.n_in] = value
        if self.i % self.stride or j % self.stride:
            return None
        return torch.addmm(
            self.base[:, j // self.stride], self.input[:, start : start + 2 * self.n_in], self.left
        )


class PairSteps:
    """The twin of a `Pair`: rows are [n, hidden, W], pixels [n, hidden]."""

    def __init__(self, pair: Pair, n: int, width: int, labels: Tensor | None):
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


class ShrinkSteps:
    """The twin of a `Shrink`."""

    def __init__(self, shrink: Shrink, n: int, width: int):
        self.vertical, self.corner = RowCache(shrink.vertical, n, width), CornerCache(shrink.corner, n, width)

    def row(self, x: Feature) -> Feature | None:
        self.corner.row()
        v = self.vertical(x[0])
        return None if v is None else feature(v)

    def pixel(self, x: Feature) -> Feature | None:
        h = self.corner.pixel(x[0])
        return None if h is None else feature(h)


class GrowSteps:
    """The twin of a `Grow`: keeps the last row of the coarser vertical stream and a row of the corner
    stream's pixels."""

    def __init__(self, grow: Grow):
        self.v_weight, self.v_bias, self.bias = (
            grow.vertical.weight.detach(),
            grow.vertical.bias,
            grow.corner.bias,
        )
        self.weight = grow.corner.weight.detach().permute(2, 3, 0, 1)  # [2, 2, hidden, hidden]
        self.i, self.pixels = -1, {}

    def row(self, x: Feature | None, like: Feature) -> Feature:
        """The next row, given the coarser scale's if there is a new one."""
        self.i, self.j = self.i + 1, -1
        self.v = self.v if x is None else x[0]
        weight = self.v_weight[:, :, self.i % 2]
        v = F.conv_transpose1d(self.v, weight, self.v_bias, stride=2, padding=1, output_padding=1)
        return feature(v[..., : like[0].shape[-1]])

    def pixel(self, x: Feature | None, like: Feature) -> Feature:
        self.j += 1
        if x is not None:
            self.pixels[self.j // 2] = x[0]
        return feature(torch.addmm(self.bias, self.pixels[self.j // 2], self.weight[self.i % 2, self.j % 2]))


class Walk(NamedTuple):
    """A scale as `u_net` walks it: the `row` methods of its parts' twins, or their `pixel` methods."""

    up: list[Callable]
    down: list[Callable]
    shrink: Callable | None
    grow: Callable | None


def walks(scale: Scale, n: int, width: int, labels: Tensor | None) -> tuple[Walk, Walk]:
    """The twin of a `Scale` of rows of `width` pixels: for its rows and for its pixels."""
    up, down = ([PairSteps(pair, n, width, labels) for pair in pairs] for pairs in (scale.up, scale.down))
    shrink = ShrinkSteps(scale.shrink, n, width) if scale.shrink else None
    grow = GrowSteps(scale.grow) if scale.grow else None
    rows = Walk([p.row for p in up], [p.row for p in down], shrink and shrink.row, grow and grow.row)
    return rows, Walk(
        [p.pixel for p in up], [p.pixel for p in down], shrink and shrink.pixel, grow and grow.pixel
    )
