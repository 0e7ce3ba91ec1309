"""MaskGIT: the masked loss, the schedule of sampling, and its bound against every order of generation."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from coded import images, prepared, prior
from draws import noise
from refused import refused

from gzcli.core.errors import UsageError
from gzcli.core.types import BatchNoise, no_progress
from gzcli.models.autoregressive.maskgit import FillOptions, MaskGIT

CLASSES, build = ("a", "b", "c"), partial(prior, MaskGIT)


class Uniform:
    """In place of the net: logits by hand."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self.seen = logits, []

    def __call__(self, codes, masked, labels=None, drop=None):
        self.seen.append((codes.clone(), masked.clone()))
        return self.logits.expand(*codes.shape, -1)


def test_masked_codes_are_hidden_and_alone_in_the_loss():
    model = build()
    codes = torch.randint(5, (1, 6), generator=torch.Generator().manual_seed(0))
    masked = torch.tensor([[True, False, True, False, False, True]])
    with torch.no_grad():
        logits = model(codes, masked)
        for i in range(6):
            variant = codes.clone()
            variant[0, i] = (variant[0, i] + 1) % 5
            moved = ((model(variant, masked) - logits).abs().amax((0, 2)) > 1e-9).tolist()
            assert moved == [not masked[0, i]] * 6
    model, x = build(smoothing=0.2).train(), images(5)
    batch = prepared(model, x)
    again = prepared(model, x).noise
    share = torch.cos(0.5 * math.pi * again.rand(5))
    masked = model.mask((share * 6).ceil().long(), again)
    codes = batch.extra["codes"].long()
    logits = model(codes, masked)
    ce = F.cross_entropy(logits.mT, codes, reduction="none", label_smoothing=0.2)
    plain = F.cross_entropy(logits.mT, codes, reduction="none")
    parts = model.loss(batch)
    expected = torch.stack([ce[i][masked[i]].mean() for i in range(5)]).mean()
    torch.testing.assert_close(parts["loss"], expected)
    nats = torch.stack([plain[i][masked[i]].mean() for i in range(5)]).mean()
    torch.testing.assert_close(parts["nats"], nats.detach())
    assert 0 < masked.sum() < masked.numel()
    model, n = build(), 6000
    count = torch.arange(n) % 6 + 1
    masked = model.mask(count, BatchNoise(0, total=n))
    assert torch.equal(masked.sum(1), count)
    assert (masked[count == 2].float().mean(0) - 2 / 6).abs().max() < 0.06


def test_the_bound_is_the_mean_over_all_orders():
    """4 codes, 24 orders: E_order Σ −log p(next | before), which no order's mixture beats (Jensen)."""
    model = build((1, 8, 8), codes=3)
    codes = torch.tensor([[0, 2, 1, 1]])
    with torch.no_grad():
        totals = []
        for order in itertools.permutations(range(4)):
            total = 0.0
            for i, place in enumerate(order):
                masked = torch.ones(1, 4, dtype=torch.bool)
                masked[0, list(order[:i])] = False
                total -= float(model(codes, masked).log_softmax(-1)[0, place, codes[0, place]])
            totals.append(total)
        exact = sum(totals) / 24
        n = 20_000
        bounds = model.nll(codes.expand(n, -1), None, BatchNoise(0, total=n), terms=4)
    assert bounds.mean().item() == pytest.approx(exact, abs=5 * float(bounds.std()) / math.sqrt(n))
    assert bounds.std() > 0 and exact >= -math.log(sum(math.exp(-t) for t in totals) / 24)
    # classes that the net does not tell apart: nothing is gained by the choice, whatever masks are drawn
    model = build(classes=CLASSES)
    torch.nn.init.zeros_(model.label.table.weight)
    x = images(6)
    codes = model.tokenizer.encode(x).flatten(1)
    with torch.no_grad():
        one = model.nll(codes, None, noise(6))
        torch.testing.assert_close(model.score_nll(x, noise=noise(6)), one)
        torch.testing.assert_close(model.class_log_prob(codes, noise(6)), -one[:, None].expand(-1, 3))


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sampling_unmasks_on_the_cosine_schedule_and_keeps_what_it_has(steps, monkeypatch):
    model = build((1, 16, 16), codes=7)
    net = Uniform(torch.linspace(0, 1, 7).double())
    monkeypatch.setattr(MaskGIT, "_logits", lambda self, codes, masked, labels, guidance: net(codes, masked))
    codes, every = torch.zeros(3, 16, dtype=torch.long), torch.ones(3, 16, dtype=torch.bool)
    done = model._fill(codes, every, None, noise(3), no_progress, FillOptions(steps=steps))
    left = [math.floor(16 * math.cos(0.5 * math.pi * i / steps)) for i in range(steps)]
    assert [masked.sum(1).tolist() for _, masked in net.seen] == [[n] * 3 for n in left]
    for (before, masked), (after, later) in itertools.pairwise(net.seen):
        assert not (later & ~masked).any() and torch.equal(after[~masked], before[~masked])
    last, masked = net.seen[-1]
    assert torch.equal(done[~masked], last[~masked]) and done.unique().numel() > 3


def test_without_choice_noise_the_most_confident_stay(monkeypatch):
    model = build((1, 16, 16), codes=2)
    certainty = torch.linspace(1, 30, 16).double()
    net = Uniform(torch.stack([certainty, torch.zeros(16).double()], -1))
    monkeypatch.setattr(MaskGIT, "_logits", lambda self, codes, masked, labels, guidance: net(codes, masked))
    start = torch.zeros(1, 16, dtype=torch.long)
    how = FillOptions(steps=3, temperature=1e-3, choice=0.0)
    model._fill(start, torch.ones(1, 16, dtype=torch.bool), None, noise(1), no_progress, how)
    masked = net.seen[1][1][0]
    assert torch.equal(masked, torch.arange(16) < masked.sum())


def test_sampled_frequencies_are_the_probabilities_in_one_code():
    model, n = build((1, 4, 4), codes=4, dtype=torch.float32), 20_000
    with torch.no_grad():
        p = model(torch.zeros(1, 1).long(), torch.ones(1, 1, dtype=torch.bool)).softmax(-1)[0, 0]
        start, every = torch.zeros(n, 1).long(), torch.ones(n, 1, dtype=torch.bool)
        codes = model._fill(start, every, None, BatchNoise(0, total=n), no_progress, FillOptions(steps=1))
    assert ((codes[:, 0].bincount(minlength=4) / n - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_guidance_goes_from_the_null_label_through_the_class():
    model = build(classes=CLASSES)
    codes, masked, y = torch.zeros(2, 6).long(), torch.ones(2, 6, dtype=torch.bool), torch.tensor([0, 2])
    with torch.no_grad():
        with_label, without = model(codes, masked, y), model(codes, masked, None)
        guided = model._logits(codes, masked, y, 2.5)
        torch.testing.assert_close(guided, without + 2.5 * (with_label - without))
    draw = lambda **how: model.sample(2, labels=y, noise=noise(2), options=FillOptions(**how))  # noqa: E731
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(guidance=4.0))
    refused("guidance", build().sample, 2, noise=noise(2), options=FillOptions(guidance=2.0))
    for bad in ({"temperature": 0.0}, {"steps": 0}):
        refused("", model.sample, 2, noise=noise(2), options=FillOptions(**bad))


def test_inpainting_keeps_the_known_pixels_and_knows_nothing_of_the_hidden():
    model, x = build((1, 16, 16), codes=16, classes=CLASSES), images(3, (1, 16, 16))
    mask = torch.ones(3, 1, 16, 16)
    mask[:, :, 5:9, 2:] = 0
    fill = lambda x, mask=mask, seed=0: model.inpaint(x, mask=mask, noise=noise(3, seed)).images  # noqa: E731
    done, visible = fill(x), mask.expand_as(x) > 0
    assert torch.equal(done[visible], x[visible]) and not torch.equal(done, x)
    assert torch.equal(fill(torch.where(visible, x, -x)), done)
    assert not torch.equal(fill(x, seed=1), done) and torch.equal(fill(x, torch.ones_like(mask)), x)
    options = {"labels": torch.tensor([0, 1, 2]), "options": FillOptions(guidance=2.0)}
    middle = model.inpaint(x, noise=noise(3), **options).images
    assert (middle != x).any(0).any(0).nonzero().aminmax()[0] >= 4
    assert torch.equal(middle[:, :, :4], x[:, :, :4])
    with pytest.raises(UsageError, match="needs labels"):
        build((1, 16, 16), codes=16, classes=CLASSES, label_dropout=0.0).inpaint(x, noise=noise(3))
