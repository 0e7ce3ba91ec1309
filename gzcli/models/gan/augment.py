"""Differentiable augmentation of what a discriminator sees — Zhao et al. 2020, arXiv:2006.10738, section 3.3.

Real and generated images alike are changed at random, and the generator learns through the change: a
discriminator of few images then cannot learn them by heart, while the generator does not learn the
augmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.types import Noise

POLICIES = ("color", "translation", "cutout")


def diff_augment(x: Tensor, policy: tuple[str, ...], noise: Noise) -> Tensor:
    """Images [B, C, H, W], each with its own draw of every augmentation of `policy`, in the order of
    `POLICIES`."""
    for name in POLICIES:
        if name in policy:
            x = globals()[f"_{name}"](x, noise.rand(len(x), 3).to(x))
    return x


def _color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness ± .5, saturation 0 … 2 and contrast .5 … 1.5, of a range of 2."""
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translation(x: Tensor, u: Tensor) -> Tensor:
    """Moved by up to an eighth of each side; what comes in is -1, the colour of an empty background."""
    b, _, height, width = x.shape
    dy, dx = (((2 * u[:, i] - 1) * side / 8).round().long() for i, side in enumerate((height, width)))
    rows = torch.arange(height, device=x.device) + dy[:, None]  # [B, H]
    columns = torch.arange(width, device=x.device) + dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    image = torch.arange(b, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[
        image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return torch.where(inside[:, None], moved.permute(0, 3, 1, 2), -1.0)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """A rectangle of half the sides, whose centre is anywhere in the image, is grey."""
    height, width = x.shape[2:]
    hidden = [
        (torch.arange(side, device=x.device) + 0.5 - u[:, i, None] * side).abs() < side / 4
        for i, side in enumerate((height, width))
    ]
    return x * ~(hidden[0][:, None, :, None] & hidden[1][:, None, None, :])
