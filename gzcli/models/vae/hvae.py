"""Hierarchical VAE — Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder",
arXiv:2007.03898.

    log p(x) ≥ ELBO = E_q [log p(x | z)] − Σ_l E_q(z_<l | x) KL(q(z_l | z_<l, x) ‖ p(z_l | z_<l))    (eq. 1)

over groups of latents z_1 … z_L on grids from coarse to fine. The posterior is relative to the prior
(`ladder.Group`, eq. 2). Unlike the paper, there is no batch norm (`cells`), and no normalizing flow in the
posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.nn.common import spread_labels
from gzcli.models.nn.latent import as_interpolations, interpolated
from gzcli.models.vae.base import HiddenLabelOptions, LabelledVAE
from gzcli.models.vae.cells import SpectralNorms
from gzcli.models.vae.ladder import BottomUp, Code, LadderOptions, TopDown, check
from gzcli.models.vae.mixture import distribution

ACTIVE = 0.05  # nats of KL from which on a group counts as active


class HVAE(LabelledVAE):
    """A ladder of Gaussian latents, after NVAE.

    pixels: the decoder's distribution over grey levels, or over whole pixels for `mixture`; auto: bernoulli
      for 2 levels, gaussian for latents, otherwise mixture.
    mixture: discretised logistics of a pixel's mixture.
    kl_warmup: steps over which the weight of the KL rises from 0. During these steps the weights of the
      groups are balanced (appendix A), so that every group is used.
    spectral: weight λ of the sum of the largest singular values of all convolutions.
    """

    paper = "Vahdat & Kautz 2020, arXiv:2007.03898"
    likelihood = "bound"
    share: Tensor

    def __init__(
        self,
        data: DataInfo,
        *,
        ladder: LadderOptions = LadderOptions(),
        pixels: Literal["auto", "bernoulli", "gaussian", "logistic", "mixture"] = "auto",
        mixture: int = 10,
        kl_warmup: int = 0,
        spectral: float = 0.01,
        labels: HiddenLabelOptions = HiddenLabelOptions(),
    ):
        check(ladder, mixture)
        super().__init__(data, labels, kl_warmup)
        channels = data.shape[0]
        if pixels == "auto" and data.levels not in (2, None):
            pixels = "mixture"
        self.pixels = distribution(pixels, channels, data.levels, mixture)
        self.encoder = BottomUp(channels, ladder)
        self.decoder = TopDown(data.shape, ladder, self.pixels.size, labels.size)
        if self.pixels.start is not None:
            self.pixels.start(self.decoder.head.get_parameter("bias"))
        self.grids = [(ladder.latent, *grid) for grid in self.decoder.grids]
        self.sizes = [math.prod(grid) for grid in self.grids]  # latents of each group
        self.scale_of = [self.decoder.sizes.index(grid) for grid in self.decoder.grids]
        share = [
            size / self.scale_of.count(scale) for size, scale in zip(self.sizes, self.scale_of, strict=True)
        ]
        self.register_buffer("share", torch.tensor(share), persistent=False)  # s_l of `kl_weights`
        self.spectral = spectral
        self.norms = SpectralNorms(self) if spectral else None

    def draw(self, n: int, noise: Noise) -> list[Tensor]:
        """Standard normal eps of every group, [n, latent, h, w] each."""
        eps = noise.randn(n, sum(self.sizes)).split(self.sizes, dim=1)
        return [part.unflatten(1, grid) for part, grid in zip(eps, self.grids, strict=True)]

    def checked(self, name: str, count: int) -> int:
        """The number of groups `count` of the option `name`. Raises UsageError where the model has fewer."""
        if not 0 <= count <= len(self.sizes):
            raise UsageError(
                f"`{name}` is {count}, the model has {len(self.sizes)} groups",
                hint="name a number from 0 to that",
            )
        return count

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        x, n = batch.x, len(batch)
        eps = self.draw(n, batch.noise)
        drop = batch.noise.rand(n) < self.label_dropout if self.labels is not None else None
        out, codes = self.decoder(eps, self.encoder(x), self.embed(batch.y, n, drop))
        recon, kl = -self.pixels.log_prob(x, out).mean(), kl_of(codes).mean(0)
        parts = {"loss": recon + (self.kl_weights(kl.detach()) * kl).sum()}
        if self.training and self.norms is not None:
            parts["spectral"] = self.norms()
            parts["loss"] = parts["loss"] + self.spectral * parts["spectral"]
        parts |= {"recon": recon, "kl": kl.sum(), "elbo": -(recon + kl.sum())}
        if self.data.levels is not None:
            parts["bpd"] = -parts["elbo"] / (math.prod(self.data.shape) * math.log(2))
        for i in sorted(set(self.scale_of)):
            height, width = self.decoder.sizes[i]
            of_scale = [kl[j] for j, scale in enumerate(self.scale_of) if scale == i]
            parts[f"kl_{height}x{width}"] = torch.stack(of_scale).sum()
        parts["active_groups"] = (kl >= ACTIVE).float().sum()
        return {name: value if name == "loss" else value.detach() for name, value in parts.items()}

    def kl_weights(self, kl: Tensor) -> Tensor | float:
        """The weight in the loss of each group's KL [groups]: 1, or during warm-up a balanced smaller one.

        γ_l ∝ E[KL_l] / s_l with mean 1, where s_l is the number of latents of the group, divided by the
        number of groups of its resolution. A group with more KL than its share gets a larger weight, and an
        unused group almost none, so that it becomes used. E is over the batch, or over a micro-batch where
        `train.accumulate` is above 1.
        """
        if not self.training or self.warm == 1:
            return 1.0
        gamma = (ranks.mean(kl, self).abs() + 0.01) / self.share.to(kl)
        return self.warm * gamma / gamma.mean()

    # ---- likelihood and out-of-distribution scores

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """A lower bound of log p(x), [B] nats. Without labels a conditional model uses the null label.

        samples: draws of z; 1: the ELBO, more: the importance-weighted bound.
        """
        e = self.embed(labels, len(x))
        return self.bound(x, self.encoder(x), e, [self.draw(len(x), noise) for _ in range(samples)])

    def bound(
        self, x: Tensor, features: Sequence[Tensor], e: Tensor | None, draws: list[list[Tensor]]
    ) -> Tensor:
        """The bound of log p(x), [B].

        features: of the coarsest groups; groups without features are drawn from the prior.
        e: embeddings of the labels [B, E].
        draws: for each sample of z, standard normal eps of every group.
        """
        log_w = []
        for eps in draws:
            out, codes = self.decoder(eps, features, e)
            log_p = self.pixels.log_prob(x, out)
            ratios = [-code.kl() if len(draws) == 1 else code.log_ratio() for code in codes]
            log_w.append(log_p + sum(ratios, torch.zeros_like(log_p)))
        return torch.stack(log_w).logsumexp(0) - math.log(len(draws))

    def score_elbo(self, x: Tensor, *, noise: Noise, samples: int = 1) -> Tensor:
        """Minus the bound of log p(x).

        samples: draws of z; 1: the ELBO, more: the importance-weighted bound.
        """
        return -self.log_prob(x, noise=noise, samples=samples)

    def score_llr(self, x: Tensor, *, noise: Noise, k: int = 1, samples: int = 1) -> Tensor:
        """LLR^(>k) = ELBO − ELBO^(>k): what the k finest groups add to the bound of log p(x).

        In ELBO^(>k) the k finest groups are drawn, with the same noise, from the prior given the coarser
        groups, which keep their posterior (Havtorn et al. 2021, arXiv:2102.08248). The ratio is large where
        the coarser groups, which hold the semantics of an image, do not predict its pixels. Raises UsageError
        for a k that is not 0 … groups.

        k: number of groups, from the finest on.
        samples: draws of z in both bounds.
        """
        keep = len(self.sizes) - self.checked("k", k)
        e, features = self.embed(None, len(x)), self.encoder(x)
        draws = [self.draw(len(x), noise) for _ in range(samples)]
        return self.bound(x, features, e, draws) - self.bound(x, features[:keep], e, draws)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures of held-out images: the KL of each group in nats (`kl_1` is the coarsest); `active_groups`,
        the number of groups with 0.05 nats or more; and `active_units`.

        A unit is active if its posterior mean, in standard deviations of the prior, varies with x (Burda
        2015, section 5.2).
        """
        n = 0
        kl = torch.zeros(len(self.sizes), dtype=torch.float64)
        mean = torch.zeros(sum(self.sizes), dtype=torch.float64)
        square = mean.clone()
        for batch in batches:
            e = self.embed(batch.y if self.conditional else None, len(batch))
            _, codes = self.decoder(self.draw(len(batch), batch.noise), self.encoder(batch.x), e)
            mu = torch.cat([code.mu for code in codes], dim=1).cpu().double()
            n += len(batch)
            kl += kl_of(codes).cpu().double().sum(0)
            mean, square = mean + mu.sum(0), square + mu.square().sum(0)
        kl, variance = kl / n, square / n - (mean / n) ** 2
        figures = {f"kl_{i}": value for i, value in enumerate(kl.tolist(), 1)}
        return figures | {
            "active_groups": float((kl >= ACTIVE).sum()),
            "active_units": float((variance > 0.01).sum()),
        }

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
        mean: bool = True,
    ) -> Tensor:
        """Draws the groups from the prior, the coarsest first, and then the pixels.

        temperature: factor of every group's standard deviation.
        mean: whether each pixel is the location of its distribution; otherwise it is a draw.
        """
        device = self.decoder.start.device
        e = None if self.labels is None else self.labels(spread_labels(labels, n, self.data, device), n)
        out, _ = self.decoder([temperature * eps for eps in self.draw(n, noise)], [], e)
        if mean:
            x = self.pixels.mean(out)
        else:
            x = self.pixels.draw(out, noise.rand(n, self.pixels.uniforms, *self.data.shape[1:]))
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        keep: int = 0,
        temperature: float = 1.0,
    ) -> Applied:
        """Each image encoded and decoded, at the posterior's mean.

        keep: number of groups, from the coarsest on, that are the image's own; finer groups are drawn from
          the prior given these, which shows what these hold; 0: all groups.
        temperature: factor of the standard deviation of the groups that are drawn.
        """
        features, keep = self.encoder(x), self.checked("keep", keep) or len(self.sizes)
        eps = [
            torch.zeros_like(t) if i < keep else temperature * t
            for i, t in enumerate(self.draw(len(x), noise))
        ]
        x = self.pixels.mean(self.decoder(eps, features[:keep], self.embed(labels, len(x)))[0])
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",), labels=labels)

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, frames: int = 8) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, … along straight lines of latents.

        Every group moves from the posterior mean of one image to that of the other, in units of the prior's
        standard deviation given the coarser groups. Raises UsageError for fewer than two images or frames.

        frames: images of an interpolation, both ends included.
        """
        still = [x.new_zeros(len(x), *grid) for grid in self.grids]
        _, codes = self.decoder(still, self.encoder(x), self.embed(None, len(x)))
        ts = [
            interpolated(code.mu, frames).unflatten(1, grid)
            for code, grid in zip(codes, self.grids, strict=True)
        ]
        x = self.pixels.mean(self.decoder(ts, [], self.embed(None, len(ts[0])))[0])
        progress(1, 1, x)
        return as_interpolations(x, frames)


def kl_of(codes: list[Code]) -> Tensor:
    """KL(q ‖ p) of each group, [B, groups]."""
    return torch.stack([code.kl() for code in codes], dim=1)
