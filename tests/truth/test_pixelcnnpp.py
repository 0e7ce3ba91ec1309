"""PixelCNN++: the discretised mixture against integration, causality by gradients, cached sampling against
whole-net passes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import distributions as D

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.models.autoregressive.pixelcnnpp import IncrementalPixelCNNpp, PixelCNNpp
from gzcli.models.nn.common import from_levels
from gzcli.models.nn.logistic import LogisticMixture, logistic_log_mass

CLASSES = ("a", "b", "c")


def build(shape, levels, *, seed=0, scale=2.0, classes=(), multilabel=False, dtype=torch.float64, **hyper):
    """A net with random weights, scaled up so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    hyper = {"hidden": 6, "blocks": (1, 1, 1), "mixture": 3, "conditional": bool(classes), **hyper}
    model = PixelCNNpp(DataInfo(shape, levels, classes=classes, multilabel=multilabel), **hyper).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale / max(1, p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return model.eval()


def every_image(shape, levels, dtype=torch.float64):
    k = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(shape)))).view(-1, *shape)
    return from_levels(k, levels).to(dtype)


def images(n, shape, levels, dtype=torch.float64, seed=1):
    k = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return from_levels(k, levels).to(dtype)


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
    """By Gauss–Legendre quadrature of the density, over the bins and, for the first and the last level, out
    to 50 scales."""
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
        found = logistic_log_mass(x, mean, torch.tensor(log_scale).double(), levels).exp()
        assert torch.allclose(found, mass, atol=1e-15, rtol=1e-7), mean


def test_log_prob_is_that_of_torch_distributions():
    """Components by hand from logistic distribution functions: μ_g + a r, μ_b + b r + c g, of parameters in
    known places."""
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


def test_two_levels_are_bernoullis_given_the_channels_before():
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
    mixture.start(bias)
    logits, mean, log_scale, coef = mixture._unpack(bias)
    assert not logits.any() and not coef.any() and (log_scale.exp() - 0.25).abs().max() < 1e-6
    assert torch.equal(mean.float(), torch.tensor([-0.75, -0.25, 0.25, 0.75]).expand(channels, 4))
    LogisticMixture(channels, 2, 4).start(torch.zeros(channels * (channels + 1) // 2))


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
    assert torch.equal(
        mixture.draw(theta, torch.zeros(1, channels + 1).double()), -torch.ones(1, channels).double()
    )


@pytest.mark.parametrize(("channels", "blocks"), [(1, (3,)), (1, (1, 1, 2)), (3, (2, 1))])
def test_each_pixel_sees_exactly_the_pixels_before_it(channels, blocks):
    """By gradients: every earlier pixel, no blind spot, and none of the later ones, nor the channels of its
    own."""
    height, width = 5, 6
    model = build((channels, height, width), 4, blocks=blocks, hidden=8)
    x = images(1, (channels, height, width), 4).requires_grad_()
    outputs = model(x)
    order = torch.arange(height * width).view(height, width)
    for i, j in itertools.product(range(height), range(width)):
        (grad,) = torch.autograd.grad(outputs[0, 0, i, j].square().sum(), x, retain_graph=True)
        assert torch.equal(grad[0] != 0, (order < order[i, j]).expand(channels, -1, -1)), (i, j)


def test_channels_of_a_pixel_see_those_before_them_through_the_coefficients_alone():
    mixture = LogisticMixture(3, 256, 1)
    theta = params(mixture, 1)
    for c, d in itertools.product(range(3), range(3)):
        x = images(1, (3,), 256).requires_grad_()
        for coefficients in (False, True):
            _, mean, _, coef = mixture._unpack(theta)
            (grad,) = torch.autograd.grad(
                mixture._mean(c, mean, coef * coefficients, x).sum() + 0 * x.sum(), x
            )
            assert (grad[0, d] != 0) == (coefficients and d < c), (c, d)


@pytest.mark.parametrize(
    ("shape", "levels", "classes"),
    [((1, 2, 2), 3, ()), ((3, 1, 2), 2, ()), ((3, 2, 1), 3, ()), ((3, 1, 1), 4, ()), ((1, 2, 2), 3, CLASSES)],
)
def test_probabilities_of_all_images_sum_to_one(shape, levels, classes):
    model, x = build(shape, levels, classes=classes), every_image(shape, levels)
    with torch.no_grad():
        log_prob = model.log_prob(x)
        assert log_prob.exp().sum() == pytest.approx(1, abs=1e-12)
        assert log_prob.exp().max() > 3 / len(x)  # not the uniform distribution
        if classes:
            each = torch.stack([model.log_prob(x, torch.full((len(x),), y)) for y in range(len(classes))])
            assert torch.allclose(each.exp().sum(1), torch.ones(3).double())
            assert torch.allclose(each.exp().mean(0), log_prob.exp())


CASES = [  # odd sizes at every scale, one scale alone, scales without blocks
    ((1, 7, 6), 2, (), (1, 1, 1)),
    ((1, 8, 8), 17, CLASSES, (2, 1)),
    ((3, 5, 9), 256, (), (1, 0, 1, 1)),
    ((3, 5, 6), 8, CLASSES, (1,)),
]


@pytest.mark.parametrize(("shape", "levels", "classes", "blocks"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cached_outputs_are_those_of_the_whole_net(shape, levels, classes, blocks, dtype, tolerance):
    model = build(shape, levels, classes=classes, blocks=blocks, dtype=dtype, scale=1.0)
    x, labels = images(3, shape, levels, dtype), torch.tensor([2, 0, 1]) if classes else None
    with torch.no_grad():
        whole, steps = model(x, labels), IncrementalPixelCNNpp(model, 3, labels)
        for i in range(shape[1]):
            steps.row(x[:, :, i - 1] if i else torch.zeros_like(x[:, :, 0]))
            for j in range(shape[2]):
                assert (steps.outputs(j, 0) - whole[:, 0, i, j]).abs().max() <= tolerance
                steps.put(j, 0, x[:, :, i, j])


@pytest.mark.parametrize(("shape", "levels", "classes", "blocks"), CASES)
def test_cached_samples_are_those_of_whole_net_passes(shape, levels, classes, blocks):
    model = build(shape, levels, classes=classes, blocks=blocks, scale=1.0)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        cached, naive = (
            model.sample(8, noise=ImageNoise(3, range(8)), naive=naive) for naive in (False, True)
        )
        assert torch.equal(cached, naive)
        assert cached.unique().numel() > 1 and cached.abs().max() <= 1


def test_sampled_frequencies_are_the_probabilities():
    """A 1×2 image of 3 levels, 20,000 samples: every image's frequency within five standard errors of
    exp(log_prob)."""
    model, n = build((1, 1, 2), 3, dtype=torch.float32), 20_000
    k = (model.sample(n, noise=BatchNoise(0, total=n)).flatten(1) + 1).round().long()
    p = model.log_prob(every_image((1, 1, 2), 3, torch.float32)).detach().exp()
    frequency = (k * torch.tensor([3, 1])).sum(1).bincount(minlength=9) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_without_temperature_the_mode_is_drawn():
    model = build((1, 6, 6), 17, classes=CLASSES, scale=1.0)
    draw = lambda seed, t: model.sample(4, noise=ImageNoise(seed, range(4)), temperature=t)  # noqa: E731
    assert torch.equal(draw(0, 1e-9), draw(5, 1e-9)) and not torch.equal(draw(0, 1.0), draw(5, 1.0))
    with pytest.raises(UsageError):
        draw(0, 0.0)


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_completion_keeps_the_rows_and_samples_the_rest_given_them(classes):
    shape = (3, 5, 4)
    model, x = build(shape, 8, classes=classes, scale=1.0), images(6, shape, 8)
    labels = torch.arange(6) % 3 if classes else None
    noise = lambda: ImageNoise(1, range(6))  # noqa: E731
    done = model.complete(x, rows=2, labels=labels, noise=noise()).images
    assert torch.equal(done[:, :, :2], x[:, :, :2]) and not torch.equal(done, x)
    assert not torch.equal(
        done[:, :, 2:], model.complete(-x, rows=2, labels=labels, noise=noise()).images[:, :, 2:]
    )
    sampled = model.sample(6, labels=labels, noise=noise())
    for rows in (0, 3):
        assert torch.equal(model.complete(sampled, rows=rows, labels=labels, noise=noise()).images, sampled)
    with pytest.raises(UsageError):
        model.complete(x, rows=6, noise=noise())


def test_completion_infers_the_class_from_the_kept_rows():
    model = build((1, 8, 8), 8, classes=CLASSES)
    labels = torch.arange(9) % 3
    x = model.sample(9, labels=labels, noise=ImageNoise(0, range(9)))
    blind, told = (
        model.complete(x, rows=6, labels=y, noise=ImageNoise(1, range(9))).images for y in (None, labels)
    )
    assert (blind == told).flatten(1).all(1).float().mean() > 0.8


def test_loss_is_the_mean_negative_log_prob_and_has_gradients_under_bf16():
    model = build((3, 6, 6), 17, classes=CLASSES, dtype=torch.float32, scale=0.5).train()
    x, y = images(4, (3, 6, 6), 17, torch.float32), torch.tensor([0, 1, 2, 0])
    batch = Batch(x, y, torch.arange(4), BatchNoise(0, total=4))
    losses = model.loss(batch)
    assert losses["loss"].item() == pytest.approx(-model.log_prob(x, y).mean().item(), rel=1e-6)
    assert losses["bpd"].item() == pytest.approx(losses["loss"].item() / (108 * math.log(2)), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch)["loss"]
    low.backward()
    assert low.dtype == torch.float32 and low.item() == pytest.approx(losses["loss"].item(), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("levels", "classes", "hyper"),
    [(None, (), {}), (4, (), {"blocks": ()}), (4, (), {"mixture": 0}), (4, (), {"conditional": True})],
)
def test_bad_hyperparameters_are_refused(levels, classes, hyper):
    with pytest.raises(UsageError):
        PixelCNNpp(DataInfo((1, 4, 4), levels, classes), **hyper)
