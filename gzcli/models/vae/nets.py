"""Encoders and decoders of the VAE family: an MLP, and a convolutional network for any image size.

An encoder maps images [B, C, H, W], and label embeddings e [B, E] or None, to [B, outputs]. A decoder maps
z [B, latent], and e, to [B, outputs, H, W]. No layer depends on the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn.adversarial import pyramid
from gzcli.models.nn.common import group_norm, halvings

Shape = tuple[int, ...]  # (C, H, W) of an image


@dataclass(frozen=True)
class NetOptions:
    """Encoder and decoder.

    net: `conv`, a convolutional network, or `mlp`.
    hidden: widths of the MLP's layers, or channels of the convolutional scales, finest first; null: 512 and
      512, or what `width` says, with as many scales as halve the sides until none is above 4.
    width: channels of the finest scale where `hidden` is null, doubled at each coarser one, at most 4-fold.
    blocks: residual blocks of each scale of the convolutional network.
    latent: dimensions of z.
    """

    net: Annotated[str, ENCODERS] = "conv"
    hidden: tuple[int, ...] | None = None
    width: int = 32
    blocks: int = 0
    latent: int = 32

    def widths(self, shape: Shape) -> tuple[int, ...]:
        """`hidden`, or what follows from the size of the image."""
        if self.hidden or self.net == "mlp":
            return tuple(self.hidden or (512, 512))
        scales = max(len(pyramid(shape)) - 1, 1)
        return tuple(self.width * 2 ** min(i, 2) for i in range(scales))


def encoder(shape: Shape, options: NetOptions, outputs: int, embed: int = 0) -> nn.Module:
    """The encoder of the options, with `outputs` numbers an image."""
    return ENCODERS[options.net](shape, options.widths(shape), outputs, embed, options.blocks)


def decoder(shape: Shape, options: NetOptions, outputs: int, embed: int = 0) -> nn.Module:
    """The decoder of the options, the mirror image of the encoder, with `outputs` numbers a pixel."""
    return DECODERS[options.net](shape, options.widths(shape), options.latent, outputs, embed, options.blocks)


@torch.no_grad()
def start_pixels(decoder: nn.Module, size: int, start: Callable[[Tensor], None]) -> None:
    """Sets the bias of a decoder's last layer, the same for all pixels, by `start` of one pixel's [size]."""
    *_, bias = decoder.parameters()
    start(one := torch.empty(size))
    bias.copy_(one.repeat_interleave(len(bias) // size))


def join(h: Tensor, e: Tensor | None) -> Tensor:
    """h [B, D] with the embeddings e [B, E] appended, if there are any."""
    return h if e is None else torch.cat([h, e], dim=1)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with GELU between them; hidden: widths of the layers."""
    widths = (inputs, *hidden)
    layers = [m for i, o in zip(widths, hidden, strict=False) for m in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class MLPEncoder(nn.Module):
    """An MLP of the pixels; without residual blocks."""

    def __init__(self, shape: Shape, hidden: tuple[int, ...], outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        c, h, w = shape
        self.net = mlp(c * h * w + embed, hidden, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(x.flatten(1), e))


class MLPDecoder(nn.Module):
    """The mirror image of the encoder: the last of `hidden` comes first."""

    def __init__(
        self,
        shape: Shape,
        hidden: tuple[int, ...],
        latent: int,
        outputs: int,
        embed: int = 0,
        blocks: int = 0,
    ):
        super().__init__()
        _, h, w = shape
        self.shape = (outputs, h, w)
        self.net = mlp(latent + embed, hidden[::-1], outputs * h * w)

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(z, e)).unflatten(1, self.shape)


class ResBlock(nn.Module):
    """A pre-activation residual block with group norm, so that the result for an image does not depend on its
    batch."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(width), group_norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        r = self.conv1(F.gelu(self.norm1(h)))
        return h + self.conv2(F.gelu(self.norm2(r)))


class ConvEncoder(nn.Module):
    """A stride-2 convolution and `blocks` residual blocks at each scale of `hidden`, finest first."""

    def __init__(self, shape: Shape, hidden: tuple[int, ...], outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        layers: list[nn.Module] = []
        width = shape[0]
        for w in hidden:
            layers += [nn.Conv2d(width, w, 3, stride=2, padding=1)]
            layers += [ResBlock(w) for _ in range(blocks)]
            width = w
        self.net = nn.Sequential(*layers, group_norm(width), nn.GELU())
        h, w = halvings(shape, len(hidden))[-1]
        self.head = nn.Linear(width * h * w + embed, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.head(join(self.net(x).flatten(1), e))


class ConvDecoder(nn.Module):
    """The mirror image of the encoder: a linear map to the coarsest scale, then residual blocks and a
    stride-2 transposed convolution at each scale."""

    def __init__(
        self,
        shape: Shape,
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
        for w, out in zip(reversed(hidden), (*reversed(hidden[:-1]), outputs), strict=True):
            up = nn.ConvTranspose2d(w, out, 4, stride=2, padding=1)
            self.scales.append(
                nn.Sequential(*(ResBlock(w) for _ in range(blocks)), group_norm(w), nn.GELU(), up)
            )

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(join(z, e)).unflatten(1, self.start)
        for scale, (height, width) in zip(self.scales, reversed(self.targets), strict=True):
            h = scale(h)[:, :, :height, :width]  # odd sizes were rounded up
        return h


ENCODERS = {"mlp": MLPEncoder, "conv": ConvEncoder}
DECODERS = {"mlp": MLPDecoder, "conv": ConvDecoder}
