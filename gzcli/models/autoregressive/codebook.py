"""Vector quantisation — van den Oord et al. 2017, arXiv:1711.00937, section 3.

    z_q = e_k,  k = argmin_j ‖z_e − e_j‖                                                        (eq. 1 and 2)
    L = ‖sg[z_e] − e_k‖² + β ‖z_e − sg[e_k]‖²                                    (eq. 3, its last two terms)

`gradient` codebooks learn by the first term; `ema` ones follow the mean of the vectors that they stand for
(appendix A.1) and need the second term alone. Statistics are shares of the global batch, so that neither the
number of vectors nor that of processes matters.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli import ranks
from gzcli.models.nn import full_fp32, to_fp32
from gzcli.types import Noise

EPS = 1e-8  # Laplace smoothing, in shares
DEAD = 0.03  # a code used less than this part of its equal share is dead
DISTANCES = 1 << 24  # held at once
REBORN = 0.1  # … and starts again with this part of it: about one averaging time to prove itself


class Codebook(nn.Module):
    """z [B, dim, h, w] → the nearest of `codes` vectors at each place.

    cosine: vectors and codes lie on the unit sphere (Yu 2021, arXiv:2110.04627, section 3.2), which keeps
    more of them in use. restart: dead codes are moved to vectors drawn from the batch.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        learned: Literal["ema", "gradient"] = "ema",
        beta: float = 0.25,
        decay: float = 0.99,
        restart: bool = True,
        cosine: bool = False,
    ):
        super().__init__()
        self.learned, self.beta, self.decay, self.restart, self.cosine = learned, beta, decay, restart, cosine
        embedding = self._normal(torch.randn(codes, dim))
        if learned == "ema":
            self.register_buffer("embedding", embedding)
            self.register_buffer(
                "total", embedding / codes
            )  # average of the sum of a code's vectors, a vector of the batch
        else:
            self.embedding = nn.Parameter(embedding)
        self.register_buffer(
            "usage", torch.full((codes,), 1 / codes)
        )  # average share of the vectors that take a code
        self.register_buffer("started", torch.tensor(False))

    def forward(self, z: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """(z_q with the gradient straight through to z, the loss and what is to be logged); moves the codes
        in training."""
        z, codes, e = self.nearest(z)
        share = ranks.mean(self._count(codes), self)
        loss = self.beta * F.mse_loss(z, e.detach())
        if self.learned == "gradient":
            loss = loss + F.mse_loss(e, z.detach())
        if self.training:
            self._update(z.detach(), codes, share, noise)
        perplexity = (-torch.special.xlogy(share, share).sum()).exp()
        return z + (e - z).detach(), {
            "loss": loss,
            "perplexity": perplexity,
            "dead": self._dead().to(share.dtype).mean(),
        }

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z as it is compared, its codes [B, h, w] int64, their vectors [B, dim, h, w]), in full
        precision."""
        z = self._normal(to_fp32(z), dim=1)
        with full_fp32(z.device):  # in TF32 a near tie falls otherwise than where the codes are read
            places = z.detach().movedim(1, -1)  # [B, h, w, dim]
            e = self._normal(self.embedding.detach())  # [codes, dim]
            square, parts = e.square().sum(1), places.flatten(0, -2).split(max(1, DISTANCES // len(e)))
            # ‖z − e‖² without ‖z‖², which all codes share
            codes = torch.cat([(square - 2 * part @ e.mT).argmin(1) for part in parts])
        codes = codes.view(places.shape[:-1])
        return z, codes, self.lookup(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors [B, dim, h, w] of codes [B, h, w]."""
        return self._normal(F.embedding(codes, self.embedding)).movedim(-1, 1)

    @torch.no_grad()
    def start(self, z: Tensor, noise: Noise) -> None:
        """Codes at vectors of the first batch; once, so that a resume changes nothing. No host sync."""
        self._place(~self.started.expand_as(self.usage), self._normal(to_fp32(z), dim=1), noise, REBORN)
        self.started.fill_(True)

    def _normal(self, t: Tensor, dim: int = -1) -> Tensor:
        return F.normalize(t, dim=dim) if self.cosine else t

    def _count(self, codes: Tensor) -> Tensor:
        """The share of each code among `codes`."""
        ones = self.usage.new_full((codes.numel(),), 1 / codes.numel())
        return torch.zeros_like(self.usage).index_add_(0, codes.flatten(), ones)

    def _dead(self) -> Tensor:
        return self.usage < DEAD / len(self.usage)

    @torch.no_grad()
    def _update(self, z: Tensor, codes: Tensor, share: Tensor, noise: Noise) -> None:
        self.usage.lerp_(share, 1 - self.decay)
        if self.learned == "ema":
            vectors = z.movedim(1, -1).flatten(0, -2).to(self.total)
            sums = torch.zeros_like(self.total).index_add_(0, codes.flatten(), vectors) / len(vectors)
            self.total.lerp_(ranks.mean(sums, self), 1 - self.decay)
            n = self.usage.sum()
            smoothed = (self.usage + EPS) / (n + len(self.usage) * EPS) * n
            self.embedding.copy_(self._normal(self.total / smoothed[:, None]))
        if self.restart:
            self._place(self._dead(), z, noise, REBORN)

    def _place(self, which: Tensor, z: Tensor, noise: Noise, part: float) -> None:
        """Moves the codes where `which` [codes] to vectors drawn from the global batch, with `part` of an
        equal share.

        No host sync: the vectors are drawn whether or not there is a code for them.
        """
        z = z.movedim(1, -1).flatten(1, 2)  # [B, h · w, dim]
        u, z = noise.rand(*z.shape[:2]).to(z).flatten(), z.flatten(0, 1)
        few = min(len(which), len(z))
        first = u.topk(few).indices  # the first of the global batch are among the first of each rank
        u, z = ranks.rows(u[first], self), ranks.rows(z[first], self)
        z = z[u.topk(min(len(which), len(z))).indices].to(self.embedding)
        z = z[(which.cumsum(0) - 1).clamp(min=0) % len(z)]  # the i-th of these codes gets the i-th vector
        share = part / len(which)
        self.usage.masked_fill_(which, share)
        self.embedding.data.copy_(torch.where(which[:, None], z, self.embedding))
        if self.learned == "ema":
            self.total.copy_(torch.where(which[:, None], z * share, self.total))
