"""A correlated Gaussian of images, whose completion is known."""

import math

import torch
from draws import noise
from torch import Tensor, nn

from gzcli.models.denoising.denoiser import LikelihoodOptions


class GaussianField:
    """Images [1, 4, 4] ~ N(mean, C), of deviation .5 and correlations that fall by e in three pixels."""

    def __init__(self):
        draw = torch.Generator().manual_seed(1)
        place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).double()
        self.covariance = 0.25 * torch.exp(-torch.cdist(place, place) / 3)
        self.mean = 0.2 * torch.randn(16, generator=draw, dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)
        root = torch.linalg.cholesky(self.covariance)
        self.one = (self.mean + root @ torch.randn(16, generator=draw, dtype=torch.float64)).view(1, 1, 4, 4)

    def halved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An image, the mask that shows its upper half, mean and covariance of the lower one given that."""
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        mask[:, :, :2] = 1
        gain = self.covariance[8:, :8] @ torch.linalg.inv(self.covariance[:8, :8])
        mean = self.mean[8:] + gain @ (self.one.flatten()[:8] - self.mean[:8])
        return self.one, mask, mean, self.covariance[8:, 8:] - gain @ self.covariance[:8, 8:]

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x]."""
        pull = alpha * self.values / (alpha**2 * self.values + sigma**2)
        off = (x.flatten(1) - alpha * self.mean) @ self.vectors * pull
        return (self.mean + off @ self.vectors.T).view_as(x)

    def velocity_net(self) -> nn.Module:
        """The velocity x_1 − x_0 of a flow to it, of a whole batch at one time in thousandths."""
        field = self

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.device, self.calls = nn.Parameter(torch.zeros(())), 0

            def forward(self, x, t, y=None, drop=None):
                self.calls += 1
                time = float(t[0]) / 1000
                return (field.denoised(x, time, 1 - time) - x) / (1 - time)

        return Net()


def check_moments(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Means within a tenth of a deviation, variances along all axes of the covariance within a tenth."""
    assert ((samples.mean(0) - mean).abs() / covariance.diag().sqrt()).max() < 0.1
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (samples - mean).T, upper=False)
    assert 0.9 < white.var(1).mean() < 1.1


def check_likelihood(model: nn.Module, mean: Tensor, std: float, *, n: int, **options) -> None:
    """Of a model of N(mean, std²): within .02 nats a dimension, image by image."""
    x = mean + std * torch.randn(n, *mean.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        value = model.log_prob(x, noise=noise(n), ode=LikelihoodOptions(**options))
    y = x + 2 / 255 * (noise(n).rand(n, *mean.shape).double() - 0.5)
    log_p = torch.distributions.Normal(mean, std).log_prob(y).flatten(1).mean(1) + math.log(2 / 255)
    gap = value / mean.numel() - log_p
    assert abs(float(gap.mean())) < 0.01 and gap.abs().max() < 0.05
