"""The core of GANs: the two networks, their training, and the critic's score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.base import Phase
from gzcli.models.gan.implicit import ImplicitModel
from gzcli.models.nn import (
    ClassEmbedding,
    Labels,
    at_least,
    every_label,
    fresh_statistics,
    pyramid,
    to_fp32,
)
from gzcli.models.nn.adversarial import (
    NORMS,
    OBJECTIVES,
    Critic,
    CriticOptions,
    Discriminator,
    LabelAs,
    LeCam,
    Norm,
    Objective,
    ResidualCritic,
    critic_outputs,
    gradient_penalty,
    patch_sizes,
    penalised,
    widths,
)
from gzcli.models.nn.layers import ResBlock


@dataclass(frozen=True)
class GeneratorOptions:
    """The network of the generator.

    latent: dimensions of z.
    width: channels of the finest scale of both networks, doubled at each coarser one, at most 8-fold.
    norm: normalization in the generator.
    net: architecture of both networks: `plain` strided convolutions, starting at half the image size, or
      `residual` (Miyato 2018, arXiv:1802.05957, appendix B.4).
    patch: patch size of residual networks (space-to-depth factor). The paper's is 1.
    """

    latent: int = 64
    width: int = 32
    norm: Norm = "group"
    net: Literal["plain", "residual"] = "plain"
    patch: int = 1


class Generator(nn.Module):
    """z [B, latent] and labels → images [B, C, H, W] in [-1, 1], fp32, from a coarsest map [C', h, w]."""

    def __init__(self, latent: int, start: tuple[int, ...], classes: int):
        super().__init__()
        self.embed = ClassEmbedding(classes, latent) if classes else None
        if self.embed is not None:
            # smaller than z: otherwise the label alone would determine the image
            nn.init.normal_(self.embed.table.weight, std=0.25)
        self.start = start
        self.stem = nn.Linear(latent * (2 if classes else 1), math.prod(start))

    def coarsest(self, z: Tensor, y: Labels) -> Tensor:
        h = z if self.embed is None else torch.cat([z, self.embed(y, z.shape[0])], dim=1)
        return self.stem(h).unflatten(1, self.start)


class ConvGenerator(Generator):
    """Transposed convolutions, through the critic's sizes."""

    def __init__(self, shape: tuple[int, ...], options: GeneratorOptions, classes: int = 0):
        *targets, start = pyramid(shape)
        channels = widths(options.width, len(targets))
        super().__init__(options.latent, (channels[-1], *start), classes)
        self.targets = targets
        self.norms = nn.ModuleList(NORMS[options.norm](w) for w in reversed(channels))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1)
            for i, o in zip(reversed(channels), (*reversed(channels[:-1]), shape[0]), strict=True)
        )

    def forward(self, z: Tensor, y: Labels = None) -> Tensor:
        h = self.coarsest(z, y)
        for norm, up, (height, width) in zip(self.norms, self.ups, reversed(self.targets), strict=True):
            h = up(F.relu(norm(h)))[:, :, :height, :width]  # odd sizes were rounded up
        return torch.tanh(to_fp32(h))


class ResNetGenerator(Generator):
    """Pre-activated residual blocks, each after an upsampling by nearest neighbours (Miyato 2018,
    arXiv:1802.05957, appendix B.4)."""

    def __init__(self, shape: tuple[int, ...], options: GeneratorOptions, classes: int = 0):
        *targets, start = patch_sizes(shape, options.patch)
        channels, norm = widths(options.width, 1 + len(targets))[::-1], NORMS[options.norm]
        super().__init__(options.latent, (channels[0], *start), classes)
        self.shape, self.patch, self.sizes = shape, options.patch, targets[::-1]
        self.blocks = nn.ModuleList(ResBlock(i, o, norm, F.relu) for i, o in pairwise(channels))
        self.norm = norm(channels[-1])
        self.image = nn.Conv2d(channels[-1], shape[0] * options.patch**2, 3, padding=1)

    def forward(self, z: Tensor, y: Labels = None) -> Tensor:
        h = self.coarsest(z, y)
        for block, size in zip(self.blocks, self.sizes, strict=True):
            h = block(F.interpolate(h, size))
        x = F.pixel_shuffle(self.image(F.relu(self.norm(h))), self.patch)
        return torch.tanh(to_fp32(x))[:, :, : self.shape[1], : self.shape[2]]


# ---- augmentation


def diff_augment(x: Tensor, policy: tuple[str, ...], noise: Noise, p: Tensor | None = None) -> Tensor:
    """Images [B, C, H, W] under differentiable augmentations (Zhao et al. 2020, arXiv:2006.10738), each with
    probability p, or always."""
    # applied to real and generated images, so that the generator does not learn the augmentation
    for name, augmented in POLICIES.items():
        if name in policy:
            changed = augmented(x, noise.rand(len(x), 3))
            if p is not None:
                changed = torch.where((noise.rand(len(x)) < p).view(-1, 1, 1, 1), changed, x)
            x = changed
    return x


class AdaptiveProbability(nn.Module):
    """The probability of each augmentation, at first 0 (Karras 2020, arXiv:2006.06676, section 3). It rises
    after a step whose E[sign f(x)] of real images is above the target, because the critic then memorizes
    them. Otherwise it falls."""

    p: Tensor
    signs: Tensor

    def __init__(self, target: float):
        super().__init__()
        self.target = target
        self.register_buffer("p", torch.zeros(()))
        self.register_buffer("signs", torch.zeros(2))  # their sum and number in this step, over all ranks

    def observe(self, f: Tensor) -> None:
        """Counts the signs of the outputs f [B] for real images."""
        signs = f.detach().sign()
        counted = torch.stack([signs.sum(), torch.ones_like(signs).sum()])
        self.signs = self.signs + ranks.mean_over_ranks(counted, self) * ranks.sharing(self)

    def adjust(self, steps: int) -> None:
        """Adjusts p by the signs since the last call. p may rise from 0 to 1 within 500,000 images, as in the
        paper, or within a tenth of a shorter run."""
        total, n = self.signs
        pace = (n / 500_000).clamp(min=10 / steps if steps else 0.0)
        change = torch.where(n > 0, (total / n - self.target).sign() * pace, 0.0)  # a resumed run has none
        self.p = (self.p + change).clamp(0, 1)
        self.signs = torch.zeros_like(self.signs)


def color(x: Tensor, u: Tensor) -> Tensor:
    """Shifts brightness by up to ±0.5, and scales saturation by 0 … 2 and contrast by 0.5 … 1.5, by uniform
    u."""
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def translation(x: Tensor, u: Tensor) -> Tensor:
    """Images shifted by up to an eighth of each side. Uncovered pixels are -1, an empty background."""
    b, _, height, width = x.shape
    dy, dx = (((2 * u[:, i] - 1) * side / 8).round().long() for i, side in enumerate((height, width)))
    rows = torch.arange(height, device=x.device) + dy[:, None]  # [B, H]
    columns = torch.arange(width, device=x.device) + dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    image = torch.arange(b, device=x.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    moved = x.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)
    return torch.where(inside[:, None], moved, -1.0)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Images with a rectangle of half the sides set to 0 (grey), with its centre uniform over the image."""
    rows, columns = (
        (torch.arange(side, device=x.device) + 0.5 - u[:, i, None] * side).abs() < side / 4
        for i, side in enumerate(x.shape[2:])
    )
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


POLICIES = {"color": color, "translation": translation, "cutout": cutout}

# ---- the model


@dataclass(frozen=True)
class GANOptions:
    """How generator and discriminator are trained against each other.

    n_critic: discriminator updates per generator update.
    objective: losses of both networks: `nonsaturating` (Goodfellow 2014), `hinge` (Lim & Ye 2017),
      `wasserstein` (Arjovsky 2017), or `relativistic`, over pairs of real and generated images (Huang 2025,
      arXiv:2501.05441).
    penalty: weight λ of the gradient penalty between real and fake images (WGAN-GP, arXiv:1704.00028, eq. 3).
    r1: weight γ of the gradient penalty on real images (Mescheder 2018, arXiv:1801.04406, eq. 9). Default: 1
      for `relativistic`, which needs it to converge (Huang 2025, section 2), otherwise 0.
    r2: weight γ of the gradient penalty on generated images (eq. 10). Default: as for `r1`.
    r1_every: interval of steps between penalties, and the factor of their weights (lazy regularization;
      Karras 2020, arXiv:1912.04958, appendix B). Default: 1 for `relativistic`, otherwise 16.
    r1_decay: fraction of both weights that remains at the end of the run. They follow half a cosine.
    augment: differentiable augmentations of the discriminator's input, for small data sets: any of `color`,
      `translation` and `cutout`.
    ada: target of adaptive augmentation, such as 0.6: the mean sign of the discriminator's outputs for real
      images (Karras 2020, arXiv:2006.06676). Not for `wasserstein` and `relativistic`. Default: augment
      always.
    lecam: weight λ of LeCam regularization, for small data sets (Tseng 2021, arXiv:2104.03310).
    """

    n_critic: int = 1
    objective: Objective = "hinge"
    penalty: float = 0.0
    r1: float | None = None
    r2: float | None = None
    r1_every: int | None = None
    r1_decay: float = 1.0
    augment: tuple[str, ...] = ()
    ada: float | None = None
    lecam: float = 0.0

    def check(self) -> None:
        """Raises UsageError for options that do not fit together."""
        at_least(1, r1_every=self.r1_every)
        if unknown := sorted(set(self.augment) - set(POLICIES)):
            hint = f"choose from {', '.join(POLICIES)}"
            raise UsageError(f"`model.augment` has no `{unknown[0]}`", hint=hint)
        if self.ada is not None and not self.augment:
            hint = "set `model.augment`, or `model.ada` to `null`"
            raise UsageError("`model.ada` has no augmentation to apply", hint=hint)
        if self.ada is not None and not OBJECTIVES[self.objective].signed:
            message = (
                f"`model.ada` needs an objective whose sign marks real images, unlike `{self.objective}`"
            )
            raise UsageError(message, hint="set `model.ada` to `null`, or `model.objective` to `hinge`")

    def gradient_weights(self, step: int, steps: int) -> dict[str, float]:
        """The nonzero weights of R1 and R2 at a step of a run."""
        usual, every = (1.0, 1) if OBJECTIVES[self.objective].relative else (0.0, 16)
        every = self.r1_every or every
        weights = {"r1": usual if self.r1 is None else self.r1, "r2": usual if self.r2 is None else self.r2}
        past = 0.5 - 0.5 * math.cos(math.pi * step / max(steps, step, 1))
        factor = every * (1 + (self.r1_decay - 1) * past)
        return {name: factor * weight for name, weight in weights.items() if weight and step % every == 0}


Nets = Callable[[int], tuple[nn.Module, Discriminator]]  # number of classes → generator and discriminator


def conv_nets(
    data: DataInfo, generator: GeneratorOptions, critic: CriticOptions, label_as: LabelAs = "channel"
) -> Nets:
    """The convolutional networks, plain or residual."""
    at_least(1, patch=generator.patch)
    if generator.net == "residual":
        return lambda classes: (
            ResNetGenerator(data.shape, generator, classes),
            ResidualCritic(data.shape, generator.width, classes, critic, label_as, generator.patch),
        )
    return lambda classes: (
        ConvGenerator(data.shape, generator, classes),
        Critic(data.shape, generator.width, classes, critic, label_as),
    )


class GAN(ImplicitModel):
    """A generator and a critic.

    A step is a critic update; every `n_critic`-th step also has a generator update. Raises UsageError for
    options that do not fit together, and for a conditional model of data without labels.
    """

    def __init__(
        self,
        data: DataInfo,
        latent: int,
        nets: Nets,
        options: GANOptions,
        conditional: bool,
    ):
        super().__init__(data, latent, conditional)
        options.check()
        self.generator, self.critic = nets(len(data.classes) if conditional else 0)
        self.options, self.step = options, 0
        self.lecam = LeCam() if options.lecam else None
        self.ada = None if options.ada is None else AdaptiveProbability(options.ada)

    @property
    def comparer(self) -> nn.Module:
        return self.critic

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", list(self.generator.parameters()), every=self.options.n_critic),
        ]

    def on_step(self, step: int) -> None:
        self.step = step + 1
        if self.ada is not None:
            self.ada.adjust(self.data.steps)

    def loss(self, batch: Batch, phase: str = "critic") -> dict[str, Tensor]:
        y = batch.y if self.conditional else None
        z = batch.noise.randn(len(batch), self.latent)
        if phase == "generator":
            return self.generator_loss(batch, z, y)
        with torch.no_grad():
            fake = self.generator(z, y)
        return self.critic_loss(batch, self.real_images(batch), fake, y)

    def real_images(self, batch: Batch) -> Tensor:
        """The real images that are compared with generated ones."""
        return batch.x

    def augment_images(self, x: Tensor, noise: Noise) -> Tensor:
        """Images [B, C, H, W], augmented for the critic."""
        return diff_augment(x, self.options.augment, noise, None if self.ada is None else self.ada.p)

    def adversarial_loss(self, batch: Batch, fake: Tensor, y: Labels) -> Tensor:
        objective = OBJECTIVES[self.options.objective]
        f = self.critic(self.augment_images(fake, batch.noise), y)
        if objective.relative:
            f = f - self.critic(self.augment_images(self.real_images(batch), batch.noise), y)
        return objective.generator(f)

    def generator_loss(self, batch: Batch, z: Tensor, y: Labels) -> dict[str, Tensor]:
        return {"loss": self.adversarial_loss(batch, self.generator(z, y), y)}

    def critic_loss(self, batch: Batch, real: Tensor, fake: Tensor, y: Labels) -> dict[str, Tensor]:
        options, learning = self.options, torch.is_grad_enabled()  # evaluation has no gradient to penalise
        real, fake = (self.augment_images(x, batch.noise) for x in (real, fake))
        weights = options.gradient_weights(self.step, self.data.steps) if learning else {}
        penalties: dict[str, Tensor] = {}
        if self.critic.independent and not weights:
            labels = None if y is None else torch.cat([y, y])
            real_f, fake_f = critic_outputs(lambda x: self.critic(x, labels), real, fake)
        else:  # batch norm would mix the statistics of real images and fakes

            def output(name: str, x: Tensor) -> Tensor:
                if name not in weights:
                    return self.critic(x, y)
                f, slopes = penalised(self.critic, x, y)
                penalties[name] = slopes.mean()
                return f

            real_f, fake_f = output("r1", real), output("r2", fake)
        loss = OBJECTIVES[options.objective].critic(real_f, fake_f)
        if options.penalty and learning:
            weights["penalty"] = options.penalty
            alpha = batch.noise.rand(len(batch))
            penalties["penalty"] = gradient_penalty(self.critic, real, fake, alpha, y).mean()
        if self.lecam is not None and learning:
            weights["lecam"], penalties["lecam"] = options.lecam, self.lecam(real_f, fake_f)
        loss = loss + sum(weights[name] * penalty for name, penalty in penalties.items())
        logged = {"gap": real_f.mean() - fake_f.mean(), **penalties}
        if self.ada is not None and learning:
            self.ada.observe(real_f)
            logged["augmented"] = self.ada.p
        return {"loss": loss, **{name: value.detach() for name, value in logged.items()}}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes the statistics of batch norm, if any, for the current weights."""
        with fresh_statistics(self) as count:
            for batch in islice(batches, count):
                y = batch.y if self.conditional else None
                fake = self.generator(batch.noise.randn(len(batch), self.latent), y)
                if not self.critic.independent:
                    for x in (batch.x, fake):
                        self.critic(self.augment_images(x, batch.noise), y)

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−f(x), because f is large for real images. For a conditional critic, the mean over the classes."""
        if not self.conditional:
            return -self.critic(x)
        return -torch.stack([self.critic(x, y) for y in every_label(self.data, len(x), x.device)]).mean(0)
