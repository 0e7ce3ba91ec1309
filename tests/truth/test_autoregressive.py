"""PixelCNN and PixelCNN++: enumeration, cached sampling against the whole net, completions, the loss."""

import itertools
import math
from functools import partial

import pytest
import torch
from draws import batch, fitted, noise
from refused import refused
from uncached import uncached_samples

from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.models.autoregressive.pixelcnn import IncrementalPixelCNN, PixelCNN
from gzcli.models.autoregressive.pixelcnnpp import IncrementalPixelCNNpp, PixelCNNpp
from gzcli.models.nn import from_levels

CLASSES = ("a", "b", "c")
SMALL = {
    PixelCNN: {"hidden": 6, "head": 6, "dilations": (1, 2), "first": 3},
    PixelCNNpp: {"hidden": 6, "blocks": (1, 1, 1), "mixture": 3},
}
CACHED = {PixelCNN: IncrementalPixelCNN, PixelCNNpp: IncrementalPixelCNNpp}
WIDE = {"dilations": (1, 2, 1), "kernel": 5}
# shape, levels, classes, options: odd sizes at every scale, one scale alone, scales without blocks
CASES = [
    (PixelCNN, (1, 7, 6), 2, (), WIDE),
    (PixelCNN, (1, 7, 6), 17, CLASSES, WIDE),
    (PixelCNN, (3, 5, 6), 256, (), WIDE),
    (PixelCNN, (3, 5, 6), 8, CLASSES, WIDE),
    (PixelCNNpp, (1, 7, 6), 2, (), {}),
    (PixelCNNpp, (1, 8, 8), 17, CLASSES, {"blocks": (2, 1)}),
    (PixelCNNpp, (3, 5, 9), 256, (), {"blocks": (1, 0, 1, 1)}),
    (PixelCNNpp, (3, 5, 6), 8, CLASSES, {"blocks": (1,)}),
]


def build(cls, shape, levels, *, seed=0, scale=2.0, classes=(), dtype=torch.float64, **hyper):
    """A net with random weights, scaled up so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    hyper = {**SMALL[cls], "conditional": bool(classes), **hyper}
    model = cls(DataInfo(shape, levels, classes=classes), **hyper).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale / max(1, p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return model.eval()


def of_levels(k, levels, dtype):
    return (k.double() * 2 / (levels - 1) - 1).to(dtype)


def every_image(shape, levels, dtype=torch.float64):
    k = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(shape)))).view(-1, *shape)
    return of_levels(k, levels, dtype)


def images(n, shape, levels, dtype=torch.float64, seed=1):
    k = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return of_levels(k, levels, dtype)


@pytest.fixture(params=[PixelCNN, PixelCNNpp], ids=["pixelcnn", "pixelcnnpp"])
def net(request):
    """`build` of either model."""
    return partial(build, request.param)


@pytest.mark.parametrize(
    ("shape", "levels", "classes"),
    [((1, 2, 2), 3, ()), ((3, 1, 2), 2, ()), ((3, 2, 1), 2, ()), ((3, 1, 1), 4, ()), ((1, 2, 2), 3, CLASSES)],
)
def test_probabilities_of_all_images_sum_to_one(net, shape, levels, classes):
    model, x = net(shape, levels, classes=classes), every_image(shape, levels)
    with torch.no_grad():
        log_prob = model.log_prob(x)
        assert log_prob.exp().sum() == pytest.approx(1, abs=1e-12)
        assert log_prob.exp().max() > 3 / len(x)  # not the uniform distribution
        if classes:
            each = torch.stack([model.log_prob(x, torch.full((len(x),), y)) for y in range(len(classes))])
            assert torch.allclose(each.exp().sum(1), torch.ones(3).double())
            assert torch.allclose(each.exp().mean(0), log_prob.exp())


@pytest.mark.parametrize(("cls", "shape", "levels", "classes", "options"), CASES)
def test_cached_outputs_and_samples_are_those_of_the_whole_net(cls, shape, levels, classes, options):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = build(cls, shape, levels, classes=classes, dtype=dtype, scale=1.0, **options)
        x, labels = images(3, shape, levels, dtype), torch.tensor([2, 0, 1]) if classes else None
        with torch.no_grad():
            whole, steps = model(x, labels), CACHED[cls](model, 3, labels)
            for i in range(shape[1]):
                steps.row(x[:, :, i - 1] if i else torch.zeros_like(x[:, :, 0]))
                for j, c in itertools.product(range(shape[2]), range(whole.shape[1])):
                    assert (steps.outputs(j, c) - whole[:, c, i, j]).abs().max() <= tolerance
                    steps.put(j, c, x[:, :, i, j] if cls is PixelCNNpp else x[:, c, i, j, None])
        cached, naive = model.sample(8, noise=noise(8, 3)), uncached_samples(model, 8, noise(8, 3))
        assert torch.equal(cached, naive) and cached.unique().numel() > 1 and cached.abs().max() <= 1


@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 2), ((1, 1, 2), 3)])
def test_sampled_frequencies_are_the_probabilities(net, shape, levels):
    """20,000 samples: every image's frequency within five standard errors of exp(log_prob)."""
    every = every_image(shape, levels, torch.float32)
    model, n = net(shape, levels, dtype=torch.float32), 20_000
    k = ((model.sample(n, noise=BatchNoise(0, total=n)).flatten(1) + 1) * (levels - 1) / 2).round().long()
    index = (k * levels ** torch.arange(k.shape[1]).flip(0)).sum(1)
    p = model.log_prob(every).detach().exp()
    frequency = index.bincount(minlength=len(every)) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_without_temperature_the_mode_is_drawn(net):
    model = net((1, 6, 6), 17, classes=CLASSES, scale=1.0)
    y, n = torch.zeros(4, dtype=torch.long), 4
    draw = lambda seed, t: model.sample(n, labels=y, noise=noise(n, seed), temperature=t)  # noqa: E731
    assert torch.equal(draw(0, 1e-9), draw(5, 1e-9)) and not torch.equal(draw(0, 1.0), draw(5, 1.0))
    refused("", draw, 0, 0.0)


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_completion_keeps_the_rows_and_samples_the_rest_given_them(net, classes):
    shape, n = (3, 5, 4), 12
    scale = 2.0 if net.args[0] is PixelCNN else 1.0
    model, x = net(shape, 8, classes=classes, scale=scale), images(n, shape, 8)
    labels = torch.arange(n) % 3 if classes else None
    complete = lambda x, rows: model.complete(x, rows=rows, labels=labels, noise=noise(n, 1)).images  # noqa: E731
    done = complete(x, 2)
    assert torch.equal(done[:, :, :2], x[:, :, :2]) and not torch.equal(done, x)
    assert not torch.equal(done[:, :, 2:], complete(-x, 2)[:, :, 2:])
    assert torch.equal(complete(x, 5), x)
    sampled = model.sample(n, labels=labels, noise=noise(n, 1))
    assert torch.equal(complete(x, 0), sampled) and torch.equal(complete(sampled, 3), sampled)
    refused("", complete, x, 6)


@pytest.mark.parametrize(
    ("cls", "channels", "options"),
    [
        *((PixelCNN, c, {"dilations": (1,) * 6, "hidden": 12, "head": 12}) for c in (1, 3)),
        *((PixelCNNpp, c, {"blocks": b, "hidden": 8}) for c, b in ((1, (3,)), (1, (1, 1, 2)), (3, (2, 1)))),
    ],
)
def test_each_output_sees_exactly_the_values_before_it(cls, channels, options):
    """By gradients: every earlier value, no blind spot, none of the later ones, nor of PixelCNN++ its own."""
    height, width = 5, 6
    model = build(cls, (channels, height, width), 4, **options)
    x = images(1, (channels, height, width), 4).requires_grad_()
    outputs = model(x)
    order = torch.arange(height * width * channels).view(height, width, channels).movedim(2, 0)  # [C, H, W]
    for c, i, j in itertools.product(range(channels if cls is PixelCNN else 1), range(height), range(width)):
        (grad,) = torch.autograd.grad(outputs[0, c, i, j].square().sum(), x, retain_graph=True)
        assert torch.equal(grad[0] != 0, order < order[c, i, j]), (c, i, j)


def test_completion_infers_the_class_from_the_kept_rows(net):
    n, y, rows = 30, torch.arange(30) % 3, 6
    model = net((1, 8, 8), 8, classes=CLASSES)
    if isinstance(model, PixelCNN):  # images of two classes are to hardly overlap
        model, rows = net((1, 8, 8), 8, classes=CLASSES, scale=3.0), 4
        model.label.table.weight.data.mul_(3)
    x = model.sample(n, labels=y, noise=noise(n))
    blind, labelled = (model.complete(x, rows=rows, labels=y, noise=noise(n, 1)).images for y in (None, y))
    assert (blind == labelled).flatten(1).all(1).float().mean() > 0.8


def test_loss_is_the_mean_negative_log_prob_and_has_gradients_under_bf16(net):
    model = net((3, 6, 6), 17, classes=CLASSES, dtype=torch.float32, scale=0.5).train()
    x, y = images(4, (3, 6, 6), 17, torch.float32), torch.tensor([0, 1, 2, 0])
    losses = model.loss(batch(x, y=y))
    assert losses["loss"].item() == pytest.approx(-model.log_prob(x, y).mean().item(), rel=1e-6)
    assert losses["bpd"].item() == pytest.approx(losses["loss"].item() / (108 * math.log(2)), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch(x, y=y))["loss"]
    low.backward()
    assert low.dtype == torch.float32 and low.item() == pytest.approx(losses["loss"].item(), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if isinstance(model, PixelCNN):
        x.requires_grad_()
        assert torch.autograd.grad(model.log_prob(x, y).sum(), x)[0].isfinite().all()


def test_it_learns_a_rule_between_pixels():
    """Images whose rows repeat their first pixel, of a fair coin each: 4 ln 2 nats are the entropy."""
    model = PixelCNN(DataInfo((1, 4, 4), 2), hidden=16, head=16, dilations=(1,), first=3)

    def rows(step: int) -> Batch:
        x = BatchNoise(step, total=32).randint(2, 32, 1, 4, 1).expand(-1, -1, -1, 4) * 2.0 - 1
        return Batch(x, None, torch.arange(32), BatchNoise(0, total=32))

    assert 4 * math.log(2) - 0.1 < fitted(model, rows, 80, 2e-2)[-1] < 4 * math.log(2) + 0.2


@pytest.mark.parametrize("levels", [2, 5])
def test_the_softmax_starts_at_the_marginal_of_each_channel(levels):
    model = PixelCNN(DataInfo((3, 6, 6), levels), hidden=6, head=6, dilations=(1,), first=3)
    x = images(64, (3, 6, 6), levels, torch.float32)
    x[:, 1] = -1
    model.on_start(batch(x))
    bias = model.logits.bias.detach().view(3, -1).clone()
    p = torch.stack([1 - bias.sigmoid()[:, 0], bias.sigmoid()[:, 0]], 1) if levels == 2 else bias.softmax(1)
    grey = from_levels(torch.arange(levels), levels)
    for c in range(3):
        shares = (x[:, c].flatten()[:, None] - grey).abs().lt(1e-4).float().mean(0)
        assert torch.allclose(p[c], shares, atol=2e-3)
    model.on_start(batch(-x))  # a resume changes nothing
    assert torch.equal(model.logits.bias.view(3, -1), bias)


@pytest.mark.parametrize("hidden", [33, 48])
def test_gradients_in_bf16_are_those_in_fp32(hidden):
    """Also where the number of channels is none that oneDNN's kernels of bf16 are made for."""
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
