"""Norms that save memory traffic under autocast, and attention.

On a GPU, autocast runs norms on an fp32 copy of a 16-bit input. Everything up to the next product is then in
fp32 and kept for the backward pass. These norms compute mean and variance in fp32 inside the kernel, but read
and write 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.models.nn import zero_init

HALF_PRECISION = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """Group norm whose output has the type of its input."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        if channels % groups:
            raise UsageError(f"a level of {channels} channels cannot be divided into {groups} norm groups")
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF_PRECISION:
            return super().forward(x)
        weight, bias = cast_weights(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the type of its input or, under autocast, the 16-bit type, so that a
    residual stream in fp32 is cast once."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if x.dtype not in HALF_PRECISION:
            y = super().forward(x)
            return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y
        weight, bias = cast_weights(x, self.weight, self.bias)
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm, with the output type of `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if x.dtype not in HALF_PRECISION:
            y = super().forward(x)
            return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y
        (weight,) = cast_weights(x, self.weight)
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def cast_weights(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """The weights in the type of the input, as GPU kernels require."""
    return [None if p is None else p.to(x.dtype) for p in weights]


def group_norm(width: int) -> GroupNorm:
    """Group norm over `width` channels, with the largest number of groups among 8, 4, 2 and 1 that divides
    them."""
    return GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width)


class ResBlock(nn.Module):
    """A residual block of two pre-activated 3×3 convolutions; the shortcut is a 1×1 convolution if the width
    changes.

    hidden: channels between the two convolutions. Default: `o`.
    """

    def __init__(
        self,
        i: int,
        o: int,
        norm: Callable[[int], nn.Module] = group_norm,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        hidden: int | None = None,
    ):
        super().__init__()
        hidden = hidden or o
        self.activation, self.norm1, self.norm2 = activation, norm(i), norm(hidden)
        self.conv1, self.conv2 = nn.Conv2d(i, hidden, 3, padding=1), nn.Conv2d(hidden, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x)))
        return self.skip(x) + self.conv2(self.activation(self.norm2(h)))


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


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention of q, k, v [B, heads, N, D]. causal: no position attends to a later one. visible:
    mask [N, N] of the positions to which each one attends."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # on a CPU the backward pass of the fused kernel takes three times as long (49 positions, AMX)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            visible = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)
