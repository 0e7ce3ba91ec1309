"""Distributions of pixels over discrete grey levels, with a decoder's outputs as parameters, so that −log p
is in nats of the discrete image.

Grey level k of L lies at x = 2k/(L−1) − 1; its bin is x ± 1/(L−1), and the first and the last bin extend to
∓∞ (Salimans 2017, PixelCNN++, arXiv:1701.05517, section 2.1). So the masses of the L levels sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.models.nn.common import from_levels, to_fp32, to_levels
from gzcli.models.nn.logistic import logistic_log_mass

Kind = Literal["bernoulli", "gaussian", "logistic"]
LOG_SCALE = (-7.0, 3.0)  # at e^-7, a quarter of a bin of 256 levels, nearly all mass is in one bin already


class PixelDistribution(Protocol):
    """p(x | z), whose parameters are a decoder's output [B, size, H, W]; a draw takes `uniforms` numbers a
    pixel. `start` sets the bias [size] of the decoder's last layer; None: it stays as layers start."""

    size: int
    uniforms: int
    start: Callable[[Tensor], None] | None

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor: ...

    def mean(self, out: Tensor) -> Tensor: ...

    def draw(self, out: Tensor, u: Tensor) -> Tensor: ...


class Pixels:
    """The distribution p(x | z) of independent pixels.

    Raises UsageError where `kind` does not fit the levels.

    kind: the distribution; auto: bernoulli for 2 levels, gaussian for latents, otherwise logistic.
    levels: number of grey levels; None for latents.
    channels: channels of an image.
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
