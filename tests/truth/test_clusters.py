"""Clusters in place of labels, against k-means of scikit-learn and counts."""

import itertools

import numpy as np
import pytest
import torch
from coded import images as coded_images
from coded import prepared, prior
from draws import flat, noise
from refused import refused
from sklearn.cluster import KMeans
from torch import nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, ImageNoise, no_progress
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
    found = np.bincount(clusters(x).numpy(), minlength=3) / 100
    assert clusters.shares.numpy() == pytest.approx(found, abs=1e-6)
    for mine, other in pairs:
        centre = theirs.cluster_centers_[other]
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


@pytest.mark.parametrize("name", ["fm", "rf", "sgm", "ddpm", "ncsnv2", "zigma"])
def test_the_network_is_told_the_cluster_in_training_and_guided_to_a_drawn_one_in_sampling(name):
    """The guided output is that of `guided_output`, whose equation test_fm and test_ddpm check."""
    patch = {"patch": 1} if name in ("rf", "zigma") else {}
    model, x = catalog.load(name).of(INFO, clusters=3, **patch), images((60, 30, 10))
    model.fit(batches(x))
    model.net = Heard()
    model.loss(Batch(x[:8], torch.zeros(8, dtype=torch.long), torch.arange(8), noise(8, 5)))
    assert torch.equal(model.net.told[-1], model.clusters(x[:8]))
    model.sample(40, noise=noise(40), progress=no_progress)
    told = model.net.told[-1][:40]  # of a batch doubled by guidance
    assert all(torch.equal(told, rows) for y in model.net.told[1:] for rows in y.split(40))
    draws = noise(40)
    draws.randn(40)  # its noise is the first draw, the clusters are the second
    assert torch.equal(told, model.clusters.draw(40, draws))

    def scales(options: dict, **how) -> set[float]:
        model = catalog.load(name).of(INFO, **options, **patch)
        found, guided = [], model.guided_output
        model.guided_output = lambda x, t, y, scale: found.append(scale) or guided(x, t, y, scale)
        flat(model.sample)(2, noise=noise(2), progress=no_progress, steps=2, **how)
        return set(found)

    assert scales({"clusters": 3}) == {GUIDANCE}
    assert scales({"clusters": 3}, guidance=1.0) == {1.0}
    assert scales({"clusters": 3, "label_dropout": 0.0}) == scales({"clusters": 0}) == {1.0}
    assert scales({"conditional": True}) == {1.0}


def test_guidance_goes_towards_clusters_where_there_are_some():
    build = lambda **options: catalog.load("fm").of(INFO, **options, **SMALL)  # noqa: E731
    guided = lambda **options: flat(build(**options).sample)(2, noise=noise(2), guidance=2.0)  # noqa: E731
    guided(clusters=3)
    refused("conditional", guided, clusters=0)
    refused("label dropout", guided, conditional=True, label_dropout=0.0)
    with pytest.raises(UsageError, match="label dropout"):
        build(clusters=3, label_dropout=0.0).log_prob(torch.zeros(2, *SHAPE), noise=noise(2))
    labelled = build(clusters=3, conditional=True)
    assert labelled.clusters is None and labelled.net.label.classes == 2
    for name in ("fm", "rf", "ncsnv2", "zigma"):
        refused("clusters", catalog.load(name).of, INFO, clusters=-3)


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
    model, x, told = clustered(cls), coded_images(20), []
    hear = lambda module, given, *_: told.append(given[0])  # noqa: E731
    for module in model.modules():
        if isinstance(module, ClassEmbedding):
            module.register_forward_pre_hook(hear)
    model.train().loss(prepared(model, x))
    assert torch.equal(told[-1], model.clusters(x))
    model.eval().sample(30, noise=noise(30, 3), progress=no_progress)
    assert torch.equal(told[-1], model.clusters.draw(30, noise(30, 3)).repeat(2)), "guided"
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
    kept, n = torch.tensor([[1, 3]]), 20_000
    with torch.no_grad():
        joint = torch.stack([(-model.nll(kept, torch.tensor([k]))).exp() for k in range(3)], 1)
        expected = (joint * model.clusters.shares)[0]
        drawn, first = (model.draw_cluster(kept.expand(n, 2)[:, :k], noise(n)) for k in (2, 0))
    for found, shares in ((drawn, expected / expected.sum()), (first, model.clusters.shares)):
        counts = torch.bincount(found, minlength=3) / n
        assert counts.numpy() == pytest.approx(shares.numpy(), abs=4 * 0.5 / n**0.5)
    assert model.complete(coded_images(4), noise=noise(4)).images.shape == (4, 1, 12, 8)
