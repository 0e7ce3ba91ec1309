"""What the GANs share, against finite differences, singular values and plain recomputation."""

import itertools
import math
from dataclasses import replace

import draws
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import noise
from refused import refused

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.metrics import collapse
from gzcli.models.gan.base import ConvGenerator, GeneratorOptions, diff_augment
from gzcli.models.gan.cgan import CGAN
from gzcli.models.gan.dcgan import DCGAN
from gzcli.models.gan.implicit import Search
from gzcli.models.nn import best_labels, mix_codes, traversal
from gzcli.models.nn.adversarial import OBJECTIVES, Critic, CriticOptions, penalised

INFO = DataInfo((1, 16, 16), 17, tuple("0123456789"))
SMALL = {"latent": 4, "width": 4, "net": "residual"}


def batch(n: int = 8, step: int = 0) -> Batch:
    return draws.batch(draws.images(n), step, torch.arange(n) % 10)


def test_objectives_are_the_papers():
    real, fake = torch.tensor([0.3, 2.0, -1.5]), torch.tensor([-0.4, 1.2, 3.0])
    p, q = real.sigmoid(), fake.sigmoid()
    for name, critic, generator in (
        ("nonsaturating", -(p.log().mean() + (1 - q).log().mean()), -q.log().mean()),
        ("hinge", -((real - 1).clamp(max=0).mean() + (-fake - 1).clamp(max=0).mean()), -fake.mean()),
        ("wasserstein", fake.mean() - real.mean(), -fake.mean()),
    ):
        torch.testing.assert_close(OBJECTIVES[name].critic(real, fake), critic, msg=name)
        torch.testing.assert_close(OBJECTIVES[name].generator(fake), generator, msg=name)


def test_r1_against_finite_differences_and_lazily_as_strong():
    critic, h = Critic((1, 8, 8), 4).double(), 1e-6
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    steps = h * torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    slopes = torch.stack([(critic(one + steps) - critic(one - steps)) / (2 * h) for one in x])
    torch.testing.assert_close(penalised(critic, x)[1], 0.5 * slopes.square().sum(1), rtol=1e-6, atol=1e-9)
    torch.manual_seed(0)
    model = DCGAN.of(INFO, width=4, latent=4, norm="group", spectral=False, r1=2.0, r1_every=4)
    plain, each = [], []
    for step in range(8):
        parts = model.loss(batch(step=step), "critic")
        plain.append("r1" in parts)
        if plain[-1]:
            each.append((parts["loss"] - 4 * 2.0 * parts["r1"]).detach())
        model.on_step(step)
    assert plain == [True, False, False, False] * 2
    model.options = replace(model.options, r1=0.0)
    torch.testing.assert_close(model.loss(batch(), "critic")["loss"].detach(), each[0])
    net = DCGAN.of(INFO, width=8, latent=4, r1=1.0, r1_every=1, penalty=10.0)
    assert {"penalty", "r1"} <= net.loss(batch(), "critic").keys()
    with torch.inference_mode():  # in evaluation no gradient is penalised
        losses = net.eval().loss(batch(), "critic")
    assert torch.isfinite(losses["loss"]) and losses.keys() == {"loss", "gap"}


def test_critics_have_norm_1_hear_labels_and_halve_sides():
    critic = Critic((1, 16, 16), 8, 10, CriticOptions(spectral=True))
    for _ in range(200):
        critic(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))
    critic.eval()
    for layer in (*critic.convs, critic.head, critic.embed.table):
        assert float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]) == pytest.approx(1, abs=2e-3)
    for label_as in ("projection", "channel"):
        torch.manual_seed(0)
        model, x = CGAN.of(INFO, width=4, latent=4, label_as=label_as, spectral=False).eval(), batch().x
        each = torch.stack([model.critic(x, torch.full((8,), k)) for k in range(10)])
        assert not torch.allclose(each[0], each[1])
        torch.testing.assert_close(model.score_disc(x, noise=noise(8)), -each.mean(0))
    for kernel, side in itertools.product((3, 4, 5), (16, 28, 31)):
        critic = Critic((3, side, side), 4, options=CriticOptions(kernel=kernel))
        h = critic.maps(torch.zeros(1, 3, side, side))
        assert h.shape[2:] == (4, 4) or side == 16
        assert h.flatten(1).shape[1] == critic.features
        drawn = ConvGenerator((3, side, side), GeneratorOptions(4, 4))(torch.zeros(1, 4))
        assert drawn.shape == (1, 3, side, side)


def test_augmentation_moves_hides_and_recolours():
    x, drawn = batch().x, lambda: BatchNoise(0, total=8)
    assert diff_augment(x, (), drawn()) is x
    moved = diff_augment(x, ("translation",), drawn())
    u = drawn().rand(8, 3)
    for i in range(8):
        dy, dx = (int(torch.round((2 * u[i, k] - 1) * 2)) for k in range(2))  # at most 16 / 8 pixels
        padded = F.pad(x[i : i + 1], (2, 2, 2, 2), value=-1.0)
        torch.testing.assert_close(moved[i : i + 1], padded[:, :, 2 + dy : 18 + dy, 2 + dx : 18 + dx])
    cut = diff_augment(torch.ones(8, 1, 16, 16), ("cutout",), drawn())
    assert set(cut.unique().tolist()) == {0.0, 1.0} and all(16 <= int((one == 0).sum()) <= 64 for one in cut)
    grey = diff_augment(x.expand(-1, 3, -1, -1), ("color",), drawn())
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6), "a grey image has no saturation to change"
    deviation = grey.flatten(1).std(1) / x.flatten(1).std(1)
    assert 0.5 <= deviation.min() < deviation.max() <= 1.5
    x.requires_grad_()
    diff_augment(x, ("color", "translation", "cutout"), drawn()).sum().backward()
    assert x.grad.abs().sum() > 0, "the generator learns through it"


def test_residual_nets_are_the_papers_and_hear_labels():
    """A block of the generator doubles the sides before its first convolution and on its shortcut, one of the
    critic halves them after its second and on its shortcut (Miyato 2018, appendix B.4)."""
    torch.manual_seed(0)
    model = CGAN.of(DataInfo((3, 8, 8), 256), **SMALL, conditional=False, spectral=False).eval()
    (block,), z = model.generator.blocks, torch.randn(2, 4)
    h = model.generator.stem(z).view(2, 8, 4, 4)
    up = torch.nn.Upsample(scale_factor=2)
    h = block.conv2(block.norm2(block.conv1(up(block.norm1(h).relu()))).relu()) + up(block.skip(h))
    drawn = model.generator.image(model.generator.norm(h).relu()).tanh()
    torch.testing.assert_close(model.generator(z), drawn)
    (block,), pool = model.critic.blocks, torch.nn.AvgPool2d(2)
    h = model.critic.image(drawn)
    h = pool(block.conv2(block.conv1(h.relu()).relu())) + block.skip(pool(h))
    torch.testing.assert_close(model.critic(drawn), model.critic.head(h.relu().sum((2, 3))).squeeze(1))
    for label_as, patch, shape in (("channel", 1, (1, 28, 28)), ("projection", 2, (3, 31, 20))):
        info, y = DataInfo(shape, 256, tuple("abc")), torch.tensor([0, 1, 2])
        net = CGAN.of(info, **SMALL, patch=patch, label_as=label_as, spectral=False).eval()
        images = net.generator(torch.zeros(3, 4), y)
        f = net.critic(images, y)
        assert images.shape == (3, *shape) and f.shape == (3,)
        tables = [net.generator.embed, net.critic.channel or net.critic.embed]
        for gradient in torch.autograd.grad(f[:2].sum(), [e.table.weight for e in tables]):
            assert gradient[:2].abs().sum(1).min() > 0 == gradient[2:].abs().max(), "of labels 0 and 1 alone"


def test_adaptive_augmentation_follows_its_target():
    """p rises for r = E[sign f(x)] above the target, falls below it, and is the share that is augmented."""
    model = DCGAN.of(replace(INFO, steps=200), latent=4, width=4, augment=("cutout",), ada=0.4)
    rates = []
    for step, share in enumerate((1, 1, 1, 6 / 8, 5 / 8, 1, 1)):  # r is 1, 1/2 or 1/4
        f = torch.where(torch.arange(8) < 8 * share, 0.3, -5.0)
        for part in f.split(4):  # as by `accumulate`
            model.ada.observe(part)
        model.on_step(step)
        model.on_step(step)  # as a resume does
        rates.append(float(model.ada.p))
    # a tenth of the run from 0 to 1
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.15, 0.2, 0.25])
    model.ada.adjust(0)
    model.ada.observe(torch.full((50_000,), 2.0))
    model.ada.adjust(0)
    assert float(model.ada.p) == pytest.approx(0.35)  # of unknown length: 500,000 images
    changed = model.augment_images(torch.ones(4000, 1, 8, 8), noise(4000)).flatten(1).amin(1) == 0
    assert float(changed.float().mean()) == pytest.approx(0.35, abs=0.03)
    before = model.ada.signs.clone()
    assert model.loss(batch(), "critic")["augmented"] == model.ada.p
    assert model.ada.signs[1] - before[1] == 8, "real images alone are counted"
    refused("no augmentation", DCGAN.of, INFO, ada=0.6)
    refused("sign", DCGAN.of, INFO, ada=0.6, augment=("color",), objective="relativistic")


def test_lecam_holds_outputs_near_the_average_of_the_other_kind():
    model = DCGAN.of(INFO, latent=4, width=4, spectral=False, lecam=0.3)
    plain = DCGAN.of(INFO, latent=4, width=4, spectral=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    model.lecam.averages = torch.tensor([0.5, -0.4])
    a_real, a_fake = 0.5, -0.4
    for step in range(2):
        x, drawn = batch(step=step).x, batch(step=step).noise
        with torch.no_grad():
            fake = model.generator(drawn.randn(8, 4))
            real_f, fake_f = model.critic(x).double(), model.critic(fake).double()
        a_real, a_fake = 0.99 * a_real + 0.01 * real_f.mean(), 0.99 * a_fake + 0.01 * fake_f.mean()
        distance = (real_f - a_fake).square().mean() + (fake_f - a_real).square().mean()
        expected = plain.loss(batch(step=step), "critic")["loss"] + 0.3 * distance
        torch.testing.assert_close(model.loss(batch(step=step), "critic")["loss"], expected.float())
    with torch.no_grad():
        assert "lecam" not in model.loss(batch(), "critic"), "evaluation moves no average"


def test_ways_traversals_and_best_labels():
    z = torch.randn(5, 3)
    way = mix_codes(z, 4)
    assert way.shape == (8, 3)
    torch.testing.assert_close(way[[0, 3, 4, 7]], z[:4])
    refused("pairs", mix_codes, z[:1], 4)
    scale = torch.tensor([0.1, 3.0, 1.0])
    result = traversal(lambda z: (z * scale)[:, :, None, None], z[:1], 2, 5, 2.0)
    assert result.rows == ("z 1", "z 2") and result.marks == ("-2.0", "-1.0", "+0.0", "+1.0", "+2.0")
    rows = result.images
    assert rows.shape == (10, 3, 1, 1)
    row = rows[:5, :, 0, 0] / scale  # the coordinate with the largest effect comes first
    torch.testing.assert_close(row[:, 1], torch.linspace(-2, 2, 5))
    torch.testing.assert_close(row[:, 0], z[0, 0].expand(5))
    for multilabel in (False, True):
        info, target = DataInfo((1, 1, 1), 256, tuple("abcd"), multilabel), torch.tensor([2, 0, 3])
        if multilabel:
            target = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
        far = lambda y, t=target: (y != t).double().view(3, -1).sum(1)  # noqa: E731
        y, best = best_labels(far, torch.ones_like(target), info)
        assert torch.equal(y, target) and not best.any()


def test_collapse_is_seen():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(2000, 8))
    one = np.zeros(2000, int)
    apart = np.sqrt(np.square(real[:1000] - real[1000:]).sum(1).mean())
    assert collapse.spread(real, one) == pytest.approx(apart, rel=0.05)
    assert collapse.diversity(0.3 * real, one, real, one) == pytest.approx(0.3)
    apart = np.arange(2000) % 2  # two classes far apart, each of one picture
    diversity = collapse.diversity(9.0 * apart[:, None] + 0.1 * real, apart, real, one)
    assert diversity == pytest.approx(0.1, rel=0.01)
    labels = np.arange(2000) % 10
    assert collapse.coverage(labels % 5, labels) == pytest.approx(math.log(5) / math.log(10))
    assert collapse.warning(1.0, 1.0) is None and collapse.warning(1.0, None) is None
    assert "classes is 50%" in collapse.warning(1.0, 0.5) and "images is 30%" in collapse.warning(0.3, 1.0)


class Painter(torch.nn.Module):
    """Class k lights pixel k, and the first number of z is the brightness of the last one."""

    def forward(self, z, y):
        lit = F.one_hot(y, 10).to(z) if y.ndim == 1 else y.to(z)
        return torch.cat([lit, z.new_zeros(len(z), 53), 0.1 * z[:, :1]], 1).view(-1, 1, 8, 8)


@pytest.mark.parametrize("multilabel", [False, True])
def test_inversion_tries_every_class_and_sets_of_them(multilabel):
    info = DataInfo((1, 8, 8), 256, tuple("0123456789"), multilabel)
    model = CGAN.of(info, width=4, latent=2).eval()
    model.generator = Painter()
    y = torch.arange(10)
    if multilabel:
        y = F.one_hot(y, 10).float()
        y[3:, 2], y[7] = 1, 0  # two labels, three for one image, one for two, and none
        y[9, 5] = 1
    x = model.generator(torch.ones(10, 2), y)
    _, labels, distance = model.invert(x, noise(10), Search(20, feature=0.0))
    assert torch.equal(labels, y) and distance.max() < 0.1
    targets = y.flip(0)
    assert torch.equal(model.invert(x, noise(10), Search(4, feature=0.0), labels=targets)[1], targets)
    again = model.reconstruct(x, labels=targets, noise=noise(10), progress=no_progress, steps=4).images
    torch.testing.assert_close(again[:, 0, :7], model.generator(torch.zeros(10, 2), targets)[:, 0, :7])
