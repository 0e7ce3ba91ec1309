"""Distributions of pixels over grey levels.

Grey level k of L is at x = 2k / (L − 1) − 1; its bin is x ± 1 / (L − 1). The first and the last bin extend to
∓∞, so that the masses of the L levels sum to 1 and −log p is in nats of the discrete image (Salimans et al.
2017, PixelCNN++, arXiv:1701.05517, sections 2.1 and 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.models.nn import at_least, on_levels, to_fp32, within

# at e^-7, a quarter of a bin of 256 levels, nearly all mass is in one bin already
LOG_SCALE, MIXTURE_LOG_SCALE = (-7.0, 3.0), (-7.0, 7.0)
SMALLEST_UNIFORM = 2**-25  # below all uniform numbers but 0, whose logit is infinite


def logistic_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log P(level of x) under a logistic (eq. 2), elementwise; no digits cancel in its tails."""
    # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)), and the width a − b of a bin depends on the scale alone
    half_bin, inv_scale = 1 / (levels - 1), torch.exp(-log_scale)
    centre = (x - mean) * inv_scale
    width = 2 * half_bin * inv_scale
    first, last = x < half_bin - 1, x > 1 - half_bin
    above = F.logsigmoid(centre + width / 2).masked_fill(last, 0.0)
    below = F.logsigmoid(width / 2 - centre).masked_fill(first, 0.0)
    return above + below + torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)


def gaussian_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log P(level of x) under a Gaussian, integrated over the level's bin, elementwise."""
    half_bin, inv_scale = 1 / (levels - 1), torch.exp(-log_scale)
    below, above = (x - mean - half_bin) * inv_scale, (x - mean + half_bin) * inv_scale
    first, last = x < half_bin - 1, x > 1 - half_bin
    log_below, log_above = torch.special.log_ndtr(below), torch.special.log_ndtr(above)
    # an inner bin on the right of the mean is mirrored to the left, where the logarithms keep their digits
    right = (below + above > 0) & ~first & ~last
    hi = torch.where(right, torch.special.log_ndtr(-below), log_above)
    lo = torch.where(right, torch.special.log_ndtr(-above), log_below)
    inner = hi + torch.log(-torch.expm1(-(hi - lo).clamp_min(1e-12)))
    return torch.where(first, log_above, torch.where(last, torch.special.log_ndtr(-below), inner))


LOG_MASS = {"gaussian": gaussian_log_mass, "logistic": logistic_log_mass}
QUANTILE_FUNCTIONS = {"gaussian": torch.special.ndtri, "logistic": torch.logit}
PixelKind = Literal["auto", "bernoulli", "gaussian", "logistic", "mixture"]


class Pixels:
    """p(x | z) for independent pixels, whose parameters are a decoder's output [B, size, H, W]. Raises
    UsageError if `kind` is incompatible with the levels (None: latents).

    A draw takes `uniforms` numbers per pixel. `init_bias` sets the bias [size] of the decoder's last layer if
    the usual initialisation is unsuitable.
    """

    init_bias: Callable[[Tensor], None] | None = None

    def __init__(self, kind: str, levels: int | None, channels: int = 1):
        if kind == "auto":
            kind = "gaussian" if levels is None else "bernoulli" if levels == 2 else "logistic"
        if kind == "bernoulli" and levels != 2:
            raise UsageError(
                f"`model.pixels: bernoulli` needs images of 2 grey levels, but these have {levels or 'none'}",
                hint=advice(
                    "binarise them with {}, or use {} for any number of levels",
                    setting("data.levels", 2),
                    setting("model.pixels", "logistic"),
                ),
            )
        self.kind, self.levels = kind, levels
        self.size, self.uniforms = channels * (1 if kind == "bernoulli" else 2), channels

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """log p(x | out) of images x [B, C, H, W] in nats, summed over pixels, [B], fp32."""
        out = to_fp32(out)
        if self.kind == "bernoulli":
            return -F.binary_cross_entropy_with_logits(out, (x + 1) / 2, reduction="none").flatten(1).sum(1)
        mean, log_scale = self.mean_scale(out)
        if self.levels is None:
            eps = (x - mean) * torch.exp(-log_scale)
            log_p = -0.5 * (eps**2 + math.log(2 * math.pi)) - log_scale
        else:
            log_p = LOG_MASS[self.kind](x, mean, log_scale, self.levels)
        return log_p.flatten(1).sum(1)

    def mean_scale(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The locations and log scales, [B, C, H, W] each."""
        mean, log_scale = out.chunk(2, dim=1)
        return mean, log_scale.clamp(*LOG_SCALE)

    def mean(self, out: Tensor) -> Tensor:
        """The locations of the pixels, [B, C, H, W] in [-1, 1] (latents: unbounded)."""
        out = to_fp32(out)
        if self.kind == "bernoulli":
            return torch.tanh(out / 2)  # 2 sigmoid(out) − 1
        mean, _ = self.mean_scale(out)
        return mean if self.levels is None else within(mean)

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        """Pixels [B, C, H, W] drawn by the inverse distribution function at u, uniform [B, C, H, W]."""
        out = to_fp32(out)
        u = u.clamp(1e-6, 1 - 1e-6)
        if self.kind == "bernoulli":
            return (u < torch.sigmoid(out)).to(out.dtype) * 2 - 1
        mean, log_scale = self.mean_scale(out)
        x = mean + QUANTILE_FUNCTIONS[self.kind](u) * torch.exp(log_scale)
        return x if self.levels is None else on_levels(x, self.levels)


class LogisticMixture:
    """A mixture over whole pixels of C channels: discretised logistics of R, of G given R, and of B given R
    and G (eq. 3). The mean of channel c is μ_c + Σ_{d<c} coef_cd x_d. For two levels, P(x_c = 1) is the
    sigmoid of that mean.

    `size` parameters describe a pixel: M mixture logits, then [2 C + C (C − 1) / 2, M] means, log scales and
    raw coefficients; for two levels, only means and coefficients. A draw takes `uniforms` numbers per pixel.
    """

    def __init__(self, channels: int, levels: int, components: int):
        self.levels, self.components = levels, components
        self.parts = [channels, channels, channels * (channels - 1) // 2]  # means, log scales, coefficients
        self.size = channels + self.parts[2] if levels == 2 else components * (1 + sum(self.parts))
        self.uniforms = channels + 1

    @torch.no_grad()
    def init_bias(self, bias: Tensor) -> None:
        """Sets `bias` [size] so that the components start spread evenly over the range of grey."""
        nn.init.zeros_(bias)
        if self.levels > 2:
            mean, log_scale, _ = bias[self.components :].view(-1, self.components).split(self.parts)
            mean.copy_((2 * torch.arange(self.components) + 1) / self.components - 1)
            log_scale.fill_(-math.log(self.components))

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p of the pixels x [..., C] in [-1, 1] given params [..., size]: [...] nats."""
        logits, mean, log_scale, coef = self._unpack(to_fp32(params))
        mean = torch.stack([self._mean(c, mean, coef, x) for c in range(x.shape[-1])], -2)
        log_mass = logistic_log_mass(x[..., None], mean, log_scale, self.levels).sum(-2)
        return (logits.log_softmax(-1) + log_mass).logsumexp(-1)

    def draw(self, params: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        """Pixels [..., C] in [-1, 1], drawn by inversion at u [..., C + 1] in [0, 1). The first number
        determines the component, the others the channels. The temperature divides the logits and multiplies
        the scales."""
        logits, mean, log_scale, coef = self._unpack(to_fp32(params))
        share = (logits / temperature).softmax(-1).cumsum(-1)[..., :-1]
        m = (share <= u[..., :1]).sum(-1)[..., None, None]  # [..., 1, 1]
        mean, log_scale, coef = (p.gather(-1, m.expand(*p.shape[:-1], 1)) for p in (mean, log_scale, coef))
        x = torch.zeros_like(u[..., 1:])
        for c in range(x.shape[-1]):
            noise = u[..., c + 1, None].logit(SMALLEST_UNIFORM)  # a standard logistic draw
            value = self._mean(c, mean, coef, x) + temperature * log_scale[..., c, :].exp() * noise
            x[..., c] = on_levels(value[..., 0], self.levels)
        return x

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixture logits [..., M]; means, log scales and coefficients [..., ·, M]."""
        if self.levels == 2:
            mean, coef = params[..., None].split(self.parts[1:], -2)
            return torch.zeros_like(mean[..., 0, :]), mean, torch.zeros_like(mean), coef
        logits, raw = params.split([self.components, self.size - self.components], -1)
        mean, log_scale, coef = raw.unflatten(-1, (-1, self.components)).split(self.parts, -2)
        return logits, mean, log_scale.clamp(*MIXTURE_LOG_SCALE), coef.tanh()

    @staticmethod
    def _mean(c: int, mean: Tensor, coef: Tensor, x: Tensor) -> Tensor:
        """The components' means of channel c given the channels before it, [..., M]."""
        of_c = coef[..., c * (c - 1) // 2 : c * (c + 1) // 2, :]
        return mean[..., c, :] + (of_c * x[..., :c, None]).sum(-2)


class MixturePixels:
    """`Pixels` for a `LogisticMixture`."""

    def __init__(self, channels: int, levels: int, components: int):
        self.mixture = mixture = LogisticMixture(channels, levels, components)
        self.size, self.uniforms, self.init_bias = mixture.size, mixture.uniforms, mixture.init_bias

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        return self.mixture.log_prob(out.movedim(1, -1), x.movedim(1, -1)).flatten(1).sum(1)

    def draw(self, out: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        return self.mixture.draw(out.movedim(1, -1), u.movedim(1, -1), temperature).movedim(-1, 1)

    def mean(self, out: Tensor) -> Tensor:
        """The location of each pixel's most probable component, [B, C, H, W], which is a draw at temperature
        0."""
        shape = len(out), self.mixture.uniforms, *out.shape[2:]
        return self.draw(out, out.new_full(shape, 0.5, dtype=torch.float32), temperature=1e-4)


def distribution(kind: str, channels: int, levels: int | None, components: int) -> Pixels | MixturePixels:
    """The distribution for the option `pixels`: over whole pixels for `mixture`, otherwise over each channel.
    Raises UsageError for a distribution over grey levels if there are none, as for latents."""
    at_least(1, **{"model.mixture": components})
    if levels is None and kind in ("mixture", "logistic"):
        message = f"`model.pixels: {kind}` needs grey levels, which latents do not have"
        raise UsageError(message, hint="use `gaussian`")
    if levels is not None and kind == "mixture":
        return MixturePixels(channels, levels, components)
    return Pixels(kind, levels, channels)
