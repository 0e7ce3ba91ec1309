"""Hamiltonian Monte Carlo — Neal 2011, "MCMC using Hamiltonian dynamics", arXiv:1206.1901, section 3.

Each chain moves (z, p), p its momentum, along H = U(z) + ‖p‖²/2, U = −log of its target, by leapfrog steps.
It accepts the end with probability min(1, exp(H_start − H_end)), which corrects for the steps' error of
O(ε²).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gzcli.core.types import Noise

Potential = Callable[[Tensor], Tensor]  # z [B, D] → U [B], differentiable


def gradient(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    """U [B] and ∂U/∂z [B, D], where the U of each chain depends on its own z alone."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = potential(z)
        return u.detach(), torch.autograd.grad(u.sum(), z)[0]


def leapfrog(
    potential: Potential, z: Tensor, p: Tensor, eps: float | Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, p) after `steps` leapfrog steps of size eps (eq. 2.28 – 2.30), and H [B] before and after."""
    u, g = gradient(potential, z)
    before = u + 0.5 * p.square().sum(1)
    for _ in range(steps):
        p = p - 0.5 * eps * g
        z = z + eps * p
        u, g = gradient(potential, z)
        p = p - 0.5 * eps * g
    return z, p, before, u + 0.5 * p.square().sum(1)


def hmc_step(
    potential: Potential, z: Tensor, eps: float | Tensor, steps: int, noise: Noise
) -> tuple[Tensor, Tensor]:
    """The next states [B, D] of the chains, and the acceptance probabilities [B] of their proposals."""
    p, u = noise.randn(*z.shape), noise.rand(len(z))
    proposal, _, before, after = leapfrog(potential, z, p, eps, steps)
    # a diverged trajectory has a NaN or infinite energy: its probability is 0
    accept = (before - after).clamp(max=0).exp().nan_to_num(0.0)
    return torch.where((u < accept)[:, None], proposal, z), accept
