"""The core of VQ models, which map an image to a coarse grid of codes and back: codebook and tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.base import Model
from gzcli.models.nn import at_least, full_fp32, to_fp32, within

LAPLACE_EPS = 1e-8  # Laplace smoothing of the shares of codes
DEAD = 0.03  # a code with less than this fraction of an equal share, 1 / codes, is dead
REBORN = 0.1  # a restarted code gets this fraction of an equal share, enough for one averaging time
TRACKED = 0.1  # weight of a step in the running statistics of vectors that are rounded to levels
DISTANCES = 1 << 24  # distances in memory at a time


@dataclass(frozen=True)
class CodebookOptions:
    """How vectors are quantised.

    codes: size of the codebook.
    dim: numbers in a code's vector.
    codebook: how codes are learned: `ema`, as the running mean of the encoder's vectors that they replace, or
      `gradient`.
    beta: weight β of the commitment loss, which pulls the encoder towards its codes.
    decay: decay per step of the running averages for `ema` and `restart`.
    restart: whether dead codes are moved to vectors drawn from the batch.
    cosine: whether vectors and codes are normalized to the unit sphere, which keeps more codes in use (Yu
      2021, arXiv:2110.04627, section 3.2).
    levels: number of values in each dimension of a code, such as 8, 5, 5 (finite scalar quantization). They
      replace the learned codebook, `codes` and `dim`. Empty: a codebook.
    scales: sides of coarser grids whose codes come first, such as 1, 2, 4. Sides that are not below the
      grid's are ignored. Empty: codes of the grid only.
    """

    codes: int = 512
    dim: int = 64
    codebook: Literal["ema", "gradient"] = "ema"
    beta: float = 0.25
    decay: float = 0.99
    restart: bool = True
    cosine: bool = False
    levels: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """The size of a code's vector."""
        return len(self.levels) or self.dim


class Codebook(nn.Module):
    """Replaces each vector of z [B, dim, h, w] by the nearest vector of the codebook (van den Oord et al.
    2017, arXiv:1711.00937, section 3), with the loss ‖sg[z_e] − e_k‖² + β ‖z_e − sg[e_k]‖² (eq. 3).

    A `gradient` codebook learns by the first term. The codes of an `ema` codebook follow the mean of the
    encoder's vectors that they replace (appendix A.1), so its loss is only the second term. Its buffers are
    running averages of the sum of each code's vectors (`total`) and of their number (`usage`). Both are
    fractions of the global batch, so they depend neither on the number of vectors nor on that of
    processes."""

    embedding: Tensor
    total: Tensor
    usage: Tensor
    started: Tensor
    # sides of the scales in the codes [B, T] of images; empty: codes are [B, h, w]
    scales: tuple[slice, ...] = ()

    def __init__(self, options: CodebookOptions):
        super().__init__()
        self.options = options
        codes = options.codes
        embedding = self._normal(torch.randn(codes, options.dim))
        if options.codebook == "ema":
            self.register_buffer("embedding", embedding)
            self.register_buffer("total", embedding / codes)
        else:
            self.register_parameter("embedding", nn.Parameter(embedding))
        self.register_buffer("usage", torch.full((codes,), 1 / codes))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, z: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """z_q with a straight-through gradient, and the loss with values to log. Training updates the
        codes."""
        z, codes, e = self.nearest(z)
        loss = self.options.beta * F.mse_loss(z, e.detach())
        if self.options.codebook == "gradient":
            loss = loss + F.mse_loss(e, z.detach())
        return z + (e - z).detach(), {"loss": loss, **self.learn(z.detach(), codes, noise)}

    def learn(self, z: Tensor, codes: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Values to log on the use of `codes`. In training, moves the codes to the vectors z that they
        replace."""
        share = ranks.mean_over_ranks(self._count(codes), self)
        if self.training:
            self._update(z, codes, share, noise)
        perplexity = (-torch.special.xlogy(share, share).sum()).exp()
        return {"perplexity": perplexity, "dead": self._dead().to(share.dtype).mean()}

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, dim, h, w], its codes [B, h, w] int64 and their vectors [B, dim, h, w], in full precision."""
        z = self._normal(to_fp32(z), dim=1)
        codes = self.index(z)
        return z, codes, self.lookup(codes)

    def index(self, z: Tensor) -> Tensor:
        """The codes [B, …] of the vectors nearest to z [B, dim, …]."""
        with full_fp32(z.device):  # TF32 could decide a near tie differently in another pass
            places = z.detach().movedim(1, -1)  # [B, h, w, dim]
            e = self._normal(self.embedding.detach())  # [codes, dim]
            square, parts = e.square().sum(1), places.flatten(0, -2).split(max(1, DISTANCES // len(e)))
            # ‖z − e‖² without ‖z‖², which all codes share
            codes = torch.cat([(square - 2 * part @ e.mT).argmin(1) for part in parts])
        return codes.view(places.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        return self._normal(F.embedding(codes, self.embedding)).movedim(-1, 1)

    @torch.no_grad()
    def init_codes(self, z: Tensor, noise: Noise) -> None:
        """Moves all codes to vectors of the first batch. This happens only once, so a resume changes
        nothing."""
        self._restart(~self.started.expand_as(self.usage), self._normal(to_fp32(z), dim=1), noise)
        self.started.fill_(True)

    def _normal(self, t: Tensor, dim: int = -1) -> Tensor:
        return F.normalize(t, dim=dim) if self.options.cosine else t

    def _count(self, codes: Tensor) -> Tensor:
        ones = self.usage.new_full((codes.numel(),), 1 / codes.numel())
        return torch.zeros_like(self.usage).index_add_(0, codes.flatten(), ones)

    def _dead(self) -> Tensor:
        return self.usage < DEAD / len(self.usage)

    @torch.no_grad()
    def _update(self, z: Tensor, codes: Tensor, share: Tensor, noise: Noise) -> None:
        self.usage.lerp_(share, 1 - self.options.decay)
        if self.options.codebook == "ema":
            vectors = z.movedim(1, -1).flatten(0, -2).to(self.total)
            sums = torch.zeros_like(self.total).index_add_(0, codes.flatten(), vectors) / len(vectors)
            self.total.lerp_(ranks.mean_over_ranks(sums, self), 1 - self.options.decay)
            n = self.usage.sum()
            smoothed = (self.usage + LAPLACE_EPS) / (n + len(self.usage) * LAPLACE_EPS) * n
            self.embedding.copy_(self._normal(self.total / smoothed[:, None]))
        if self.options.restart:
            self._restart(self._dead(), z, noise)

    def _restart(self, selected: Tensor, z: Tensor, noise: Noise) -> None:
        """Moves the `selected` codes, bool [codes], to vectors drawn from the global batch z."""
        # always drawn, so that the host need not wait for the device
        z = z.movedim(1, -1).flatten(1, 2)  # [B, h · w, dim]
        u, z = noise.rand(*z.shape[:2]).flatten(), z.flatten(0, 1)
        count = min(len(selected), len(z))
        # the first vectors of the global batch are among the first of each rank
        first = u.topk(count).indices
        u, z = ranks.rows(u[first], self), ranks.rows(z[first], self)
        z = z[u.topk(min(len(selected), len(z))).indices].to(self.embedding)
        z = z[(selected.cumsum(0) - 1).clamp(min=0) % len(z)]  # the i-th of these codes gets the i-th vector
        share = REBORN / len(selected)
        self.usage.masked_fill_(selected, share)
        self.embedding.data.copy_(torch.where(selected[:, None], z, self.embedding))
        if self.options.codebook == "ema":
            self.total.copy_(torch.where(selected[:, None], z * share, self.total))


class FiniteScalar(Codebook):
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505): f(z) = tanh((z − m) / s) of each
    number is rounded to the nearest of L values, the midpoints of L equal parts of (−1, 1). The
    straight-through gradient is that of f. The values are fixed, so there is no loss. The code of digits k_i
    is Σ_i k_i Π_{j<i} L_j.

    In the paper, for odd L the parts at both ends of (−1, 1) are half as wide, and there are no m and s, the
    running mean and standard deviation of vectors. Without these, the vectors of a new encoder share one
    code, or drift into the flat tails of tanh, and small encoders stay there."""

    mean: Tensor  # m [dim, 1, 1]
    std: Tensor  # s [dim, 1, 1]
    levels: Tensor  # [dim]
    radix: Tensor  # [dim], Π_{j<i} L_j

    def __init__(self, options: CodebookOptions):
        at_least(2, **{"model.levels": min(options.levels)})
        codes, dim = math.prod(options.levels), len(options.levels)
        fixed = replace(options, codes=codes, dim=dim, codebook="ema", beta=0.0, restart=False, cosine=False)
        super().__init__(fixed)
        del self.total
        self.register_buffer("mean", torch.zeros(dim, 1, 1))
        self.register_buffer("std", torch.ones(dim, 1, 1))
        levels = torch.tensor(options.levels)
        radix = levels.cumprod(0) // levels
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", radix, persistent=False)
        digits = torch.arange(codes)[:, None] // radix % levels
        self.embedding.copy_((2 * digits + 1) / levels - 1)

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The continuous codes f(z), their indices and their vectors."""
        z = torch.tanh((to_fp32(z) - self.mean) / self.std)
        codes = self.index(z)
        return z, codes, self.lookup(codes)

    def index(self, z: Tensor) -> Tensor:
        digits = ((z.detach().movedim(1, -1) + 1) / 2 * self.levels).long()
        return (digits.minimum(self.levels - 1) * self.radix).sum(-1)  # f(z) may be rounded to 1

    def forward(self, z: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.track(z, TRACKED)
        return super().forward(z, noise)

    def init_codes(self, z: Tensor, noise: Noise) -> None:
        """Sets the mean and the standard deviation, once."""
        self.track(z, (~self.started).to(self.mean))
        self.started.fill_(True)

    @torch.no_grad()
    def track(self, z: Tensor, weight: Tensor | float) -> None:
        """Moves the mean and the standard deviation towards those of z by `weight`."""
        z = to_fp32(z).movedim(1, 0).flatten(1)[..., None]  # [dim, B · h · w, 1]
        mean = ranks.mean_over_ranks(z.mean(1, keepdim=True), self)
        std = (
            ranks.mean_over_ranks((z - mean).square().mean(1, keepdim=True), self)
            .sqrt()
            .clamp_min(LAPLACE_EPS)
        )
        self.mean.copy_(torch.lerp(self.mean, mean.to(self.mean), weight))
        self.std.copy_(torch.lerp(self.std, std.to(self.std), weight))

    @torch.no_grad()
    def _update(self, z: Tensor, codes: Tensor, share: Tensor, noise: Noise) -> None:
        self.usage.lerp_(share, 1 - self.options.decay)


MAX_CODES_PER_SIDE = 16  # the most codes along a side by default


def default_halvings(shape: tuple[int, ...]) -> int:
    """The number of times that the sides of images (C, H, W) are halved: twice, or more until neither side
    has more than MAX_CODES_PER_SIDE codes."""
    return max(2, math.ceil(math.log2(max(shape[1:]) / MAX_CODES_PER_SIDE)))


class Tokenizer(Model):
    """`encoder` [B, C, H, W] → [B, dim, h, w], `codebook`, `decoder` → [B, C, H, W]; the grid is h × w.

    A tokenizer is the first stage of a prior (`transformer`, `maskgit`, or of several scales `var`). Its own
    samples draw every code independently by its frequency in training, so they have colours and strokes but
    no composition. An `ema` codebook is an average already; averaged weights (`train.ema`) with a longer
    memory do not match it.
    """

    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        grid: tuple[int, int],
        encoder: nn.Module,
        codebook: Codebook,
        decoder: nn.Module,
    ):
        super().__init__(data)
        self.grid, self.codes, scales = grid, len(codebook.usage), codebook.scales
        self.shape = (scales[-1].stop,) if scales else grid  # shape of an image's codes
        self.encoder, self.codebook, self.decoder = encoder, codebook, decoder

    @torch.no_grad()
    def on_start(self, batch: Batch) -> None:
        self.codebook.init_codes(self.encoder(batch.x), batch.noise)

    def encode(self, x: Tensor) -> Tensor:
        """The codes of images x [B, C, H, W]: int64 [B, *shape]."""
        return self.codebook.nearest(self.encoder(x))[1]

    def decode(self, codes: Tensor) -> Tensor:
        """The images [B, C, H, W] in [-1, 1] of codes [B, *shape]."""
        return within(to_fp32(self.decoder(self.codebook.lookup(codes))))

    def to_latent(self, x: Tensor) -> Tensor:
        """The encoder's vectors [B, dim, h, w], before the codebook."""
        return to_fp32(self.encoder(x))

    def from_latent(self, z: Tensor) -> Tensor:
        """The images of vectors, decoded from their nearest codes."""
        return self.decode(self.codebook.nearest(z)[1])

    @torch.no_grad()
    def sample(self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress) -> Tensor:
        """Draws n images [n, C, H, W] from codes that are drawn by their frequencies in training."""
        u = noise.rand(n, *self.shape)
        x = self.decode(draw(self.codebook.usage.expand(*u.shape, -1), u))
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress) -> Applied:
        """Encodes and decodes x."""
        x = self.decode(self.encode(x))
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",))

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖² [B], the error of reconstructions."""
        return (x - self.decode(self.encode(x))).square().flatten(1).sum(1)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel, averaged over the channels: [B, H, W]."""
        return (x - self.decode(self.encode(x))).abs().mean(1)

    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖z_e − e_k‖² [B], the distance of the encoder's vectors to their codes, summed over the grid."""
        z, _, e = self.codebook.nearest(self.encoder(x))
        return (z - e).square().flatten(1).sum(1)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of held-out images, with values in [0, 1].

        mse: mean squared error of reconstructions.
        perplexity: perplexity of the codes.
        """
        figures = Figures(self)
        for batch in batches:
            figures.add(batch.x)
        return figures.as_dict()


class Figures:
    """Running sums of a tokenizer's reconstruction errors and code frequencies."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.error, self.pixels = 0.0, 0
        self.usage = torch.zeros(tokenizer.codes, dtype=torch.float64)

    def add(self, x: Tensor) -> Tensor:
        """Adds the images x [B, C, H, W]; returns their codes [B, *shape]."""
        codes = self.tokenizer.encode(x)
        self.error += float((0.5 * (x - self.tokenizer.decode(codes))).square().sum())
        self.pixels += x.numel()
        self.usage += codes.flatten().bincount(minlength=len(self.usage)).cpu()
        return codes

    @property
    def entropy(self) -> float:
        """The entropy of a single code, in nats."""
        p = self.usage / self.usage.sum()
        return -float(torch.special.xlogy(p, p).sum())

    def as_dict(self) -> dict[str, float]:
        return {"mse": self.error / self.pixels, "perplexity": math.exp(self.entropy)}


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Indices [...] drawn in proportion to weights [..., K], by inversion at u [...] in [0, 1)."""
    cdf = to_fp32(weights).cumsum(-1)
    u = u.clamp(max=1 - 1e-6)  # so that u · cdf[-1] stays below cdf[-1] when rounded
    return (cdf <= (u * cdf[..., -1])[..., None]).sum(-1)
