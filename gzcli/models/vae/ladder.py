"""The two towers of a hierarchical VAE: features from the image up, latents from the coarsest group down.

Vahdat & Kautz 2020, NVAE, arXiv:2007.03898, figure 2. Tuples hold one entry a resolution, finest first;
groups of latents are counted from the top, group 0 being the coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.models.nn.common import halvings, to_fp32
from gzcli.models.vae.cells import DecoderCell, EncoderCell
from gzcli.models.vae.gaussian import kl_normal, log_normal


@dataclass(frozen=True)
class LadderOptions:
    """The towers. `channels`, `groups` and `cells` have an entry for each resolution, from the image's own
    on, halved each time.

    channels: channels of the feature maps at each resolution, the image's own first.
    groups: groups of latents at each resolution; the coarsest has one or more.
    cells: residual cells before each group of a resolution, in either tower; for a resolution without groups,
      all its cells.
    latent: channels of a group of latents.
    expand: channels of the decoder's depthwise convolutions, as a multiple of `channels`.
    """

    channels: tuple[int, ...] = (16, 32, 48, 64)
    groups: tuple[int, ...] = (0, 1, 2, 2)
    cells: tuple[int, ...] = (0, 1, 1, 1)
    latent: int = 8
    expand: int = 3


def check(ladder: LadderOptions, mixture: int) -> None:
    """Raises UsageError unless the options, and the components of a mixture, are those of two towers."""
    channels, groups, cells = ladder.channels, ladder.groups, ladder.cells
    if not len(channels) == len(groups) == len(cells):
        raise UsageError(
            "`model.channels`, `model.groups` and `model.cells` differ in length",
            hint="give each one number a resolution, the image's own first, as in `groups: [0, 1, 2]`",
        )
    if not groups or groups[-1] < 1:
        raise UsageError(
            "`model.groups` has no group at the coarsest resolution", hint="its last number must be 1 or more"
        )
    if min(*groups, *cells) < 0 or min(*channels, ladder.latent, ladder.expand, mixture) < 1:
        raise UsageError(
            "`model.groups` and `model.cells` must not be negative, the other sizes of `model` be 1 or more"
        )


class Code(NamedTuple):
    """The posterior of one group's latents, t ~ N(mu, e^(2 log_sigma)), and a draw t of it; [B, latent·h·w]
    each."""

    t: Tensor
    mu: Tensor
    log_sigma: Tensor

    def kl(self) -> Tensor:
        """KL(q ‖ p), [B]."""
        return kl_normal(self.mu, 2 * self.log_sigma)

    def log_ratio(self) -> Tensor:
        """log p − log q of the draw, [B]. The scale of the prior, which is the unit of t, cancels."""
        return log_normal(self.t) - log_normal(self.t, self.mu, 2 * self.log_sigma)


def soft_clamp(h: Tensor) -> Tensor:
    """h within ±5, fp32. It bounds the KL of any image, also of images unlike the training images."""
    return 5 * torch.tanh(to_fp32(h) / 5)


class BottomUp(nn.Module):
    """Images [B, C, H, W] → the features of each group, top first."""

    def __init__(self, image_channels: int, ladder: LadderOptions):
        super().__init__()
        channels, self.groups = ladder.channels, ladder.groups
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        # for each resolution, the cells before each of its groups; for one without groups, its cells alone
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(EncoderCell(w) for _ in range(c))) for _ in range(max(g, 1)))
            for w, g, c in zip(channels, self.groups, ladder.cells, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = self.stem(x).contiguous(memory_format=torch.channels_last), []
        for i, scale in enumerate(self.scales):
            if i:
                h = self.downs[i - 1](F.silu(h))
            for part in scale.children():
                h = part(h)
                if self.groups[i]:
                    features.append(h)
        return features[::-1]


class Group(nn.Module):
    """One group of latents z = mu + sigma·t, in terms of t: the prior is t ~ N(0, I).

    The residual normal posterior (eq. 2), z ~ N(mu + Δmu, (sigma·Δsigma)²), is t ~ N(Δmu / sigma, Δsigma²),
    so that KL = ½ (Δmu² / sigma² + Δsigma² − log Δsigma² − 1) is a KL to N(0, I).
    """

    def __init__(self, width: int, latent: int, cells: int, expand: int):
        super().__init__()
        self.cells = nn.Sequential(*(DecoderCell(width, expand) for _ in range(cells)))
        self.prior = nn.Conv2d(width, 2 * latent, 1)
        self.combine = nn.Conv2d(width, width, 1)
        self.residual = nn.Conv2d(width, 2 * latent, 3, padding=1)
        self.join = nn.Conv2d(latent, width, 1)

    def forward(self, h: Tensor, eps: Tensor, feature: Tensor | None) -> tuple[Tensor, Code | None]:
        """The state after this group, and the posterior's draw.

        h: the state [B, width, h, w].
        eps: standard normal [B, latent, h, w].
        feature: of the image, [B, width, h, w]; None: t is eps, a draw of the prior.
        """
        h = self.cells(h)
        mu, log_sigma = soft_clamp(self.prior(F.silu(h))).chunk(2, dim=1)
        t, code = eps, None
        if feature is not None:
            delta, log_ratio = soft_clamp(self.residual(F.silu(feature + self.combine(h)))).chunk(2, dim=1)
            shift = delta * torch.exp(-log_sigma)
            t = shift + log_ratio.exp() * eps
            code = Code(t.flatten(1), shift.flatten(1), log_ratio.flatten(1))
        return h + self.join(mu + log_sigma.exp() * t), code


class TopDown(nn.Module):
    """The parameters of the pixels [B, outputs, H, W], from a learned state that the groups change, the
    coarsest first.

    A label is added to the state at the beginning of each resolution, so that all priors and posteriors
    depend on it.

    shape: of an image, (C, H, W).
    ladder: the groups and cells.
    outputs: channels of the output.
    embed: size of a label's embedding, 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], ladder: LadderOptions, outputs: int, embed: int):
        super().__init__()
        channels, groups, cells = ladder.channels[::-1], ladder.groups[::-1], ladder.cells[::-1]
        self.sizes = halvings(shape, len(channels) - 1)[::-1]
        # the size of each group
        self.grids = [size for size, g in zip(self.sizes, groups, strict=True) for _ in range(g)]
        self.start = nn.Parameter(torch.randn(1, channels[0], *self.sizes[0]))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1) for i, o in pairwise(channels)
        )
        self.labels = nn.ModuleList(nn.Linear(embed, w) for w in channels) if embed else None
        # for each resolution, its groups, each with cells of its own; for one without groups, its cells alone
        self.scales = nn.ModuleList(
            nn.ModuleList(
                [Group(w, ladder.latent, c, ladder.expand) for _ in range(g)]
                or [DecoderCell(w, ladder.expand) for _ in range(c)]
            )
            for w, g, c in zip(channels, groups, cells, strict=True)
        )
        self.head = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(
        self, eps: Sequence[Tensor], features: Sequence[Tensor], e: Tensor | None = None
    ) -> tuple[Tensor, list[Code]]:
        """The parameters of the pixels, and the posteriors' draws of the groups that have features.

        eps: standard normal [B, latent, h, w] of every group, coarsest first.
        features: features of the coarsest groups, of all, some or none; the finer groups are drawn from the
          prior.
        e: embeddings of the labels [B, E].
        """
        h = self.start.expand(len(eps[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        draws, seen = iter(eps), iter(features)
        codes: list[Code] = []
        for i, (scale, (height, width)) in enumerate(zip(self.scales, self.sizes, strict=True)):
            if i:
                h = self.ups[i - 1](F.silu(h))[:, :, :height, :width]  # odd sizes were rounded up
            if self.labels is not None:
                h = h + self.labels[i](e)[:, :, None, None]
            for part in scale.children():
                if isinstance(part, Group):
                    h, code = part(h, next(draws), next(seen, None))
                    codes += [] if code is None else [code]
                else:
                    h = part(h)
        return self.head(F.silu(h)), codes
