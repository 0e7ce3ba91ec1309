"""The VAE's mathematics against enumeration, Monte Carlo and torch.distributions."""

import itertools
import math

import pytest
import torch
from draws import batch, fitted, noise, squares
from torch import nn
from torch.distributions import Normal, kl_divergence

from gzcli.core.types import BatchNoise, DataInfo, no_progress
from gzcli.models.nn import from_levels
from gzcli.models.nn.perceptual import gaussian_window, ms_ssim, ssim_parts
from gzcli.models.nn.pixels import Pixels
from gzcli.models.vae.aae import AAE
from gzcli.models.vae.base import NetOptions, kl_normal, log_normal
from gzcli.models.vae.vae import VAE

DIGITS = DataInfo((1, 16, 16), 17, tuple("0123456789"))


@pytest.fixture(scope="module")
def trained() -> VAE:
    torch.manual_seed(0)
    model, x = VAE.of(DIGITS, net="mlp", hidden=(64,), latent=4), squares(256, DIGITS)
    fitted(model, lambda step: batch(x, step), 150, 3e-3)
    return model.eval()


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_masses_of_all_levels_sum_to_one(kind, levels):
    x = from_levels(torch.arange(levels), levels).view(-1, 1, 1, 1)
    for mean, log_scale in itertools.product((-1.3, -1.0, -0.21, 0.004, 1.0, 2.5), (-7.0, -2.0, 1.0)):
        out = torch.tensor([mean, log_scale]).view(1, 2, 1, 1).repeat(levels, 1, 1, 1).requires_grad_()
        log_p = Pixels(kind, levels).log_prob(x, out)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-4), (mean, log_scale)
        (gradient,) = torch.autograd.grad(log_p.sum(), out)
        assert torch.isfinite(gradient).all(), (mean, log_scale)


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
def test_masses_are_differences_of_the_distribution_function(kind):
    levels, mean, log_scale = 17, 0.1, -1.5
    x = from_levels(torch.arange(levels), levels)
    edges = nn.functional.pad(x[:-1] + 1 / (levels - 1), (1, 1), value=torch.inf).double()
    edges[0] = -torch.inf
    standard = (edges - mean) / math.exp(log_scale)
    cdf = torch.sigmoid(standard) if kind == "logistic" else torch.special.ndtr(standard)
    out = torch.tensor([mean, log_scale]).view(1, 2, 1, 1).expand(levels, -1, -1, -1)
    log_p = Pixels(kind, levels).log_prob(x.view(-1, 1, 1, 1), out)
    torch.testing.assert_close(log_p.double(), cdf.diff().log(), rtol=1e-4, atol=1e-5)


def test_what_models_start_as():
    assert Pixels("auto", 2).kind == "bernoulli" and Pixels("auto", 256).kind == "logistic"
    x, out = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2), torch.tensor([0.3, -2.0]).view(1, 1, 1, 2)
    expected = math.log(1 - out[..., 0].sigmoid()) + math.log(out[..., 1].sigmoid())
    assert Pixels("auto", 2).log_prob(x, out).item() == pytest.approx(expected, rel=1e-5)
    for net in ("mlp", "conv"):
        model = VAE.of(DataInfo((1, 8, 8)), net=net, latent=2, pixels="mixture", mixture=4)
        *_, last = (m for m in model.decoder.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d))
        means = last.bias.detach().view(model.pixels.size, -1)[4:8]  # after the logits of the four components
        torch.testing.assert_close(means[:, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
        assert (means == means[:, :1]).all(), "the same for all pixels"
    widths = lambda *shape: NetOptions(width=8).widths(shape)  # noqa: E731
    assert widths(1, 16, 16) == (8, 16) and widths(3, 32, 48) == (8, 16, 32, 32)
    assert widths(3, 3, 3) == (8,) and NetOptions(net="mlp").widths((1, 16, 16)) == (512, 512)
    model = VAE.of(DataInfo((1, 28, 28), 2), net="mlp", hidden=(400,), latent=20)
    layers = (784 * 400 + 400) + (400 * 40 + 40) + (20 * 400 + 400) + (400 * 784 + 784)
    assert sum(p.numel() for p in model.parameters()) == layers


@pytest.mark.parametrize(("kind", "levels"), [("bernoulli", 2), ("logistic", 5), ("gaussian", 5)])
def test_drawn_pixels_follow_the_masses(kind, levels):
    pixels, n = Pixels(kind, levels), 20_000
    row = torch.tensor([0.3, -1.0][: pixels.size]).view(1, -1, 1, 1)
    u = torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    drawn = pixels.draw(row.expand(n, -1, -1, -1), u)
    x = from_levels(torch.arange(levels), levels)
    frequencies = torch.stack([(drawn - value).abs().lt(1e-3).float().mean() for value in x])
    expected = pixels.log_prob(x.view(-1, 1, 1, 1), row.expand(levels, -1, -1, -1)).exp()
    torch.testing.assert_close(frequencies, expected, atol=0.012, rtol=0)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_a_mixture_is_a_distribution_over_whole_pixels(net):
    """The masses of all images of one pixel with three channels of three levels."""
    model = VAE.of(DataInfo((3, 1, 1), 3), net=net, latent=2, pixels="mixture", mixture=2).eval()
    out = model.decoder(torch.randn(1, 2)).expand(27, -1, -1, -1)
    x = from_levels(torch.cartesian_prod(*[torch.arange(3)] * 3), 3).view(27, 3, 1, 1)
    masses = model.pixels.log_prob(x, out).exp()
    torch.testing.assert_close(masses.sum(), torch.tensor(1.0))
    drawn = model.sample(4, noise=noise(4), progress=no_progress, mean=False)
    assert (drawn[:, None] - x).abs().amax((2, 3, 4)).amin(1).max() < 1e-6, "images of these levels"


def test_kl_against_torch_and_monte_carlo():
    g = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)
    kl = kl_normal(mu, logvar)
    torch.testing.assert_close(kl, kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum(1))
    z = mu + (0.5 * logvar).exp() * torch.randn(100_000, 5, 3, generator=g)
    sampled = (log_normal(z, mu, logvar) - log_normal(z)).mean(0)
    torch.testing.assert_close(sampled, kl, rtol=0.02, atol=0.02)


def test_iwae_reaches_the_exact_marginal_of_a_linear_gaussian_model():
    """Probabilistic PCA (Tipping 1999): x = Wz + b + σε, so p(x) = N(b, WWᵀ + σ²I) and q may be exact."""
    info = DataInfo((1, 2, 3), None)
    torch.manual_seed(0)
    model = VAE.of(info, net="mlp", hidden=(4,), latent=2).eval()
    w, b, log_s = torch.randn(6, 2), torch.randn(6), -0.4
    model.decoder, scale = nn.Module(), lambda z: torch.full((len(z), 1, 2, 3), log_s)
    model.decoder.forward = lambda z, e=None: torch.cat([(z @ w.T + b).view(-1, 1, 2, 3), scale(z)], 1)
    x = torch.randn(32, 1, 2, 3)
    s2 = math.exp(2 * log_s)
    exact = torch.distributions.MultivariateNormal(b, w @ w.T + s2 * torch.eye(6)).log_prob(x.flatten(1))
    # a q that is off: the prior, with the bound far below; IWAE closes the gap
    model.encoder = torch.nn.Module()
    model.encoder.forward = lambda x, e=None: torch.zeros(len(x), 4)
    elbo, iwae = (model.log_prob(x, noise=noise(32), k=k) for k in (1, 4096))
    assert (exact - elbo).mean() > 1
    torch.testing.assert_close(iwae.mean(), exact.mean(), atol=0.1, rtol=0)
    with torch.no_grad():  # the regret of that q is its gap to the best Gaussian q of diagonal covariance
        regret = model.score_regret(x, noise=noise(32), steps=200, samples=64)
    precision = w.T @ w / s2 + torch.eye(2)
    posterior_mean = torch.linalg.solve(precision, w.T @ (x.flatten(1) - b).T / s2).T
    start = kl_to(torch.zeros(32, 2), torch.ones(2), posterior_mean, precision)
    best = kl_to(posterior_mean, 1 / precision.diag(), posterior_mean, precision)
    torch.testing.assert_close(regret.mean(), (start - best).mean(), rtol=0.1, atol=0)


@pytest.mark.parametrize("k", [2, 7, 50])
def test_each_weight_of_the_exact_posterior_is_the_marginal(k):
    """Of x = Wz + σε, with orthogonal columns; their mean is p(x) for any k, in bound and loss."""
    model = VAE.of(DataInfo((1, 2, 2), None), net="mlp", hidden=(4,), latent=2, iwae=k).double().eval()
    w, log_s = torch.tensor([[1.0, 1, 1, 1], [0.5, -0.5, 0.5, -0.5]], dtype=torch.float64).T, -0.4
    s2 = math.exp(2 * log_s)
    variance = s2 / (w.square().sum(0) + s2)

    def decode(z, e=None):
        x = (z @ w.T).view(-1, 1, 2, 2)
        return torch.cat([x, torch.full_like(x, log_s)], 1)

    def encode(x, e=None):
        return torch.cat([variance * (x.flatten(1) @ w) / s2, variance.log().expand(len(x), 2)], 1)

    model.encoder, model.decoder = nn.Module(), nn.Module()
    model.encoder.forward, model.decoder.forward = encode, decode
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    covariance = w @ w.T + s2 * torch.eye(4)
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(model.log_prob(x, noise=noise(16), k=k), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.loss(batch(x))["loss"], -exact.mean(), atol=1e-5, rtol=0)


def kl_to(mean, var, target, precision) -> torch.Tensor:
    """KL(N(mean, diag var) ‖ N(target, precision⁻¹)), [B]."""
    q = torch.distributions.MultivariateNormal(mean, torch.diag(var))
    return kl_divergence(q, torch.distributions.MultivariateNormal(target, precision_matrix=precision))


def test_regret_is_never_negative_and_larger_off_the_data(trained):
    inside, g = squares(16, DIGITS), torch.Generator().manual_seed(0)
    outside = torch.sign(torch.randn(16, 1, 16, 16, generator=g))
    with torch.no_grad():
        familiar, strange = (trained.score_regret(x, noise=noise(16), steps=30) for x in (inside, outside))
    assert familiar.min() >= 0 and familiar.max() > 0
    assert strange.mean() > familiar.mean()


def test_warm_up_and_importance_weights_of_the_loss():
    model, x = VAE.of(DIGITS, net="mlp", hidden=(16,), latent=4, kl_warmup=10, beta=2.0), squares(8, DIGITS)
    for step, weight in ((None, 0.0), (4, 1.0), (20, 2.0)):
        if step is not None:
            model.on_step(step)
        parts = model.train().loss(batch(x))
        torch.testing.assert_close(parts["loss"], parts["recon"] + weight * parts["kl"])
        parts = model.eval().loss(batch(x))
        torch.testing.assert_close(parts["loss"], parts["recon"] + 2.0 * parts["kl"])
    elbo = model.log_prob(x, noise=BatchNoise(0, 0, "main", total=8)).mean()
    torch.testing.assert_close(elbo, -(parts["recon"] + parts["kl"]))
    torch.manual_seed(0)
    model, x = VAE.of(DIGITS, net="mlp", hidden=(16,), latent=4, iwae=5), squares(64, DIGITS)
    losses = torch.stack([model.loss(batch(x, step))["loss"] for step in range(30)]).mean()
    bound = torch.stack([model.iwae_bound(x, noise(64, seed), 5).mean() for seed in range(30)]).mean()
    torch.testing.assert_close(losses, -bound, rtol=5e-3, atol=0)


def test_ssim_against_its_definition_of_any_size_and_in_training():
    g = torch.Generator().manual_seed(0)
    (x, y), window = torch.rand(2, 1, 1, 9, 9, generator=g), gaussian_window(7, 1.5)
    w = torch.outer(window, window)
    assert w.sum().item() == pytest.approx(1) and w.argmax().item() == 24  # heaviest in the middle
    values = []
    for i, j in itertools.product(range(3), range(3)):
        p, q = x[0, 0, i : i + 7, j : j + 7], y[0, 0, i : i + 7, j : j + 7]
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
        cov = (w * (p - mp) * (q - mq)).sum()
        values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    ssim = ssim_parts(x, y, window)[0][0, 0]
    torch.testing.assert_close(ssim, torch.stack(values).mean(), rtol=1e-4, atol=1e-5)
    g = torch.Generator().manual_seed(0)
    for size in (4, 16, 28, 32, 64, 128):
        x = torch.rand(2, 3, size, size, generator=g) * 2 - 1
        torch.testing.assert_close(ms_ssim(x, x), torch.ones(2))
        near, far = ms_ssim(x, (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(-1, 1)), ms_ssim(x, -x)
        assert (far < near).all() and (near < 1).all(), size
        y = (-x).requires_grad_()  # negative contrast to a fractional power would be NaN
        ms_ssim(x, y).sum().backward()
        assert torch.isfinite(y.grad).all(), size
    torch.manual_seed(0)
    model = VAE.of(DIGITS, net="mlp", hidden=(64,), latent=8, recon="ms_ssim", beta=0.1)
    x = squares(64, DIGITS)
    optimizer, first = torch.optim.Adam(model.parameters(), lr=3e-3), None
    for _ in range(40):
        parts = model.loss(batch(x))
        first = parts["recon"] if first is None else first
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    assert parts["recon"] < 0.7 * first
    assert first <= 256  # D·(1 − MS-SSIM)


def test_images_unlike_any_have_an_elbo_of_their_size_and_learned_ones_keep_theirs():
    """e^logvar at logvar 20 made the KL of a foreign image 10⁹ nats, and every histogram one bar."""
    info = DataInfo((1, 8, 8), 256)
    model = VAE.of(info, latent=4, hidden=(8,)).eval()
    del model.encoder
    mu, learned = torch.randn(5, 4), torch.linspace(-19, 3.9, 20).view(5, 4)
    model.encoder = lambda x, e: torch.cat([mu, learned], 1)
    assert torch.equal(model.encode(torch.zeros(5, 1, 8, 8))[1], learned), "a learned posterior is as it was"
    model.encoder = lambda x, e: torch.cat([mu, torch.full_like(mu, 160.0)], 1)
    kl = model.score_kl(torch.zeros(5, 1, 8, 8), noise=None)
    assert (kl < 200).all() and (kl > 4 * 20).all(), "finite, and still far from the prior"
    aae = AAE.of(info, latent=4, posterior="gaussian", hidden=(8,)).eval()
    del aae.encoder
    aae.encoder = lambda x: torch.cat([mu, torch.full_like(mu, 160.0)], 1)
    assert (aae.encode(torch.zeros(5, 1, 8, 8), torch.ones(5, 4)) - mu < 10).all()
