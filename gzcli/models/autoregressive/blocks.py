"""Transformer blocks over a grid of codes (Vaswani 2017, arXiv:1706.03762; pre-norm, as GPT-2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.nn.unet import softmax_attention


def start(width: int) -> float:
    """The deviation of initial weights: GPT-2's .02 at its width of 768, more for narrower nets, which learn
    faster so."""
    return 0.02 * math.sqrt(768 / width)


class Past:
    """Keys and values of the positions that a block has seen, up to `length` of them."""

    def __init__(self, n: int, length: int, block: Block):
        head_dim, like = block.norm1.weight.numel() // block.heads, block.norm1.weight
        self.kv = like.new_empty(2, n, block.heads, length, head_dim)
        self.seen = 0

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with those of new positions k, v [n, heads, new, head_dim] at their
        end."""
        before, self.seen = self.seen, self.seen + k.shape[2]
        self.kv[:, :, :, before : self.seen] = torch.stack([k, v])
        return self.kv[:, :, :, : self.seen].unbind(0)


class Block(nn.Module):
    """Self-attention and an MLP, both residual; `grid`: before them a depthwise 3×3 convolution over the
    codes."""

    def __init__(self, width: int, heads: int, dropout: float, grid: tuple[int, int] | None = None):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width) if grid else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, *, causal: bool = False, past: Past | None = None) -> Tensor:
        """h [B, T, width]; causal: no position sees a later one. With `past` h are the positions after those
        it has seen, and it sees them from now on; the first call may be of many positions, causal, the later
        ones of one each."""
        if self.near is not None:  # the first token is the label
            h = torch.cat(
                [h[:, :1], h[:, 1:] + self.near(h[:, 1:].mT.unflatten(2, self.grid)).flatten(2).mT], 1
            )
        q, k, v = (
            self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, heads, T, D]
        if past is not None:
            k, v = past.add(k, v)
        a = softmax_attention(q, k, v, causal).transpose(1, 2).flatten(2)
        h = h + self.dropout(self.out(a))
        return h + self.dropout(self.mlp(self.norm2(h)))


class Trunk(nn.Module):
    """`layers` blocks and a final norm. Raises UsageError for a width that the heads cannot share."""

    def __init__(
        self, width: int, layers: int, heads: int, dropout: float, grid: tuple[int, int] | None = None
    ):
        super().__init__()
        if width % heads:
            raise UsageError(
                f"`model.width` is {width}, which {heads} heads cannot share",
                hint="set `model.heads` to a divisor",
            )
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, grid) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what is added to the residual stream starts smaller (GPT-2)
                added = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=start(width) / (math.sqrt(2 * layers) if added else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, h: Tensor, *, causal: bool = False, pasts: list[Past] | None = None) -> Tensor:
        h = self.drop(h)
        for block, past in zip(self.blocks, pasts or [None] * len(self.blocks), strict=True):
            h = block(h, causal=causal, past=past)
        return self.norm(h)

    def pasts(self, n: int, length: int) -> list[Past]:
        return [Past(n, length, block) for block in self.blocks]


class Position(nn.Module):
    """A learned vector for each row and one for each column of the grid: forward() is [h · w, width], in
    raster order."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        self.rows, self.columns = (nn.Parameter(start(width) * torch.randn(side, width)) for side in grid)

    def forward(self) -> Tensor:
        return (self.rows[:, None] + self.columns).flatten(0, 1)
