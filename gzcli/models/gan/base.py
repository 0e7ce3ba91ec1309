"""What all GANs share: two players, latent arithmetic, and scores from the discriminator and by inversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.base import Model, Phase
from gzcli.models.gan.augment import POLICIES, diff_augment
from gzcli.models.gan.losses import Objective, critic_loss, generator_loss, gradient_penalty, r1_penalty
from gzcli.models.gan.nets import Critic, Generator
from gzcli.models.nn import (
    as_ways,
    at_least,
    best_labels,
    double,
    fresh_statistics,
    pairs_of,
    slerp,
    spread_labels,
    to_fp32,
    traversal,
    ways,
)
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress

CALIBRATION = 20  # batches


class GAN(Model):
    """A generator of z ~ N(0, I) and a critic. A step is a critic update, every `n_critic`-th also one of the
    generator.

    objective: of losses.py. penalty: weight of the gradient penalty between real and fake images; r1: of that
    on real ones, which is computed every `r1_every` steps, that many times as strong (Karras 2020,
    arXiv:1912.04958, appendix B).
    augment: of the images that the critic is trained on, see augment.py. Raises UsageError for an unknown
    one.
    """

    best = "fd"
    costly = ("inversion",)
    fitted_on_train = ("knn",)

    def __init__(
        self,
        data: DataInfo,
        generator: Generator,
        critic: Critic,
        *,
        latent: int,
        conditional: bool,
        objective: Objective,
        n_critic: int = 1,
        penalty: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        augment: tuple[str, ...] = (),
    ):
        super().__init__(data)
        if unknown := sorted(set(augment) - set(POLICIES)):
            raise UsageError(
                f"`model.augment` does not know `{unknown[0]}`", hint=f"it knows: {', '.join(POLICIES)}"
            )
        if conditional and not data.classes:
            raise UsageError("`model.conditional` needs a data set with labels", hint="gz list data")
        self.generator, self.critic = generator, critic
        self.latent, self.conditional, self.objective, self.n_critic = (
            latent,
            conditional,
            objective,
            n_critic,
        )
        self.penalty, self.r1, self.r1_every, self.augment = penalty, r1, r1_every, augment
        self.step = 0
        self.register_buffer(
            "bank", None, persistent=False
        )  # critic features of in-distribution images, for `knn`

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", list(self.generator.parameters()), every=self.n_critic),
        ]

    def on_step(self, step: int) -> None:
        self.step = step + 1

    def loss(self, batch: Batch, phase: str = "critic") -> dict[str, Tensor]:
        y = batch.y if self.conditional else None
        z = batch.noise.randn(len(batch), self.latent)
        if phase == "generator":
            return self.generator_loss(batch, z, y)
        with torch.no_grad():
            fake = self.generator(z, y)
        return self.critic_loss(batch, batch.x, fake, y)

    def generator_loss(self, batch: Batch, z: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        fake = diff_augment(self.generator(z, y), self.augment, batch.noise)
        return {"loss": generator_loss(self.objective, self.critic(fake, y))}

    def critic_loss(self, batch: Batch, real: Tensor, fake: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        real, fake = (diff_augment(x, self.augment, batch.noise) for x in (real, fake))
        if self.critic.alone:
            real_f, fake_f = self.critic(
                torch.cat([real, fake]), None if y is None else torch.cat([y, y])
            ).chunk(2)
        else:  # batch norm is told apart by its statistics: real images and fakes are batches of their own
            real_f, fake_f = self.critic(real, y), self.critic(fake, y)
        loss = critic_loss(self.objective, real_f, fake_f)
        parts = {"gap": (real_f.mean() - fake_f.mean()).detach()}
        learning = torch.is_grad_enabled()  # in evaluation there is no gradient to be penalised
        if self.penalty and learning:
            penalty = gradient_penalty(self.critic, real, fake, batch.noise.rand(len(batch)), y).mean()
            loss, parts["penalty"] = loss + self.penalty * penalty, penalty.detach()
        if self.r1 and learning and self.step % self.r1_every == 0:
            r1 = r1_penalty(self.critic, real, y).mean()
            loss, parts["r1"] = loss + self.r1_every * self.r1 * r1, r1.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """The statistics of batch norm, where there is any: of what the nets as they are make and see."""
        with fresh_statistics(self) as norms:
            for batch in islice(batches, CALIBRATION if norms else 0):
                y = batch.y if self.conditional else None
                fake = self.generator(batch.noise.randn(len(batch), self.latent).to(batch.x), y)
                if not self.critic.alone:
                    for x in (batch.x, fake):
                        self.critic(diff_augment(x, self.augment, batch.noise), y)

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
    ) -> Tensor:
        """G(z), z ~ N(0, temperature²)."""
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.generator(temperature * noise.randn(n, self.latent).to(device), y)
        progress(1, 1, x)
        return x

    def reconstruct(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        steps: int = 100,
    ) -> Applied:
        """The generator's nearest image to each x, of `labels` or else of those that fit best, found by
        `invert`. Raises UsageError for no steps."""
        at_least(1, steps=steps)
        z, y, _ = self.invert(x, noise, labels=labels, steps=steps, progress=progress)
        with torch.no_grad():
            return Applied(self.generator(z, y), rows=("nearest",), labels=y)

    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 8, search: int = 100
    ) -> Applied:
        """The way from image 0 to 1, 2 to 3, … in latent space, ends included.

        The ends are the generator's nearest images, found in `search` steps; a conditional model changes
        the label half-way. Raises UsageError for fewer than two images, or steps, or no search.
        """
        at_least(2, steps=steps)
        at_least(1, search=search)
        x = pairs_of(x)
        z, y, _ = self.invert(x, noise.first(len(x)), steps=search, progress=progress)
        z, pairs = ways(z, steps, slerp), len(x) // 2
        if y is not None:  # a way has the label of its nearer end
            end = 2 * torch.arange(pairs, device=x.device)[:, None] + (
                torch.arange(steps, device=x.device) * 2 >= steps
            )
            y = y[end.flatten()]
        with torch.no_grad():
            return replace(as_ways(self.generator(z, y), steps), labels=y)

    def traverse(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress,
        dims: int = 8,
        steps: int = 8,
        span: float = 3.0,
        search: int = 100,
    ) -> Applied:
        """The generator's nearest image to the first of x, changed along the `dims` coordinates of z that
        change it most, from −span to span. Raises UsageError for fewer than one of `dims`, `steps` or
        `search`."""
        at_least(1, dims=dims, steps=steps, search=search)
        z, y, _ = self.invert(x[:1], noise.first(1), steps=search, progress=progress)
        with torch.no_grad():
            return traversal(
                lambda z: self.generator(z, None if y is None else y.expand(len(z), *y.shape[1:])),
                z,
                dims,
                steps,
                span,
            )

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−f(x): the critic rates real images high. A conditional critic's mean over the classes."""
        if not self.conditional:
            return -self.critic(x)
        classes = spread_labels(None, len(self.data.classes), self.data, x.device)
        return -torch.stack([self.critic(x, y.expand(len(x), *y.shape)) for y in classes]).mean(0)

    def score_inversion(
        self,
        x: Tensor,
        *,
        noise: Noise,
        steps: int = 100,
        lr: float = 0.05,
        starts: int = 8,
        feature: float = 0.1,
    ) -> Tensor:
        """What of x the generator cannot reach (AnoGAN, Schlegl 2017, arXiv:1703.05921, eq. 4)."""
        return self.invert(x, noise, steps=steps, lr=lr, starts=starts, feature=feature)[2]

    def invert(
        self,
        x: Tensor,
        noise: Noise,
        *,
        labels: Tensor | None = None,
        steps: int,
        lr: float = 0.05,
        starts: int = 8,
        feature: float = 0.1,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B, latent], its labels and its distance [B]: Adam from the best of `starts` draws of z, image by
        image.

        A conditional model without `labels` has a draw of every class at least; of none and of each alone
        where there may be several. Half-way, where z is near, they become those that fit it best, of several
        one by one.
        distance = (1 − feature)·‖x − G(z)‖² + feature·‖φ(x) − φ(G(z))‖², φ the critic's last feature map.
        """
        n, tries = len(x), self.guesses(x, labels, starts)
        starts = len(tries)
        with torch.inference_mode(False), torch.enable_grad():
            x, z = x.detach().clone(), noise.randn(n, starts * self.latent).to(x.device).clone()
            target = self.critic.maps(x).detach() if feature else None

            def distance(z: Tensor, y: Tensor | None) -> Tensor:
                fake = self.generator(z, y)
                d = (1 - feature) * double(x - fake).square().flatten(1).sum(1)
                if feature:
                    d = d + feature * double(target - self.critic.maps(fake)).square().flatten(1).sum(1)
                return d

            z = z.unflatten(1, (starts, self.latent))
            with torch.no_grad():
                first = torch.stack([distance(z[:, i], tries[i]) for i in range(starts)], dim=1).argmin(1)
            rows = torch.arange(n, device=z.device)
            y = None if tries[0] is None else torch.stack(tries, 1)[rows, first]
            z = z[rows, first].requires_grad_()
            adam = torch.optim.Adam([z], lr=lr, eps=1e-3)
            best = double(torch.full((n,), torch.inf, device=x.device))
            best_z = z.detach().clone()
            for step in range(steps + 1):
                if step and step == steps // 2 and y is not None and labels is None:
                    z.data.copy_(best_z)
                    y, best = best_labels(partial(distance, best_z), y, self.data)
                d = distance(z, y)
                better = d.detach() < best
                best = torch.where(better, d.detach(), best)
                best_z = torch.where(better[:, None], z.detach(), best_z)
                if step < steps:
                    (z.grad,) = torch.autograd.grad(d.sum(), z)
                    adam.step()
                    if progress is not None:
                        progress(step + 1, steps)
        return best_z, y, best.to(x.dtype)

    def guesses(self, x: Tensor, labels: Tensor | None, starts: int) -> list[Any]:
        """The labels of x, [B] or [B, K], to be tried by each of at least `starts` draws; None where there
        are none."""
        if not self.conditional:
            return [None] * starts
        if labels is not None:
            return [labels.to(x.device)] * starts
        K = len(self.data.classes)
        classes = spread_labels(None, K, self.data, x.device)
        if self.data.multilabel:
            classes = torch.cat([torch.zeros_like(classes[:1]), classes])
        draws = range(max(starts, len(classes)))
        return [classes[i % len(classes)].expand(len(x), *classes.shape[1:]) for i in draws]

    def unit_features(self, x: Tensor) -> Tensor:
        """The critic's features on a 2×2 grid, on the unit sphere: [B, 4·C']."""
        h = nn.functional.adaptive_avg_pool2d(to_fp32(self.critic.maps(x)), 2).flatten(1)
        return nn.functional.normalize(h, dim=1)

    @torch.no_grad()
    def fit_knn(self, batches: Iterable[Batch]) -> None:
        """Remembers the features of training images (`batches`: an iterable of Batch)."""
        self.bank = torch.cat([self.unit_features(batch.x) for batch in batches])

    def score_knn(self, x: Tensor, *, noise: Noise, k: int = 10) -> Tensor:
        """Distance to the k-th nearest training image in critic features (Sun 2022, arXiv:2204.06507).

        Raises UsageError before `fit_knn`, or where it saw fewer than k images.
        """
        if self.bank is None or len(self.bank) < k:
            raise UsageError(
                f"the `knn` score needs the features of at least {k} training images",
                hint="fit it first, or ask for fewer neighbours",
            )
        h = self.unit_features(x)
        near = (h @ self.bank.T).topk(k, dim=1).indices[:, -1]
        return (h - self.bank[near]).norm(dim=1)  # from the difference: exact also for near neighbours
