"""A pre-norm transformer, like GPT-2, with a cache of keys and values (Vaswani 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.models.nn.layers import LayerNorm, softmax_attention

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class TransformerOptions:
    """The size of a transformer.

    width: embedding dimension. A multiple of `heads`.
    layers: blocks, each of self-attention and an MLP of 4 · `width` hidden units.
    heads: attention heads of a block.
    dropout: dropout rate.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0


def initial_std(width: int) -> float:
    """The standard deviation of initial weights: GPT-2's .02 at its width of 768, larger at smaller
    widths."""
    return 0.02 * math.sqrt(768 / width)


class KVCache:
    """Keys and values of the positions that a block has seen, up to `length` of them."""

    def __init__(self, n: int, heads: int, length: int, head_dim: int, weight: Tensor):
        self.kv = weight.new_empty(2, n, heads, length, head_dim)
        self.count = 0

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [n, heads, new, head_dim]; returns the keys and the values of all positions so far."""
        before, self.count = self.count, self.count + k.shape[2]
        self.kv[:, :, :, before : self.count] = torch.stack([k, v])
        return self.kv[0, :, :, : self.count], self.kv[1, :, :, : self.count]


class TransformerBlock(nn.Module):
    """Self-attention and an MLP; with `near`, after a depthwise 3×3 convolution over each grid of codes."""

    def __init__(self, width: int, heads: int, dropout: float, near: bool = False):
        super().__init__()
        self.heads = heads
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width) if near else None
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: Tensor,
        *,
        causal: bool = False,
        visible: Tensor | None = None,
        cache: KVCache | None = None,
        grids: Grids = (),
    ) -> Tensor:
        """h [B, T, width], which follows the positions in the cache, if any. causal: no position attends to a
        later one. visible: mask [T, T] of the positions to which each one attends. grids: grids of the last
        positions, for `near`."""
        if self.near is not None:
            sizes = [rows * columns for rows, columns in grids]
            first, *codes = h.split([h.shape[1] - sum(sizes), *sizes], 1)
            grid_codes = [c.mT.unflatten(2, grid) for c, grid in zip(codes, grids, strict=True)]
            near = [c + self.near(g).flatten(2).mT for c, g in zip(codes, grid_codes, strict=True)]
            h = torch.cat([first, *near], 1)
        qkv = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D]
        if cache is not None:
            k, v = cache.add(k, v)
        a = softmax_attention(q, k, v, causal, visible).transpose(1, 2).flatten(2)
        h = h + self.dropout(self.out(a))
        return h + self.dropout(self.mlp(self.norm2(h)))


class Trunk(nn.Module):
    """The blocks of a transformer and a final norm."""

    def __init__(self, options: TransformerOptions, near: bool = False):
        super().__init__()
        self.options, width, heads = options, options.width, options.heads
        if width % heads:
            message = f"`model.width` is {width}, which is not divisible by {heads} heads"
            raise UsageError(message, hint="set `model.heads` to a divisor of it")
        self.drop = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, options.dropout, near) for _ in range(options.layers)
        )
        self.norm = LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # weights whose outputs are added to the residual stream start smaller (GPT-2)
                added = name.endswith(("out.weight", "mlp.2.weight"))
                scale = math.sqrt(2 * options.layers) if added else 1
                nn.init.normal_(p, std=initial_std(width) / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self,
        h: Tensor,
        *,
        causal: bool = False,
        visible: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        grids: Grids = (),
    ) -> Tensor:
        """h [B, T, width] through all blocks; caches: one for each block, see `TransformerBlock.forward`."""
        h = self.drop(h)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            h = block(h, causal=causal, visible=visible, cache=cache, grids=grids)
        return self.norm(h)

    def caches(self, n: int, length: int) -> list[KVCache]:
        heads, size = self.options.heads, self.options.width // self.options.heads
        return [KVCache(n, heads, length, size, self.norm.weight) for _ in self.blocks]


class Position(nn.Module):
    """A learned vector for each row and each column of the grid: [h · w, width], in raster order."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        sides = (nn.Parameter(initial_std(width) * torch.randn(side, width)) for side in grid)
        self.rows, self.columns = sides

    def forward(self) -> Tensor:
        return (self.rows[:, None] + self.columns).flatten(0, 1)
