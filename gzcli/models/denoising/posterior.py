"""Denoising given some of the pixels: E[x_0 | x_t, known pixels] by Tweedie's first two moments, for any
sampler.

    Cov[x_0 | x_t] = (σ²/α) ∂x̂_0/∂x_t
    x̂_0 + Cov Mᵀ (M Cov Mᵀ + σ_y² I)⁻¹ (y − M x̂_0),   M the rows of the known pixels y

Rozet et al. 2024, "Learning Diffusion Priors from Observations by Expectation Maximization",
arXiv:2405.13712, section 4: exact for Gaussian data, where putting known pixels in place of estimated ones
(RePaint) is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gzcli.models.denoising.samplers import Denoise
from gzcli.models.denoising.schedule import Level

UNSURE = 0.05  # σ_y: the error that a network may make of a pixel that it is certain of


def given(
    denoise: Denoise,
    level: Callable[[float], Level],
    known: Tensor,
    mask: Tensor,
    *,
    iterations: int,
    into_range: Callable[[Tensor], Tensor],
) -> Denoise:
    """The denoiser of images whose pixels are `known` [B, C, H, W] where mask [B, 1, H, W] is 1.

    A call takes one of the network and iterations + 1 of its gradient.

    denoise: the denoiser of images nothing is known of, without clipping, which has no gradient.
    level: α and σ at a time.
    iterations: of conjugate gradients for the inverse, which is each image's own.
    into_range: clamps estimates of x_0.
    """

    def conditioned(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        _, alpha, sigma = level(t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            x0 = denoise(x, t)[0]

            def covariance(v: Tensor) -> Tensor:
                return sigma**2 / alpha * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

            found = x0.detach()
            error = mask * (known - found)
            found = found + covariance(
                solved(lambda v: mask * covariance(v) + UNSURE**2 * v, error, iterations)
            )
        x, x0 = x.detach(), torch.lerp(into_range(found), known, mask)
        return x0, (x - alpha * x0) / sigma

    return conditioned


def solved(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The x of matrix(x) = b for each row of the batch, by conjugate gradients from 0 (Hestenes & Stiefel
    1952). A row takes no step where its matrix is not positive, as that of a network need not be."""
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
    """[B, 1, 1, 1]."""
    return (u * v).sum((1, 2, 3), keepdim=True)
