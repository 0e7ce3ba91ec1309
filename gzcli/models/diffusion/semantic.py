"""Parts of the diffusion autoencoder: the encoder of the semantic code, the U-Net that is told it, DDIM run
backwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.diffusion.samplers import Denoise
from gzcli.models.diffusion.schedule import Level
from gzcli.models.nn import UNet, stacked
from gzcli.models.nn.unet import Attention, Down, ResBlock, Stage, attended
from gzcli.types import DataInfo, Progress, no_progress

EPS = 1e-5


class Encoder(nn.Module):
    """x [B, C, H, W] → z_sem [B, latent]: the way down of the U-Net, which no time is told, averaged over
    positions.

    channels, mult, layers, attention, groups: as in `UNet.of`.
    """

    def __init__(
        self,
        data: DataInfo,
        latent: int,
        *,
        channels: int,
        mult: tuple[int, ...],
        layers: int,
        attention: tuple[int, ...],
        head_dim: int | None,
        dropout: float,
        groups: int,
    ):
        super().__init__()

        def stage(i: int, o: int, n: int, attend: Sequence[bool], resample: nn.Module | None = None) -> Stage:
            blocks = [
                ResBlock(o if k else i, o, 0, groups, EPS, dropout, scale_shift=False) for k in range(n)
            ]
            return Stage(
                blocks, [Attention(o, head_dim or o, groups, EPS) if a else None for a in attend], resample
            )

        c, last = channels * mult[0], len(mult) - 1
        self.conv_in = stacked(nn.Conv2d(data.shape[0], c, 3, padding=1), 0)
        self.down = nn.ModuleList()
        for k, attend in enumerate(attended(data, len(mult), attention)):
            o = channels * mult[k]
            self.down.append(stage(c, o, layers, [attend] * layers, Down(o, 1) if k < last else None))
            c = o
        self.mid = stage(c, c, 2, [True, False])
        self.norm_out = nn.GroupNorm(groups, c, EPS)
        self.out = nn.Linear(c, latent)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in [*self.down, self.mid]:
            for block, attend in stage.pairs():
                h = attend(block(h))
            if stage.resample is not None:
                h = stage.resample(h)
        return self.out(F.silu(self.norm_out(h)).mean((2, 3)))


class CodedUNet(UNet):
    """The U-Net, whose blocks are told a code [B, latent] beside the time; it comes where the label does."""

    def __init__(self, *args, latent: int, **options):
        super().__init__(*args, scale_shift=True, **options)
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.emb = Modulation(block.emb.in_features, latent, block.conv1.out_channels)

    def embedding(self, t: Tensor, y: Tensor, drop: Tensor | None) -> Tensor:
        emb = super().embedding(t, None, drop)
        return torch.cat([emb, y.to(emb.dtype)], 1)


class Modulation(nn.Module):
    """Scale and shift of the normalised h by time and code: z_s (t_s h + t_b) (Preechakul 2022, eq. 7), z_s
    and t_s around 1."""

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


def ddim_inverse(
    denoise: Denoise, x: Tensor, path: Sequence[Level], *, progress: Progress = no_progress
) -> Tensor:
    """The noise at path[0] from which DDIM walks along `path` to x (Preechakul 2022, eq. 8): its steps
    backwards, each with the ε of where it starts in place of where it ends, an error of first order in its
    length."""
    back = list(pairwise(reversed(path)))
    for i, (u, s) in enumerate(back):
        x0, eps = denoise(x, max(u.t, 0.0))  # the clean image has no time of its own: that of least noise
        x = s.alpha * x0 + s.sigma * eps
        progress(i + 1, len(back), x)
    return x
