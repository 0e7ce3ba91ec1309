"""R3GAN — Huang, Gokaslan, Kuleshov & Tompkin 2025, "The GAN is dead; long live the GAN! A Modern GAN
Baseline", arXiv:2501.05441.

    discriminator: min  E log(1 + exp(f(G(z)) − f(x))) + γ/2 E ‖∇f(x)‖² + γ/2 E ‖∇f(G(z))‖²      (eq. 2, 4, 5)
    generator:     min  E log(1 + exp(f(x) − f(G(z))))

With both penalties the game converges locally, so the nets need no norms or other tricks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.types import DataInfo
from gzcli.models.gan.base import GAN, GANOptions
from gzcli.models.nn import ClassEmbedding, Labels, to_fp32, zero_init
from gzcli.models.nn.adversarial import Discriminator, patch_sizes, to_patches

SLOPE = 0.2  # slope of the leaky ReLU below 0
RELU = math.sqrt(2 / (1 + SLOPE**2))  # gain of weights after it (He 2015, arXiv:1502.01852)


@dataclass(frozen=True)
class ResidualOptions:
    """The residual networks.

    latent: dimensions of z.
    width: base number of channels of both networks.
    mult: channels of each scale as a multiple of `width`, finest first. The last value applies to all coarser
      scales.
    blocks: residual blocks of each scale.
    expansion: width of a block's grouped convolution as a multiple of its scale's.
    group: channels per group of the grouped convolution, rounded up to a divisor.
    patch: patch size (space-to-depth factor). The paper's is 1.
    """

    latent: int = 64
    width: int = 16
    mult: tuple[int, ...] = (1, 2, 4, 8)
    blocks: int = 1
    expansion: int = 2
    group: int = 16
    patch: int = 1


def conv(i: int, o: int, kernel: int = 1, groups: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """A convolution whose outputs initially have gain² times the mean square of its inputs."""
    layer = zero_init(nn.Conv2d(i, o, kernel, padding=kernel // 2, groups=groups))
    nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)
    return layer


class Block(nn.Module):
    """x plus the output of a 1×1, a grouped 3×3 and a 1×1 convolution without norms; initially the identity.

    The first two layers have a gain of L^(−1/4), where L is the number of blocks in the net. One step thus
    changes the net's output equally at any depth (Fixup, Zhang 2019, arXiv:1901.09321, section 3).
    """

    def __init__(self, width: int, options: ResidualOptions, depth: int):
        super().__init__()
        inner = width * options.expansion
        gain, most = depth**-0.25, max(inner // options.group, 1)
        groups = next(n for n in range(most, 0, -1) if inner % n == 0)
        self.widen = conv(width, inner, gain=gain)
        self.grouped = conv(inner, inner, 3, groups, gain * RELU)
        self.narrow = zero_init(nn.Conv2d(inner, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(x), SLOPE)
        return x + self.narrow(F.leaky_relu(self.grouped(h), SLOPE))


def scales(shape: tuple[int, ...], options: ResidualOptions) -> tuple[list[tuple[int, int]], list[int]]:
    """The (height, width) and the channels of the feature maps, finest first."""
    sizes = patch_sizes(shape, options.patch)
    return sizes, [options.width * options.mult[min(i, len(options.mult) - 1)] for i in range(len(sizes))]


def stages(channels: list[int], options: ResidualOptions) -> nn.ModuleList:
    """The blocks of each scale."""
    depth = len(channels) * options.blocks
    return nn.ModuleList(
        nn.Sequential(*(Block(width, options, depth) for _ in range(options.blocks))) for width in channels
    )


class ResidualGenerator(nn.Module):
    """z [B, latent] and labels → images [B, C, H, W] in [-1, 1], fp32. The coarsest map is a learned basis
    [C', h, w], each channel weighed by a linear function of z and the label."""

    def __init__(self, shape: tuple[int, ...], options: ResidualOptions, classes: int = 0):
        super().__init__()
        self.shape, self.patch = shape, options.patch
        sizes, widths = scales(shape, options)
        self.sizes, channels = sizes[::-1], widths[::-1]
        self.embed = ClassEmbedding(classes, options.latent) if classes else None
        self.stem = nn.Linear(options.latent * (2 if classes else 1), channels[0])
        nn.init.normal_(self.stem.weight, std=self.stem.in_features**-0.5)
        self.basis = nn.Parameter(torch.randn(channels[0], *self.sizes[0]))
        self.stages = stages(channels, options)
        self.changes = nn.ModuleList(conv(i, o) for i, o in pairwise(channels))
        self.pixels = conv(channels[-1], shape[0] * self.patch**2, 1 if self.patch == 1 else 3)

    def forward(self, z: Tensor, y: Labels = None) -> Tensor:
        h = z if self.embed is None else torch.cat([z, self.embed(y, len(z))], dim=1)
        h = self.basis * self.stem(h)[:, :, None, None]
        for i, stage in enumerate(self.stages):
            if i:  # a bilinear kernel is a low-pass filter
                h = F.interpolate(self.changes[i - 1](h), self.sizes[i], mode="bilinear", align_corners=False)
            h = stage(h)
        x = to_fp32(F.pixel_shuffle(self.pixels(h), self.patch))[:, :, : self.shape[1], : self.shape[2]]
        # not tanh, whose gradient vanishes faster, so that training gets stuck at black images
        return x * torch.rsqrt(1 + x.square())


class ResidualDiscriminator(Discriminator):
    """The generator mirrored: its last layer is a linear function of the map [B, C', h, w]."""

    def __init__(self, shape: tuple[int, ...], options: ResidualOptions, classes: int = 0):
        super().__init__()
        self.patch, (self.sizes, channels) = options.patch, scales(shape, options)
        self.image = conv(shape[0] * self.patch**2, channels[0], 1 if self.patch == 1 else 3)
        self.stages = stages(channels, options)
        self.changes = nn.ModuleList(conv(i, o) for i, o in pairwise(channels))
        self.add_head(channels[-1] * math.prod(self.sizes[-1]), classes)

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.image(to_patches(x, self.patch))
        for i, stage in enumerate(self.stages):
            if i:
                h = self.changes[i - 1](F.interpolate(h, self.sizes[i], mode="area"))
            h = stage(h)
        return h


class R3GAN(GAN):
    """A GAN of residual networks without norms, trained by the relativistic loss with R1 and R2.

    conditional: whether the networks are conditioned on labels. The generator gets them with z, the
      discriminator by projection.
    """

    paper = "Huang 2025, arXiv:2501.05441"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: ResidualOptions = ResidualOptions(),
        options: GANOptions = GANOptions(objective="relativistic"),
        conditional: bool = False,
    ):
        def nets(classes: int) -> tuple[nn.Module, Discriminator]:
            generator = ResidualGenerator(data.shape, net, classes)
            return generator, ResidualDiscriminator(data.shape, net, classes)

        super().__init__(data, net.latent, nets, options, conditional)
