"""Codes of several scales with one codebook C — Tian et al. 2024, "Visual Autoregressive Modeling: Scalable
Image Generation via Next-Scale Prediction", arXiv:2404.02905.

    f ← z,   for each scale k, the coarsest first: q_k nearest to down(f, h_k), f ← f − p_k    (algorithm 1)
    p_k = φ_k(up(C[q_k])),   ẑ = Σ_k p_k                                                       (algorithm 2)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Noise
from gzcli.models.autoregressive.tokenizer import Codebook, CodebookOptions, FiniteScalar
from gzcli.models.nn import full_fp32, to_fp32


class ScaledCodebook(Codebook):
    """Replaces z [B, dim, h, w] by a sum of parts, one from each scale. Its codes [B, T] are those of all
    scales, each in raster order. The last scale is the grid h × w.

    The loss is that of `Codebook` for the sums up to each scale, on average (eq. 5). φ_k is the identity plus
    a convolution, which learns by the first term even if codes follow averages. Raises UsageError for codes
    on the unit sphere."""

    down: Tensor  # [h · w, T], means over blocks
    up: Tensor  # [T, h · w], bicubic interpolation

    def __init__(self, options: CodebookOptions, grid: tuple[int, int]):
        super().__init__(options)
        if options.cosine:
            hint = "set `model.cosine` to `false`"
            raise UsageError("`model.cosine` does not work with codes of several scales", hint=hint)
        (height, width), side = grid, max(grid)
        grids = [(-(-s * height // side), -(-s * width // side)) for s in options.scales if s < side]
        grids.append(grid)
        ends = accumulate((h * w for h, w in grids), initial=0)
        self.grid, self.grids, self.scales = grid, grids, tuple(slice(*span) for span in pairwise(ends))
        # matrices are deterministic on every device, and allow any ratio
        fine = torch.eye(grid[0] * grid[1]).unflatten(1, grid)[:, None]
        coarse = [torch.eye(h * w).unflatten(1, (h, w))[:, None] for h, w in grids]
        down = [F.adaptive_avg_pool2d(fine, size).flatten(1) for size in grids]
        up = [F.interpolate(each, grid, mode="bicubic").flatten(1) for each in coarse]
        self.register_buffer("down", torch.cat(down, 1), persistent=False)
        self.register_buffer("up", torch.cat(up), persistent=False)
        self.convs = nn.ModuleList(nn.Conv2d(options.dim, options.dim, 3, padding=1) for _ in grids)
        for p in self.convs.parameters():
            nn.init.zeros_(p)

    def forward(self, z: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        z, codes, rests, sums = self.split(z)
        of_sum = [F.mse_loss(e, z.detach()) + self.options.beta * F.mse_loss(z, e.detach()) for e in sums]
        logged = self.learn(rests[..., None], codes, noise)
        return z + (sums[-1] - z).detach(), {"loss": torch.stack(of_sum).mean(), **logged}

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns z in full precision, its codes [B, T], the vectors [B, dim, T] that these replace, and the
        sums [B, dim, h, w] up to each scale."""
        z = to_fp32(z)
        codes, rests, sums = [], [], [torch.zeros_like(z)]
        for k in range(len(self.scales)):
            rests.append(self.shrink((z - sums[-1]).detach(), k))
            codes.append(self.index(rests[-1]))
            sums.append(sums[-1] + self.part(codes[-1], k))
        return z, torch.cat(codes, 1), torch.cat(rests, 2), sums[1:]

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, codes, _, sums = self.split(z)
        return z, codes, sums[-1]

    def lookup(self, codes: Tensor) -> Tensor:
        *_, total = self.sums(codes)
        return total

    def sums(self, codes: Tensor) -> Iterator[Tensor]:
        """The sums [B, dim, h, w] of the parts before each scale, and finally that of all parts."""
        parts = (self.part(codes[:, scale], k) for k, scale in enumerate(self.scales))
        zero = self.embedding.new_zeros(len(codes), self.options.dim, *self.grid)
        return accumulate(parts, initial=zero)

    def part(self, codes: Tensor, k: int) -> Tensor:
        """p_k [B, dim, h, w] for the codes [B, T_k] of scale k."""
        e = super().lookup(codes)  # [B, dim, T_k]
        with full_fp32(e.device):
            h = (e @ self.up[self.scales[k]]).unflatten(2, self.grid)
            return h + self.convs[k](h)

    def shrink(self, f: Tensor, k: int) -> Tensor:
        """down(f, h_k) [B, dim, T_k] of f [B, dim, h, w]."""
        with full_fp32(f.device):
            return f.flatten(2) @ self.down[:, self.scales[k]]


def codebook_of(options: CodebookOptions, grid: tuple[int, int]) -> Codebook:
    """The codebook, of one scale or several. Raises UsageError for several scales of levels."""
    if not options.levels:
        return ScaledCodebook(options, grid) if options.scales else Codebook(options)
    if options.scales:
        hint = "use only one of `model.levels` and `model.scales`"
        raise UsageError(
            "`model.levels` has a fixed size, but the residuals of `model.scales` get smaller", hint=hint
        )
    return FiniteScalar(options)
