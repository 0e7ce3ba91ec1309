"""The two-stream gated ResNet of PixelCNN++ (Salimans et al. 2017, arXiv:1701.05517, figure 2).

The vertical stream at row i sees the image's rows < i, the corner stream at (i, j) also the pixels < j of row
i: a corner convolution has 2×2 taps of which the last is the current position. Each coarser scale has every
second row and column of the next finer one, and sees what position (2i, 2j) there sees.

A feature of a stream is a pair (h, e) with e = [elu(h), elu(−h)], because several convolutions take the same
e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.autoregressive.layers import VerticalConv
from gzcli.models.nn.common import ClassEmbedding, Modules

Feature = tuple[Tensor, Tensor]
Conv = TypeVar("Conv", bound=nn.Conv2d)


def feature(h: Tensor) -> Feature:
    """The pair (h, e)."""
    return h, concat_elu(h)


def concat_elu(h: Tensor) -> Tensor:
    """[elu(h), elu(−h)] along the channels of h [B, C, …]."""
    return F.elu(torch.cat([h, -h], 1))


def glu(y: Tensor) -> Tensor:
    """a · σ(b) for y = [a, b] along the channels.

    b is copied for speed: on a CPU the sigmoid of a slice of channels_last memory is slow.
    """
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


class Block(nn.Module, Generic[Conv]):
    """A gated ResNet block of one stream.

        h + a σ(b),  [a, b] = conv_out([elu(y), elu(−y)]) + label bias,  y = conv_in(e) + Σ 1×1(side)

    conv: makes a causal convolution of (inputs, outputs).
    sides: number of features of other streams that `forward` takes.
    """

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
    """A block of each stream. The corner block also gets the result of the vertical one.

    skip: whether both also get the feature of a shortcut.
    """

    def __init__(self, hidden: int, skip: bool, classes: int, dropout: float):
        super().__init__()
        self.vertical = Block(vertical_conv, hidden, skip, classes, dropout)
        self.corner = Block(CornerConv, hidden, 1 + skip, classes, dropout)

    def forward(
        self, x: tuple[Feature, Feature], labels: Tensor | None, *skip: tuple[Feature, Feature]
    ) -> tuple[Feature, Feature]:
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
    """The blocks of one resolution, towards coarser ones (`up`, as the paper calls it) and back (`down`), and
    the layers between this resolution and the next coarser one."""

    def __init__(self, hidden: int, blocks: int, *, coarsest: bool, classes: int, dropout: float):
        super().__init__()
        back = blocks if coarsest else blocks + 1
        self.up: Modules[Pair] = Modules(Pair(hidden, False, classes, dropout) for _ in range(blocks))
        self.down: Modules[Pair] = Modules(Pair(hidden, True, classes, dropout) for _ in range(back))
        self.shrink = None if coarsest else Shrink(hidden)
        self.grow = None if coarsest else Grow(hidden)


def u_net(x: Any, scales: Iterable[Any], *given: Any) -> Any:
    """x through the scales, finest first, and back, with shortcuts between the blocks of one scale.

    The same function serves the whole net (`Scale`) and its computation by row or by pixel (`Walk`), where
    `shrink` returns None if the coarser scale has no new position.
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
