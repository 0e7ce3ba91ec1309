"""The core of the VAE family: Gaussians with diagonal covariance, distributions of pixels over grey levels,
applications of codes, and labels that training may hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.nn.common import ClassEmbedding, at_least, from_levels, to_fp32, to_levels
from gzcli.models.nn.latent import as_interpolations, interpolated, traversal
from gzcli.models.nn.logistic import LogisticMixture, logistic_log_mass

LOG_2PI = math.log(2 * math.pi)
# Bounds of a posterior's logvar. Learned posteriors are narrower than the prior, whose logvar is 0. Images
# unlike the training images can raise the logvar without limit: at 20 their KL was 10^9 nats. The upper bound
# is log sigma ≤ 2, as in the published code of soft actor-critic (Haarnoja 2018, arXiv:1812.05905).
LOGVAR = (-20.0, 4.0)


def kl_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, e^logvar) ‖ N(0, I)), summed over the last dimension (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, e^logvar), summed over the last dimension."""
    logvar = logvar.to(z) if isinstance(logvar, Tensor) else z.new_full((), logvar)
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def drawn(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Draws of N(mu, e^logvar) from standard normal eps."""
    return mu + (0.5 * logvar).exp() * eps


Kind = Literal["bernoulli", "gaussian", "logistic"]
LOG_SCALE = (-7.0, 3.0)  # at e^-7, a quarter of a bin of 256 levels, nearly all mass is in one bin already


class Pixels:
    """p(x | z) of independent pixels, whose parameters are a decoder's output [B, size, H, W]. Raises
    UsageError where `kind` does not fit the levels (None: latents).

    Grey level k of L lies at x = 2k/(L−1) − 1; its bin is x ± 1/(L−1), and the first and the last bin extend
    to ∓∞ (Salimans 2017, PixelCNN++, arXiv:1701.05517, section 2.1), so that the masses of the L levels sum
    to 1 and −log p is in nats of the discrete image. A draw takes `uniforms` numbers a pixel. `start` sets
    the bias [size] of the decoder's last layer; None: it stays as layers start.
    """

    def __init__(self, kind: Kind | Literal["auto"], levels: int | None, channels: int = 1):
        if kind == "auto":
            kind = "gaussian" if levels is None else "bernoulli" if levels == 2 else "logistic"
        if kind == "bernoulli" and levels != 2:
            raise UsageError(
                f"`model.pixels: bernoulli` needs images of 2 grey levels, these have {levels or 'none'}",
                hint="`--set data.levels=2` binarises them; `--set model.pixels=logistic` takes any number "
                "of levels",
            )
        if kind == "logistic" and levels is None:
            raise UsageError(
                "`model.pixels: logistic` needs grey levels, latents have none", hint="use `gaussian`"
            )
        self.kind: Kind = kind
        self.levels = levels
        self.size = channels * (1 if kind == "bernoulli" else 2)
        self.uniforms = channels
        self.start: Callable[[Tensor], None] | None = None

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """log p(x | out) in nats, summed over pixels, [B], fp32.

        x: images [B, C, H, W].
        out: [B, size, H, W].
        """
        out = to_fp32(out)
        if self.kind == "bernoulli":
            return -F.binary_cross_entropy_with_logits(out, (x + 1) / 2, reduction="none").flatten(1).sum(1)
        mean, log_scale = self.mean_scale(out)
        if self.levels is None:
            eps = (x - mean) * torch.exp(-log_scale)
            log_p = -0.5 * (eps**2 + math.log(2 * math.pi)) - log_scale
        else:
            log_p = LOCATION_SCALE[self.kind].log_mass(x, mean, log_scale, self.levels)
        return log_p.flatten(1).sum(1)

    def mean_scale(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and log scales, [B, C, H, W] each."""
        mean, log_scale = out.chunk(2, dim=1)
        return mean, log_scale.clamp(*LOG_SCALE)

    def mean(self, out: Tensor) -> Tensor:
        """The locations of the pixels, [B, C, H, W] in [-1, 1] (latents: unbounded)."""
        out = to_fp32(out)
        if self.kind == "bernoulli":
            return torch.tanh(out / 2)  # 2 sigmoid(out) − 1
        mean, _ = self.mean_scale(out)
        return mean if self.levels is None else mean.clamp(-1, 1)

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        """Pixels [B, C, H, W] drawn by the inverse distribution function at u, uniform [B, C, H, W]."""
        out = to_fp32(out)
        u = u.clamp(1e-6, 1 - 1e-6)
        if self.kind == "bernoulli":
            return (u < torch.sigmoid(out)).to(out.dtype) * 2 - 1
        mean, log_scale = self.mean_scale(out)
        x = mean + LOCATION_SCALE[self.kind].quantile(u) * torch.exp(log_scale)
        return x if self.levels is None else from_levels(to_levels(x.clamp(-1, 1), self.levels), self.levels)


def bin_edges(
    x: Tensor, mean: Tensor, log_scale: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised lower and upper edge of x's bin, and where the bin is the first or the last one."""
    half, inv_scale = 1 / (levels - 1), torch.exp(-log_scale)
    below, above = (x - mean - half) * inv_scale, (x - mean + half) * inv_scale
    return below, above, x < half - 1, x > 1 - half


def log1mexp(d: Tensor) -> Tensor:
    """log(1 − e^−d) for d > 0."""
    return torch.log(-torch.expm1(-d.clamp_min(1e-12)))


def gaussian_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log P(level of x) under a Gaussian, integrated over the level's bin."""
    below, above, first, last = bin_edges(x, mean, log_scale, levels)
    log_below, log_above = torch.special.log_ndtr(below), torch.special.log_ndtr(above)
    # an inner bin on the right of the mean is mirrored to the left, where the logarithms keep their digits
    right = (below + above > 0) & ~first & ~last
    hi = torch.where(right, torch.special.log_ndtr(-below), log_above)
    lo = torch.where(right, torch.special.log_ndtr(-above), log_below)
    inner = hi + log1mexp(hi - lo)
    return torch.where(first, log_above, torch.where(last, torch.special.log_ndtr(-below), inner))


class LocationScale(NamedTuple):
    """A family of distributions with a location and a scale."""

    log_mass: Callable[[Tensor, Tensor, Tensor, int], Tensor]  # of x's level, by mean, log scale and levels
    quantile: Callable[[Tensor], Tensor]  # of the standard distribution


LOCATION_SCALE: dict[str, LocationScale] = {
    "gaussian": LocationScale(gaussian_log_mass, torch.special.ndtri),
    "logistic": LocationScale(logistic_log_mass, torch.logit),
}


class MixturePixels:
    """Mixtures of discretised logistics over whole pixels. Raises UsageError for latents, which have no grey
    levels."""

    def __init__(self, channels: int, levels: int | None, components: int):
        if levels is None:
            raise UsageError(
                "`model.pixels: mixture` needs grey levels, latents have none", hint="use `gaussian`"
            )
        self.mixture = LogisticMixture(channels, levels, components)
        self.size, self.uniforms = self.mixture.size, self.mixture.uniforms
        self.start: Callable[[Tensor], None] | None = self.mixture.start

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """log p(x | out) in nats, summed over pixels: x [B, C, H, W] → [B], fp32."""
        return self.mixture.log_prob(out.movedim(1, -1), x.movedim(1, -1)).flatten(1).sum(1)

    def draw(self, out: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        """Pixels [B, C, H, W] drawn by inversion at u, uniform [B, C + 1, H, W]."""
        return self.mixture.draw(out.movedim(1, -1), u.movedim(1, -1), temperature).movedim(-1, 1)

    def mean(self, out: Tensor) -> Tensor:
        """The location of each pixel's heaviest component [B, C, H, W]: a draw at temperature 0."""
        shape = len(out), self.mixture.uniforms, *out.shape[2:]
        return self.draw(out, out.new_full(shape, 0.5, dtype=torch.float32), temperature=1e-4)


def distribution(
    kind: Kind | Literal["auto", "mixture"], channels: int, levels: int | None, components: int
) -> Pixels | MixturePixels:
    """The distribution of the option `pixels`: of whole pixels for `mixture`, else of each channel."""
    at_least(1, **{"model.mixture": components})
    return (
        MixturePixels(channels, levels, components) if kind == "mixture" else Pixels(kind, levels, channels)
    )


LABEL_SIZE = 32  # of a label's embedding


@dataclass(frozen=True)
class ConditionOptions:
    """How a model is conditioned on labels.

    conditional: whether the model is conditioned on labels.
    """

    conditional: bool = False

    def embedding(self, data: DataInfo) -> ClassEmbedding | None:
        """The embedding of the labels of `data`, None for a model without labels."""
        return ClassEmbedding(len(data.classes), LABEL_SIZE) if self.conditional else None

    @property
    def size(self) -> int:
        """The size of a label's embedding, 0 for a model without labels."""
        return LABEL_SIZE if self.conditional else 0


@dataclass(frozen=True)
class HiddenLabelOptions(ConditionOptions):
    """The same with labels that training hides at random, so that images without labels have a likelihood.

    label_dropout: share of the labels that training replaces by the null label, 0 … 1; likelihoods and scores
      without labels use the null label.
    """

    label_dropout: float = 0.1


class Autoencoder(Model):
    """A model with a code z [B, latent] of each image, which is distributed as N(0, I)."""

    def code(self, x: Tensor) -> Tensor:
        """The code of each image, without noise."""
        raise NotImplementedError

    def image(self, z: Tensor) -> Tensor:
        """The image [B, C, H, W] of each code, without a label."""
        raise NotImplementedError

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, frames: int = 8) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, … along straight lines of z.

        Raises UsageError for fewer than two images or frames.

        frames: images of an interpolation, both ends included.
        """
        x = self.image(interpolated(self.code(x), frames))
        progress(1, 1, x)
        return as_interpolations(x, frames)

    @torch.no_grad()
    def traverse(
        self, x: Tensor, *, noise: Noise, progress: Progress, dims: int = 8, frames: int = 8, span: float = 3
    ) -> Applied:
        """The first image, changed along the dimensions of z that change it most.

        dims: number of dimensions, a row for each.
        frames: images of a row.
        span: a dimension goes from −span to span, in standard deviations of the prior.
        """
        return traversal(self.image, self.code(x[:1]), dims, frames, span)


class LabelledVAE(Model):
    """A model with an ELBO that may be conditioned on labels.

    kl_warmup: steps over which the weight of the KL rises from 0 to 1.
    """

    def __init__(self, data: DataInfo, labels: HiddenLabelOptions, kl_warmup: int):
        super().__init__(data)
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout
        self.labels = labels.embedding(data)
        self.kl_warmup, self.warm = kl_warmup, 0.0 if kl_warmup else 1.0

    def embed(self, labels: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor | None:
        """The embeddings [n, LABEL_SIZE] of n labels, the null label where they are None or `drop` [n] is
        true."""
        if self.labels is None:
            return None
        if labels is None and not self.label_dropout:
            raise UsageError(
                "this model was trained without a null label, so it cannot do without labels",
                hint="train it with `--set model.label_dropout=0.1`",
            )
        return self.labels(labels, n, drop)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel, of the reconstruction at the posterior's mean, over channels: [B, H, W]."""
        return (x - self.reconstruct(x, noise=noise, progress=no_progress).images).abs().mean(1)

    def on_step(self, step: int) -> None:
        if self.kl_warmup:
            self.warm = min(1.0, (step + 1) / self.kl_warmup)
