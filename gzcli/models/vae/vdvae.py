"""Very deep VAE — Child 2020, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on
Images", arXiv:2011.10650.

A ladder of latents (`LadderVAE`) of many groups down to a grid of 1×1, in two towers of bottleneck blocks
without norms (figure 3). Three measures keep great depth trainable (section 3). The last layers of blocks
start scaled by 1/√depth. Latents are upsampled by nearest neighbours with a learned bias. Steps with a huge
gradient are skipped (the key `train.skip`). Unlike in the paper, means and log sigmas are bounded to ±5.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.types import DataInfo
from gzcli.models.labelled import LabelOptions
from gzcli.models.nn import halved_sizes, zero_init
from gzcli.models.vae.ladder import (
    BoundOptions,
    Cell,
    Code,
    Group,
    LadderOptions,
    LadderVAE,
    TopDown,
    draw_latents,
    shrink_init,
    soft_clamp,
)


@dataclass(frozen=True)
class BlockOptions(LadderOptions):
    """`LadderOptions`, and the towers' blocks.

    blocks: residual blocks of the bottom-up tower at each resolution. The top-down tower uses them at
      resolutions without groups.
    bottleneck: divisor of `channels` for a block's inner convolutions.
    """

    blocks: tuple[int, ...] = (1, 1, 1, 1)
    bottleneck: int = 4

    def inner(self, i: int) -> int:
        """The channels of the inner convolutions at resolution i."""
        return max(self.channels[i] // self.bottleneck, 1)


def conv(inputs: int, outputs: int, kernel: int = 1) -> nn.Conv2d:
    """A convolution whose initial weights preserve the variance of an input that passed a GELU, because there
    are no norms."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return layer


def bottleneck(inputs: int, inner: int, last: nn.Conv2d, size: tuple[int, int]) -> list[nn.Module]:
    """The layers of a block: two 3×3 convolutions between two of 1×1. On a grid of up to 2×2 all are 1×1."""
    kernel = 3 if max(size) > 2 else 1
    layers = conv(inputs, inner), conv(inner, inner, kernel), conv(inner, inner, kernel), last
    return [layer for one in layers for layer in (nn.GELU(), one)]


def residual_block(width: int, inner: int, depth: int, size: tuple[int, int]) -> Cell:
    """A block of a tower of `depth` blocks."""
    return Cell(*bottleneck(width, inner, shrink_init(conv(inner, width), depth**-0.5), size))


def change_width(inputs: int, outputs: int) -> nn.Module:
    """A layer that changes the width; the identity if widths are equal, as in the paper."""
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)


class BottomUp(nn.Module):
    """Images [B, C, H, W] → the features of each group, top first, which the groups of a resolution share."""

    def __init__(self, shape: tuple[int, ...], ladder: BlockOptions):
        super().__init__()
        channels, self.groups = ladder.channels, ladder.groups
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        self.widen = nn.ModuleList(change_width(i, o) for i, o in pairwise(channels))
        depth = max(sum(ladder.blocks), 1)
        sizes = halved_sizes(shape, len(channels) - 1)
        self.scales = nn.ModuleList(
            nn.Sequential(
                *(residual_block(w, ladder.inner(i), depth, sizes[i]) for _ in range(ladder.blocks[i]))
            )
            for i, w in enumerate(channels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = self.stem(x).contiguous(memory_format=torch.channels_last), []
        for i, scale in enumerate(self.scales):
            if i:
                h = self.widen[i - 1](F.avg_pool2d(h, 2, ceil_mode=True))
            h = scale(h)
            features += self.groups[i] * [h]
        return features[::-1]


class DeepGroup(Group):
    """A group with an absolute posterior, q = N(mu_q, sigma_q²), which depends on the state like the
    prior."""

    def __init__(self, ladder: BlockOptions, i: int, size: tuple[int, int]):
        super().__init__()
        width, latent, inner, depth = ladder.channels[i], ladder.latent, ladder.inner(i), sum(ladder.groups)
        self.sizes = [2 * latent, width]
        self.posterior = nn.Sequential(*bottleneck(2 * width, inner, conv(inner, 2 * latent), size))
        prior = zero_init(nn.Conv2d(inner, 2 * latent + width, 1))
        self.prior = nn.Sequential(*bottleneck(width, inner, prior, size))
        self.project = shrink_init(conv(latent, width), depth**-0.5)
        self.block = residual_block(width, inner, depth, size)

    def forward(self, h: Tensor, eps: Tensor, feature: Tensor | None) -> tuple[Tensor, Code | None]:
        prior, change = self.prior(h).split(self.sizes, dim=1)
        mu, log_sigma = soft_clamp(prior).chunk(2, dim=1)
        posterior = None
        if feature is not None:
            mu_q, log_sigma_q = soft_clamp(self.posterior(torch.cat([h, feature], dim=1))).chunk(2, dim=1)
            posterior = (mu_q - mu) * torch.exp(-log_sigma), log_sigma_q - log_sigma
        z, code = draw_latents(eps, mu, log_sigma, posterior)
        return self.block(h + change + self.project(z)), code


class Up(nn.Module):
    """Upsamples by nearest neighbours, crops to `size` and adds a learned bias to each value."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]):
        super().__init__()
        self.narrow = change_width(inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(1, outputs, *size))

    def forward(self, h: Tensor) -> Tensor:
        height, width = self.bias.shape[2:]
        h = F.interpolate(self.narrow(h), scale_factor=2, mode="nearest")
        return h[:, :, :height, :width] + self.bias


class DeepTopDown(TopDown):
    """`TopDown`, whose levels without groups contain blocks."""

    def make_up(self, inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
        return Up(inputs, outputs, size)

    def make_scale(self, ladder: BlockOptions, i: int, size: tuple[int, int]) -> list[nn.Module]:
        if groups := ladder.groups[i]:
            return [DeepGroup(ladder, i, size) for _ in range(groups)]
        shape = ladder.channels[i], ladder.inner(i), sum(ladder.groups), size
        return [residual_block(*shape) for _ in range(ladder.blocks[i])]


class VDVAE(LadderVAE):
    """A hierarchy of Gaussian latents with many groups."""

    paper = "Child 2020, arXiv:2011.10650"
    bottom_up, top_down = BottomUp, DeepTopDown

    def __init__(
        self,
        data: DataInfo,
        *,
        ladder: BlockOptions = BlockOptions(),
        bound: BoundOptions = BoundOptions(),
        labels: LabelOptions = LabelOptions(),
    ):
        super().__init__(data, ladder, bound, labels)
