"""Denoising given some pixels: E[x_0 | x_t, known pixels] by the first two moments of x_0 given x_t.

    Cov[x_0 | x_t] = (σ²/α) ∂x̂_0/∂x_t
    x̂_0 + Cov Mᵀ (M Cov Mᵀ + σ_y² I)⁻¹ (y − M x̂_0),   M selects the known pixels y

Rozet et al. 2024, "Learning Diffusion Priors from Observations by Expectation Maximization",
arXiv:2405.13712, section 4. It is exact for Gaussian data; RePaint, which replaces estimated pixels by known
ones, is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gzcli.models.denoising.samplers import Denoise
from gzcli.models.denoising.schedule import Level

SIGMA_Y = 0.05  # σ_y: the error of the network's estimates, in place of noise of the known pixels


def conditioned(
    denoise: Denoise,
    level: Callable[[float], Level],
    known: Tensor,
    mask: Tensor,
    *,
    iterations: int,
    into_range: Callable[[Tensor], Tensor],
) -> Denoise:
    """The denoiser of images some of whose pixels are known.

    It calls the network once and its gradient iterations + 1 times.

    denoise: the unconditioned denoiser, without clipping, which has no gradient.
    level: α and σ at a time.
    known: images [B, C, H, W] with the known pixels.
    mask: [B, 1, H, W], 1 where a pixel is known.
    iterations: of conjugate gradients, for each image's inverse.
    into_range: clamps estimates of x_0.
    """

    def estimates(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        _, alpha, sigma = level(t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            x0 = denoise(x, t)[0]

            def covariance(v: Tensor) -> Tensor:
                return sigma**2 / alpha * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

            found = x0.detach()
            error = mask * (known - found)
            scaled = conjugate_gradients(lambda v: mask * covariance(v) + SIGMA_Y**2 * v, error, iterations)
            found = found + covariance(scaled)
        x, x0 = x.detach(), torch.lerp(into_range(found), known, mask)
        return x0, (x - alpha * x0) / sigma

    return estimates


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The solution x of matrix(x) = b for each row of the batch, from 0 (Hestenes & Stiefel 1952).

    A network's matrix need not be positive definite; a row takes no step in a direction of negative
    curvature.
    """
    x, r, p = torch.zeros_like(b), b, b
    rr = _dot(r, r)
    for _ in range(iterations):
        ahead = matrix(p)
        curvature = _dot(p, ahead)
        step = torch.where(curvature > 0, rr / curvature.clamp(min=1e-30), 0.0)
        x, r = x + step * p, r - step * ahead
        before, rr = rr, _dot(r, r)
        p = r + (rr / before.clamp(min=1e-30)) * p
    return x


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """The dot product of each row, [B, 1, 1, 1]."""
    return (u * v).sum((1, 2, 3), keepdim=True)
