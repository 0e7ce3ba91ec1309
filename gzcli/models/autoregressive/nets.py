"""The convolutional encoder and decoder of VQGAN (Esser 2021, arXiv:2012.09841, table 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.autoregressive.tokenizer import halved
from gzcli.models.nn.attention import Attention
from gzcli.models.nn.norms import GroupNorm
from gzcli.models.nn.unet import Down, Up

EPS = 1e-6  # of the group norms
MULT = {2: (1, 2, 4), 3: (1, 2, 2, 4), 4: (1, 1, 2, 2, 4)}  # channels of each level, by how often is halved


@dataclass(frozen=True)
class ConvOptions:
    """The size of encoder and decoder.

    channels: channels of the finest level; a multiple of `groups`.
    mult: channels of each level in units of `channels`, the finest first; the resolution is halved between
      two levels; null: as many as leave at most 16 codes a side, 1, 2, 4 or the authors' of more levels.
    blocks: residual blocks of each level of the encoder; the decoder has one more.
    attention: whether the coarsest level has self-attention.
    groups: groups of each group norm.
    """

    channels: int = 32
    mult: tuple[int, ...] | None = None
    blocks: int = 1
    attention: bool = True
    groups: int = 8

    def widths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The channels of each level of images (C, H, W), the finest first."""
        times = halved(shape)
        # those of the authors' models of 4, 8 and 16 pixels a code; coarser ones begin with more levels of 1
        mult = MULT.get(times, (1,) * (times - 4) + MULT[4]) if self.mult is None else self.mult
        return tuple(self.channels * m for m in mult)


class ResBlock(nn.Module):
    """Two pre-activated 3×3 convolutions beside an identity, or a 1×1 convolution where the width changes."""

    def __init__(self, i: int, o: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(groups, i, EPS), GroupNorm(groups, o, EPS)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Level(nn.Sequential):
    """The residual blocks of one resolution, each followed by attention if `attend`."""

    def __init__(self, i: int, o: int, blocks: int, groups: int, attend: bool):
        layers: list[nn.Module] = []
        for k in range(blocks):
            layers += [
                ResBlock(o if k else i, o, groups),
                *([Attention(o, o, groups, EPS)] if attend else []),
            ]
        super().__init__(*layers)


class Middle(nn.Sequential):
    """At the lowest resolution: a block, attention, a block."""

    def __init__(self, c: int, groups: int, attend: bool):
        attention = [Attention(c, c, groups, EPS)] if attend else []
        super().__init__(ResBlock(c, c, groups), *attention, ResBlock(c, c, groups))


class Encoder(nn.Module):
    """x [B, channels, H, W] → [B, dim, h, w].

    widths: channels of each level, the finest first.
    """

    def __init__(self, channels: int, dim: int, widths: tuple[int, ...], options: ConvOptions):
        super().__init__()
        blocks, groups = options.blocks, options.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(i, o, blocks, groups, options.attention and k == last)
            for k, (i, o) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.downs = nn.ModuleList(Down(w, 1) for w in widths[:-1])
        self.middle = Middle(widths[-1], groups, options.attention)
        self.norm = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level, down in zip(self.levels, (*self.downs, nn.Identity()), strict=True):
            h = down(level(h))
        return self.conv_out(F.silu(self.norm(self.middle(h))))


class Decoder(nn.Module):
    """z [B, dim, h, w] → [B, channels, H, W], the mirror image of the encoder with one block more at each
    level.

    widths: channels of each level, the finest first.
    sizes: (height, width) of the feature maps, the image's first.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        widths: tuple[int, ...],
        options: ConvOptions,
        sizes: list[tuple[int, int]],
    ):
        super().__init__()
        widths, blocks, groups = widths[::-1], options.blocks + 1, options.groups
        self.sizes = sizes[-2::-1]
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], groups, options.attention)
        self.levels = nn.ModuleList(
            Level(i, o, blocks, groups, options.attention and k == 0)
            for k, (i, o) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.ups = nn.ModuleList(Up(w) for w in widths[:-1])
        self.norm = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels[0](self.middle(self.conv_in(z)))
        for up, size, level in zip(self.ups, self.sizes, list(self.levels)[1:], strict=True):
            h = level(up(h, size))
        return self.conv_out(F.silu(self.norm(h)))
