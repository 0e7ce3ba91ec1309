"""PresGAN: the chains on targets with known moments, and the entropy's gradient where p(x) is Gaussian."""

import math

import draws
import pytest
import torch
from draws import noise
from torch import nn

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models.gan.presgan import PresGAN, hmc_step, leapfrog

INFO = DataInfo((1, 16, 16), 17, tuple("0123456789"))


def gaussian(mean: torch.Tensor, std: torch.Tensor):
    return lambda z: 0.5 * ((z - mean) / std).square().sum(1)


def test_leapfrog_is_of_second_order_and_chains_have_the_moments_of_a_gaussian():
    target = gaussian(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double())
    z, p = torch.randn(64, 2).double(), torch.randn(64, 2).double()
    errors = []
    for eps in (0.1, 0.05, 0.025):
        end, momentum, before, after = leapfrog(target, z, p, eps, round(1 / eps))
        errors.append((after - before).abs().mean())
        back, turned, *_ = leapfrog(target, end, -momentum, eps, round(1 / eps))
        torch.testing.assert_close(back, z)
        torch.testing.assert_close(turned, -p)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 1.0, 2.0])
    z, rates, samples = torch.zeros(500, 3), [], []
    for i in range(150):
        z, accept = hmc_step(gaussian(mean, std), z, 0.45, 4, BatchNoise(0, i, total=500))
        rates.append(accept.mean())
        if i >= 50:
            samples.append(z)
    samples = torch.cat(samples)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0), std, atol=0, rtol=0.03)
    assert 0.5 < torch.stack(rates).mean() < 0.99, "the step is large enough for refusals to matter"
    z, accept = hmc_step(lambda z: z.pow(4).sum(1), torch.full((4, 2), 3.0), 50.0, 10, BatchNoise(0, total=4))
    assert torch.equal(z, torch.full((4, 2), 3.0)) and not accept.any()


class Linear(nn.Module):
    """x = W z + b as images."""

    def __init__(self, w: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, z, y=None):
        return (z @ self.w.T + self.b).view(-1, 1, 8, 8)


def linear(scale: float, **options) -> PresGAN:
    torch.manual_seed(0)
    model = PresGAN.of(DataInfo((1, 8, 8), None), latent=3, width=4, sigma=0.3, sigma_max=0.5, **options)
    model.generator = Linear(scale * torch.randn(64, 3), 0.1 * torch.randn(64))
    return model


def test_gradients_of_density_and_entropy_of_a_linear_generator():
    """p(x) = N(b, WWᵀ + σ²I), whose score is −Σ⁻¹ (x − b): the chains' mean must find it."""
    model, n = linear(0.25, burn_in=30, draws=400, leapfrog=8).eval(), 4
    model.step_size.fill_(0.1)
    w, b, sigma = model.generator.w.detach(), model.generator.b.detach(), model.sigma().detach()
    z = torch.randn(n, 3)
    x = model.generator(z).detach() + sigma * torch.randn(n, 1, 8, 8)
    gradient, rate = model.density_gradient(x, z, None, BatchNoise(0, total=n))
    exact = -torch.linalg.solve(w @ w.T + sigma.flatten().square().diag(), (x.flatten(1) - b).T).T
    assert 0.6 < rate < 1.0
    torch.testing.assert_close(gradient.flatten(1), exact, atol=0.12 * exact.abs().max().item(), rtol=0)
    # h of a Gaussian is ½ log det(2πe Σ): autograd's gradient by the weights against the chains'
    model, n = linear(0.06, burn_in=3, draws=5, leapfrog=5, entropy=1.0, spectral=False), 16384
    for p in model.critic.parameters():
        nn.init.zeros_(p)  # the adversarial part is constant
    model.step_size.fill_(0.1)
    batch = draws.batch(torch.zeros(n, 1, 8, 8))
    model.eval()
    w, log_sigma = model.generator.w, model.log_sigma
    loss = model.generator_loss(batch, batch.noise.randn(n, 3), None)["loss"]
    gradients = torch.autograd.grad(loss, [w, log_sigma])
    covariance = w @ w.T + (2 * log_sigma.flatten()).exp().diag()
    exact = torch.autograd.grad(-0.5 * torch.logdet(2 * math.pi * math.e * covariance), [w, log_sigma])
    for one, want in zip(gradients, exact, strict=True):
        cosine = torch.cosine_similarity(one.flatten(), want.flatten(), dim=0)
        assert cosine > 0.97 and 0.85 < one.norm() / want.norm() < 1.15


def test_the_step_size_finds_the_acceptance_asked_for():
    info = DataInfo((1, 8, 8), 17)
    model, rates = PresGAN.of(info, width=4, latent=4, accept=0.7, burn_in=1, draws=1, leapfrog=3).train(), []
    x = torch.rand(16, *info.shape) * 2 - 1
    for step in range(220):
        batch = Batch(x, None, torch.arange(16), BatchNoise(0, step, "generator", total=16))
        with torch.no_grad():
            rates.append(model.loss(batch, "generator")["accept"])
    assert torch.stack(rates[120:]).mean() == pytest.approx(0.7, abs=0.05)


def test_sigma_stays_within_its_bounds_and_is_on_both_sides():
    model = PresGAN.of(INFO, width=4, latent=4, sigma_min=0.05, sigma_max=0.2).eval()
    nn.init.uniform_(model.log_sigma, -9, 3)
    assert float(model.sigma().min()) == pytest.approx(0.05)
    assert float(model.sigma().max()) == pytest.approx(0.2)
    draw = lambda **o: model.sample(64, noise=noise(64), progress=no_progress, **o).detach()  # noqa: E731
    residual = draw(mean=False) - draw()
    torch.testing.assert_close(residual.std(0).mean(), model.sigma().mean().detach(), rtol=0.1, atol=0)
    torch.manual_seed(0)
    model, seen = PresGAN.of(INFO, width=4, latent=4, sigma=0.2, spectral=False), []
    model.critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x = torch.zeros(64, *INFO.shape)
    nn.init.zeros_(model.generator.ups[-1].weight), nn.init.zeros_(model.generator.ups[-1].bias)
    model.loss(draws.batch(x), "critic")
    real, fake = seen[0].chunk(2)
    assert real.std() == pytest.approx(0.2, rel=0.05) and fake.std() == pytest.approx(0.2, rel=0.05)
    assert not torch.equal(real, fake)
