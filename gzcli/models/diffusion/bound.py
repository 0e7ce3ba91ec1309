"""Terms of the variational bound on a diffusion's likelihood (Ho 2020, eq. 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def strata(timesteps: int, terms: int) -> list[int]:
    """Edges, from 1 to T, of at most `terms` strata of the times 1 … T − 1, with widths that grow with t."""
    terms = min(terms, timesteps - 1)
    return [1 + max(k, round((timesteps - 1) * (k / terms) ** 2)) for k in range(terms + 1)]


def discretised_gaussian(x: Tensor, mean: Tensor, sigma: float, levels: int) -> Tensor:
    """log mass of N(mean, σ²) in the bin of each grey level x in [-1, 1]; the end bins extend to ±∞ (Ho 2020,
    eq. 13)."""
    half = 1 / (levels - 1)
    low = torch.where(x < -1 + half, -math.inf, (x - half - mean) / sigma)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) / sigma)
    flip = low + high > 0  # the upper tail is mirrored to the lower one, where log Φ is exact
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    a, b = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return b + torch.log((-torch.expm1(a - b)).clamp(min=1e-30))
