"""WGAN-GP: the penalty against finite differences and a critic of known slope, the two phases, the scores."""

import torch
from draws import batch, images, noise, only
from refused import refused

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.gan.implicit import Search
from gzcli.models.gan.wgan import WGAN
from gzcli.models.nn import slerp
from gzcli.models.nn.adversarial import Critic, gradient_penalty

DIGITS = DataInfo((1, 16, 16), 17, tuple("0123456789"))
SMALL = {"latent": 8, "width": 8}


def model(**options) -> WGAN:
    torch.manual_seed(0)
    return WGAN.of(DIGITS, **SMALL, **options)


def test_penalty_of_linear_critics_under_autocast_and_against_finite_differences():
    w = torch.zeros(256)
    w[:2] = torch.tensor([3.0, 4.0])
    w.requires_grad_()
    critic = lambda x, y=None: x.flatten(1) @ w  # noqa: E731
    penalty = gradient_penalty(critic, images(6), images(6, seed=1), torch.rand(6))
    torch.testing.assert_close(penalty, torch.full((6,), 16.0))  # (5 − 1)²
    penalty.mean().backward()
    torch.testing.assert_close(w.grad, (2 * 4.0 * w / 5).detach())  # d (‖w‖ − 1)² / dw
    critic, real, fake, alpha = Critic((1, 16, 16), 8), images(4), images(4, seed=1), torch.rand(4)
    exact = gradient_penalty(critic, real, fake, alpha)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient_penalty(critic, real, fake, alpha), exact)
    torch.manual_seed(0)
    critic = Critic((1, 6, 6), 4).double()
    real, fake = images(3, (1, 6, 6)).double(), images(3, (1, 6, 6), 1).double()
    alpha = torch.tensor([0.0, 0.3, 0.9])
    # lerp from fake to real: alpha = 0 is the fake itself
    x_hat = fake + alpha.double().view(-1, 1, 1, 1) * (real - fake)
    h, steps = 1e-6, 1e-6 * torch.eye(36, dtype=torch.float64).view(36, 1, 1, 6, 6)
    slopes = torch.stack([(critic(x_hat + s) - critic(x_hat - s)) / (2 * h) for s in steps], 1)
    expected = (slopes.norm(dim=1) - 1) ** 2
    penalty = gradient_penalty(critic, real, fake, alpha.double())
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_the_paper_and_leave_the_other_net_alone():
    net, x = model(penalty=7.0), images(6)
    parts = net.loss(batch(x), "critic")
    with torch.no_grad():
        again = batch(x).noise
        fake = net.generator(again.randn(6, 8))
        wasserstein = net.critic(x).mean() - net.critic(fake).mean()
    penalty = gradient_penalty(net.critic, x, fake, again.rand(6)).mean()
    torch.testing.assert_close(parts["gap"], wasserstein)
    torch.testing.assert_close(parts["loss"], 7.0 * penalty - wasserstein)
    torch.testing.assert_close(net.loss(batch(x), "generator")["loss"], -net.critic(fake).mean())
    net, x = model(), images(4)
    assert [phase.name for phase in net.phases()] == ["critic", "generator"]
    assert [step for step in range(12) if net.phases()[1].due(step)] == [4, 9]
    both = (("critic", net.critic, net.generator), ("generator", net.generator, net.critic))
    for name, moved, still in both:
        only(net, name)
        net.loss(batch(x), name)["loss"].backward()
        assert all(p.grad.any() for p in moved.parameters() if p.ndim > 1)
        assert all(p.grad is None for p in still.parameters())
        net.zero_grad(set_to_none=True)
    net.requires_grad_(True)  # even with every parameter open, the critic's loss ends at the fake images
    net.loss(batch(x), "critic")["loss"].backward()
    assert all(p.grad is None for p in net.generator.parameters())


def test_the_critic_finds_the_wasserstein_distance_of_two_points():
    """All real images are one, all fakes another: W1 is their distance, the optimal critic's slope is 1."""
    critic, real = Critic((1, 8, 8), 8), images(1, (1, 8, 8)).expand(8, -1, -1, -1)
    fake = (images(1, (1, 8, 8), seed=1) * 0.2).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.9))
    noise = torch.Generator().manual_seed(0)
    for _ in range(150):
        wasserstein = critic(real).mean() - critic(fake).mean()
        penalty = gradient_penalty(critic, real, fake, torch.rand(8, generator=noise)).mean()
        optimizer.zero_grad()
        (10 * penalty - wasserstein).backward()
        optimizer.step()
    distance = (real[0] - fake[0]).norm()
    # the penalty is soft: its optimum is a slope of 1 + W / (2·10·…), a little above 1
    assert 0.9 * distance < wasserstein < 1.5 * distance


def test_inversion_finds_what_the_generator_can_draw():
    net = model().eval()
    for p in net.generator.parameters():
        p.data *= 2.0  # an untrained generator draws next to nothing
    reachable = net.sample(4, noise=noise(4, seed=5), progress=no_progress)
    strange = torch.sign(images(4))

    def score(x, steps):
        return net.score_inversion(x, noise=noise(4), search=Search(steps, feature=0.0))

    with torch.inference_mode():
        start, end, lost = score(reachable, 0), score(reachable, 120), score(strange, 120)
    assert (end < 0.2 * start).all()
    assert end.max() < 0.1 * lost.min()
    again = net.reconstruct(reachable, noise=noise(4), progress=no_progress, steps=150).images
    torch.testing.assert_close(again, reachable, atol=0.3, rtol=0)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    way = slerp(a, b, torch.linspace(0, 1, 5)[:, None])  # great circles keep the norm
    torch.testing.assert_close(way.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(way[2], torch.full((2,), 0.5**0.5))


def test_knn_is_the_kth_distance_in_critic_features():
    net, bank, x = model().eval(), images(40, seed=3), images(4)
    refused("training images", net.score_knn, x, noise=noise(4))
    net.fit_knn([batch(part) for part in bank.split(16)])
    with torch.no_grad():
        scores = net.score_knn(x, noise=noise(4), k=3)
        distances = torch.cdist(net.unit_features(x).double(), net.unit_features(bank).double())
    torch.testing.assert_close(scores.double(), distances.sort(dim=1).values[:, 2], rtol=1e-4, atol=1e-6)
    assert net.score_knn(bank[:4], noise=noise(4), k=1).max() < 1e-4  # each is its own neighbour
    assert not any("bank" in key for key in net.state_dict())
