"""Clusters in place of labels, against k-means of scikit-learn and counts."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coded import images as coded_images
from coded import prepared, prior
from draws import flat, noise
from refused import refused
from sklearn.cluster import KMeans
from torch import nn

from gzcli.core.types import Batch, DataInfo, ImageNoise, no_progress
from gzcli.engine import checkpoint
from gzcli.engine.ema import EMA
from gzcli.judge.likelihood import log_marginal
from gzcli.models import catalog
from gzcli.models.autoregressive.maskgit import MaskGIT
from gzcli.models.autoregressive.transformer import Transformer
from gzcli.models.labelled import GUIDANCE, Clusters
from gzcli.models.nn import ClassEmbedding

SHAPE = (1, 4, 4)
INFO = DataInfo(SHAPE, classes=("a", "b"))
SMALL = {"channels": 4, "groups": 4, "mult": (1,), "attention": (), "patch": 1}


def images(counts: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Images about as many random means as there are counts, in random order."""
    gen = torch.Generator().manual_seed(seed)
    means = torch.rand(len(counts), *SHAPE, generator=gen) * 2 - 1
    which = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    which = which[torch.randperm(len(which), generator=gen)]
    return means[which] + 0.01 * torch.randn(len(which), *SHAPE, generator=gen)


def batches(x: torch.Tensor, size: int = 32) -> list[Batch]:
    parts = x.split(size)
    return [Batch(p, None, torch.arange(len(p)), ImageNoise(i, range(len(p)))) for i, p in enumerate(parts)]


def fitted(counts: tuple[int, ...], number: int) -> tuple[Clusters, torch.Tensor]:
    clusters, x = Clusters(SHAPE, number), images(counts)
    clusters.fit(batches(x))
    return clusters, x


def test_clusters_are_those_of_scikit_learn_and_fewer_of_few_images(recwarn):
    clusters, x = fitted((60, 30, 10), 3)
    theirs = KMeans(3, n_init=10, random_state=1).fit(x.flatten(1).numpy())
    pairs = set(zip(clusters(x).tolist(), theirs.labels_.tolist(), strict=True))
    assert len(pairs) == 3
    assert sorted(clusters.shares.tolist()) == pytest.approx([0.1, 0.3, 0.6])
    frequencies = np.bincount(clusters(x).numpy(), minlength=3) / 100
    assert clusters.shares.numpy() == pytest.approx(frequencies, abs=1e-6)
    for mine, peer in pairs:
        centre = theirs.cluster_centers_[peer]
        assert clusters.centres[mine].numpy() == pytest.approx(centre, abs=1e-5)
    clusters = Clusters((3, 128, 64), 2)
    assert clusters.centres.shape == (2, 3 * 32 * 32)
    x = torch.rand(2, 3, 128, 64)
    means = x.view(2, 3, 32, 4, 32, 2).mean((3, 5)).flatten(1)
    assert clusters.points(x).numpy() == pytest.approx(means.numpy(), abs=1e-6)
    for counts, number in (((2, 2), 1), ((30, 29), 2), ((40, 40), 4)):
        clusters, x = fitted(counts, 9)
        assert (clusters.shares > 0).sum() == number
        assert set(clusters.draw(1_000, ImageNoise(1, range(1_000))).tolist()) <= set(clusters(x).tolist())
    clusters = Clusters(SHAPE, 4)
    clusters.fit(batches(torch.ones(20, *SHAPE)))
    assert clusters.shares.max() == 1 and not len(recwarn), "equal images"


def test_images_have_clusters_by_their_shares():
    """As evenly as the shares allow, and any one image with the probability of the share."""
    clusters, _ = fitted((60, 30, 10), 3)
    for seed in range(5):
        drawn = clusters.draw(1_000, ImageNoise(seed, range(1_000)))
        for n in (1, 10, 64, 1_000):
            counts = torch.bincount(drawn[:n], minlength=3)
            assert counts.numpy() == pytest.approx((n * clusters.shares).numpy(), abs=2)
        assert torch.equal(clusters.draw(50, ImageNoise(seed, range(100, 150))), drawn[100:150])
    drawn = torch.cat([clusters.draw(1, ImageNoise(seed, [7])) for seed in range(2_000)])
    shares = torch.bincount(drawn, minlength=3) / 2_000
    assert shares.numpy() == pytest.approx(clusters.shares.numpy(), abs=4 * 0.5 / 2_000**0.5)


class Heard(nn.Module):
    """A net that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.weight, self.told = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, t, y=None, drop=None):
        self.told.append(y)
        return x * self.weight


@pytest.mark.parametrize("name", ["fm", "rf", "sgm", "ddpm", "ncsnv2", "zigma", "eqm"])
def test_the_network_is_told_the_cluster_in_training_and_guided_to_a_drawn_one_in_sampling(name):
    """The guided output is that of `guided_output`, whose equation test_fm and test_ddpm check."""
    patch = {"patch": 1} if name in ("rf", "zigma") else {}
    model, x = catalog.load(name).of(INFO, clusters=3, **patch), images((60, 30, 10))
    model.fit(batches(x))
    model.net = Heard()
    model.loss(Batch(x[:8], torch.zeros(8, dtype=torch.long), torch.arange(8), noise(8, 5)))
    assert torch.equal(model.net.told[-1], model.clusters(x[:8]))
    model.sample(40, noise=noise(40), progress=no_progress)
    clusters = model.net.told[-1][:40]  # of a batch doubled by guidance
    assert all(torch.equal(clusters, rows) for y in model.net.told[1:] for rows in y.split(40))
    draws = noise(40)
    draws.randn(40)  # its noise is the first draw, the clusters are the second
    assert torch.equal(clusters, model.clusters.draw(40, draws))

    def scales(options: dict, **how) -> set[float]:
        model = catalog.load(name).of(INFO, **options, **patch)
        values, guided = [], model.guided_output
        model.guided_output = lambda x, t, y, scale: values.append(scale) or guided(x, t, y, scale)
        flat(model.sample)(2, noise=noise(2), progress=no_progress, steps=2, **how)
        return set(values)

    assert scales({"clusters": 3}) == {model.towards_clusters}
    assert scales({"clusters": 3}, guidance=1.0) == {1.0}
    assert scales({"clusters": 3, "label_dropout": 0.0}) == scales({"clusters": 0}) == {1.0}
    assert scales({"conditional": True}) == {1.0}


def test_guidance_goes_towards_clusters_where_there_are_some():
    build = lambda **options: catalog.load("fm").of(INFO, **options, **SMALL)  # noqa: E731
    guided = lambda **options: flat(build(**options).sample)(2, noise=noise(2), guidance=2.0)  # noqa: E731
    guided(clusters=3)
    refused("conditional", guided, clusters=0)
    refused("label dropout", guided, conditional=True, label_dropout=0.0)
    labelled = build(clusters=3, conditional=True)
    assert (labelled.clusters.each, labelled.net.label.classes) == (1, 3)
    sets = replace(INFO, multilabel=True)
    refused("one class each", catalog.load("fm").of, sets, conditional=True, clusters=3)
    for name in ("fm", "rf", "ncsnv2", "zigma"):
        refused("clusters", catalog.load(name).of, INFO, clusters=-3)


def of_classes(counts: tuple[int, ...] = (90, 60, 30), number: int = 7, classes: int = 3):
    """Clusters of three classes that overlap, with their images and labels."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = torch.cat([images((n // 3, n - n // 3), seed=k) for k, n in enumerate(counts)])
    clusters = Clusters(SHAPE, number, classes)
    clusters.fit([Batch(x, y, torch.arange(len(x)), ImageNoise(0, range(len(x))))])
    return clusters, x, y


def test_clusters_of_a_class_are_its_own_and_drawn_by_their_shares_within_it():
    clusters, x, y = of_classes()
    assert (clusters.each, clusters.shares[6]) == (2, 0), "two in each class, one is left"
    for k in range(3):
        theirs = KMeans(2 if k < 2 else 1, n_init=10, random_state=1).fit(x[y == k].flatten(1).numpy())
        distance = torch.cdist(torch.tensor(theirs.cluster_centers_), clusters.centres[2 * k : 2 * k + 2])
        assert distance.min(1).values.max() < 1e-5
    c = clusters(x, y)
    assert torch.equal(c // 2, y) and clusters.shares.numpy() == pytest.approx(
        torch.bincount(c, minlength=7).numpy() / len(x), abs=1e-6
    )
    of_class = torch.stack(
        [clusters.log_prob(torch.arange(2 * k, 2 * k + 2), torch.tensor([k, k])).exp() for k in range(3)]
    )
    torch.testing.assert_close(of_class.sum(1), torch.ones(3))
    torch.testing.assert_close(clusters.log_prob(c), clusters.shares[c].log())
    for labels in (torch.arange(900) % 3, torch.full((900,), 1)):
        drawn = clusters.draw(900, ImageNoise(3, range(900)), labels)
        assert torch.equal(drawn // 2, labels)
        for k in labels.unique():
            counts = torch.bincount(drawn[labels == k] - 2 * k, minlength=2)
            assert counts.numpy() == pytest.approx((counts.sum() * of_class[k]).numpy(), abs=4)
        assert torch.equal(clusters.draw(50, ImageNoise(3, range(100, 150)), labels[100:150]), drawn[100:150])
    clusters, x, y = of_classes((40, 40), 1 * 4, classes=4)  # two classes have no images
    assert clusters.shares.isfinite().all() and clusters.log_prob(torch.tensor([3]), torch.tensor([3])) == 0
    assert (
        catalog.load("fm")
        .of(replace(INFO, classes=tuple("abcd")), clusters=3, conditional=True, **SMALL)
        .clusters.each
        == 1
    )


def within_classes(name: str = "fm", **options):
    """A model of two clusters in each of two classes, and its images with their labels."""
    sizes = {} if name in ("rf", "tarflow") else SMALL
    clusters, x, y = of_classes((60, 60), 4, classes=2)
    model = catalog.load(name).of(INFO, clusters=4, conditional=True, **sizes, **options)
    model.clusters.load_state_dict(clusters.state_dict())
    return model, x, y


def test_the_embedding_of_a_cluster_is_that_of_its_class_and_its_own_which_starts_at_zero():
    embed = ClassEmbedding((7, 3), 5)  # the last cluster lies in no class, and is never drawn
    table, y = embed.table.weight, torch.arange(6)
    assert table.shape == (11, 5) and not table[:7].any() and table[7:].all()
    torch.testing.assert_close(embed(y, 6), table[8 + y // 2])
    nn.init.normal_(table)
    torch.testing.assert_close(embed(y, 6), table[y] + table[8 + y // 2])
    torch.testing.assert_close(embed(torch.tensor([8, 9, 10]), 3), table[8:], msg="a class alone")
    torch.testing.assert_close(embed(y, 6, y > 3)[4:], embed(None, 2), msg="the null label")
    assert torch.equal(embed(None, 1)[0], table[7])
    embed(torch.tensor([2]), 1).sum().backward()
    assert table.grad.any(1).nonzero().flatten().tolist() == [2, 9], "a step for one is one for its class"
    plain = ClassEmbedding(3, 5)
    assert plain.rows is plain.table.weight and plain.table.weight.all()
    for model in (within_classes()[0], within_classes("rf", patch=1)[0], within_classes("tarflow")[0]):
        tables = [m for m in model.modules() if isinstance(m, ClassEmbedding)]
        assert [(m.classes, m.parents) for m in tables] == [(4, 2)]
        assert not tables[0].table.weight[:4].any()


def test_training_hides_the_cluster_alone_as_often_as_all_of_the_label():
    model, _, _ = within_classes(label_dropout=0.2)
    c = torch.arange(4000) % 4
    model.condition = lambda batch: c
    y, drop = model.training_labels(Batch(torch.zeros(4000), None, c, noise(4000)))
    alone = y > 4
    assert torch.equal(y[~alone], c[~alone]) and torch.equal(y[alone] - 5, c[alone] // 2)
    assert not (alone & drop).any()
    assert [m.float().mean().item() for m in (alone, drop)] == [pytest.approx(0.2, abs=0.03)] * 2
    for options in ({"conditional": False}, {"clusters": 2}):  # no class, and one cluster in each
        model = catalog.load("fm").of(INFO, **{"clusters": 4, "conditional": True} | options, **SMALL)
        model.condition = lambda batch: c % 2
        assert torch.equal(model.training_labels(Batch(c, None, c, noise(4000)))[0], c % 2)


def test_weights_of_clusters_without_rows_of_their_classes_load_and_train_on():
    model, x, y = within_classes()
    nn.init.normal_(model.net.conv_out.weight)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    old["net.label.table.weight"] = 3 * torch.randn(5, 16)  # of four clusters and the null label
    model.load_state_dict(old)
    table = model.net.label.table.weight
    assert torch.equal(table[:5], old["net.label.table.weight"]) and not table[5:].any()
    torch.testing.assert_close(model.net.label(torch.arange(4), 4), table[:4])
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(Batch(x[:8], y[:8], torch.arange(8), noise(8)))["loss"].backward()
    optimizer.step()
    state, params = optimizer.state_dict(), list(model.parameters())
    i = next(i for i, p in enumerate(params) if p is table)
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][i][key] = state["state"][i][key][:5]
    checkpoint.restore(optimizer, state)
    assert optimizer.state[table]["exp_avg"].shape == table.shape
    ema = EMA(model, 0.9)
    ema.load_state_dict(old | {n: p for n, p in model.named_parameters() if n not in old}, 3)
    assert torch.equal(ema.state_dict()["net.label.table.weight"][:5], old["net.label.table.weight"])


def test_the_nearest_cluster_is_that_of_what_is_known():
    clusters, x, _ = of_classes()
    centres = clusters.centres[clusters.shares > 0].view(-1, *SHAPE)
    mask = (torch.rand(len(x), 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    nearest = ((x[:, None] - centres) * mask[:, None]).square().flatten(2).sum(2).argmin(1)
    hidden = torch.where(mask > 0, x, 9.0)
    assert torch.equal(clusters(hidden, mask=mask), nearest) and torch.equal(
        clusters(x, mask=mask * 0 + 1), clusters(x)
    )
    pool = nn.functional.avg_pool2d
    small = torch.cdist(pool(x, 2).flatten(1), pool(centres, 2).flatten(1)).argmin(1)
    assert torch.equal(clusters(pool(x, 2)), small) and small.unique().numel() > 2


MEANS = torch.tensor([-0.7, -0.5, 0.5, 0.6])  # of clusters: the first two of class 0, the others of class 1


class Gaussians(nn.Module):
    """The velocity of N(mean, .1²) by pixel given the cluster."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(MEANS.double())

    def forward(self, x, t, y=None, drop=None):
        t, std = t[:, None, None, None] / 1000, 0.1
        mean, variance = self.means[y][:, None, None, None], (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


def gaussians(means: torch.Tensor, conditional: bool) -> nn.Module:
    """A flow of four Gaussian clusters with exact velocities."""
    model = catalog.load("fm").of(
        DataInfo((1, 2, 2), 256, ("a", "b")), clusters=4, conditional=conditional, **SMALL
    )
    model.net = Gaussians()
    model.net.means.data = means.double()
    model.clusters.centres.copy_(means[:, None].expand(-1, 4))
    model.clusters.shares.copy_(torch.tensor([0.1, 0.3, 0.2, 0.4]))
    return model.double().eval()


@pytest.mark.parametrize("means", [MEANS, torch.tensor([-0.9, -0.3, 0.3, 0.9])])
def test_a_likelihood_is_a_bound_of_the_mixture_and_equal_where_clusters_are_apart(means):
    """Against the mixture of Gaussians; σ/α of data is that of dequantisation."""
    model, labelled = gaussians(means, False), gaussians(means, True)
    std, n, c = 0.1, 64, torch.arange(64) % 4
    x = means[c][:, None, None, None].double() + std * ImageNoise(9, range(n)).randn(n, 1, 2, 2).double()
    dequantised = x + 2 / 255 * (noise(n).rand(n, 1, 2, 2).double() - 0.5)
    law = torch.distributions.Normal(means.double(), math.hypot(std, 1 / 255 / 3**0.5))
    log_p = (
        law.log_prob(dequantised.flatten(1)[..., None]).sum(1)
        + 4 * math.log(2 / 255)
        + model.clusters.shares.log()
    )
    bound, nearest = model.log_prob(x, noise=noise(n)), model.clusters(x)
    torch.testing.assert_close(bound, log_p[torch.arange(n), nearest], atol=2e-3, rtol=0)
    gap = log_p.logsumexp(1) - bound
    assert gap.min() > -2e-3
    assert (gap.max() > 0.1) if means is MEANS else (gap.max() < 2e-2)
    of_class = log_p.unflatten(1, (2, 2))
    per_class = torch.stack([labelled.log_prob(x, torch.full((n,), k), noise=noise(n)) for k in range(2)], 1)
    p_y = torch.tensor([0.4, 0.6]).double()
    excess = per_class + p_y.log() - of_class.logsumexp(2)
    assert (excess / per_class.abs()).max() < 1e-3, "a relative error of the solver far from the data"
    torch.testing.assert_close(
        labelled.log_prob(x, noise=noise(n)), (per_class + p_y.log())[torch.arange(n), nearest // 2]
    )
    batch = Batch(x, nearest // 2, torch.arange(n), noise(n))
    marginal = log_marginal(labelled, batch, p_y, seed=0)
    torch.testing.assert_close(marginal, (per_class + p_y.log()).logsumexp(1))
    assert (log_p.logsumexp(1) - marginal).min() > -2e-3


@pytest.mark.parametrize("name", ["fm", "ddpm"])
def test_what_is_made_of_an_image_is_told_its_cluster(name):
    clusters, x, y = of_classes((60, 60), 4, classes=2)
    build = lambda **options: catalog.load(name).of(INFO, clusters=4, **SMALL, **options).eval()  # noqa: E731
    model, labelled, x, y = build(), build(conditional=True), x[::20], y[::20]
    for m in (model, labelled):
        m.net = Heard()
        m.clusters.load_state_dict(clusters.state_dict())
    n, scores = len(x), ("score_recon", "log_prob", "score_denoise" if name == "ddpm" else "path_statistics")

    def labels(m, verb, **how):
        m.net.told.clear()
        flat(getattr(m, verb))(x, **how)
        return m.net.told

    for m, verb in itertools.product((model, labelled), ("reconstruct", "interpolate", "inpaint", *scores)):
        how = {"inpaint": {"mask": torch.ones(n, 1, 4, 4)}, "interpolate": {"frames": 2}}.get(verb, {})
        heard = labels(m, verb, **({"steps": 2} if verb == "path_statistics" else {"noise": noise(n)}), **how)
        assert all(torch.equal(rows, clusters(x)) for rows in heard), verb
    for verb, how in {"edit": {"labels": 1 - y}, "log_prob": {"labels": 1 - y}}.items():
        assert all(
            torch.equal(rows, clusters(x, 1 - y)) for rows in labels(labelled, verb, noise=noise(n), **how)
        )
    way = labels(labelled, "translate", labels=1 - y, y=y, noise=noise(n))
    assert torch.equal(way[0], clusters(x, y)) and torch.equal(way[-1], clusters(x, 1 - y))
    heard = labels(labelled, "classify", times=1, noise=noise(n))
    assert all(torch.equal(rows, clusters(x, torch.full((n,), k))) for k, rows in enumerate(heard))
    assert torch.equal(labelled.edit(x, labels=1 - y, noise=noise(n)).labels, 1 - y)


def test_noise_is_paired_within_the_cluster():
    """So that the noise of a cluster is N(0, I): n |mean|² / dim is 1, and more where pairs cross them."""
    model = catalog.load("fm").of(INFO, clusters=3, coupling="ot", **SMALL)
    x = images((300, 200, 100))
    model.fit(batches(x))
    starts = torch.stack(
        [model.noise_and_images(Batch(x, None, torch.arange(600), noise(600, seed)))[0] for seed in range(20)]
    )
    for k in range(3):
        mean = starts[:, model.clusters(x) == k].mean(1)
        of_each = (model.clusters(x) == k).sum() * mean.square().flatten(1).mean(1)
        assert float(of_each.mean()) == pytest.approx(1, abs=5 * (2 / 16 / 20) ** 0.5)


def test_reflow_is_told_the_clusters_of_its_teacher():
    teacher = catalog.load("fm").of(INFO, clusters=3, **SMALL)
    x = images((60, 30, 10))
    teacher.fit(batches(x))
    heard = teacher.net = Heard()
    model = catalog.load("reflow").of(INFO, teacher=teacher, pair_steps=2)
    model.fit(batches(images((5, 5, 5), seed=3)))
    assert torch.equal(model.clusters.centres, teacher.clusters.centres)
    batch = Batch(x[:8], None, torch.arange(8), noise(8, 5))
    batch.extra |= model.prepare(batch)
    assert torch.equal(heard.told[-1], teacher.clusters(x[:8]).repeat(2)), "as the teacher draws: guided"
    assert (model.pair_guidance, model.guidance_scale(None)) == (GUIDANCE, 1.0)
    model.loss(batch)
    assert torch.equal(model.net.told[-1], teacher.clusters(x[:8]))


def clustered(cls=Transformer, shape=(1, 12, 8), **options):
    """A prior of random weights that is told one of three clusters."""
    model = prior(cls, shape, clusters=3, label_dropout=0.1, **options)
    model.fit(batches(coded_images(60, shape), 20))
    return model


@pytest.mark.parametrize("cls", [Transformer, MaskGIT])
def test_a_prior_is_told_the_cluster_of_the_image_and_draws_one_by_its_share(cls):
    model, x, clusters = clustered(cls), coded_images(20), []
    hear = lambda module, args, *_: clusters.append(args[0])  # noqa: E731
    for module in model.modules():
        if isinstance(module, ClassEmbedding):
            module.register_forward_pre_hook(hear)
    model.train().loss(prepared(model, x))
    assert torch.equal(clusters[-1], model.clusters(x))
    model.eval().sample(30, noise=noise(30, 3), progress=no_progress)
    assert torch.equal(clusters[-1], model.clusters.draw(30, noise(30, 3)).repeat(2)), "guided"
    assert model.guidance_scale(None) == GUIDANCE


def test_codes_and_clusters_have_probabilities_by_which_completions_draw():
    """Over all codes and clusters; `joint_nll` and the score are those of the image's own cluster."""
    model = clustered(shape=(1, 8, 8), codes=4)
    grid = torch.tensor(list(itertools.product(range(4), repeat=4)))
    with torch.no_grad():
        p = torch.stack([(-model.nll(grid, y)).exp() for y in model.each_class(grid)], 1)
        joint = model.clusters.shares * p
        assert joint.sum() == pytest.approx(1, abs=1e-6)
        x = coded_images(9, (1, 8, 8))
        rows = (model.tokenizer.encode(x).flatten(1) * torch.tensor([64, 16, 4, 1])).sum(1)
        expected = -joint[rows, model.clusters(x)].log()
        torch.testing.assert_close(model.score_nll(x, noise=noise(9)), expected)
    model = clustered()
    prefix, n = torch.tensor([[1, 3]]), 20_000
    with torch.no_grad():
        joint = torch.stack([(-model.nll(prefix, torch.tensor([k]))).exp() for k in range(3)], 1)
        expected = (joint * model.clusters.shares)[0]
        drawn, first = (
            model.draw_cluster(model.clusters, prefix.expand(n, 2)[:, :k], None, noise(n)) for k in (2, 0)
        )
    for labels, shares in ((drawn, expected / expected.sum()), (first, model.clusters.shares)):
        counts = torch.bincount(labels, minlength=3) / n
        assert counts.numpy() == pytest.approx(shares.numpy(), abs=4 * 0.5 / n**0.5)
    assert model.complete(coded_images(4), noise=noise(4)).images.shape == (4, 1, 12, 8)


@pytest.mark.parametrize("cls", [Transformer, MaskGIT])
def test_a_prior_of_classes_with_clusters_is_told_a_cluster_of_the_class(cls):
    x, y = coded_images(80), torch.arange(80) % 2
    model = prior(cls, clusters=4, label_dropout=0.1, classes=("a", "b"))
    model.fit([Batch(x, y, torch.arange(80), noise(80))])
    codes, c = model.tokenizer.encode(x).flatten(1), model.clusters(x)
    assert (model.clusters.each, (model.clusters.shares > 0).sum()) == (2, 4)
    with torch.no_grad():
        nll = model.nll(codes, c, noise(80)) - model.clusters.shares[c].log()
        torch.testing.assert_close(model.score_nll(x, noise=noise(80)), nll)
        joint = model.joint_nll(codes, x, y, noise(80))
        mask = c // 2 == y
        torch.testing.assert_close(joint[mask] + math.log(2), nll[mask])
    clusters = []
    hear = lambda module, args, *_: clusters.append(args[0])  # noqa: E731
    model.label.register_forward_pre_hook(hear)
    how, verb = ({"rows": 4}, "complete") if cls is Transformer else ({}, "inpaint")
    for labels in (y, None):
        done = getattr(model, verb)(x, labels=labels, noise=noise(80), **how)
        assert clusters[-1].max() == 3 and (labels is None or torch.equal(clusters[-1] // 2, y))
        assert done.labels is None or torch.equal(clusters[-1] // 2, done.labels)
