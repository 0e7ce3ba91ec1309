"""The convolutional critic of the GANs and of the adversarial autoencoder, after DCGAN (arXiv:1511.06434).

Its feature maps are the image's size halved (rounded up) until both sides are at most 4: 28 → 14 → 7 → 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gzcli.models.nn.common import ClassEmbedding, group_norm, halvings, to_fp32

Norm = Literal["none", "group", "batch"]

LabelAs = Literal["channel", "projection"]


@dataclass(frozen=True)
class CriticOptions:
    """The network of the discriminator.

    disc_norm: normalisation after every convolution of the discriminator but the first.
    kernel: side of the discriminator's strided convolutions, in pixels.
    spectral: whether each weight of the discriminator is divided by its largest singular value (Miyato 2018,
      arXiv:1802.05957).
    """

    disc_norm: Norm = "none"
    kernel: int = 3
    spectral: bool = False


def pyramid(shape: tuple[int, ...], coarsest: int = 4) -> list[tuple[int, int]]:
    """(height, width) of the feature maps of images (C, H, W), halved until no side is above `coarsest`."""
    times = 0
    while max(halvings(shape, times)[-1]) > coarsest:
        times += 1
    return halvings(shape, times)


def widths(width: int, scales: int) -> list[int]:
    """Channels of the scales below the image, finest first: width, 2·width, 4·width, then 8·width."""
    return [width * 2 ** min(i, 3) for i in range(scales)]


NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "group": group_norm,
    "batch": nn.BatchNorm2d,
}


class Critic(nn.Module):
    """Images [B, C, H, W] → an unbounded number for each, [B], fp32.

    shape: of an image, (C, H, W).
    width: channels of the finest scale, doubled at each coarser one, at most 8-fold.
    classes: number of classes that the critic is conditioned on, 0 for none.
    options: normalisation, kernel and spectral norm of the layers.
    label_as: `projection` of the features on the label's embedding (Miyato 2018, arXiv:1802.05637, eq. 3), or
      `channel`, an embedding of the size of the image beside it (after Mirza 2014).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        classes: int = 0,
        options: CriticOptions = CriticOptions(),
        label_as: LabelAs = "projection",
    ):
        super().__init__()
        sizes = pyramid(shape)
        channels = widths(width, len(sizes) - 1)
        self.kernel, norm = options.kernel, options.disc_norm
        self.independent = norm != "batch"  # whether an output depends on its own image alone in training too
        as_channel = classes and label_as == "channel"
        self.channel = ClassEmbedding(classes, shape[1] * shape[2]) if as_channel else None
        inputs = (shape[0] + (self.channel is not None), *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, self.kernel, stride=2, padding=(self.kernel - 1) // 2)
            for i, o in zip(inputs, channels, strict=False)
        )
        self.norms = nn.ModuleList(NORMS[norm if i else "none"](w) for i, w in enumerate(channels))
        h, w = sizes[-1]
        self.features = channels[-1] * h * w
        self.head = nn.Linear(self.features, 1)
        self.embed = ClassEmbedding(classes, self.features) if classes and label_as == "projection" else None
        # spectral norm gives the embedding the norm 1; without it, its norm is about √features
        self.scale = 1.0 if options.spectral else self.features**-0.5
        if options.spectral:
            for layer in (*self.convs, self.head, *([self.embed.table] if self.embed else [])):
                spectral_norm(layer)

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The coarsest feature map [B, C', h, w]."""
        if self.channel is not None:
            x = torch.cat([x, self.channel(y, len(x)).view(-1, 1, *x.shape[2:])], 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.kernel % 2 == 0:  # an even kernel would round the half of an odd side down
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.maps(x, y).flatten(1)
        f = to_fp32(self.head(h)).squeeze(1)
        if self.embed is not None:
            f = f + self.scale * (to_fp32(self.embed(y, len(x))) * to_fp32(h)).sum(1)
        return f
