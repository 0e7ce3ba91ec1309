"""Parts of the diffusion autoencoder: the encoder of the semantic code, and the U-Net conditioned on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.types import DataInfo
from gzcli.models.nn import stacked
from gzcli.models.nn.attention import Attention
from gzcli.models.nn.norms import GroupNorm
from gzcli.models.nn.unet import Down, ResBlock, Stage, UNet
from gzcli.models.nn.unet_sizes import UNetOptions, attended, patched, widths_of

EPS = 1e-5


class Encoder(nn.Module):
    """x [B, C, H, W] → z_sem [B, latent]: the encoder of a U-Net without time, averaged over positions."""

    def __init__(self, data: DataInfo, latent: int, options: UNetOptions):
        super().__init__()
        channels, groups, dropout = options.channels, options.groups, options.dropout
        mult, self.patch = widths_of(data.shape, options), options.patch

        def stage(i: int, o: int, n: int, attend: Sequence[bool], half: nn.Module | None = None) -> Stage:
            widths = [i, *[o] * (n - 1)]
            blocks = [ResBlock(width, o, 0, groups, EPS, dropout, scale_shift=False) for width in widths]
            attention = [Attention(o, options.head_dim or o, groups, EPS) if a else None for a in attend]
            return Stage(blocks, attention, half)

        c, last = channels * mult[0], len(mult) - 1
        self.conv_in = stacked(nn.Conv2d(data.shape[0] * self.patch**2, c, 3, padding=1), 0)
        self.down = nn.ModuleList()
        for k, attend in enumerate(attended(data.shape, len(mult), options)):
            o = channels * mult[k]
            half = Down(o, 1) if k < last else None
            self.down.append(stage(c, o, options.layers, [attend] * options.layers, half))
            c = o
        self.mid = stage(c, c, 2, [True, False])
        self.norm_out = GroupNorm(groups, c, EPS)
        self.out = nn.Linear(c, latent)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(patched(x, self.patch))
        for stage in [*self.down, self.mid]:
            h = stage(h)[-1]
        return self.out(F.silu(self.norm_out(h)).mean((2, 3)))


class CodedUNet(UNet):
    """A U-Net with blocks conditioned on time and a code [B, latent], given in place of the label."""

    def __init__(self, *args: Any, latent: int, **options: Any):
        super().__init__(*args, scale_shift=True, **options)
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.emb = Modulation(4 * self.dim, latent, block.conv1.out_channels)

    def embedding(self, t: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        if y is None:
            raise ValueError("the network needs a code")
        emb = super().embedding(t, None, drop)
        return torch.cat([emb, y.to(emb.dtype)], 1)


class Modulation(nn.Module):
    """Scale and shift of the normalised h by time and code: z_s (t_s h + t_b) (Preechakul 2022, eq. 7), where
    z_s and t_s start near 1."""

    def __init__(self, dim: int, latent: int, channels: int):
        super().__init__()
        self.split = (dim, latent)
        self.time, self.code = stacked(nn.Linear(dim, 2 * channels), 2), nn.Linear(latent, channels)

    def forward(self, emb: Tensor) -> Tensor:
        """[B, dim + latent] → [B, 2 · channels], the scale less 1 before the shift, as `ResBlock` takes
        them."""
        t, z = emb.split(self.split, 1)
        scale, shift = self.time(t).chunk(2, 1)
        z = 1 + self.code(z)
        return torch.cat([z * (1 + scale) - 1, z * shift], 1)
