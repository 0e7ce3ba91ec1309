"""The core of VAEs with a ladder of latents: groups z_1 … z_L on grids from coarse to fine.

    log p(x) ≥ ELBO = E_q [log p(x | z)] − Σ_l E_q(z_<l | x) KL(q(z_l | z_<l, x) ‖ p(z_l | z_<l))

(Sønderby 2016, arXiv:1602.02282). Two towers compute features bottom-up from the image, and latents top-down
from the coarsest group, so that posteriors depend on the coarser latents. A model defines the towers' layers.
Tuples have one entry per resolution, finest first; group 0 is the coarsest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.labelled import LabelOptions, over_classes
from gzcli.models.nn import (
    Labels,
    as_interpolations,
    at_least,
    bits_per_dim,
    halved_sizes,
    mix_codes,
    nearer,
    to_fp32,
)
from gzcli.models.nn.pixels import PixelKind, distribution
from gzcli.models.vae.base import LabelledVAE, kl_normal, log_normal


@dataclass(frozen=True)
class LadderOptions:
    """The ladder of latents. Lists have an entry for each resolution, beginning with the image's; each
    resolution is half the previous one.

    channels: channels of the feature maps at each resolution, the finest first.
    groups: groups of latents at each resolution. The coarsest needs at least one.
    latent: channels of a group of latents.
    """

    channels: tuple[int, ...] = (16, 32, 48, 64)
    groups: tuple[int, ...] = (0, 1, 2, 2)
    latent: int = 8


@dataclass(frozen=True)
class BoundOptions:
    """The two terms of the bound.

    pixels: the decoder's distribution over grey levels (`mixture`: over whole pixels). auto: bernoulli for 2
      levels, gaussian for latents, otherwise mixture.
    mixture: number of discretized logistics in a pixel's mixture.
    kl_warmup: steps over which the weight of the KL rises from 0. Meanwhile, the weights of the groups are
      balanced so that each group is used (Vahdat & Kautz 2020, appendix A).
    """

    pixels: PixelKind = "auto"
    mixture: int = 10
    kl_warmup: int = 0


def check_ladder(ladder: LadderOptions) -> None:
    """Raises UsageError unless the sizes are valid."""
    sizes = {f"model.{name}": value for name, value in vars(ladder).items()}
    lists = {name: value for name, value in sizes.items() if isinstance(value, tuple)}
    if len({len(value) for value in lists.values()}) > 1:
        *first, last = (f"`{name}`" for name in lists)
        raise UsageError(
            f"{', '.join(first)} and {last} differ in length",
            hint="give each one number per resolution, beginning with the image's, as in `groups: [0, 1, 2]`",
        )
    if not ladder.groups or ladder.groups[-1] < 1:
        message = "`model.groups` has no group at the coarsest resolution"
        raise UsageError(message, hint="its last number must be 1 or more")
    at_least(0, **{name: min(value) for name, value in lists.items()})
    single = {name: value for name, value in sizes.items() if name not in lists}
    at_least(1, **single, **{"model.channels": min(ladder.channels)})


class Code(NamedTuple):
    """The posterior of a group, t ~ N(mu, e^(2 log_sigma)), and a draw t of it, [B, latent·h·w] each."""

    t: Tensor
    mu: Tensor
    log_sigma: Tensor

    def kl(self) -> Tensor:
        return kl_normal(self.mu, 2 * self.log_sigma)

    def log_ratio(self) -> Tensor:
        """log p − log q of the draw, [B]. The scale of the prior is the unit of t, so it cancels."""
        return log_normal(self.t) - log_normal(self.t, self.mu, 2 * self.log_sigma)


def draw_latents(
    eps: Tensor, mu: Tensor, log_sigma: Tensor, posterior: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Code | None]:
    """A draw z = mu + sigma·t of a group's latents [B, latent, h, w], from standard normal eps, and its code.
    The prior is t ~ N(0, I). The posterior is t ~ N(shift, ratio²), given as (shift, log ratio); None means
    the prior.
    """
    t, code = eps, None
    if posterior is not None:
        shift, log_ratio = posterior
        t = shift + log_ratio.exp() * eps
        code = Code(t.flatten(1), shift.flatten(1), log_ratio.flatten(1))
    return mu + log_sigma.exp() * t, code


def kl_of(codes: list[Code]) -> Tensor:
    """KL(q ‖ p) of each group, [B, groups]."""
    return torch.stack([code.kl() for code in codes], dim=1)


def soft_clamp(h: Tensor) -> Tensor:
    """h, softly clamped to ±5, in fp32. This bounds the KL of any image, even of images unlike the training
    images."""
    return 5 * torch.tanh(to_fp32(h) / 5)


class Cell(nn.Module):
    """A residual branch."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


@torch.no_grad()
def shrink_init(conv: nn.Conv2d, factor: float = 0.1) -> nn.Conv2d:
    """The convolution with its initial weights multiplied by a factor."""
    conv.weight.mul_(factor)
    return conv


class Group(nn.Module):
    """One group of latents. It maps a state h [B, width, h, w], standard normal eps [B, latent, h, w] and the
    image's features [B, width, h, w], or None, to the next state and the code of the posterior's draw.
    Without features, the latents are drawn from the prior."""


class TopDown(nn.Module):
    """Computes the parameters of the pixels [B, outputs, H, W] from a learned state, which the groups change,
    the coarsest first. A label is added at each resolution, so that all priors and posteriors depend on
    it."""

    def __init__(self, shape: tuple[int, ...], ladder: LadderOptions, outputs: int, embed: int):
        super().__init__()
        channels, groups = ladder.channels[::-1], ladder.groups[::-1]
        self.sizes = halved_sizes(shape, len(channels) - 1)[::-1]
        # the size of each group
        self.grids = [size for size, g in zip(self.sizes, groups, strict=True) for _ in range(g)]
        self.start = nn.Parameter(torch.randn(1, channels[0], *self.sizes[0]))
        steps = zip(pairwise(channels), self.sizes[1:], strict=True)
        self.ups = nn.ModuleList(self.make_up(i, o, size) for (i, o), size in steps)
        self.labels = nn.ModuleList(nn.Linear(embed, w) for w in channels) if embed else None
        self.scales = nn.ModuleList(
            nn.ModuleList(self.make_scale(ladder, len(channels) - 1 - i, size))
            for i, size in enumerate(self.sizes)
        )
        self.head = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def make_up(self, inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
        """The layer from one resolution to the next, whose size is `size`, or up to one row and column
        more."""
        raise NotImplementedError

    def make_scale(self, ladder: Any, i: int, size: tuple[int, int]) -> list[nn.Module]:
        """The groups of resolution i, and their layers [B, width, h, w] → [B, width, h, w]."""
        raise NotImplementedError

    def forward(
        self, eps: Sequence[Tensor], features: Sequence[Tensor], e: Tensor | None = None
    ) -> tuple[Tensor, list[Code]]:
        """The parameters of the pixels, and the posteriors' draws of the groups that have features.

        eps: standard normal [B, latent, h, w] of every group, coarsest first.
        features: features of the coarsest groups: of all, some or none. The finer groups are drawn from the
          prior.
        """
        h = self.start.expand(len(eps[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        draws, of_group = iter(eps), iter(features)
        codes: list[Code] = []
        for i, (scale, (height, width)) in enumerate(zip(self.scales, self.sizes, strict=True)):
            if i:
                h = self.ups[i - 1](h)[:, :, :height, :width]  # odd sizes were rounded up
            if self.labels is not None:
                h = h + self.labels[i](e)[:, :, None, None]
            for part in scale.children():
                if isinstance(part, Group):
                    h, code = part(h, next(draws), next(of_group, None))
                    codes += [] if code is None else [code]
                else:
                    h = part(h)
        return self.head(F.silu(h)), codes


ACTIVE = 0.05  # nats of KL above which a group counts as active


class LadderVAE(LabelledVAE):
    """A VAE with a ladder of Gaussian latents. A model defines the two towers, which are built from (shape,
    ladder) and from (shape, ladder, outputs, embed)."""

    sums = ("main",)
    bottom_up: ClassVar[Any]
    top_down: ClassVar[Any]
    share: Tensor

    def __init__(self, data: DataInfo, ladder: LadderOptions, bound: BoundOptions, labels: LabelOptions):
        check_ladder(ladder)
        super().__init__(data, labels, bound.kl_warmup)
        mixture = bound.pixels == "auto" and data.levels not in (2, None)
        kind = "mixture" if mixture else bound.pixels
        self.pixels = distribution(kind, data.shape[0], data.levels, bound.mixture)
        self.encoder = self.bottom_up(data.shape, ladder)
        self.decoder = self.top_down(data.shape, ladder, self.pixels.size, self.embed_dim)
        if self.pixels.init_bias is not None:
            self.pixels.init_bias(self.decoder.head.get_parameter("bias"))
        self.grids = [(ladder.latent, *grid) for grid in self.decoder.grids]
        self.sizes = [math.prod(grid) for grid in self.grids]  # latents of each group
        self.scale_of = [self.decoder.sizes.index(grid) for grid in self.decoder.grids]
        share = [size / self.scale_of.count(i) for size, i in zip(self.sizes, self.scale_of, strict=True)]
        self.register_buffer("share", torch.tensor(share), persistent=False)  # s_l of `kl_weights`

    def draw(self, n: int, noise: Noise) -> list[Tensor]:
        """Standard normal eps of every group, [n, latent, h, w] each."""
        eps = noise.randn(n, sum(self.sizes)).split(self.sizes, dim=1)
        return [part.unflatten(1, grid) for part, grid in zip(eps, self.grids, strict=True)]

    def check_groups(self, name: str, count: int) -> int:
        """The value `count` of the option `name`. Raises UsageError if the model has fewer groups."""
        if not 0 <= count <= len(self.sizes):
            message = f"`{name}` is {count}, but the model has {len(self.sizes)} groups"
            raise UsageError(message, hint="give a number from 0 to that number")
        return count

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        x = batch.x
        eps, e = self.draw(len(batch), batch.noise), self.embed_batch(batch)
        out, codes = self.decoder(eps, self.encoder(x), e)
        recon, kl = -self.pixels.log_prob(x, out).mean(), kl_of(codes).mean(0)
        parts = {"loss": recon + (self.kl_weights(kl.detach()) * kl).sum()}
        parts |= {"recon": recon, "kl": kl.sum(), "elbo": -(recon + kl.sum())}
        if self.data.levels is not None:
            parts["bpd"] = bits_per_dim(-parts["elbo"], self.data)
        for i in sorted(set(self.scale_of)):
            height, width = self.decoder.sizes[i]
            of_scale = [kl[j] for j, scale in enumerate(self.scale_of) if scale == i]
            parts[f"kl_{height}x{width}"] = torch.stack(of_scale).sum()
        parts["active_groups"] = (kl >= ACTIVE).float().sum()
        return {name: value if name == "loss" else value.detach() for name, value in parts.items()}

    def kl_weights(self, kl: Tensor) -> Tensor | float:
        """The loss weight of each group's KL, [groups]. It is 1 or, during warm-up, γ_l ∝ E[KL_l] / s_l with
        mean 1, where s_l is the number of latents divided by the number of groups at its resolution. A group
        with a small KL thus has almost no weight, so that it becomes used."""
        if not self.training or self.kl_factor == 1:
            return 1.0
        gamma = (ranks.mean_over_ranks(kl, self).abs() + 0.01) / self.share.to(kl)
        return self.kl_factor * gamma / gamma.mean()

    # ---- likelihood and out-of-distribution scores

    def log_prob(self, x: Tensor, labels: Labels = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """A lower bound of log p(x), [B] nats. Without labels, a conditional model has the bound of the
        mixture of its classes.

        samples: samples of z. 1: the ELBO; more: the importance-weighted bound.
        """
        return self.mixed_bound(x, self.encoder(x), labels, noise, samples)

    def mixed_bound(
        self, x: Tensor, features: Sequence[Tensor], labels: Labels, noise: Noise, samples: int
    ) -> Tensor:
        """`bound` given labels; without labels, the bound of the mixture of classes."""

        def bound(labels: Labels, noise: Noise) -> Tensor:
            draws = [self.draw(len(x), noise) for _ in range(samples)]
            return self.bound(x, features, self.embed(labels, len(x)), draws)

        return over_classes(self, bound, len(x), labels, noise)

    def bound(
        self, x: Tensor, features: Sequence[Tensor], e: Tensor | None, draws: list[list[Tensor]]
    ) -> Tensor:
        """The bound of log p(x), [B], for draws eps. Groups without features are drawn from the prior."""
        log_w = []
        for eps in draws:
            out, codes = self.decoder(eps, features, e)
            log_p = self.pixels.log_prob(x, out)
            ratios = [-code.kl() if len(draws) == 1 else code.log_ratio() for code in codes]
            log_w.append(log_p + sum(ratios, torch.zeros_like(log_p)))
        return torch.stack(log_w).logsumexp(0) - math.log(len(draws))

    def score_elbo(self, x: Tensor, *, noise: Noise, samples: int = 1) -> Tensor:
        """Minus the bound of log p(x).

        samples: samples of z. 1: the ELBO; more: the importance-weighted bound.
        """
        return -self.log_prob(x, noise=noise, samples=samples)

    def score_llr(self, x: Tensor, *, noise: Noise, k: int = 1, samples: int = 1) -> Tensor:
        """LLR^(>k) = ELBO − ELBO^(>k), the contribution of the k finest groups to the bound of log p(x).
        ELBO^(>k) draws them from the prior given the coarser ones (Havtorn et al. 2021, arXiv:2102.08248).

        k: number of groups, starting from the finest.
        samples: draws of z in both bounds.
        """
        keep = len(self.sizes) - self.check_groups("k", k)
        features = self.encoder(x)
        coarse = self.mixed_bound(x, features[:keep], None, noise.again(), samples)
        return self.mixed_bound(x, features, None, noise, samples) - coarse

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
        mean: bool = True,
    ) -> Tensor:
        """Draws the groups from the prior, the coarsest first, and then the pixels.

        temperature: factor of every group's standard deviation.
        mean: whether each pixel is the location of its distribution instead of a sample.
        """
        e = self.embed_samples(labels, n)
        out, _ = self.decoder([temperature * eps for eps in self.draw(n, noise)], [], e)
        return self.to_images(out, mean, noise, progress)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        keep: int = 0,
        temperature: float = 1.0,
    ) -> Applied:
        """Encodes and decodes each image at the posterior's mean.

        keep: number of coarsest groups that are encoded from the image. Finer groups are drawn from the
          prior. 0: encode all groups.
        temperature: factor of the standard deviation of the sampled groups.
        """
        features, keep = self.encoder(x), self.check_groups("keep", keep) or len(self.sizes)
        draws = enumerate(self.draw(len(x), noise))
        eps = [torch.zeros_like(t) if i < keep else temperature * t for i, t in draws]
        out, _ = self.decoder(eps, features[:keep], self.embed(labels, len(x)))
        return Applied(self.to_images(out, True, noise, progress), rows=("reconstruction",), labels=labels)

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress, frames: int = 8
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, … along straight lines of latents.

        Every group moves from the posterior mean of one image to that of the other, in units of the prior's
        standard deviation given the coarser groups. Each frame has the label of the nearer end.

        frames: images of an interpolation, both ends included.
        """
        zeros = [x.new_zeros(len(x), *grid) for grid in self.grids]
        _, codes = self.decoder(zeros, self.encoder(x), self.embed(labels, len(x)))
        means = zip((code.mu for code in codes), self.grids, strict=True)
        ts = [mix_codes(mu, frames).unflatten(1, grid) for mu, grid in means]
        y = nearer(labels, frames)
        out, _ = self.decoder(ts, [], self.embed(y, len(ts[0])))
        return as_interpolations(self.to_images(out, True, noise, progress), frames, y)
