"""Images and latents: cut into parts of a batch, resized, and with three channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def colours(x: Tensor) -> Tensor:
    """Grey images as three equal channels, [B, 3, H, W]."""
    return x.expand(-1, 3, -1, -1)


def slices(x: Tensor, positions: int) -> list[slice]:
    """Slices of the rows of x [B, C, H, W]; a slice has at most `positions` pixels a channel, or one row."""
    size = max(1, positions // x[0, 0].numel())
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]


def parts_of(x: Tensor, positions: int) -> list[Tensor]:
    """The parts of x [B, C, H, W] by `slices`."""
    return [x[part] for part in slices(x, positions)]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images in [-1, 1] resized to (height, width), [B, C, *size]."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True).clamp(-1, 1)


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """mask [B] in the shape [B, 1, …], with as many dimensions as `like`."""
    return mask.view(-1, *[1] * (like.ndim - 1))
