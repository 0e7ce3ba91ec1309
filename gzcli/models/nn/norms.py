"""Norms that do not double the traffic of autocast.

A GPU's autocast runs norms in fp32: it makes an fp32 copy of a 16-bit input, and all that follows up to the
next product is in fp32 and kept for the backward pass. These compute mean and variance in fp32 too, inside
the kernel, but read and write 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError

HALVES = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """Group norm whose output has the type of its input. Raises UsageError where the channels do not divide
    into the groups."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        if channels % groups:
            raise UsageError(f"a level of {channels} channels does not divide into {groups} norm groups")
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALVES:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(
                x, self.num_groups, _as(self.weight, x.dtype), _as(self.bias, x.dtype), self.eps
            )


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the type of its input or, under autocast, the 16-bit type: a residual
    stream stays in fp32, and what is computed of it is cast once."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALVES:
            made = super().forward(x)
            kind = x.device.type
            return made.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else made
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x, self.normalized_shape, _as(self.weight, x.dtype), _as(self.bias, x.dtype), self.eps
            )


def _as(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight in the type of the input, as kernels of GPUs want it."""
    return None if p is None else p.to(dtype)
