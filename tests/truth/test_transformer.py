"""The GPT over codes: causality, probabilities that sum to 1, cached sampling against whole passes."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from coded import images, prepared, prior
from draws import noise
from refused import refused

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.models.autoregressive.tokenizer import draw
from gzcli.models.autoregressive.transformer import DrawOptions, Transformer, truncated_probs
from gzcli.models.base import group_options

CLASSES, build = ("a", "b", "c"), partial(prior, Transformer)


def test_each_code_sees_exactly_the_codes_before_it_and_what_top_k_and_top_p_leave():
    model = build()
    codes = torch.randint(model.codes, (1, model.length))
    with torch.no_grad():
        logits = model(codes)
        for i in range(model.length):
            variant = codes.clone()
            variant[0, i] = (variant[0, i] + 1) % model.codes
            moved = (model(variant) - logits).abs().amax((0, 2)) > 1e-9
            assert torch.equal(moved, torch.arange(model.length) > i)
        beginning = model(codes[:, :3])
        assert torch.allclose(beginning, logits[:, :3], atol=1e-12), "it is judged as in the whole"
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    for options, left in (
        ({"top_k": 2}, [0.4, 0.0, 0.3, 0.0]),
        ({"top_p": 0.65}, [0.4, 0.0, 0.3, 0.0]),
        ({"top_p": 0.71}, [0.4, 0.0, 0.3, 0.2]),
        ({"top_p": 1e-9, "top_k": 9}, [0.4, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
    ):
        assert torch.allclose(truncated_probs(logits, DrawOptions(**options)), torch.tensor([left])), options
    for bad in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        refused("", truncated_probs, logits, DrawOptions(**bad))


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_probabilities_of_all_codes_sum_to_one(classes):
    model = build((1, 8, 8), codes=4, classes=classes)
    grid = torch.tensor(list(itertools.product(range(4), repeat=4)))
    with torch.no_grad():
        for y in range(len(classes) or 1):
            p = (-model.nll(grid, torch.full((len(grid),), y) if classes else None)).exp()
            assert p.sum() == pytest.approx(1, abs=1e-12) and p.max() > 3 / len(grid)


def test_scores_and_figures():
    model, x = build(classes=CLASSES), images(3)
    codes = model.tokenizer.encode(x).flatten(1)
    with torch.no_grad():
        each = torch.stack([(-model.nll(codes, torch.full((3,), y))).exp() for y in range(3)])
        torch.testing.assert_close(model.score_nll(x, noise=noise(3)), -each.mean(0).log())
        plain = build()
        nll = plain.nll(plain.tokenizer.encode(x).flatten(1), None)
        torch.testing.assert_close(plain.score_nll(x, noise=noise(3)), nll)
    model, x = build(), images(6)
    batches = [Batch(part, None, torch.arange(3), noise(3)) for part in x.split(3)]
    with torch.no_grad():
        values = model.measure(batches)
        codes = model.tokenizer.encode(x)
        again = model.reconstruct(x, noise=noise(6), progress=no_progress).images
        p = codes.flatten().bincount(minlength=5) / codes.numel()
        assert values["mse"] == pytest.approx(float(F.mse_loss(again / 2, x / 2)))
        assert values["entropy"] == pytest.approx(-float(torch.special.xlogy(p, p).sum()), rel=1e-6)
        assert values["perplexity"] == pytest.approx(math.exp(values["entropy"]))
        nll = float(model.nll(codes.flatten(1), None).mean())
        assert values["code_nats"] == pytest.approx(nll / model.length) and "nats" not in values


def recompute(model: Transformer, n: int, labels, noise, guidance: float = 1.0, **options) -> torch.Tensor:
    """Codes [n, T] by a pass of the whole net for each, without cache."""
    u = noise.rand(n, model.length).to(model.head.weight)
    codes = torch.zeros(n, model.length, dtype=torch.long)
    for i in range(model.length):
        logits = model(codes[:, : i + 1], labels)[:, i]
        if guidance != 1:
            without = model(codes[:, : i + 1], labels, torch.ones(n, dtype=torch.bool))[:, i]
            logits = without + guidance * (logits - without)
        codes[:, i] = draw(truncated_probs(logits, DrawOptions(**options)), u[:, i])
    return codes


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8, "guidance": 2.5}])
def test_cached_samples_are_those_of_whole_passes(options):
    model, labels = build(classes=CLASSES, label_dropout=0.2), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        codes = recompute(model, 5, labels, noise(5), **options)
        x = model.sample(5, labels=labels, noise=noise(5), **group_options(model.sample, options))
        assert torch.equal(x, model.images(codes)) and codes.unique().numel() > 1
        single = model.float()
        x = single.sample(5, labels=labels, noise=noise(5), **group_options(model.sample, options))
        assert torch.equal(x, single.images(recompute(single, 5, labels, noise(5), **options)))


def test_sampled_frequencies_are_the_probabilities():
    """4 codes of 2: every sequence's frequency within five standard errors of exp(−nll)."""
    model, n = build((1, 8, 8), codes=2, dtype=torch.float32), 20_000
    start = torch.zeros(n, 0, dtype=torch.long)
    with torch.no_grad():
        codes = model._generate(start, None, BatchNoise(0, total=n), no_progress, DrawOptions(), 1.0)
        grid = torch.tensor(list(itertools.product(range(2), repeat=4)))
        p = (-model.nll(grid, None)).exp()
    frequencies = (codes * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16) / n
    assert ((frequencies - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_the_loss_is_the_mean_nll_of_a_code():
    model = build(classes=CLASSES).train()
    x, y = images(4), torch.tensor([0, 1, 2, 0])
    batch = prepared(model, x, y)
    codes = batch.extra["codes"]
    assert codes.dtype == torch.int16 and torch.equal(codes.long(), model.tokenizer.encode(x).flatten(1))
    parts = model.loss(batch)
    torch.testing.assert_close(parts["loss"], model.nll(codes.long(), y).mean() / model.length)
    torch.testing.assert_close(parts["bits"], parts["loss"].detach() / math.log(2))
    single = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        low = single.loss(batch)["loss"]
    low.backward()
    assert low.dtype == torch.float32 and low.item() == pytest.approx(parts["loss"].item(), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in single.parameters())
    dropping, y = build(classes=CLASSES, label_dropout=0.3).train(), torch.zeros(2000).long()
    rows = Batch(torch.zeros(2000, 1), y, torch.arange(2000), BatchNoise(0, total=2000))
    assert dropping.training_labels(rows)[1].float().mean() == pytest.approx(0.3, abs=0.05)
    assert dropping.eval().training_labels(rows)[1].sum() == 0


@pytest.mark.parametrize("classes", [(), CLASSES])
def test_completion_keeps_the_rows_and_knows_nothing_of_the_others(classes):
    model, x = build(classes=classes), images(4)
    y = torch.tensor([0, 1, 2, 0]) if classes else None
    complete = lambda x, rows, y=y: model.complete(x, rows=rows, labels=y, noise=noise(4)).images  # noqa: E731
    done = complete(x, 4)
    assert torch.equal(done[:, :, :4], x[:, :, :4]) and not torch.equal(done, x)
    hidden = torch.cat([x[:, :, :4], -x[:, :, 4:]], 2)
    for labels in (y, None):
        assert torch.equal(complete(x, 4, labels), complete(hidden, 4, labels))
    assert not torch.equal(done[:, :, 4:], complete(-x, 4)[:, :, 4:])
    assert torch.equal(complete(x, 12), x)
    assert torch.equal(complete(x, 0), model.sample(4, labels=y, noise=noise(4)))
    refused("multiple of 4", complete, x, 5)


def test_completion_infers_the_class_from_the_kept_codes():
    model = build((1, 16, 16), codes=16, classes=CLASSES, scale=0.3)
    model.label.table.weight.data.mul_(4)
    x = images(9, (1, 16, 16))
    source = torch.cat([x[:, :, :8], x[:, :, 7:8].expand(-1, -1, 8, -1)], 2)
    best = model.class_log_prob(model.tokenizer.encode(source).flatten(1)[:, :8], noise(9)).argmax(1)
    blind, labelled = (model.complete(x, rows=8, labels=y, noise=noise(9)).images for y in (None, best))
    assert torch.equal(blind, labelled) and best.unique().numel() > 1


def test_the_tokenizer_is_frozen_and_decay_is_for_matrices():
    model = build().train()
    assert not model.tokenizer.training and not any(p.requires_grad for p in model.tokenizer.parameters())
    assert not any("tokenizer" in key for key in model.state_dict())
    over = partial(Transformer.of, DataInfo((1, 12, 8)))
    for message, call in {
        "guidance": lambda: model.sample(2, noise=noise(2), guidance=2.0),
        "labels": lambda: over(tokenizer=model.tokenizer, conditional=True),
        "heads": lambda: over(tokenizer=model.tokenizer, width=10, heads=4),
        "makes no codes": lambda: over(tokenizer=model),
    }.items():
        refused(message, call)
    decayed, free = build().phases()[0].groups()
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim < 2 for p in free["params"])
    assert free["weight_decay"] == 0.0
