"""Differentiable augmentation of what a discriminator sees — Zhao et al. 2020, arXiv:2006.10738, section 3.3.

Real and generated images are augmented at random alike, and the generator's gradient passes through the
augmentation. So the discriminator cannot memorise a small training set, and the generator does not learn the
augmentation itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.types import Noise


def diff_augment(x: Tensor, policy: tuple[str, ...], noise: Noise) -> Tensor:
    """Images [B, C, H, W] under the augmentations named by `policy`, in the order of `POLICIES`. Each image
    has draws of its own."""
    for name, augmented in POLICIES.items():
        if name in policy:
            x = augmented(x, noise.rand(len(x), 3))
    return x


def color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness moved by up to ±0.5, saturation times 0 … 2, contrast times 0.5 … 1.5.

    x: images [B, C, H, W] in [-1, 1].
    u: uniform numbers on [0, 1), [B, 3].
    """
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def translation(x: Tensor, u: Tensor) -> Tensor:
    """Images moved by up to an eighth of each side; uncovered pixels are -1, the colour of an empty
    background."""
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


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Images with a rectangle of half the sides set to 0 (grey), with its centre uniform over the image."""
    height, width = x.shape[2:]
    hidden = [
        (torch.arange(side, device=x.device) + 0.5 - u[:, i, None] * side).abs() < side / 4
        for i, side in enumerate((height, width))
    ]
    return x * ~(hidden[0][:, None, :, None] & hidden[1][:, None, None, :])


POLICIES = {"color": color, "translation": translation, "cutout": cutout}
