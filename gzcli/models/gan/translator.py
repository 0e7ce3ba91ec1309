"""CycleGAN's generator — Zhu et al. 2017, arXiv:1703.10593, section 4, after Johnson et al. 2016
(arXiv:1603.08155). Instance norm keeps an image's result independent of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn.common import to_fp32


@dataclass(frozen=True)
class TranslatorOptions:
    """The networks that translate images from one domain to the other.

    width: channels at the image's own size, doubled at each halving.
    halvings: how often the sides of the image are halved.
    blocks: residual blocks at the smallest size.
    """

    width: int = 32
    halvings: int = 2
    blocks: int = 4


class Translator(nn.Module):
    """Images [B, C, H, W] of one domain → of the other, in [-1, 1], fp32. Sides of any size; odd halves are
    rounded up."""

    def __init__(self, channels: int, options: TranslatorOptions):
        super().__init__()
        widths = [options.width * 2**i for i in range(options.halvings + 1)]
        self.stem = nn.Sequential(
            reflecting(channels, options.width, 7), nn.InstanceNorm2d(options.width), nn.ReLU()
        )
        self.downs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.InstanceNorm2d(o), nn.ReLU()
            )
            for i, o in pairwise(widths)
        )
        self.blocks = nn.Sequential(*(ResBlock(widths[-1]) for _ in range(options.blocks)))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, bias=False)
            for i, o in pairwise(reversed(widths))
        )
        self.head = reflecting(options.width, channels, 7, bias=True)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h, sizes = self.stem(x), []
        for down in self.downs:
            sizes.append(h.shape[2:])
            h = down(h)
        h = self.blocks(h)
        for up, size in zip(self.ups, reversed(sizes), strict=True):
            h = F.relu(F.instance_norm(up(h, output_size=size)))
        return torch.tanh(to_fp32(self.head(h)))


class ResBlock(nn.Module):
    """Two convolutions with instance norm beside an identity."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            reflecting(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            reflecting(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def reflecting(inputs: int, outputs: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, with reflection at the borders. Before instance norm it needs no
    bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias)
