"""Couplings through the CDF of a mixture of logistics (Flow++, Ho 2019, §3.2), and that CDF's inverse.

y = logit F(x), F(x) = Σ_k π_k σ((x − μ_k) / s_k), is monotone and onto the reals. Everything is computed from
log F and log (1 − F), each a logsumexp, so that no tail rounds to 0 or 1 and no log is taken of a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.nn.common import to_fp32

MIN_LOG_SCALE = -7.0  # the least log scale of a component, as in the paper's code
# iterations of the inverse; 2,000 random mixtures of 32 logistics, of scales from e^-7 on, took 32 at most
ITERATIONS = 40


@dataclass
class LogisticMixture:
    """A mixture of K logistics for each value of x [B, …]; its parameters are [B, K, …]."""

    log_pi: Tensor
    mean: Tensor
    log_scale: Tensor

    @classmethod
    def of(cls, logits: Tensor, mean: Tensor, log_scale: Tensor) -> LogisticMixture:
        return cls(logits.log_softmax(1), mean, log_scale.clamp_min(MIN_LOG_SCALE))

    def logit_cdf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = logit F(x) and log dy/dx = log f − log F − log (1 − F), f = F' the density
        (eq. 14)."""
        z = (x[:, None] - self.mean) * (-self.log_scale).exp()
        log_sigmoid = F.logsigmoid(z)
        below = self.log_pi + log_sigmoid  # log π_k σ(z_k)
        above = below - z  # log π_k σ(−z_k)
        density = above + log_sigmoid - self.log_scale  # log of π_k σ(z_k) σ(−z_k) / s_k
        log_cdf, log_tail = below.logsumexp(1), above.logsumexp(1)
        return log_cdf - log_tail, density.logsumexp(1) - log_cdf - log_tail

    def inverse_logit_cdf(self, y: Tensor) -> Tensor:
        """x with logit F(x) = y, by Newton's method inside a bracket, with bisection where a step leaves it.

        The solution for component k alone is x_k = μ_k + s_k y; that of the mixture lies between the least
        and the largest x_k. The number of iterations is fixed, so that the host reads nothing from the
        device. The x of the least error is returned.
        """
        each = self.mean + self.log_scale.exp() * y[:, None]
        low, high = each.amin(1), each.amax(1)
        x = best = (low + high) / 2
        least, step = torch.full_like(y, torch.inf), high - low
        for _ in range(ITERATIONS):
            value, log_slope = self.logit_cdf(x)
            error = value - y
            closer = error.abs() < least
            best, least = torch.where(closer, x, best), torch.where(closer, error.abs(), least)
            low, high = torch.where(error < 0, x, low), torch.where(error > 0, x, high)
            newton = x - error * (-log_slope).exp()
            # bisection also where Newton's step is more than half of the previous one
            good = (newton > low) & (newton < high) & ((newton - x).abs() < step / 2)
            after = torch.where(good, newton, (low + high) / 2)
            x, step = after, (after - x).abs()
        return best


class MixLogisticCoupling(nn.Module):
    """y₁ = x₁, y₂ = logit F(x₂) · exp(a) + b with a, b and the mixture F of K = `components` from x₁ (eq.
    13–16).

    a is bounded by tanh, as in the paper's code. The means are relative to points spread over [−2, 2], so
    that the components of a network near zero differ.

    net: maps x₁ and a context to [B, (2 + 3K) · C₂, H, W].
    components: number of logistics K.
    """

    start: Tensor

    def __init__(self, net: nn.Module, components: int):
        super().__init__()
        self.net = net
        middle = (components - 1) / 2
        start = 2 * (torch.arange(components) - middle) / max(middle, 1)
        self.register_buffer("start", start[:, None, None, None], persistent=False)

    def parameters_of(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, LogisticMixture]:
        """a and b, each [B, C₂, H, W], and the mixture."""
        K = len(self.start)
        h = to_fp32(self.net(x1, context)).unflatten(1, (2 + 3 * K, -1))
        logits, mean, log_scale = h[:, 2:].split(K, 1)
        return h[:, 0].tanh(), h[:, 1], LogisticMixture.of(logits, mean + self.start, log_scale)

    def forward(self, x1: Tensor, x2: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y₂ and log |det ∂y₂/∂x₂| [B]."""
        a, b, mixture = self.parameters_of(x1, context)
        y, log_slope = mixture.logit_cdf(x2)
        return y * a.exp() + b, (a + log_slope).flatten(1).sum(1)

    def inverse(self, x1: Tensor, y2: Tensor, context: Tensor | None = None) -> Tensor:
        a, b, mixture = self.parameters_of(x1, context)
        return mixture.inverse_logit_cdf((y2 - b) * (-a).exp())
