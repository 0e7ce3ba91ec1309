"""The network inside a coupling of Flow++ (Ho et al. 2019, arXiv:1902.00275, §3.3): gated convolutions and
self-attention.

Features between the layers are [B, H, W, C], the layout of layer norm and attention. In this layout
convolutions are faster on a CPU too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.nn.attention import softmax_attention
from gzcli.models.nn.common import Layer


@dataclass(frozen=True)
class CouplingOptions:
    """The couplings and their networks.

    hidden: channels of a coupling's network.
    blocks: blocks of a coupling's network, each of a gated convolution and attention.
    components: logistics of a coupling's mixture.
    heads: attention heads.
    attention: largest number of positions of a feature map with attention; 0: no attention.
    dropout: probability of dropout in a coupling's network.
    """

    hidden: int = 32
    blocks: int = 2
    components: int = 8
    heads: int = 4
    attention: int = 256
    dropout: float = 0.0


class GatedConv(nn.Module):
    """norm(h + a · σ(b)), (a, b) from two convolutions, 3×3 and `second`, of concat-ELU features (§3.3.1;
    PixelCNN++)."""

    def __init__(self, hidden: int, second: int, context: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(2 * hidden, hidden, 3, padding=1)
        self.context = nn.Linear(2 * context, hidden) if context else None
        self.dropout = nn.Dropout(dropout)
        self.out = shrink(nn.Conv2d(2 * hidden, 2 * hidden, second, padding=second // 2))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        a = channels_last(self.conv, concat_elu(h))
        if self.context is not None and context is not None:
            a = a + self.context(concat_elu(context))
        return self.norm(h + F.glu(channels_last(self.out, self.dropout(concat_elu(a))), -1))


class GatedAttention(nn.Module):
    """norm(h + a · σ(b)), (a, b) from self-attention over all positions (§3.3.2)."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = shrink(nn.Linear(hidden, 2 * hidden))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        qkv = self.qkv(h).flatten(1, 2).unflatten(2, (3, self.heads, -1))  # [B, HW, 3, heads, D]
        a = softmax_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(h.shape)
        return self.norm(h + F.glu(self.out(self.dropout(a)), -1))


class CouplingNet(nn.Module):
    """x₁ [B, channels, H, W] → [B, out, H, W], by blocks of a gated convolution and, on small maps,
    attention.

    An embedding of positions is added once, at the start, for both convolutions and attention.

    channels: channels of the input.
    out: channels of the output.
    size: (height, width).
    options: the blocks.
    context: channels of the context, 0 for none.
    """

    def __init__(
        self, channels: int, out: int, size: tuple[int, int], options: CouplingOptions, context: int = 0
    ):
        super().__init__()
        hidden, dropout = options.hidden, options.dropout
        attend = size[0] * size[1] <= options.attention
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.position = nn.Parameter(0.01 * torch.randn(*size, hidden))
        self.blocks = nn.ModuleList()
        for _ in range(options.blocks):
            self.blocks.append(GatedConv(hidden, 1, context, dropout))
            self.blocks.extend([GatedAttention(hidden, options.heads, dropout)] if attend else [])
        self.last = shrink(nn.Conv2d(hidden, out, 3, padding=1))

    def forward(self, x1: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x1).permute(0, 2, 3, 1) + self.position
        for block in self.blocks:
            h = block(h, context)
        return self.last(h.permute(0, 3, 1, 2))


def channels_last(conv: nn.Conv2d, h: Tensor) -> Tensor:
    """`conv` on [B, H, W, C]."""
    return conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def concat_elu(h: Tensor) -> Tensor:
    """[elu(h), elu(−h)] along the channels of h [B, H, W, C]."""
    return F.elu(torch.cat([h, -h], -1))


def shrink(module: Layer) -> Layer:
    """The module with a tenth of its initial parameters, so that its branch starts near the identity
    (`init_scale` of the paper's code)."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.1)
    return module
