"""Generators and critics of the GAN family: convolutional, for any image size, after DCGAN
(arXiv:1511.06434).

The feature maps are the image's size halved (rounded up) until both sides are at most 4: 28 → 14 → 7 → 4.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gzcli import ranks
from gzcli.models.nn import ClassEmbedding, to_fp32

Norm = Literal["none", "group", "batch"]


def pyramid(shape: tuple[int, ...], coarsest: int = 4) -> list[tuple[int, int]]:
    """Sizes of the feature maps, from the image's own down."""
    sizes = [(shape[1], shape[2])]
    while max(sizes[-1]) > coarsest:
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


def widths(width: int, scales: int) -> list[int]:
    """Channels of the scales below the image, finest first: width, 2·width, 4·width … at most 8·width."""
    return [width * 2 ** min(i, 3) for i in range(scales)]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics are those of all ranks; each rank normalises by its own images in
    training."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.running_mean = ranks.mean(self.running_mean, self)
        self.running_var = ranks.mean(self.running_var, self)
        return y


def make_norm(norm: Norm, width: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return BatchNorm(width)
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width)


class Generator(nn.Module):
    """z [B, latent] (and labels, by an embedding beside z) → images [B, C, H, W] in [-1, 1], fp32."""

    def __init__(
        self, shape: tuple[int, ...], latent: int, width: int, norm: Norm = "group", classes: int = 0
    ):
        super().__init__()
        *self.targets, start = pyramid(shape)
        channels = widths(width, len(self.targets))
        self.embed = ClassEmbedding(classes, latent) if classes else None
        if (
            self.embed is not None
        ):  # with the label as loud as z, the generator would settle for one image of each class
            nn.init.normal_(self.embed.table.weight, std=0.25)
        self.start = (channels[-1], *start)
        self.stem = nn.Linear(latent * (2 if classes else 1), channels[-1] * start[0] * start[1])
        self.norms = nn.ModuleList(make_norm(norm, w) for w in reversed(channels))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1)
            for i, o in zip(reversed(channels), (*reversed(channels[:-1]), shape[0]), strict=True)
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = z if self.embed is None else torch.cat([z, self.embed(y, len(z))], dim=1)
        h = self.stem(h).unflatten(1, self.start)
        for norm, up, (height, width) in zip(self.norms, self.ups, reversed(self.targets), strict=True):
            h = up(F.relu(norm(h)))[:, :, :height, :width]  # odd sizes were rounded up
        return torch.tanh(to_fp32(h))


class Critic(nn.Module):
    """Images → one unbounded number each, [B], fp32.

    kernel: of the strided convolutions. labels: by `projection` on their embedding (Miyato 2018,
    arXiv:1802.05637, eq. 3), or as an embedding of the size of the image, a channel more (after Mirza 2014).
    norm: of all layers but the first. spectral: every weight divided by its largest singular value (Miyato
    2018, arXiv:1802.05957).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        classes: int = 0,
        *,
        kernel: int = 3,
        norm: Norm = "none",
        spectral: bool = False,
        labels: Literal["projection", "channel"] = "projection",
    ):
        super().__init__()
        sizes = pyramid(shape)
        channels = widths(width, len(sizes) - 1)
        self.kernel, self.alone = (
            kernel,
            norm != "batch",
        )  # alone: an image's output is its own in training too
        self.channel = (
            ClassEmbedding(classes, shape[1] * shape[2]) if classes and labels == "channel" else None
        )
        inputs = (shape[0] + (self.channel is not None), *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride=2, padding=(kernel - 1) // 2)
            for i, o in zip(inputs, channels, strict=False)
        )
        self.norms = nn.ModuleList(make_norm(norm if i else "none", w) for i, w in enumerate(channels))
        h, w = sizes[-1]
        self.features = channels[-1] * h * w
        self.head = nn.Linear(self.features, 1)
        self.embed = ClassEmbedding(classes, self.features) if classes and labels == "projection" else None
        self.scale = 1.0 if spectral else self.features**-0.5  # an embedding of norm √D, and one of norm 1
        if spectral:
            for layer in (*self.convs, self.head, *([self.embed.table] if self.embed else [])):
                spectral_norm(layer)

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The coarsest feature map [B, C', h, w]."""
        if self.channel is not None:
            x = torch.cat([x, self.channel(y, len(x)).view(-1, 1, *x.shape[2:])], 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.kernel % 2 == 0:  # odd sides are halved and rounded up
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.maps(x, y).flatten(1)
        f = to_fp32(self.head(h)).squeeze(1)
        if self.embed is not None:
            f = f + self.scale * (to_fp32(self.embed(y, len(x))) * to_fp32(h)).sum(1)
        return f
