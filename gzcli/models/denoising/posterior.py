"""Denoising given what is known of an image, some pixels or means of blocks: E[x_0 | x_t, y] by the first two
moments of x_0 given x_t.

    Cov[x_0 | x_t] = (σ²/α) ∂x̂_0/∂x_t
    x̂_0 + Cov Aᵀ (A Cov Aᵀ + σ_y² I)⁻¹ (y − A x̂_0),   y = A x_0 is known

Rozet et al. 2024, "Learning Diffusion Priors from Observations by Expectation Maximization",
arXiv:2405.13712, section 4. It is exact for Gaussian data; RePaint, which replaces estimated pixels by known
ones, is not. A file of its own, as an estimator that is tested against a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gzcli.models.denoising.process import Level
from gzcli.models.denoising.samplers import Denoise, Estimate

SIGMA_Y = 0.05  # σ_y: the error of the network's estimates, in place of noise of what is known


@dataclass(frozen=True)
class Measurement:
    """A linear map A of images.

    of: A x.
    back: Aᵀ y, of the shape of images.
    fill: A⁺ y, the least image with A A⁺ y = y.
    """

    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    fill: Callable[[Tensor], Tensor]


def pixels(mask: Tensor) -> Measurement:
    """The pixels where the mask [B, 1, H, W] is 1; the others are 0."""

    def masked(x: Tensor) -> Tensor:
        return mask * x

    return Measurement(masked, masked, masked)


def means(by: int) -> Measurement:
    """The means of blocks of by × by pixels: images [B, C, H / by, W / by]."""

    def spread(y: Tensor) -> Tensor:
        return F.interpolate(y, scale_factor=by, mode="nearest")

    return Measurement(lambda x: F.avg_pool2d(x, by), lambda y: spread(y) / by**2, spread)


def conditioned(
    denoise: Denoise,
    level: Callable[[float], Level],
    y: Tensor,
    measurement: Measurement,
    *,
    iterations: int,
    into_range: Callable[[Tensor], Tensor],
) -> Denoise:
    """The denoiser of images x_0 of which y = A x_0 is known: a call of the network and iterations + 1 of its
    gradient.

    denoise: the unconditioned denoiser, without clipping, which has no gradient.
    level: α and σ at a time.
    measurement: A.
    iterations: of conjugate gradients, for each image's inverse.
    into_range: clamps estimates of x_0.
    """

    def estimates(x: Tensor, t: float) -> Estimate:
        _, alpha, sigma = level(t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            x0 = denoise(x, t)[0]

            def covariance(v: Tensor) -> Tensor:
                return sigma**2 / alpha * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

            mean = x0.detach()

            def matrix(v: Tensor) -> Tensor:
                return measurement.of(covariance(measurement.back(v))) + SIGMA_Y**2 * v

            scaled = conjugate_gradients(matrix, y - measurement.of(mean), iterations)
            mean = into_range(mean + covariance(measurement.back(scaled)))
        x, x0 = x.detach(), mean + measurement.fill(y - measurement.of(mean))
        return Estimate(x0, (x - alpha * x0) / sigma)

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
