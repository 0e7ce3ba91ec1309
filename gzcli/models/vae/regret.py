"""Likelihood regret — Xiao et al. 2020, arXiv:2003.02977, eq. 5: the gain of the ELBO when the posterior is
fitted to one image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def likelihood_regret(
    elbo: Callable[[Tensor, Tensor], Tensor], mu: Tensor, logvar: Tensor, steps: int, lr: float
) -> Tensor:
    """The largest ELBO of `steps` steps of Adam, minus the first, [B]. It is never negative.

    The sum over the images is maximised and Adam works elementwise, so that a score does not depend on the
    batch.

    elbo: ELBO [B] of a posterior's mu and logvar, [B, latent] each.
    mu: the encoder's mean, where the search starts.
    logvar: the encoder's log variance.
    steps: steps of Adam.
    lr: learning rate of Adam.
    """
    with torch.inference_mode(False), torch.enable_grad():
        mu, logvar = (t.detach().clone().requires_grad_() for t in (mu, logvar))
        # gradients are in nats: an eps far above rounding keeps unused dimensions from a random walk
        adam = torch.optim.Adam([mu, logvar], lr=lr, eps=1e-2)
        value = elbo(mu, logvar)
        first = best = value.detach()
        for _ in range(steps):
            mu.grad, logvar.grad = torch.autograd.grad(-value.sum(), [mu, logvar])
            adam.step()
            value = elbo(mu, logvar)
            best = torch.maximum(best, value.detach())
    return best - first
