"""What the tests of image flows share: models, images, the truth by autograd and quadrature."""

import itertools
import math

import pytest
import torch
from draws import noise
from torch.autograd.functional import jacobian

from gzcli.core.types import Batch, BatchNoise, Noise
from gzcli.models.nn import from_levels
from gzcli.models.normalizing_flow.base import ImageFlow

DIGITS = tuple("0123456789")


def roughen(model: torch.nn.Module, size: float = 0.2, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter off its start, where zero-initialised nets hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=g).to(p.dtype))
    return model


def images(n: int, shape=(1, 8, 8), levels=256, seed=0) -> torch.Tensor:
    k = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return from_levels(k, levels)


def batch(x: torch.Tensor, y: torch.Tensor | None = None, seed: int = 0) -> Batch:
    return Batch(x, y, torch.arange(len(x)), BatchNoise(seed, 0, "main", total=len(x)))


def log_det_by_autograd(f, x: torch.Tensor) -> torch.Tensor:
    """log |det ∂f/∂x| of each image of x, f mapping one image [1, …] to as many numbers."""
    jacobians = (jacobian(lambda t: f(t[None]).flatten(), one).flatten(1) for one in x)
    return torch.stack([torch.linalg.slogdet(each)[1] for each in jacobians])


def check_bijection(model: ImageFlow, shape=(1, 8, 8)) -> None:
    """The flow (of this image shape) inverts and has the log-det of its Jacobian."""
    model.double()
    v = 0.05 + 0.9 * torch.rand(1, *shape, dtype=torch.float64)
    z, log_det = model.encode(v)
    flat = lambda t: torch.cat([e.flatten(1) for e in model.encode(t)[0]], 1)  # noqa: E731
    torch.testing.assert_close(log_det, log_det_by_autograd(flat, v))
    torch.testing.assert_close(model.decode(z), v)
    model.float()
    torch.testing.assert_close(model.decode(model.encode(v.float())[0]), v.float(), atol=1e-4, rtol=0)


class Midpoints(Noise):
    """Dequantisation noise on a grid of 7⁴ cells, the same for each image: [images · 7⁴, 1, 2, 2]."""

    CELLS = 7**4

    def rand(self, *shape):
        grid = torch.cartesian_prod(*[(torch.arange(7) + 0.5) / 7] * 4).view(-1, 1, 2, 2)
        return grid.repeat(shape[0] // self.CELLS, 1, 1, 1)


def check_probabilities(model: ImageFlow) -> None:
    """On all 81 images of 2×2 pixels and 3 levels: p(k) by quadrature sums to 1 and is the frequency of k."""
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    x, n = from_levels(every, 3), 100_000
    with torch.no_grad():
        model.top[1] -= 1.0  # narrow enough that all mass but a percent lies in the image range
        log_p = model.log_prob(x.repeat_interleave(Midpoints.CELLS, 0), noise=Midpoints())
        p = log_p.view(81, -1).exp().mean(1)
        labels = torch.arange(n) % len(model.data.classes) if model.conditional else None
        mean, log_std = model.top_prior(labels, n)
        eps = [torch.randn(n, *shape) for shape in model.shapes]
        v = model.decode([*eps[:-1], mean + eps[-1] * log_std.exp()])
    inside = ((v >= 0) & (v < 1)).flatten(1).all(1)
    index = ((v[inside] * 3).floor().long().flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    frequency = torch.bincount(index, minlength=81) / n
    assert p.sum().item() == pytest.approx(1, abs=0.01)
    assert (p - frequency).abs().sum() / 2 < 0.02  # total variation


def check_log_prob(model: ImageFlow, x: torch.Tensor) -> None:
    """log_prob of one image, uniformly dequantised, is the density by autograd − D log levels."""
    levels = model.data.levels
    v = ((x + 1) * (levels - 1) / 2 + noise(1).rand(*x.shape).to(x)) / levels
    mean, log_std = model.top

    def standard(t):
        *eps, top = model.encode(t)[0]
        return torch.cat([e.flatten(1) for e in [*eps, (top - mean) * (-log_std).exp()]], 1)

    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(standard(v)).sum(1)
    expected = log_normal + log_det_by_autograd(standard, v) - x.numel() * math.log(levels)
    torch.testing.assert_close(model.log_prob(x, noise=noise(1)), expected)


class FixedNoise(Noise):
    """One draw, which is what a test says."""

    def __init__(self, value: torch.Tensor):
        self.value = value

    def rand(self, *shape: int) -> torch.Tensor:
        return self.value.view(shape)

    randn = rand
