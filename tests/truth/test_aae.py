"""AAE and CVAE: what is theirs alone."""

import draws
import pytest
import torch
from draws import fitted, noise
from torch.distributions import Bernoulli, kl_divergence

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models.vae.aae import AAE
from gzcli.models.vae.cvae import CVAE

INFO = DataInfo((1, 16, 16), 2, tuple("0123456789"))


def batch(n: int = 16, step: int = 0) -> Batch:
    x = (draws.images(n, INFO.shape) < -0.4).float() * 2 - 1
    return draws.batch(x, step, torch.arange(n) % 10)


@pytest.mark.parametrize("posterior", ["deterministic", "gaussian"])
def test_losses_are_the_papers(posterior):
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
    model = CVAE.of(INFO, net="mlp", hidden=(64,), latent=2, label_dropout=0.0)
    means = torch.rand(10, *INFO.shape, generator=torch.Generator().manual_seed(1)).round() * 0.9 + 0.05
    y = torch.arange(60) % 10
    fitted(model, lambda step: draws.batch(Bernoulli(means[y]).sample() * 2 - 1, step, y), 150, 1e-2)
    y = torch.arange(40) % 10
    out = model.eval().sample(40, labels=y, noise=noise(40), progress=no_progress)
    nearest = (out[:, None] - (2 * means - 1)).flatten(2).square().sum(2).argmin(1)
    assert (nearest == y).float().mean() >= 0.95


def test_scores_and_figures():
    model, b = AAE.of(INFO, net="mlp", hidden=(32,), latent=4, conditional=True).eval(), batch()
    z = model.encode(b.x)
    each = torch.stack([model.distance(b.x, model.decode(z, torch.full((16,), k))) for k in range(10)], 1)
    torch.testing.assert_close(model.score_recon(b.x, noise=noise(16)), each.min(1).values)
    model = CVAE.of(INFO, net="mlp", hidden=(32,), latent=4).eval()
    with torch.no_grad():
        figures = model.measure([batch(), batch(step=1)])
        mu, logvar = model.encode(b.x, model.labels(b.y, 16))
    prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
    kl = kl_divergence(torch.distributions.Normal(mu, (0.5 * logvar).exp()), prior).sum(1).mean()
    assert figures["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert figures["active_units"] == int((mu.var(0) > 0.01).sum())
    assert figures["iwae100"] <= figures["recon"] + figures["kl"]
