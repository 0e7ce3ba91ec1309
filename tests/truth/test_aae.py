"""AAE and CVAE: what is theirs alone."""

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, no_progress
from gzcli.models.vae.aae import AAE
from gzcli.models.vae.cvae import CVAE

INFO = DataInfo((1, 16, 16), 2, tuple("0123456789"))


def batch(n: int = 16, step: int = 0) -> Batch:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(n, *INFO.shape, generator=g) < 0.3).float() * 2 - 1
    return Batch(x, torch.arange(n) % 10, torch.arange(n), BatchNoise(0, step, "main", total=n))


@pytest.mark.parametrize("posterior", ["deterministic", "gaussian"])
def test_losses_are_the_papers(posterior):
    torch.manual_seed(0)
    model = AAE.of(INFO, net="mlp", hidden=(32,), latent=4, posterior=posterior, disc_hidden=(16,))
    b = batch()
    eps, prior = b.noise.randn(16, 4), b.noise.randn(16, 4)
    b = batch()
    out = model.encoder(b.x)
    z = out if posterior == "deterministic" else out[:, :4] + (0.5 * out[:, 4:]).exp() * eps
    d = lambda z: model.discriminator(z).squeeze(1).sigmoid()  # noqa: E731
    recon = (b.x - torch.tanh(model.decoder(z))).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(model.loss(batch(), "autoencoder")["loss"], recon - 10 * d(z).log().mean())
    expected = -(d(prior).log().mean() + (1 - d(z)).log().mean())
    torch.testing.assert_close(model.loss(batch(), "discriminator")["loss"], expected)


def test_the_discriminator_makes_codes_gaussian():
    """Of two clusters far from the origin, with an encoder free to move them."""
    torch.manual_seed(0)
    model = AAE.of(INFO, net="mlp", hidden=(64,), latent=2, disc_hidden=(64, 64))
    torch.nn.init.constant_(model.encoder.net[-1].bias, 4.0)
    optimizers = {p.name: torch.optim.Adam(p.parameters(), lr=2e-3, betas=(0.5, 0.9)) for p in model.phases()}
    source = torch.randn(256, *INFO.shape).sign()
    for step in range(400):
        for name in ("discriminator", "autoencoder"):
            b = Batch(source, None, torch.arange(256), BatchNoise(0, step, name, total=256))
            model.zero_grad()
            model.loss(b, name)["loss"].backward()
            optimizers[name].step()
    z = model.encode(source)
    assert z.mean(0).abs().max() < 0.6 and 0.5 < z.std(0).mean() < 1.5


def test_label_in_label_out():
    """A cvae of ten different pictures, one a class, draws the class it is asked for."""
    torch.manual_seed(0)
    model = CVAE.of(INFO, net="mlp", hidden=(64,), latent=2, label_dropout=0.0)
    means = torch.rand(10, *INFO.shape, generator=torch.Generator().manual_seed(1)).round() * 0.9 + 0.05
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        y = torch.arange(60) % 10
        x = Bernoulli(means[y]).sample() * 2 - 1
        optimizer.zero_grad()
        model.loss(Batch(x, y, torch.arange(60), BatchNoise(0, step, total=60)))["loss"].backward()
        optimizer.step()
    y = torch.arange(40) % 10
    out = model.eval().sample(40, labels=y, noise=ImageNoise(0, range(40)), progress=no_progress)
    nearest = (out[:, None] - (2 * means - 1)).flatten(2).square().sum(2).argmin(1)
    assert (nearest == y).float().mean() >= 0.95


def test_elbo_measures_and_labels():
    torch.manual_seed(0)
    model, b = CVAE.of(INFO, net="mlp", hidden=(32,), latent=4).eval(), batch()
    with torch.no_grad():
        bounds = [model.log_prob(b.x, b.y, noise=ImageNoise(0, range(16)), k=k).mean() for k in (1, 10, 100)]
    assert bounds[0] < bounds[1] < bounds[2]
    torch.manual_seed(0)
    model, b = AAE.of(INFO, net="mlp", hidden=(32,), latent=4, conditional=True).eval(), batch()
    z = model.encode(b.x)
    each = torch.stack([model.distance(b.x, model.decode(z, torch.full((16,), k))) for k in range(10)], 1)
    torch.testing.assert_close(model.score_recon(b.x, noise=ImageNoise(0, range(16))), each.min(1).values)


def test_measure_says_recon_kl_units_and_bound():
    torch.manual_seed(0)
    model = CVAE.of(INFO, net="mlp", hidden=(32,), latent=4).eval()
    with torch.no_grad():
        found = model.measure([batch(), batch(step=1)])
        mu, logvar = model.encode(batch().x, model.labels(batch().y, 16))
    prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
    kl = kl_divergence(torch.distributions.Normal(mu, (0.5 * logvar).exp()), prior).sum(1).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert found["active_units"] == int((mu.var(0) > 0.01).sum())
    assert found["iwae100"] <= found["recon"] + found["kl"]
