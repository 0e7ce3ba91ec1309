"""The sizes of a U-Net, and those that follow from the size of the images where none are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from gzcli.core.errors import UsageError

LOWEST = 7  # the least side, in positions, of the last level
MULT = (1, 2, 2, 2, 4, 4)  # widths of the levels, the last for all further ones
ATTENDED = (16, 8)  # sides, in positions, near which levels have self-attention
LARGEST = 22  # the largest such side


@dataclass(frozen=True)
class UNetOptions:
    """The sizes of a U-Net.

    channels: width of the first level, in feature maps.
    mult: width of each level in units of `channels`; every level halves the resolution of the one before;
      null: as many levels as leave 7 … 13 positions on the shorter side, of widths 1, 2, 2, 2, 4, 4.
    layers: residual blocks of each level of the encoder; the decoder has one more.
    attention: sides in positions at which a level has self-attention; null: those nearest to 16 and 8; the
      lowest level always has it.
    head_dim: channels of an attention head; null: one head.
    dropout: share of activations that each residual block drops in training, 0 … 1.
    groups: groups of each group normalisation; must divide the width of every level.
    patch: side of the squares of pixels that are one position of the network; a multiple of it must be each
      side of the images.
    """

    channels: int = 32
    mult: tuple[int, ...] | None = None
    layers: int = 1
    attention: tuple[int, ...] | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    groups: int = 8
    patch: int = 1


def positions(shape: tuple[int, ...], patch: int) -> int:
    """Positions on the shorter side of images of a shape [C, H, W]. Raises UsageError where a side is no
    multiple of `patch`."""
    if patch < 1:
        raise UsageError(f"patches of {patch} pixels", hint="set `model.patch` to 1 or more")
    if any(side % patch for side in shape[1:]):
        height, width = (max(patch, side // patch * patch) for side in shape[1:])
        size = f"{width}" if height == width else f"{width}x{height}"
        raise UsageError(
            f"images of {shape[2]}×{shape[1]} pixels do not divide into patches of {patch}×{patch}",
            hint=f"`--set data.size={size}` fits, or `--set model.patch={math.gcd(*shape[1:], patch)}`",
        )
    return min(shape[1:]) // patch


def widths_of(shape: tuple[int, ...], options: UNetOptions) -> tuple[int, ...]:
    """The width of each level, in units of `channels`, for images of a shape [C, H, W]. Raises UsageError
    as `positions`."""
    side = positions(shape, options.patch)
    if options.mult is not None:
        return options.mult
    levels = 1
    while (side := (side + 1) // 2) >= LOWEST:
        levels += 1
    return (*MULT, *MULT[-1:] * levels)[:levels]


def attended(shape: tuple[int, ...], levels: int, options: UNetOptions) -> tuple[bool, ...]:
    """For each of a number of levels whether it has self-attention, for images of a shape [C, H, W]."""
    sides = [positions(shape, options.patch)]
    for _ in range(levels - 1):
        sides.append((sides[-1] + 1) // 2)
    at = options.attention
    if at is None:
        nearest = [min(sides, key=lambda side: abs(math.log(side / wanted))) for wanted in ATTENDED]
        at = tuple(side for side in nearest if side <= LARGEST)
    return tuple(side in at for side in sides)


def patched(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, C p², H / p, W / p], the pixels of each patch side by side. Raises UsageError as
    `positions`."""
    if patch == 1:
        return x
    positions(tuple(x.shape[1:]), patch)
    return F.pixel_unshuffle(x, patch)
