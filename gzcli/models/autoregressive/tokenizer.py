"""The base of VQ models, which map an image to a coarse grid of codes and back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.autoregressive.codebook import Codebook
from gzcli.models.base import Model
from gzcli.models.nn import to_fp32

SIDE = 16  # the most codes along a side where a recipe does not say how often it is halved


def halved(shape: tuple[int, ...]) -> int:
    """How often a tokenizer halves the sides of images (C, H, W): twice, and more often until neither has
    more than SIDE codes, whose number is the length of a prior's sequence."""
    return max(2, math.ceil(math.log2(max(shape[1:]) / SIDE)))


class Tokenizer(Model):
    """`encoder` [B, C, H, W] → [B, dim, h, w], `codebook`, `decoder` → [B, C, H, W]; the grid is h × w.

    A tokenizer is the first stage of a prior (`transformer`, `maskgit`), which learns the joint distribution
    of codes. By itself it draws every code independently by its frequency in training, so that samples have
    colours and strokes but no composition. An `ema` codebook is an average already. Averaged weights
    (`train.ema`) with a longer memory than the codebook's `decay` do not fit it.
    """

    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        *,
        grid: tuple[int, int],
        encoder: nn.Module,
        codebook: Codebook,
        decoder: nn.Module,
    ):
        super().__init__(data)
        self.grid, self.codes = grid, len(codebook.usage)
        self.encoder, self.codebook, self.decoder = encoder, codebook, decoder

    @torch.no_grad()
    def on_start(self, batch: Batch) -> None:
        self.codebook.start(self.encoder(batch.x), batch.noise)

    def encode(self, x: Tensor) -> Tensor:
        """The codes of images x [B, C, H, W]: int64 [B, h, w]."""
        return self.codebook.nearest(self.encoder(x))[1]

    def decode(self, codes: Tensor) -> Tensor:
        """The images [B, C, H, W] in [-1, 1] of codes [B, h, w]."""
        return to_fp32(self.decoder(self.codebook.lookup(codes))).clamp(-1, 1)

    def to_latent(self, x: Tensor) -> Tensor:
        """The encoder's vectors [B, dim, h, w], before the codebook."""
        return to_fp32(self.encoder(x))

    def from_latent(self, z: Tensor) -> Tensor:
        """The images of vectors, by their nearest codes."""
        return self.decode(self.codebook.nearest(z)[1])

    @torch.no_grad()
    def sample(self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress) -> Tensor:
        """n images [n, C, H, W] of codes drawn by their frequencies in training."""
        u = noise.rand(n, *self.grid)
        x = self.decode(draw(self.codebook.usage.expand(*u.shape, -1), u))
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress) -> Applied:
        """x through its codes."""
        x = self.decode(self.encode(x))
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",))

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖² [B], the error of reconstructions."""
        return (x - self.decode(self.encode(x))).square().flatten(1).sum(1)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel, the mean over the channels: [B, H, W]."""
        return (x - self.decode(self.encode(x))).abs().mean(1)

    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖z_e − e_k‖² [B], the distance of the encoder's vectors to their codes, summed over the grid."""
        z, _, e = self.codebook.nearest(self.encoder(x))
        return (z - e).square().flatten(1).sum(1)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The `mse` of reconstructions, for images in [0, 1], and the `perplexity` of the codes."""
        figures = Figures(self)
        for batch in batches:
            figures.add(batch.x)
        return figures.found()


class Figures:
    """Running sums of a tokenizer's reconstruction error and of the use of its codes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.error, self.pixels = 0.0, 0
        self.usage = torch.zeros(tokenizer.codes, dtype=torch.float64)

    def add(self, x: Tensor) -> Tensor:
        """Adds the images x [B, C, H, W]; returns their codes [B, h, w]."""
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

    def found(self) -> dict[str, float]:
        return {"mse": self.error / self.pixels, "perplexity": math.exp(self.entropy)}


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Indices [...] by inversion of the distributions proportional to weights [..., K]; u [...] uniform on
    [0, 1).

    An index of weight 0 is never drawn.
    """
    cdf = to_fp32(weights).cumsum(-1)
    u = u.clamp(max=1 - 1e-6)  # so that u · cdf[-1] stays below cdf[-1] when rounded
    return (cdf <= (u * cdf[..., -1])[..., None]).sum(-1)
