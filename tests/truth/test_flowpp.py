"""Flow++ against autograd's Jacobian, numerical integration, an entropy and itself inverted."""

import math
from dataclasses import replace

import pytest
import torch
from draws import fitted
from flows import DIGITS, FixedNoise, batch, images, log_det_by_autograd, roughen

from gzcli.core.types import BatchNoise, DataInfo
from gzcli.models.nn import from_levels
from gzcli.models.normalizing_flow import flowpp
from gzcli.models.normalizing_flow.flowpp import CHANNEL_HALVES, COLUMN_HALVES, Couplings, FlowPP, LogisticCDF

SMALL = {"channel": (0, 1), "checkerboard": (2, 1), "hidden": 8, "blocks": 1, "components": 3, "heads": 2}
SMALL |= {"dequant_blocks": 1}
STEP = flowpp.CouplingOptions(components=3, hidden=8, blocks=1, heads=2, attention=64, dropout=0.0)


def model_of(shape=(1, 4, 8), levels=256, classes=DIGITS, size=0.1, **options) -> FlowPP:
    torch.manual_seed(0)
    return roughen(FlowPP.of(DataInfo(shape, levels, classes), **SMALL | options), size)


def mixture(n: int, K: int = 5, spread: float = 3.0, dtype=torch.float64, seed: int = 0) -> LogisticCDF:
    """A mixture for each of n values, with scales from a hundredth to a hundred."""
    g = torch.Generator().manual_seed(seed)
    logits, mean, log_scale = torch.randn(3, n, K, 1, generator=g, dtype=torch.float64).to(dtype)
    return LogisticCDF.from_logits(2 * logits, spread * mean, 1.5 * log_scale)


def test_the_cdf_is_the_integral_of_the_mixtures_density():
    m = mixture(4)
    grid = torch.linspace(-1000, 1000, 1_000_001, dtype=torch.float64)
    for i in range(4):
        pi, mean, scale = m.log_pi[i, :, 0].exp(), m.mean[i, :, 0], m.log_scale[i, :, 0].exp()
        # the density of a logistic in its other form, sech² / 4s
        parts = zip(pi, mean, scale, strict=True)
        density = sum(p / (4 * s * torch.cosh((grid - mu) / (2 * s)).square()) for p, mu, s in parts)
        cdf = torch.cumulative_trapezoid(density, grid)
        at = torch.tensor([495_000, 499_750, 500_000, 500_350, 502_000])  # x from -10 to 4
        one = LogisticCDF(*(t[i : i + 1].expand(5, -1, 1) for t in (m.log_pi, m.mean, m.log_scale)))
        y, log_slope = one.logit_cdf(grid[at, None])
        F = y.sigmoid()
        torch.testing.assert_close(F[:, 0], cdf[at - 1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close((log_slope.exp() * F * (1 - F))[:, 0], density[at], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_finite_and_go_on_as_the_widest_component(dtype):
    m = mixture(6, dtype=dtype)
    for far in (1e3, -1e3, 1e6, -1e6):
        x = torch.full((6, 1), far, dtype=dtype).requires_grad_()
        y, log_slope = m.logit_cdf(x)
        assert y.isfinite().all() and log_slope.isfinite().all() and (y.sign() == math.copysign(1, far)).all()
        (y + log_slope).sum().backward()
        assert x.grad.isfinite().all()
    tail = torch.tensor([[1e5], [1e6]], dtype=torch.float64)
    one = LogisticCDF(*(t[:1].double().expand(2, -1, 1) for t in (m.log_pi, m.mean, m.log_scale)))
    rise = one.logit_cdf(tail)[0].diff(dim=0) / 9e5
    assert rise.item() == pytest.approx((-one.log_scale.max()).exp().item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("K", "spread"), [(1, 1.0), (4, 1.0), (32, 3.0)])
def test_the_inverse_is_exact(K, spread, dtype, atol):
    m = mixture(2000, K, spread, dtype)
    g = torch.Generator().manual_seed(1)
    x = spread * torch.randn(2000, 1, generator=g, dtype=torch.float64).to(dtype)
    y, log_slope = m.logit_cdf(x)
    back = m.inverse_logit_cdf(y)
    # x is known as well as y is: in the gap between two components the CDF is flat
    conditioning = 1 + 4 * (1 + y.abs()) * (-log_slope).exp()
    assert ((back - x).abs() / (1 + x.abs()) / conditioning).max() < atol
    far = m.inverse_logit_cdf(torch.linspace(-1e3, 1e3, 2000, dtype=dtype)[:, None])
    assert far.isfinite().all()
    m = LogisticCDF(*(torch.empty(2, 4, 3, device="meta") for _ in range(3)))  # no values to read back
    assert m.inverse_logit_cdf(torch.empty(2, 3, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("way", [COLUMN_HALVES, CHANNEL_HALVES])
def test_halves_are_alternate_columns_or_alternate_rows_of_the_squares(way):
    image = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    x = image if way == COLUMN_HALVES else torch.nn.functional.pixel_unshuffle(image, 2)
    x1, x2 = flowpp.split_halves(x, way)
    rows = image[:, :, 0::2].unflatten(3, (-1, 2)).movedim(4, 2).flatten(1, 2)  # [B, C · 2, H/2, W/2]
    torch.testing.assert_close(x1, image[..., 0::2] if way == COLUMN_HALVES else rows)
    assert x1.shape == x2.shape and x1.is_contiguous()
    torch.testing.assert_close(flowpp.join(x1, x2, way), x)


@pytest.mark.parametrize("way", [COLUMN_HALVES, CHANNEL_HALVES])
@pytest.mark.parametrize("attention", [0, 64])
def test_couplings_have_the_log_det_of_their_jacobian_and_invert(way, attention):
    flow = roughen(Couplings((4, 2, 4), way, 3, replace(STEP, attention=attention), 3), 0.1).double()
    x, context = torch.randn(2, 4, 2, 4, dtype=torch.float64), torch.randn(2, 2, 4, 3, dtype=torch.float64)
    context = context[:, :, : 2 if way == COLUMN_HALVES else 4]
    y, log_det = flow(x, context)
    for one, c, value in zip(x, context, log_det, strict=True):
        expected = log_det_by_autograd(lambda t, c=c: flow(t, c[None])[0], one[None])[0]
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(flow.inverse(y, context), x)
    assert (y != x).all(), "each value is changed"
    single, x, context = flow.float(), x.float(), context.float()
    torch.testing.assert_close(single.inverse(single(x, context)[0], context), x, atol=1e-4, rtol=0)


def dequantiser(levels=4) -> flowpp.Dequantiser:
    torch.manual_seed(0)
    return roughen(flowpp.Dequantiser(DataInfo((1, 1, 2), levels), 0, 3, 3, STEP), 0.2).double()


def test_densities_of_noise_and_image_are_those_of_their_jacobians():
    q, x = dequantiser(), from_levels(torch.tensor([[[[1, 3]]]]), 4).double()
    eps = torch.randn(1, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, log_q = q(x, FixedNoise(eps))
    u = 4 * v - torch.tensor([1.0, 3.0])
    assert ((u > 0) & (u < 1)).all()
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum()
    log_det = log_det_by_autograd(lambda e: 4 * q(x, FixedNoise(e))[0], eps)
    torch.testing.assert_close(log_q, log_normal - log_det)
    # ∫ q(u | x) du over the square of two pixels, on a grid of y = logit u, where `forward` states q
    q, means = dequantiser(), []
    line = torch.linspace(-20, 20, 121, dtype=torch.float64)
    y = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    u = y.sigmoid()
    du = (u * (1 - u) / 3).prod(-1).flatten()
    for k in (torch.tensor([0, 0]), torch.tensor([1, 3])):
        x = (k.double() * 2 / 3 - 1).expand(len(y), 1, 1, 2)
        v, log_q = q(x, FixedNoise(q.couplings.inverse(y, q.context(x))))
        torch.testing.assert_close(4 * v - k, u, atol=1e-9, rtol=0)
        mass = log_q.exp() * du
        assert mass.sum().item() == pytest.approx(1, abs=1e-3)
        means.append((mass[:, None] * u.flatten(1)).sum(0))
    assert (means[0] - means[1]).abs().max() > 0.01
    model, x = model_of(levels=17).double(), images(1, (1, 4, 8), 17).double()
    eps = torch.randn(1, 1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    v, log_q = model.dequantiser(x, FixedNoise(eps))
    mean, log_std = model.top
    standard = lambda t: (model.encode(t)[0][0] - mean) * (-log_std).exp()  # noqa: E731
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(standard(v)).sum()
    want = log_p + log_det_by_autograd(standard, v) - log_q - 32 * math.log(17)
    torch.testing.assert_close(model.log_prob(x, noise=FixedNoise(eps)), want)


@pytest.mark.slow
def test_learned_noise_beats_uniform_and_more_samples_tighten_the_bound():
    """On independent two-level pixels, whose entropy no bound can beat."""
    g = torch.Generator().manual_seed(0)
    k = (torch.rand(512, 1, 4, 4, generator=g) < torch.linspace(0.1, 0.9, 4)).long()
    x = from_levels(k, 2)
    bounds = {}
    options = {"channel": (0,), "checkerboard": (2,), "logit": 0.01, "dequant_couplings": 2}
    for dequant in ("uniform", "variational"):
        model = model_of((1, 4, 4), levels=2, classes=(), size=0.0, dequant=dequant, **options)
        model.on_start(batch(x))
        rows = lambda: torch.randint(512, (32,), generator=g)  # noqa: E731
        fitted(model, lambda step, rows=rows: batch(x[rows()], seed=step), 100, 1e-2)
        with torch.no_grad():
            one = model.log_prob(x, noise=BatchNoise(1, total=512)).mean().item()
            many = model.log_prob(x, noise=BatchNoise(1, total=512), samples=8).mean().item()
        assert many > one
        bounds[dequant] = one
    p = torch.linspace(0.1, 0.9, 4)
    entropy = -4 * (p * p.log() + (1 - p) * (1 - p).log()).sum().item()
    assert bounds["uniform"] + 0.1 < bounds["variational"] < -entropy + 0.1
