"""The base of all GANs: two networks, their training and sampling, and scores by the critic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.models.base import Phase
from gzcli.models.gan.augment import POLICIES, diff_augment
from gzcli.models.gan.generator import Generator, GeneratorOptions
from gzcli.models.gan.inversion import InvertibleGAN, Search
from gzcli.models.nn.adversarial import OBJECTIVES, Objective, gradient_penalty, r1_penalty
from gzcli.models.nn.common import fresh_statistics, spread_labels, to_fp32
from gzcli.models.nn.critic import Critic, CriticOptions, LabelAs


@dataclass(frozen=True)
class AdversarialOptions:
    """How generator and discriminator are trained against each other.

    n_critic: discriminator updates per generator update.
    penalty: weight λ of the gradient penalty between real and fake images (WGAN-GP, arXiv:1704.00028, eq. 3).
    augment: differentiable augmentations of the images that the discriminator sees, for sets of few images,
      any of `color`, `translation` and `cutout`.
    """

    n_critic: int = 1
    penalty: float = 0.0
    augment: tuple[str, ...] = ()


@dataclass(frozen=True)
class GANOptions(AdversarialOptions):
    """The same, with the losses.

    objective: the losses of both networks: `nonsaturating` (Goodfellow 2014), `hinge` (Lim & Ye 2017) or
      `wasserstein` (Arjovsky 2017).
    r1: weight γ of the gradient penalty on real images (Mescheder 2018, arXiv:1801.04406, eq. 9).
    r1_every: steps from one such penalty to the next; its weight is multiplied by as many (Karras 2020,
      arXiv:1912.04958, appendix B).
    """

    objective: Objective = "hinge"
    r1: float = 0.0
    r1_every: int = 16


class GAN(InvertibleGAN):
    """A generator of z ~ N(0, I) and a critic.

    A step is a critic update; every `n_critic`-th step also has a generator update. Raises UsageError for an
    unknown augmentation, and for a conditional model of data without labels.
    """

    best = "fd"
    fitted_on_train = ("knn",)
    bank: Tensor | None

    def __init__(
        self,
        data: DataInfo,
        generator: GeneratorOptions,
        critic: CriticOptions,
        options: GANOptions,
        conditional: bool,
        label_as: LabelAs = "channel",
    ):
        super().__init__(data)
        if unknown := sorted(set(options.augment) - set(POLICIES)):
            raise UsageError(
                f"`model.augment` does not know `{unknown[0]}`", hint=f"it knows: {', '.join(POLICIES)}"
            )
        if conditional and not data.classes:
            raise UsageError("`model.conditional` needs a data set with labels", hint="gz list data")
        classes = len(data.classes) if conditional else 0
        self.generator = Generator(data.shape, generator, classes)
        self.critic = Critic(data.shape, generator.width, classes, critic, label_as)
        self.latent, self.conditional, self.options = generator.latent, conditional, options
        self.step = 0
        self.register_buffer("bank", None, persistent=False)  # critic features of training images, for `knn`

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", list(self.generator.parameters()), every=self.options.n_critic),
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

    def augmented(self, x: Tensor, noise: Noise) -> Tensor:
        """Images [B, C, H, W] as the critic sees them."""
        return diff_augment(x, self.options.augment, noise)

    def adversarial_loss(self, fake: Tensor, y: Tensor | None, noise: Noise) -> Tensor:
        """The generator's loss by the critic's outputs for its images."""
        return OBJECTIVES[self.options.objective].generator(self.critic(self.augmented(fake, noise), y))

    def generator_loss(self, batch: Batch, z: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        return {"loss": self.adversarial_loss(self.generator(z, y), y, batch.noise)}

    def critic_loss(self, batch: Batch, real: Tensor, fake: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        options = self.options
        real, fake = (self.augmented(x, batch.noise) for x in (real, fake))
        if self.critic.independent:
            both = None if y is None else torch.cat([y, y])
            real_f, fake_f = self.critic(torch.cat([real, fake]), both).chunk(2)
        else:  # batch norm would mix the statistics of real images and fakes
            real_f, fake_f = self.critic(real, y), self.critic(fake, y)
        loss = OBJECTIVES[options.objective].critic(real_f, fake_f)
        parts = {"gap": (real_f.mean() - fake_f.mean()).detach()}
        learning = torch.is_grad_enabled()  # evaluation has no gradient to penalise
        if options.penalty and learning:
            penalty = gradient_penalty(self.critic, real, fake, batch.noise.rand(len(batch)), y).mean()
            loss, parts["penalty"] = loss + options.penalty * penalty, penalty.detach()
        if options.r1 and learning and self.step % options.r1_every == 0:
            r1 = r1_penalty(self.critic, real, y).mean()
            loss, parts["r1"] = loss + options.r1_every * options.r1 * r1, r1.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes the statistics of batch norm, if there is any, for the present weights."""
        with fresh_statistics(self) as count:
            for batch in islice(batches, count):
                y = batch.y if self.conditional else None
                fake = self.generator(batch.noise.randn(len(batch), self.latent), y)
                if not self.critic.independent:
                    for x in (batch.x, fake):
                        self.critic(self.augmented(x, batch.noise), y)

    # ---- sampling

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
        """G(z) for z ~ N(0, temperature²).

        temperature: standard deviation of z.
        """
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.generator(temperature * noise.randn(n, self.latent), y)
        progress(1, 1, x)
        return x

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−f(x), since f is large for real images; for a conditional critic the mean over the classes."""
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
        """The distance of x to the generator's nearest image (AnoGAN, eq. 4).

        steps: gradient steps of the search for z.
        lr: learning rate of Adam in the search for z.
        starts: draws of z; the search starts at the nearest one.
        feature: weight of the critic's features in the distance, in [0, 1].
        """
        return self.invert(x, noise, Search(steps, lr, starts, feature))[2]

    def map_inversion(
        self,
        x: Tensor,
        *,
        noise: Noise,
        steps: int = 100,
        lr: float = 0.05,
        starts: int = 8,
        feature: float = 0.1,
    ) -> Tensor:
        """|x − G(z)| at each pixel, of the generator's nearest image, the mean over channels: [B, H, W];
        options as in `score_inversion`."""
        z, y, _ = self.invert(x, noise, Search(steps, lr, starts, feature))
        return (x - self.generator(z, y)).abs().mean(1)

    def unit_features(self, x: Tensor) -> Tensor:
        """The critic's features on a 2×2 grid, of norm 1: [B, 4·C']."""
        h = nn.functional.adaptive_avg_pool2d(to_fp32(self.critic.maps(x)), 2).flatten(1)
        return nn.functional.normalize(h, dim=1)

    @torch.no_grad()
    def fit_knn(self, batches: Iterable[Batch]) -> None:
        """Keeps the features of the training images of `batches`."""
        self.bank = torch.cat([self.unit_features(batch.x) for batch in batches])

    def score_knn(self, x: Tensor, *, noise: Noise, k: int = 10) -> Tensor:
        """Distance to the k-th nearest training image in critic features (Sun 2022, arXiv:2204.06507).

        Raises UsageError before `fit_knn`, or where it saw fewer than k images.

        k: rank of the neighbour; 1: the nearest.
        """
        if self.bank is None or len(self.bank) < k:
            raise UsageError(
                f"the `knn` score needs the features of at least {k} training images",
                hint="fit it first, or ask for fewer neighbours",
            )
        h = self.unit_features(x)
        near = (h @ self.bank.T).topk(k, dim=1).indices[:, -1]
        return (h - self.bank[near]).norm(dim=1)  # from the difference: near neighbours keep their digits
