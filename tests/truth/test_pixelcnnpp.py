"""PixelCNN++'s discretised mixture against integration, torch.distributions and frequencies."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_autoregressive import every_image, images
from torch import distributions as D

from gzcli.core.types import BatchNoise
from gzcli.models.nn.pixels import LogisticMixture, logistic_log_mass


def params(mixture, *shape, scale=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, mixture.size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "levels"), [(1, 2), (1, 3), (1, 17), (1, 256), (2, 5), (3, 2), (3, 3), (3, 8)]
)
def test_masses_of_all_pixels_sum_to_one(channels, levels):
    mixture = LogisticMixture(channels, levels, 4)
    x = every_image((channels,), levels)
    for scale in (0.1, 2.0, 8.0):
        log_prob = mixture.log_prob(params(mixture, 20, 1, scale=scale), x)  # [20, pixels]
        assert torch.allclose(log_prob.exp().sum(1), torch.ones(20).double(), atol=1e-13, rtol=0)
    assert log_prob.exp().max() > 0.5


@pytest.mark.parametrize("levels", [3, 17, 256])
@pytest.mark.parametrize("log_scale", [-2.5, 0.0, 1.5])
def test_the_mass_of_a_level_is_the_integral_over_its_bin(levels, log_scale):
    """By Gauss–Legendre quadrature, for the first and the last level out to 50 scales."""
    node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
    x, s = every_image((1,), levels)[:, 0], math.exp(log_scale)
    for mean in torch.tensor([-1.3, -0.2, 0.4, 0.999], dtype=torch.float64):
        edges = torch.cat([x - 1 / (levels - 1), x[-1:] + 1 / (levels - 1)])
        edges[0], edges[-1] = mean - 50 * s - 3, mean + 50 * s + 3
        t = torch.linspace(0, 1, 301, dtype=torch.float64)
        pieces = torch.lerp(edges[:-1, None], edges[1:, None], t)  # [levels, 301]
        half, middle = pieces.diff()[..., None] / 2, (pieces[:, 1:] + pieces[:, :-1])[..., None] / 2
        z = (middle + half * node - mean) / s
        mass = (torch.sigmoid(z) * torch.sigmoid(-z) / s * weight * half).sum((1, 2))
        value = logistic_log_mass(x, mean, torch.tensor(log_scale).double(), levels).exp()
        assert torch.allclose(value, mass, atol=1e-15, rtol=1e-7), mean


def test_log_prob_is_that_of_torch_distributions():
    """Components by logistic distribution functions: μ_g + a r, μ_b + b r + c g, at known places."""
    levels, M = 8, 3
    mixture = LogisticMixture(3, levels, M)
    theta = params(mixture, 50)
    x = images(50, (3,), levels)
    logits, rest = theta[:, :M], theta[:, M:].view(50, 9, M)
    mu, log_s, (a, b, c) = rest[:, :3], rest[:, 3:6], rest[:, 6:].tanh().unbind(1)
    r, g, _ = (v[:, None] for v in x.unbind(1))
    log_p = torch.zeros(50, M).double()
    for channel, mean in enumerate((mu[:, 0], mu[:, 1] + a * r, mu[:, 2] + b * r + c * g)):
        logistic = D.TransformedDistribution(
            D.Uniform(torch.zeros_like(mean), torch.ones_like(mean)),
            [D.SigmoidTransform().inv, D.AffineTransform(mean, log_s[:, channel].exp())],
        )
        v = x[:, channel, None].expand(-1, M)
        above = torch.where(v > 0.99, torch.ones_like(mean), logistic.cdf(v + 1 / 7))
        below = torch.where(v < -0.99, torch.zeros_like(mean), logistic.cdf(v - 1 / 7))
        log_p += (above - below).log()
    expected = (D.Categorical(logits=logits).logits + log_p).logsumexp(1)
    assert torch.allclose(mixture.log_prob(theta, x), expected, atol=1e-10)
    mixture = LogisticMixture(3, 2, 10)
    theta, x = params(mixture, 64), images(64, (3,), 2)
    assert mixture.size == 6
    (r, g, _), (mu_r, mu_g, mu_b, a, b, c) = x.unbind(1), theta.unbind(1)
    logits = torch.stack([mu_r, mu_g + a * r, mu_b + b * r + c * g], 1)
    expected = D.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum(1)
    assert torch.allclose(mixture.log_prob(theta, x), expected)
    assert LogisticMixture(1, 2, 10).size == 1


def test_extreme_parameters_keep_log_prob_and_gradients_finite_and_fp32_near_fp64():
    mixture = LogisticMixture(3, 256, 5)
    x = images(200, (3,), 256)
    for scale in (1.0, 10.0, 60.0):
        theta = params(mixture, 200, scale=scale)
        exact, single = mixture.log_prob(theta, x), theta.float().requires_grad_()
        log_prob = mixture.log_prob(single, x.float())
        (grad,) = torch.autograd.grad(log_prob.sum(), single)
        assert grad.isfinite().all() and grad.any()
        assert torch.allclose(log_prob.double(), exact, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixture.log_prob(theta.bfloat16(), x.float()).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_components_start_side_by_side(channels):
    mixture = LogisticMixture(channels, 256, 4)
    bias = params(mixture)
    mixture.init_bias(bias)
    logits, mean, log_scale, coef = mixture._unpack(bias)
    assert not logits.any() and not coef.any() and (log_scale.exp() - 0.25).abs().max() < 1e-6
    assert torch.equal(mean.float(), torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(channels, 4))
    LogisticMixture(channels, 2, 4).init_bias(torch.zeros(channels * (channels + 1) // 2))


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (3, 2), (3, 3)])
def test_draws_have_the_frequencies_of_log_prob(channels, levels):
    mixture, n = LogisticMixture(channels, levels, 3), 50_000
    theta, pixels = params(mixture, 1, seed=3), every_image((channels,), levels)
    p = mixture.log_prob(theta, pixels).exp()
    x = mixture.draw(theta.expand(n, -1), BatchNoise(0, total=n).rand(n, channels + 1).double())
    index = (((x + 1) / 2 * (levels - 1)).round().long() * levels ** torch.arange(channels).flip(0)).sum(1)
    frequency = index.bincount(minlength=len(pixels)) / n
    assert torch.allclose(x, pixels[index], atol=1e-6)
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    lowest = mixture.draw(theta, torch.zeros(1, channels + 1).double())
    assert torch.equal(lowest, -torch.ones(1, channels).double())


def test_channels_of_a_pixel_see_those_before_them_through_the_coefficients_alone():
    mixture = LogisticMixture(3, 256, 1)
    theta = params(mixture, 1)
    for c, d in itertools.product(range(3), range(3)):
        x = images(1, (3,), 256).requires_grad_()
        for coefficients in (False, True):
            _, mean, _, coef = mixture._unpack(theta)
            made = mixture._mean(c, mean, coef * coefficients, x).sum() + 0 * x.sum()
            (grad,) = torch.autograd.grad(made, x)
            assert (grad[0, d] != 0) == (coefficients and d < c), (c, d)
