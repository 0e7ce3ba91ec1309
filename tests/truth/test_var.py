"""VAR: parts of scales that add up, causality over scales, probabilities that sum to 1, cached sampling."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from coded import images, prior
from draws import noise
from refused import refused

from gzcli.models.autoregressive.scales import codebook_of
from gzcli.models.autoregressive.tokenizer import CodebookOptions, draw
from gzcli.models.autoregressive.transformer import DrawOptions, Transformer, truncated_probs
from gzcli.models.autoregressive.var import VAR
from gzcli.models.base import group_options

CLASSES, SCALES = ("a", "b", "c"), (1, 2, 4)
build = partial(prior, VAR, book={"scales": SCALES})


def test_the_parts_of_scales_are_what_is_left_of_the_scales_before_and_add_up():
    """Algorithms 1 and 2 by hand, on a grid of 3 × 2: scales of 1 × 1, 2 × 2 and the grid; 4 is left out."""
    torch.manual_seed(0)
    book = codebook_of(CodebookOptions(codes=16, dim=3, scales=SCALES, codebook="gradient"), (3, 2)).double()
    for p in book.convs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, total, rows = torch.randn(4, 3, 3, 2).double(), 0, []
    left = z
    for (h, w), conv in zip([(1, 1), (2, 2), (3, 2)], book.convs, strict=True):
        small = F.adaptive_avg_pool2d(left, (h, w))
        codes = (small.movedim(1, -1)[..., None, :] - book.embedding).square().sum(-1).argmin(-1)
        e = F.interpolate(book.embedding[codes].movedim(-1, 1), (3, 2), mode="bicubic")
        part = e + conv(e)
        left, total, rows = left - part, total + part, [*rows, codes.flatten(1)]
    same, codes, quantised = book.nearest(z)
    assert torch.equal(codes, torch.cat(rows, 1)) and torch.equal(same, z) and codes.unique().numel() > 4
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)  # the weights of its resampling are fp32
    close(quantised, total)
    close(z - quantised, left)
    torch.testing.assert_close(book.lookup(codes), quantised)
    q, figures = book(z.requires_grad_(), noise(4))
    sums = list(book.sums(codes))[1:]
    expected = sum(F.mse_loss(e, z) for e in sums) / 3
    torch.testing.assert_close(figures["loss"], 1.25 * expected)
    to_z, to_e = torch.autograd.grad(figures["loss"], [z, book.embedding], retain_graph=True)
    torch.testing.assert_close(to_z, 0.25 * torch.autograd.grad(expected, z, retain_graph=True)[0])
    torch.testing.assert_close(to_e, torch.autograd.grad(expected, book.embedding)[0])
    assert torch.equal(torch.autograd.grad(q.sum(), z)[0], torch.ones_like(z))


def test_each_scale_sees_all_coarser_scales_and_nothing_else():
    model = build((1, 16, 16))
    scales = model.book.scales
    assert [s.stop - s.start for s in scales] == [1, 4, 16]
    level = torch.cat([torch.full((s.stop - s.start,), k) for k, s in enumerate(scales)])
    codes = torch.randint(model.codes, (1, model.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(codes)
        for i in range(model.length):
            variant = codes.clone()
            variant[0, i] = (variant[0, i] + 1) % model.codes
            moved = (model(variant) - logits).abs().amax((0, 2)) > 1e-12
            assert torch.equal(moved, level > level[i])
    # by gradients: of the logits of a scale, with respect to the parts of every scale
    parts = [model.book.part(codes[:, s], k).requires_grad_() for k, s in enumerate(scales)]
    sums = [torch.zeros_like(parts[0]), *itertools.accumulate(parts)]
    h = torch.cat([model.inputs(f, k) for k, f in enumerate(sums[:-1])], 1) + model.label(None, 1, None)
    again = model.head(model.trunk(h, visible=model.visible, grids=model.book.grids))
    torch.testing.assert_close(again, logits)
    for k, s in enumerate(scales):
        grads = torch.autograd.grad(again[:, s].sum(), parts, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in grads] == [j < k for j in range(3)]


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_probabilities_of_all_codes_sum_to_one(classes):
    model = build((1, 8, 8), codes=2, classes=classes)
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    with torch.no_grad():
        for y in range(len(classes) or 1):
            p = (-model.nll(every, torch.full((len(every),), y) if classes else None)).exp()
            assert p.sum() == pytest.approx(1, abs=1e-12) and p.max() > 2 / len(every)
        x = images(3, (1, 8, 8))
        codes = model.tokenizer.encode(x)
        each = [model.nll(codes, torch.full((3,), y) if classes else None) for y in range(len(classes) or 1)]
        mixture = torch.stack([nll.neg().exp() for nll in each]).mean(0)
        torch.testing.assert_close(model.score_nll(x, noise=noise(3)), -mixture.log())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"guidance": 2.5}])
def test_cached_samples_are_those_of_whole_passes(options):
    model, labels = build(classes=CLASSES, label_dropout=0.2), torch.tensor([0, 1, 2, 0, 1])
    how = group_options(model.sample, options)
    u, scales, guidance = noise(5).rand(5, model.length), model.book.scales, options.get("guidance", 1.0)
    codes = torch.zeros(5, model.length, dtype=torch.long)
    with torch.no_grad():
        for k, s in enumerate(scales):
            logits = model(codes, labels)
            without = model(codes, labels, torch.ones(5, dtype=torch.bool))
            logits = without + (1 + (guidance - 1) * k / (len(scales) - 1)) * (logits - without)
            codes[:, s] = draw(truncated_probs(logits, how.get("options", DrawOptions())), u)[:, s]
        x = model.sample(5, labels=labels, noise=noise(5), **how)
        assert torch.equal(x, model.images(codes)) and codes.unique().numel() > 1


def test_codes_of_the_wrong_kind_are_refused():
    refused("several scales", prior, VAR, hint="stages.tokenizer.model.scales")
    refused("one scale", prior, Transformer, book={"scales": SCALES}, hint="stages.tokenizer.model.scales")
    refused("codes of several scales", build, book={"scales": SCALES, "cosine": True}, hint="model.cosine")
    refused("get smaller", build, book={"scales": SCALES, "levels": (4, 4)}, hint="model.levels")
