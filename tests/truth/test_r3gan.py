"""R3GAN: penalties of critics with known slopes, losses of pairs, eight Gaussians, the nets at the start."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from draws import batch, images, noise
from torch import nn

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.gan.base import GANOptions
from gzcli.models.gan.dcgan import DCGAN
from gzcli.models.gan.presgan import PresGAN
from gzcli.models.gan.r3gan import R3GAN, Block, ResidualOptions
from gzcli.models.gan.wgan import WGAN
from gzcli.models.nn.adversarial import OBJECTIVES, penalised

DIGITS = DataInfo((1, 16, 16), 17, tuple("0123456789"))
SMALL = {"latent": 4, "width": 4}


class Bowl(nn.Module):
    """f(x) = a/2 ‖x‖² + w·x, whose slope is a x + w."""

    independent = True

    def __init__(self, a: float):
        super().__init__()
        self.a, self.w = a, nn.Parameter(torch.linspace(-1, 1, 256))

    def forward(self, x, y=None):
        x = x.flatten(1)
        return self.a / 2 * x.square().sum(1) + x @ self.w


def test_penalties_of_known_slopes_on_both_sides_of_each_pair():
    x, critic = images(6), Bowl(0.0)
    penalty = penalised(critic, x)[1]
    torch.testing.assert_close(
        penalty, (critic.w.square().sum() / 2).expand(6)
    )  # linear: everywhere the same
    penalty.mean().backward()
    torch.testing.assert_close(critic.w.grad, critic.w.detach())
    for model in (
        R3GAN.of(DIGITS, **SMALL, r1=0.5),
        DCGAN.of(DIGITS, **SMALL, objective="relativistic", r1=0.5),
    ):
        model.critic = critic = Bowl(0.3)
        fake = model.generator(batch(x).noise.randn(6, 4)).detach()
        slopes = [0.3 * i.flatten(1) + critic.w for i in (x, fake)]
        r1, r2 = (0.5 * slope.square().sum(1).mean() for slope in slopes)
        gap = critic(x) - critic(fake)
        parts = model.loss(batch(x), "critic")
        torch.testing.assert_close(parts["r1"], r1)
        torch.testing.assert_close(parts["r2"], r2)
        torch.testing.assert_close(parts["loss"], -gap.sigmoid().log().mean() + 0.5 * r1 + r2)
        model.on_step(0)
        assert {"r1", "r2"} <= model.loss(batch(x, 1), "critic").keys(), "every step"
        pairs = -(-gap).sigmoid().log().mean()
        torch.testing.assert_close(model.loss(batch(x), "generator")["loss"], pairs)


def test_weights_fall_by_half_a_cosine_and_are_as_strong_where_lazy():
    options = GANOptions(objective="relativistic", r1=2.0, r2=0.0, r1_every=4, r1_decay=0.1)
    assert [options.gradient_weights(step, 8) for step in (1, 2, 3)] == [{}] * 3
    weights = [options.gradient_weights(step, 8)["r1"] for step in (0, 4, 8)]
    assert weights == pytest.approx([8.0, 8.0 * 0.55, 8.0 * 0.1])


def test_relativistic_pairs_of_every_gan_with_its_own_images():
    model = WGAN.of(DIGITS, **SMALL, objective="relativistic", penalty=0.0)
    assert model.loss(batch(images(4)), "critic").keys() == {"loss", "gap", "r1", "r2"}
    model = PresGAN.of(DIGITS, **SMALL, objective="relativistic", entropy=0.0, sigma=0.2)
    model.critic, x, drawn = Bowl(1.0), images(4), batch(images(4)).noise
    fake = model.generator(drawn.randn(4, 4))
    fake, real = (i + 0.2 * drawn.randn(*x.shape) for i in (fake, x))  # real images have the noise, too
    gap = model.critic(fake) - model.critic(real)
    torch.testing.assert_close(model.loss(batch(x), "generator")["loss"], F.softplus(-gap).mean())


@pytest.mark.slow
def test_eight_gaussians_all_modes():
    torch.manual_seed(0)
    angles = torch.arange(8) * (math.pi / 4)
    means = torch.stack([angles.cos(), angles.sin()], 1)

    def mlp(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, o))

    generator, critic, loss = mlp(4, 2), mlp(2, 1), OBJECTIVES["relativistic"]
    f = lambda x, y=None: critic(x).squeeze(1)  # noqa: E731
    adams = [torch.optim.Adam(net.parameters(), 2e-3, (0.0, 0.99)) for net in (critic, generator)]
    for _ in range(900):
        real = means[torch.randint(8, (128,))] + 0.05 * torch.randn(128, 2)
        fake = generator(torch.randn(128, 4))
        (f_x, r1), (f_g, r2) = (penalised(f, x) for x in (real, fake))
        adams[0].zero_grad()
        (loss.critic(f_x, f_g) + 0.1 * (r1 + r2).mean()).backward()
        adams[0].step()
        adams[1].zero_grad()
        loss.generator(f(fake) - f(real)).backward()
        adams[1].step()
    with torch.no_grad():
        distance, mode = torch.cdist(generator(torch.randn(2000, 4)), means).min(1)
    share = torch.bincount(mode[distance < 0.25], minlength=8) / 2000
    assert share.min() > 0.04 and share.sum() > 0.75, share
    assert float((r1 + r2).mean().detach()) < 0.5, "the game settles: the critic is nearly flat"


def test_nets_of_any_size_start_as_the_identity_with_a_gain_by_depth():
    torch.manual_seed(0)
    block, x = Block(64, ResidualOptions(), depth=16), torch.randn(4, 64, 32, 32)
    assert torch.equal(block(x), x)
    h = block.grouped(F.leaky_relu(block.widen(x), 0.2))[:, :, 1:-1, 1:-1]
    # two layers of gain L^(−1/4): the variance of the branch is 1/L
    assert float(h.detach().var()) == pytest.approx(1 / 16, rel=0.1)
    for patch, shape in itertools.product((1, 2, 3), ((1, 28, 28), (3, 31, 20))):
        info = DataInfo(shape, 256, tuple("abc"))
        net = R3GAN.of(info, **SMALL, patch=patch, conditional=True).eval()
        for layer in (*net.generator.stages, *net.critic.stages):
            nn.init.normal_(layer[0].narrow.weight)
        made = [
            net.sample(2, labels=torch.full((2,), k), noise=noise(2), progress=no_progress) for k in (0, 1)
        ]
        assert made[0].shape == (2, *shape) and not torch.allclose(*made)
        f, g = (net.critic(made[0], torch.full((2,), k)) for k in (0, 1))
        assert f.shape == (2,) and not torch.allclose(f, g)
