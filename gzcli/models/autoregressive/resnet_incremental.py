"""The gated ResNet of PixelCNN++ row by row and pixel by pixel, for sampling: each class computes a module of
resnet.py from caches of its earlier inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.models.autoregressive.layers import RowCache
from gzcli.models.autoregressive.resnet import (
    CornerConv,
    Feature,
    Grow,
    Pair,
    Scale,
    Shrink,
    concat_elu,
    feature,
    glu,
)


class CornerCache:
    """Computes a `CornerConv` pixel by pixel: at the start of a row the contribution of the row above, then
    for each pixel the rest.

    Inputs lie as [n, (W + 1) · n_in], the first pixel zero, so that two neighbours are one run of memory.
    """

    base: Tensor  # [n, W, n_out], the row above's contribution

    def __init__(self, conv: CornerConv, n: int, width: int):
        taps = conv.weight.detach().permute(2, 3, 1, 0).flatten(1, 2)  # [2, 2 · n_in, n_out]
        self.above, self.left = taps[0], taps[1]
        self.bias, self.n_in, self.stride = conv.bias.detach(), conv.in_channels, conv.stride[0]
        self.input = self.left.new_zeros(n, (width + 1) * self.n_in)
        self.i = self.j = -1

    def row(self, more: Tensor | float = 0.0) -> None:
        """Begins the next row; `more` [n, W, n_out] is added to its outputs."""
        self.i, self.j = self.i + 1, -1
        if self.i % self.stride == 0:
            taps = self.input.unfold(1, 2 * self.n_in, self.stride * self.n_in)  # [n, W, 2 · n_in]
            self.base = taps @ self.above + (self.bias + more)

    def pixel(self, value: Tensor) -> Tensor:
        """The output [n, n_out] at the next pixel, whose input is `value` [n, n_in]."""
        self.put(value)
        return self.output()

    def put(self, value: Tensor) -> None:
        """Enters the next input pixel [n, n_in]."""
        self.j += 1
        self.input[:, (self.j + 1) * self.n_in : (self.j + 2) * self.n_in] = value

    @property
    def has_output(self) -> bool:
        """Whether there is an output for the pixel that was entered last: a strided one skips rows and
        columns."""
        return self.i % self.stride == 0 and self.j % self.stride == 0

    def output(self) -> Tensor:
        taps = self.input[:, self.j * self.n_in : (self.j + 2) * self.n_in]
        return torch.addmm(self.base[:, self.j // self.stride], taps, self.left)


class IncrementalPair:
    """Computes a `Pair` position by position: rows are [n, hidden, W], pixels [n, hidden]."""

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


class IncrementalShrink:
    """Computes a `Shrink` position by position; None where the coarser scale has no new position."""

    def __init__(self, shrink: Shrink, n: int, width: int):
        self.vertical, self.corner = RowCache(shrink.vertical, n, width), CornerCache(shrink.corner, n, width)

    def row(self, x: Feature) -> Feature | None:
        self.corner.row()
        self.vertical.push(x[0])
        return feature(self.vertical.output()) if self.vertical.has_output else None

    def pixel(self, x: Feature) -> Feature | None:
        self.corner.put(x[0])
        return feature(self.corner.output()) if self.corner.has_output else None


class IncrementalGrow:
    """Computes a `Grow` position by position. It keeps the last row of the coarser vertical stream, and a row
    of pixels of the coarser corner stream."""

    v: Tensor  # [n, hidden, W of the coarser scale]

    def __init__(self, grow: Grow):
        self.v_weight, self.v_bias = grow.vertical.weight.detach(), grow.vertical.bias
        self.weight = grow.corner.weight.detach().permute(2, 3, 0, 1)  # [2, 2, hidden, hidden]
        self.bias = grow.corner.get_parameter("bias")
        self.i = self.j = -1
        self.pixels: dict[int, Tensor] = {}  # column of the coarser scale → [n, hidden]

    def row(self, x: Feature | None, like: Feature) -> Feature:
        """The next row, given the coarser scale's if there is a new one."""
        self.i, self.j = self.i + 1, -1
        self.v = self.v if x is None else x[0]
        weight = self.v_weight[:, :, self.i % 2]
        v = F.conv_transpose1d(self.v, weight, self.v_bias, stride=2, padding=1, output_padding=1)
        return feature(v[..., : like[0].shape[-1]])

    def pixel(self, x: Feature | None, like: Feature) -> Feature:
        """The next pixel, given the coarser scale's if there is a new one."""
        self.j += 1
        if x is not None:
            self.pixels[self.j // 2] = x[0]
        return feature(torch.addmm(self.bias, self.pixels[self.j // 2], self.weight[self.i % 2, self.j % 2]))


class Walk(NamedTuple):
    """The functions of a scale, of rows or of pixels, that `u_net` calls."""

    up: list[Callable[..., Feature]]
    down: list[Callable[..., Feature]]
    shrink: Callable[[Feature], Feature | None] | None
    grow: Callable[[Feature | None, Feature], Feature] | None


class IncrementalScale:
    """Computes a `Scale` with rows of `width` pixels position by position.

    rows: the functions of rows that `u_net` calls.
    pixels: the functions of pixels that `u_net` calls.
    """

    def __init__(self, scale: Scale, n: int, width: int, labels: Tensor | None):
        up, down = (
            [IncrementalPair(pair, n, width, labels) for pair in pairs] for pairs in (scale.up, scale.down)
        )
        shrink = IncrementalShrink(scale.shrink, n, width) if scale.shrink else None
        grow = IncrementalGrow(scale.grow) if scale.grow else None
        self.rows = Walk(
            [pair.row for pair in up],
            [pair.row for pair in down],
            shrink.row if shrink else None,
            grow.row if grow else None,
        )
        self.pixels = Walk(
            [pair.pixel for pair in up],
            [pair.pixel for pair in down],
            shrink.pixel if shrink else None,
            grow.pixel if grow else None,
        )
