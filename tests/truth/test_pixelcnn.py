"""PixelCNN: causality by gradients, probabilities that sum to 1, cached sampling against passes of the whole
net."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.models.autoregressive.pixelcnn import IncrementalPixelCNN, PixelCNN
from gzcli.models.nn.common import from_levels

CLASSES = ("a", "b", "c")


def build(shape, levels, *, seed=0, scale=2.0, classes=(), multilabel=False, dtype=torch.float64, **hyper):
    """A net with random weights, scaled up so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    hyper = {"hidden": 6, "head": 6, "dilations": (1, 2), "first": 3, "conditional": bool(classes), **hyper}
    model = PixelCNN(DataInfo(shape, levels, classes=classes, multilabel=multilabel), **hyper).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale / max(1, p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return model.eval()


def images(n, shape, levels, dtype=torch.float64, seed=1):
    k = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return from_levels(k, levels).to(dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_value_sees_exactly_the_values_before_it(channels):
    """By gradients: every earlier value within reach, no blind spot, and none of the later ones."""
    height, width = 5, 6
    model = build((channels, height, width), 4, dilations=(1, 1, 1, 1, 1, 1), hidden=12, head=12)
    x = images(1, (channels, height, width), 4).requires_grad_()
    logits = model(x)
    order = (
        torch.arange(height * width * channels).view(height, width, channels).permute(2, 0, 1)
    )  # [C, H, W]
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        (grad,) = torch.autograd.grad(logits[0, c, i, j].square().sum(), x, retain_graph=True)
        assert torch.equal(grad[0] != 0, order < order[c, i, j]), (c, i, j)


@pytest.mark.parametrize(
    ("shape", "levels", "classes"),
    [((1, 2, 2), 3, ()), ((3, 1, 2), 2, ()), ((3, 2, 1), 2, ()), ((3, 1, 1), 4, ()), ((1, 2, 2), 3, CLASSES)],
)
def test_probabilities_of_all_images_sum_to_one(shape, levels, classes):
    model = build(shape, levels, classes=classes)
    grid = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(shape)))).view(-1, *shape)
    x = from_levels(grid, levels).double()
    with torch.no_grad():
        log_prob = model.log_prob(x)
        assert log_prob.exp().sum() == pytest.approx(1, abs=1e-12)
        assert log_prob.exp().max() > 3 / len(x)  # not the uniform distribution
        if classes:
            each = torch.stack([model.log_prob(x, torch.full((len(x),), y)) for y in range(len(classes))])
            assert torch.allclose(each.exp().sum(1), torch.ones(3).double())
            assert torch.allclose(each.exp().mean(0), log_prob.exp())


CASES = [((1, 7, 6), 2, ()), ((1, 7, 6), 17, CLASSES), ((3, 5, 6), 256, ()), ((3, 5, 6), 8, CLASSES)]


@pytest.mark.parametrize(("shape", "levels", "classes"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cached_logits_are_those_of_the_whole_net(shape, levels, classes, dtype, tolerance):
    model = build(shape, levels, classes=classes, dtype=dtype, dilations=(1, 2, 1), kernel=5, scale=1.0)
    x, labels = images(3, shape, levels, dtype), torch.tensor([2, 0, 1]) if classes else None
    with torch.no_grad():
        whole, steps = model(x, labels), IncrementalPixelCNN(model, 3, labels)
        for i in range(shape[1]):
            steps.row(x[:, :, i - 1] if i else torch.zeros_like(x[:, :, 0]))
            for j, c in itertools.product(range(shape[2]), range(shape[0])):
                assert (steps.outputs(j, c) - whole[:, c, i, j]).abs().max() <= tolerance
                steps.put(j, c, x[:, c, i, j, None])


@pytest.mark.parametrize(("shape", "levels", "classes"), CASES)
def test_cached_samples_are_those_of_whole_net_passes(shape, levels, classes):
    model = build(shape, levels, classes=classes, scale=1.0)
    cached, naive = (model.sample(8, noise=ImageNoise(3, range(8)), naive=naive) for naive in (False, True))
    assert torch.equal(cached, naive)
    assert cached.unique().numel() > 1 and cached.abs().max() <= 1
    single = model.float()
    cached, naive = (
        single.sample(16, noise=ImageNoise(3, range(16)), naive=naive) for naive in (False, True)
    )
    assert (cached == naive).flatten(1).all(1).float().mean() == 1


def test_sampled_frequencies_are_the_probabilities():
    """4 binary values, 20,000 samples: every image's frequency within five standard errors of
    exp(log_prob)."""
    model, n = build((1, 2, 2), 2, dtype=torch.float32), 20_000
    bits = torch.tensor([8, 4, 2, 1])
    index = ((model.sample(n, noise=BatchNoise(0, total=n)).flatten(1) > 0) * bits).sum(1)
    grid = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4))).view(-1, 1, 2, 2)
    p = model.log_prob(grid).detach().exp()
    assert ((index.bincount(minlength=16) / n - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_without_temperature_the_mode_is_drawn():
    model = build((1, 6, 6), 17, classes=CLASSES, scale=1.0)
    draw = lambda seed, t: model.sample(4, noise=ImageNoise(seed, range(4)), temperature=t)  # noqa: E731
    assert torch.equal(draw(0, 1e-9), draw(5, 1e-9)) and not torch.equal(draw(0, 1.0), draw(5, 1.0))
    with pytest.raises(UsageError):
        draw(0, 0.0)


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_completion_keeps_the_rows_and_samples_the_rest_given_them(classes):
    shape = (3, 5, 4)
    n = 12
    model, x = build(shape, 8, classes=classes), images(n, shape, 8)
    labels = torch.arange(n) % 3 if classes else None
    noise = lambda: ImageNoise(1, range(n))  # noqa: E731
    done = model.complete(x, rows=2, labels=labels, noise=noise()).images
    assert torch.equal(done[:, :, :2], x[:, :, :2]) and not torch.equal(done, x)
    assert not torch.equal(
        done[:, :, 2:], model.complete(-x, rows=2, labels=labels, noise=noise()).images[:, :, 2:]
    )
    assert torch.equal(model.complete(x, rows=5, noise=noise()).images, x)
    sampled = model.sample(n, labels=labels, noise=noise())
    assert torch.equal(model.complete(x, rows=0, labels=labels, noise=noise()).images, sampled)
    assert torch.equal(model.complete(sampled, rows=3, labels=labels, noise=noise()).images, sampled)
    with pytest.raises(UsageError):
        model.complete(x, rows=6, noise=noise())


def test_completion_infers_the_class_from_the_kept_rows():
    n, y = 30, torch.arange(30) % 3
    model = build((1, 8, 8), 8, classes=CLASSES, scale=3.0)  # whose images of two classes hardly overlap
    model.label.table.weight.data.mul_(3)
    x = model.sample(n, labels=y, noise=ImageNoise(0, range(n)))
    assert (model._class_log_prob(x, rows=4).argmax(1) == y).float().mean() > 0.9
    blind, told = (
        model.complete(x, rows=4, labels=labels, noise=ImageNoise(1, range(n))).images for labels in (None, y)
    )
    assert (blind == told).flatten(1).all(1).float().mean() > 0.9


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
    x.requires_grad_()
    assert torch.autograd.grad(model.log_prob(x, y).sum(), x)[0].isfinite().all()


def test_it_learns_a_rule_between_pixels():
    """Images whose rows repeat their first pixel, of a fair coin each: 4 ln 2 nats are the entropy."""
    torch.manual_seed(0)
    model = PixelCNN(DataInfo((1, 4, 4), 2), hidden=16, head=16, dilations=(1,), first=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(80):
        x = BatchNoise(step, total=32).randint(2, 32, 1, 4, 1).expand(-1, -1, -1, 4) * 2.0 - 1
        loss = model.loss(Batch(x, None, torch.arange(32), BatchNoise(0, total=32)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 4 * math.log(2) - 0.1 < loss.item() < 4 * math.log(2) + 0.2


@pytest.mark.parametrize("levels", [2, 5])
def test_the_softmax_starts_at_the_marginal_of_each_channel(levels):
    model = PixelCNN(DataInfo((3, 6, 6), levels), hidden=6, head=6, dilations=(1,), first=3)
    x = images(64, (3, 6, 6), levels, torch.float32)
    x[:, 1] = -1
    model.on_start(Batch(x, None, torch.arange(64), BatchNoise(0, total=64)))
    bias = model.logits.bias.detach().view(3, -1).clone()
    p = torch.stack([1 - bias.sigmoid()[:, 0], bias.sigmoid()[:, 0]], 1) if levels == 2 else bias.softmax(1)
    for c in range(3):
        grey = from_levels(torch.arange(levels), levels)
        assert torch.allclose(
            p[c], (x[:, c].flatten()[:, None] - grey).abs().lt(1e-4).float().mean(0), atol=2e-3
        )
    model.on_start(
        Batch(-x, None, torch.arange(64), BatchNoise(0, total=64))
    )  # after a resume: nothing changes
    assert torch.equal(model.logits.bias.view(3, -1), bias)


def test_bad_hyperparameters_are_refused():
    for levels, hyper in ((None, {}), (4, {"kernel": 4}), (4, {"first": 1}), (4, {"conditional": True})):
        with pytest.raises(UsageError):
            PixelCNN(DataInfo((1, 4, 4), levels), **hyper)


@pytest.mark.parametrize("hidden", [33, 48])
def test_gradients_in_bf16_are_those_in_fp32(hidden):
    """Also where the number of channels is none that oneDNN's kernels of bf16 are made for."""
    torch.manual_seed(0)
    model = PixelCNN.of(DataInfo((3, 32, 32), levels=2), hidden=hidden, head=18, dilations=(1, 4))
    x = torch.randint(2, (16, 3, 32, 32)) * 2.0 - 1
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = -model.part_log_prob(model(x), x).mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() <= 0.1 * exact.norm(), name
