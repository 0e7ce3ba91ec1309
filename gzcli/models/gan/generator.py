"""The convolutional generator of the GANs, for any image size, after DCGAN (arXiv:1511.06434)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn.common import ClassEmbedding, to_fp32
from gzcli.models.nn.critic import NORMS, Norm, pyramid, widths


@dataclass(frozen=True)
class GeneratorOptions:
    """The network of the generator.

    latent: dimensions of z.
    width: channels of the finest scale of both networks, doubled at each coarser one, at most 8-fold.
    norm: normalisation in the generator.
    """

    latent: int = 64
    width: int = 32
    norm: Norm = "group"


class Generator(nn.Module):
    """z [B, latent] and the embedding of labels → images [B, C, H, W] in [-1, 1], fp32.

    The feature maps have the sizes of the critic's, coarsest first.
    """

    def __init__(self, shape: tuple[int, ...], options: GeneratorOptions, classes: int = 0):
        super().__init__()
        *self.targets, start = pyramid(shape)
        channels, latent = widths(options.width, len(self.targets)), options.latent
        self.embed = ClassEmbedding(classes, latent) if classes else None
        if self.embed is not None:
            # smaller than z: otherwise the label would determine the image, one for each class
            nn.init.normal_(self.embed.table.weight, std=0.25)
        self.start = (channels[-1], *start)
        self.stem = nn.Linear(latent * (2 if classes else 1), channels[-1] * start[0] * start[1])
        self.norms = nn.ModuleList(NORMS[options.norm](w) for w in reversed(channels))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1)
            for i, o in zip(reversed(channels), (*reversed(channels[:-1]), shape[0]), strict=True)
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = z if self.embed is None else torch.cat([z, self.embed(y, z.shape[0])], dim=1)
        h = self.stem(h).unflatten(1, self.start)
        for norm, up, (height, width) in zip(self.norms, self.ups, reversed(self.targets), strict=True):
            h = up(F.relu(norm(h)))[:, :, :height, :width]  # odd sizes were rounded up
        return torch.tanh(to_fp32(h))
