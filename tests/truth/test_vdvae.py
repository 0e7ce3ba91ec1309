"""The very deep VAE: its bound against quadrature, its posterior against torch.distributions, its start."""

import math
from typing import Any

import pytest
import torch
from draws import noise, squares
from torch.distributions import Normal, kl_divergence

from gzcli.core.types import DataInfo
from gzcli.models.vae.vdvae import VDVAE, DeepGroup, Up

INFO = DataInfo((1, 2, 2), 4, ())


def made(**options: Any) -> VDVAE:
    """Two groups of one latent each by default; away from its start, where the prior is that of no group."""
    g = torch.Generator().manual_seed(1)
    base = {"channels": (8, 8), "groups": (0, 2), "blocks": (1, 1), "latent": 1, "mixture": 2}
    model = VDVAE.of(INFO, **base | options).double().eval()
    for name, p in model.named_parameters():  # posteriors near enough to the prior that 100 draws reach it
        p.data += (0.1 if "prior" in name or "posterior" in name else 0.15) * torch.randn(
            p.shape, generator=g
        )
    return model


@torch.no_grad()
def test_the_bound_reaches_the_integral_over_two_latents():
    model, x = made(), squares(3, INFO).double()
    t, step = torch.linspace(-6, 6, 81, dtype=torch.float64), 12 / 80
    first, second = (grid.reshape(-1, 1, 1, 1) for grid in torch.meshgrid(t, t, indexing="ij"))
    out, codes = model.decoder([first, second], [])
    log_prior = (Normal(0, 1).log_prob(first) + Normal(0, 1).log_prob(second)).flatten()
    log_p = torch.stack([model.pixels.log_prob(one.expand(len(out), -1, -1, -1), out) for one in x])
    exact = (log_p + log_prior).logsumexp(1) + 2 * math.log(step)
    for group in (m for m in model.modules() if isinstance(m, DeepGroup)):
        group.posterior[-1].bias[1] += 0.4  # wider than the prior: no tail of it is missed
    every = x.repeat_interleave(200, 0)
    elbo, some = (model.log_prob(every, noise=noise(len(every)), samples=k).view(3, -1) for k in (1, 50))
    assert not codes and (exact - elbo.mean(1) > 0.5).all()
    assert (elbo.mean(1) < some.mean(1)).all() and (some.mean(1) < exact).all()
    torch.testing.assert_close(some.logsumexp(1) - math.log(200), exact, atol=0.06, rtol=0)  # of 10,000 draws


def test_the_posterior_is_absolute_and_knows_the_state():
    model = made(groups=(1, 1), latent=3)
    group = next(m for m in model.modules() if isinstance(m, DeepGroup))
    h, feature, eps = (torch.randn(5, c, 1, 1, dtype=torch.float64) for c in (8, 8, 3))
    states = []
    group.project.register_forward_hook(lambda layer, inputs, output: states.append(inputs[0]))
    _, code = group(h, eps, feature)
    squash = lambda t: 5 * torch.tanh(t / 5)  # noqa: E731
    mu, log_sigma = squash(group.prior(h)[:, :6]).chunk(2, 1)
    mu_q, log_sigma_q = squash(group.posterior(torch.cat([h, feature], 1))).chunk(2, 1)
    p, q = Normal(mu, log_sigma.exp()), Normal(mu_q, log_sigma_q.exp())
    torch.testing.assert_close(states[0], q.mean + q.stddev * eps)
    torch.testing.assert_close(code.kl(), kl_divergence(q, p).flatten(1).sum(1))
    torch.testing.assert_close(
        code.log_ratio(), (p.log_prob(states[0]) - q.log_prob(states[0])).sum((1, 2, 3))
    )


def test_the_start_of_a_deep_ladder():
    """Priors N(0, I); last layers and projections by 1 / √depth; a finer grid by nearest neighbours."""
    model = VDVAE.of(INFO, channels=(32, 32), groups=(9, 16), blocks=(4, 5), latent=2)
    h = torch.randn(3, 32, 1, 1)
    for group in (m for m in model.modules() if isinstance(m, DeepGroup)):
        last = group.block.net[-1].weight
        assert last.std().item() == pytest.approx((last.shape[1] * 25) ** -0.5, rel=0.5)
        assert group.project.weight.std().item() == pytest.approx((2 * 25) ** -0.5, rel=0.5)
        assert not group.prior(h).any()
    up = Up(32, 32, (1, 2))
    up.bias.data.normal_()
    torch.testing.assert_close(up(h), h.expand(3, 32, 1, 2) + up.bias)
