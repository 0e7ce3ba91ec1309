"""The two towers of a hierarchical VAE: features from the image up, latents from the coarsest group down.

Vahdat & Kautz 2020, NVAE, arXiv:2007.03898, figure 2. Tuples hold one entry a resolution, finest first;
groups of latents are counted from the top, group 0 being the coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn import to_fp32
from gzcli.models.vae.cells import DecoderCell, EncoderCell
from gzcli.models.vae.nets import halvings
from gzcli.models.vae.vae import kl_normal, log_normal


class Code(NamedTuple):
    """Where the posterior put one group's latents: t ~ N(mu, e^(2 log_sigma)) of each image, [B, latent·h·w]
    each."""

    t: Tensor
    mu: Tensor
    log_sigma: Tensor

    def kl(self) -> Tensor:
        """KL(q ‖ p), [B]."""
        return kl_normal(self.mu, 2 * self.log_sigma)

    def log_ratio(self) -> Tensor:
        """log p − log q of the draw, [B]; the scale of the prior, in which t is counted, cancels."""
        return log_normal(self.t) - log_normal(self.t, self.mu, 2 * self.log_sigma)


def soft_clamp(h: Tensor) -> Tensor:
    """Within ±5, smoothly: a bound on the KL of any image, learned or strange. fp32."""
    return 5 * torch.tanh(to_fp32(h) / 5)


class BottomUp(nn.Module):
    """Images [B, C, H, W] → the features of each group, top first."""

    def __init__(
        self, image_channels: int, channels: tuple[int, ...], groups: tuple[int, ...], cells: tuple[int, ...]
    ):
        super().__init__()
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        # for each resolution, the cells before each of its groups; where there is no group, cells alone
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(EncoderCell(w) for _ in range(c))) for _ in range(max(g, 1)))
            for w, g, c in zip(channels, groups, cells, strict=True)
        )
        self.groups = groups

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = self.stem(x).contiguous(memory_format=torch.channels_last), []
        for i, parts in enumerate(self.scales):
            if i:
                h = self.downs[i - 1](F.silu(h))
            for part in parts:
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
        """The state after this group; t is drawn with eps [B, latent, h, w] from the posterior, or is eps
        without a feature."""
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
    """From a learned state, through the groups from the coarsest on, to the parameters of the pixels [B,
    outputs, H, W].

    A label is added to the state as each resolution begins; priors and posteriors all depend on it from
    there.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: tuple[int, ...],
        groups: tuple[int, ...],
        cells: tuple[int, ...],
        *,
        latent: int,
        expand: int,
        outputs: int,
        embed: int,
    ):
        super().__init__()
        self.sizes = halvings(shape, len(channels) - 1)[::-1]
        self.grids = [
            size for size, g in zip(self.sizes, groups[::-1], strict=True) for _ in range(g)
        ]  # of each group
        channels, groups, cells = channels[::-1], groups[::-1], cells[::-1]
        self.start = nn.Parameter(torch.randn(1, channels[0], *self.sizes[0]))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1) for i, o in pairwise(channels)
        )
        self.labels = nn.ModuleList(nn.Linear(embed, w) for w in channels) if embed else None
        self.scales = (
            nn.ModuleList(  # groups that begin with their cells; where there is no group, cells alone
                nn.ModuleList(
                    [Group(w, latent, c, expand) for _ in range(g)]
                    or [DecoderCell(w, expand) for _ in range(c)]
                )
                for w, g, c in zip(channels, groups, cells, strict=True)
            )
        )
        self.head = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(
        self, eps: Sequence[Tensor], features: Sequence[Tensor], e: Tensor | None = None
    ) -> tuple[Tensor, list[Code]]:
        """The pixels' parameters and the codes of the groups that have `features`; the others' t is their
        `eps`.

        eps: of every group, [B, latent, h, w]; features: of the top groups, all or some or none; e: label
        embedding [B, E].
        """
        h = self.start.expand(len(eps[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        eps, codes, seen = iter(eps), [], iter(features)
        for i, (scale, (height, width)) in enumerate(zip(self.scales, self.sizes, strict=True)):
            if i:
                h = self.ups[i - 1](F.silu(h))[:, :, :height, :width]  # odd sizes were rounded up
            if self.labels is not None:
                h = h + self.labels[i](e)[:, :, None, None]
            for part in scale:
                if isinstance(part, Group):
                    h, code = part(h, next(eps), next(seen, None))
                    codes += [] if code is None else [code]
                else:
                    h = part(h)
        return self.head(F.silu(h)), codes
