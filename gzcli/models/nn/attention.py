"""Softmax attention, and self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.nn.common import zero_init
from gzcli.models.nn.norms import GroupNorm


class Attention(nn.Module):
    """Self-attention over the positions of x [B, C, H, W], with a residual connection."""

    def __init__(self, c: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.norm = GroupNorm(groups, c, eps)
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.out = zero_init(nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).mT  # [B, HW, C]
        q, k, v = (f(h).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = softmax_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + self.out(h).mT.unflatten(2, x.shape[2:])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention of q, k, v [B, heads, N, D]; causal: no position sees a later one."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # on a CPU the backward pass of the fused kernel takes three times as long (49 positions, AMX)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(
                scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
            )
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
