"""Discretised logistics (Salimans et al. 2017, PixelCNN++, arXiv:1701.05517, sections 2.1 and 2.2).

Grey level k of L lies at x = 2k / (L − 1) − 1; its bin is x ± 1 / (L − 1), and the first and the last bin
extend to ∓∞, so that the masses of the L levels sum to 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn.common import from_levels, to_fp32, to_levels

LOG_SCALE = (-7.0, 7.0)  # at e^-7, a quarter of a bin of 256 levels, nearly all mass is in one bin already


def logistic_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log P(level of x) under a logistic (eq. 2), elementwise; no digits cancel in its tails."""
    # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)), and the width a − b of a bin depends on the scale alone
    half, inv_scale = 1 / (levels - 1), torch.exp(-log_scale)
    centre = (x - mean) * inv_scale
    width = 2 * half * inv_scale
    first, last = x < half - 1, x > 1 - half
    above = F.logsigmoid(centre + width / 2).masked_fill(last, 0.0)
    below = F.logsigmoid(width / 2 - centre).masked_fill(first, 0.0)
    return above + below + torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)


class LogisticMixture:
    """A mixture over whole pixels of C channels. Its components are discretised logistics of R, of G given R,
    and of B given R and G (eq. 3): the mean of channel c is μ_c + Σ_{d<c} coef_cd x_d. Two levels need
    neither mixture nor scale: then P(x_c = 1) = σ(μ_c + Σ_{d<c} coef_cd x_d).

    `size` parameters describe a pixel: M mixture logits, then [2 C + C (C − 1) / 2, M] means, log scales and
    raw coefficients; for two levels, means and coefficients alone. A draw takes `uniforms` numbers a pixel.
    """

    def __init__(self, channels: int, levels: int, components: int):
        self.levels, self.components = levels, components
        self.parts = [channels, channels, channels * (channels - 1) // 2]  # means, log scales, coefficients
        self.size = channels + self.parts[2] if levels == 2 else components * (1 + sum(self.parts))
        self.uniforms = channels + 1

    @torch.no_grad()
    def start(self, bias: Tensor) -> None:
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
        """Pixels [..., C] in [-1, 1] by inversion at u [..., C + 1] in [0, 1): the component by the first,
        then channel by channel; the temperature divides the logits and multiplies the scales."""
        logits, mean, log_scale, coef = self._unpack(to_fp32(params))
        share = (logits / temperature).softmax(-1).cumsum(-1)[..., :-1]
        m = (share <= u[..., :1]).sum(-1)[..., None, None]  # [..., 1, 1]
        mean, log_scale, coef = (p.gather(-1, m.expand(*p.shape[:-1], 1)) for p in (mean, log_scale, coef))
        x = torch.zeros_like(u[..., 1:])
        for c in range(x.shape[-1]):
            noise = u[..., c + 1, None].logit()  # a standard logistic draw
            value = self._mean(c, mean, coef, x) + temperature * log_scale[..., c, :].exp() * noise
            x[..., c] = from_levels(to_levels(value[..., 0], self.levels), self.levels)
        return x

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixture logits [..., M]; means, log scales and coefficients [..., ·, M]."""
        if self.levels == 2:
            mean, coef = params[..., None].split(self.parts[1:], -2)
            return torch.zeros_like(mean[..., 0, :]), mean, torch.zeros_like(mean), coef
        logits, rest = params.split([self.components, self.size - self.components], -1)
        mean, log_scale, coef = rest.unflatten(-1, (-1, self.components)).split(self.parts, -2)
        return logits, mean, log_scale.clamp(*LOG_SCALE), coef.tanh()

    @staticmethod
    def _mean(c: int, mean: Tensor, coef: Tensor, x: Tensor) -> Tensor:
        """The components' means of channel c given the channels before it, [..., M]."""
        of_c = coef[..., c * (c - 1) // 2 : c * (c + 1) // 2, :]
        return mean[..., c, :] + (of_c * x[..., :c, None]).sum(-2)
