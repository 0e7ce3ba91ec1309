"""Encoders and decoders of the VAE family: an MLP, and a convolutional net for any image size.

An encoder is image [B, C, H, W] (and label embedding e [B, E] or None) → [B, outputs]; a decoder is
z [B, latent] (and e) → [B, outputs·C, H, W]. No layer looks at the other images of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def join(h: Tensor, e: Tensor | None) -> Tensor:
    return h if e is None else torch.cat([h, e], dim=1)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    widths = (inputs, *hidden)
    layers = [m for i, o in zip(widths, hidden, strict=False) for m in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class MLPEncoder(nn.Module):
    def __init__(self, shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int, embed: int = 0):
        super().__init__()
        c, h, w = shape
        self.net = mlp(c * h * w + embed, hidden, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(x.flatten(1), e))


class MLPDecoder(nn.Module):
    def __init__(
        self, shape: tuple[int, ...], hidden: tuple[int, ...], latent: int, outputs: int, embed: int = 0
    ):
        super().__init__()
        c, h, w = shape
        self.shape = (outputs * c, h, w)
        self.net = mlp(latent + embed, hidden, outputs * c * h * w)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(z, e)).unflatten(1, self.shape)


class ResBlock(nn.Module):
    """Pre-activation residual block; group norm, so that an image's result does not depend on its batch."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        r = self.conv1(F.gelu(self.norm1(h)))
        return h + self.conv2(F.gelu(self.norm2(r)))


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width)


def halvings(shape: tuple[int, ...], scales: int) -> list[tuple[int, int]]:
    """The sizes of the feature maps: the image's, then halved (rounded up) `scales` times."""
    sizes = [(shape[1], shape[2])]
    for _ in range(scales):
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


class ConvEncoder(nn.Module):
    """One stride-2 convolution and `blocks` residual blocks a scale, `hidden` = widths of the scales, finest
    first."""

    def __init__(
        self, shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int, embed: int = 0, blocks: int = 0
    ):
        super().__init__()
        layers, width = [], shape[0]
        for w in hidden:
            layers += [nn.Conv2d(width, w, 3, stride=2, padding=1)]
            layers += [ResBlock(w) for _ in range(blocks)]
            width = w
        self.net = nn.Sequential(*layers, norm(width), nn.GELU())
        h, w = halvings(shape, len(hidden))[-1]
        self.head = nn.Linear(width * h * w + embed, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.head(join(self.net(x).flatten(1), e))


class ConvDecoder(nn.Module):
    """The encoder's mirror: a linear map to the coarsest scale, then blocks and a stride-2 transposed
    convolution."""

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: tuple[int, ...],
        latent: int,
        outputs: int,
        embed: int = 0,
        blocks: int = 0,
    ):
        super().__init__()
        *self.targets, start = halvings(shape, len(hidden))
        self.start = (hidden[-1], *start)
        self.stem = nn.Linear(latent + embed, hidden[-1] * start[0] * start[1])
        self.scales = nn.ModuleList()
        for w, out in zip(reversed(hidden), (*reversed(hidden[:-1]), outputs * shape[0]), strict=True):
            up = nn.ConvTranspose2d(w, out, 4, stride=2, padding=1)
            self.scales.append(nn.Sequential(*(ResBlock(w) for _ in range(blocks)), norm(w), nn.GELU(), up))

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(join(z, e)).unflatten(1, self.start)
        for scale, (height, width) in zip(self.scales, reversed(self.targets), strict=True):
            h = scale(h)[:, :, :height, :width]  # odd sizes were rounded up
        return h
