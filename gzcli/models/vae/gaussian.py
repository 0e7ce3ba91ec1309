"""Gaussians with diagonal covariance, such as the posteriors of VAEs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
