"""The hierarchical VAE: its KL against torch.distributions, bounds, the likelihood ratio, singular values."""

import math

import pytest
import torch
from draws import batch, noise, squares
from refused import refused
from torch import nn
from torch.distributions import Normal, kl_divergence

from gzcli.core.types import BatchNoise, DataInfo, no_progress
from gzcli.models.nn import from_levels
from gzcli.models.nn.pixels import MixturePixels
from gzcli.models.vae.hvae import HVAE, NormalGroup, SpectralNorms, decoder_cell, encoder_cell
from gzcli.models.vae.ladder import Group, kl_of

INFO = DataInfo((1, 8, 8), 2, ("a", "b", "c"))
SMALL = {"channels": (8, 8, 16), "groups": (0, 2, 1), "cells": (0, 1, 1), "latent": 2}


def shaken(model: HVAE, size: float = 0.1) -> HVAE:
    """Away from its start, where many branches are near zero."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> HVAE:
    torch.manual_seed(0)
    model, x = HVAE.of(INFO, **SMALL, kl_warmup=30), squares(128, INFO)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(100):
        optimizer.zero_grad()
        model.loss(batch(x[step % 4 :: 4], step))["loss"].backward()
        optimizer.step()
        model.on_step(step)
    return model.eval()


def test_the_residual_normal_is_that_of_the_paper():
    """z ~ N(mu + Δmu, (sigma Δsigma)²), its KL and its density, from the raw outputs of the two heads."""
    group = NormalGroup(width=4, latent=3, cells=0, expand=1).double()
    h, feature, eps = (torch.randn(5, c, 2, 2, dtype=torch.float64) for c in (4, 4, 3))
    states = []
    group.join.register_forward_hook(lambda layer, inputs, output: states.append(inputs[0]))
    _, code = group(h, eps, feature)
    (z,) = states
    squash = lambda t: 5 * torch.tanh(t / 5)  # noqa: E731
    mu, log_sigma = squash(group.prior(nn.functional.silu(h))).chunk(2, 1)
    delta, log_ratio = squash(group.residual(nn.functional.silu(feature + group.combine(h)))).chunk(2, 1)
    p, q = Normal(mu, log_sigma.exp()), Normal(mu + delta, (log_sigma + log_ratio).exp())
    torch.testing.assert_close(z, q.mean + q.stddev * eps)
    torch.testing.assert_close(code.kl(), kl_divergence(q, p).flatten(1).sum(1))
    torch.testing.assert_close(code.log_ratio(), (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(1))
    group(h, eps, None)
    torch.testing.assert_close(states[1], p.mean + p.stddev * eps)


def test_kl_is_the_mean_of_the_log_ratio_and_logged_by_groups(trained):
    n = 4000  # of one image
    with torch.no_grad():
        features = [feature.expand(n, -1, -1, -1) for feature in trained.encoder(squares(1, INFO))]
        _, codes = trained.decoder(trained.draw(n, noise(n)), features)
        sampled, kl = -torch.stack([code.log_ratio() for code in codes], 1), kl_of(codes)
    error = 5 * (sampled - kl).std(0) / math.sqrt(n)
    assert ((sampled - kl).mean(0).abs() < error).all()
    assert kl.mean(0).max() > 0.5  # it has learned something to say
    x = squares(64, INFO)
    parts = trained.loss(batch(x))
    torch.testing.assert_close(parts["kl_2x2"] + parts["kl_4x4"], parts["kl"])
    assert 2 <= parts["active_groups"] <= 3
    dead = HVAE.of(INFO, **SMALL).eval()
    for module in dead.modules():
        if isinstance(module, Group):
            nn.init.zeros_(module.residual.weight), nn.init.zeros_(module.residual.bias)
    parts = dead.loss(batch(x))
    assert parts["kl"] == parts["active_groups"] == 0


def test_the_bound_reaches_the_marginal_of_a_ladder_of_gaussians():
    """With pixels that hear nothing of z, p(x) is theirs, whatever q: ratios of densities average to 1."""
    model, x = shaken(HVAE.of(INFO, **SMALL)), squares(16, INFO)
    nn.init.zeros_(model.decoder.head.weight)
    for group in (m for m in model.modules() if isinstance(m, Group)):
        group.residual.weight.data *= 0.07  # not so far from the prior that 200 draws miss it
        group.residual.bias.data *= 0.07
    logits = model.decoder.head.bias.detach().view(1, 1, 1, 1).expand(16, 1, 8, 8)
    elbo, bound = (model.log_prob(x, noise=noise(16), samples=k) for k in (1, 200))
    exact = model.pixels.log_prob(x, logits)
    assert (exact - elbo).mean() > 0.1
    torch.testing.assert_close(bound.mean(), exact.mean(), atol=0.03, rtol=0)


def test_likelihood_ratio(trained):
    x = squares(32, INFO, seed=1)
    groups = len(trained.sizes)
    with torch.no_grad():
        none, one, every = (trained.score_llr(x, noise=noise(32), k=k) for k in (0, 1, groups))
        # ELBO^(>k) by hand: all z from the prior leave the pixels' term alone
        out, codes = trained.decoder(trained.draw(32, noise(32)), [])
        elbo = trained.log_prob(x, noise=noise(32))
    assert not none.any() and one.abs().mean() > 0 and not codes
    torch.testing.assert_close(every, elbo - trained.pixels.log_prob(x, out))
    assert every.mean() > one.mean()  # z says more of x, the more of it is x's own
    for k in (-1, groups + 1):
        refused(f"`k` is {k}", trained.score_llr, x, noise=noise(32), k=k)


def test_warm_up_and_spectral_norms_are_of_training_alone():
    model, x = HVAE.of(INFO, **SMALL, kl_warmup=10, spectral=0.5), squares(8, INFO)
    for step, weight in ((None, 0.0), (4, 0.5), (20, 1.0)):
        if step is not None:
            model.on_step(step)
        parts = model.train().loss(batch(x))
        kl = parts["loss"] - parts["recon"] - 0.5 * parts["spectral"]
        if weight in (0.0, 1.0):
            torch.testing.assert_close(kl, weight * parts["kl"], rtol=1e-4, atol=1e-4)
        parts = model.eval().loss(batch(x))
        torch.testing.assert_close(parts["loss"], parts["recon"] + parts["kl"])
        assert "spectral" not in parts
    elbo = model.log_prob(x, noise=BatchNoise(0, 0, "main", total=8)).mean()
    torch.testing.assert_close(elbo, parts["elbo"])
    model = HVAE.of(INFO, **SMALL, kl_warmup=10)  # one group of 2·2·2 latents, then two of 2·4·4
    model.on_step(4)
    even = model.kl_weights(torch.tensor([7.99, 15.99, 15.99]))  # 8 latents a resolution's share; 32 / 2 each
    torch.testing.assert_close(even, torch.full((3,), 0.5))
    idle = model.kl_weights(torch.tensor([0.0, 15.99, 15.99]))
    assert idle[0] < 0.01 and idle.mean().item() == pytest.approx(0.5)
    model.on_step(9)
    assert model.kl_weights(even) == 1


def test_spectral_norms_against_the_singular_values():
    convs = nn.ConvTranspose2d(8, 4, 4), nn.Conv2d(3, 5, 3, bias=False)
    norms = SpectralNorms(nn.Sequential(encoder_cell(8), decoder_cell(8, 2), *convs))
    for _ in range(300):
        norms()
    layers = [layer for group in norms.layers for layer in group]
    assert len(layers) == 7
    exact = torch.stack([torch.linalg.svdvals(layer.weight.detach().flatten(1))[0] for layer in layers])
    torch.testing.assert_close(torch.cat(norms.norms()), exact, rtol=2e-3, atol=0)
    norms().backward()  # d s / dW = u vᵀ
    u, _, vh = torch.linalg.svd(layers[-1].weight.detach().flatten(1), full_matrices=False)
    gradient = layers[-1].weight.grad.flatten(1)
    torch.testing.assert_close(gradient, torch.outer(u[:, 0], vh[0]), atol=1e-2, rtol=0)
    before = {name: value.clone() for name, value in norms.state_dict().items()}
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(torch.rand_like(layer.weight))
    for training in (False, True):
        norms.train(training)()
        matches = [torch.equal(before[name], value) for name, value in norms.state_dict().items()]
        assert matches and all(matches) != training


def test_mixture_shows_the_heaviest_component():
    pixels, levels = MixturePixels(1, 17, 2), 17
    out = torch.tensor([0.0, 1.0, -0.75, 0.5, -3.0, -3.0]).view(1, 6, 1, 1)  # logits, means, log scales
    assert pixels.mean(out).item() == pytest.approx(0.5)
    x = from_levels(torch.arange(levels), levels).view(-1, 1, 1, 1)
    total = pixels.log_prob(x, out.expand(levels, -1, -1, -1)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-4)


def test_labels_reach_priors_and_posteriors():
    model = shaken(HVAE.of(INFO, **SMALL, conditional=True))
    x, zero = squares(4, INFO), torch.zeros(4).long()
    a, b, null = (model.log_prob(x, y, noise=noise(4)) for y in (zero, zero + 1, None))
    assert not torch.equal(a, b) and not torch.equal(a, null)
    e = [model.embed(y, 4) for y in (zero, zero + 1)]
    still = [torch.zeros(4, *grid) for grid in model.grids]
    (_, first), (_, second) = (model.decoder(still, model.encoder(x), label) for label in e)
    assert all(not torch.equal(one.mu, two.mu) for one, two in zip(first, second, strict=True))
    strict = HVAE.of(INFO, **SMALL, conditional=True, label_dropout=0.0)
    refused("without a null label", strict.reconstruct, x, noise=noise(4), progress=no_progress)


def test_reconstruction_keeps_as_many_groups_as_asked_and_a_temperature(trained):
    x = squares(16, INFO, seed=1)

    def show(keep, seed=0):
        return trained.reconstruct(x, noise=noise(16, seed), progress=no_progress, keep=keep).images

    whole, one = show(0), show(1)
    assert torch.equal(whole, show(3)) and torch.equal(whole, show(0, seed=1))
    assert not torch.equal(one, show(1, seed=1))
    # on average over draws: with two groups kept, one draw may be nearer by chance than the mean of all
    every, two, first = (sum((x - show(k, s)).square().mean() for s in range(8)) for k in (0, 2, 1))
    assert every < two < first
    refused("`keep` is 4", show, 4)

    cold, warm = (trained.sample(3, noise=noise(3), progress=no_progress, temperature=t) for t in (0.0, 1.0))
    assert torch.equal(cold[0], cold[1])  # the prior's mean, for every image
    assert not torch.equal(warm[0], warm[1])
