"""Hierarchical VAE — Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder",
arXiv:2007.03898.

    log p(x) ≥ ELBO = E_q [log p(x | z)] − Σ_l E_q(z_<l | x) KL(q(z_l | z_<l, x) ‖ p(z_l | z_<l))
    (eq. 1)

over groups of latents z_1 … z_L on grids from coarse to fine. The posterior is told by how it differs from
the prior (`ladder.Group`, eq. 2). There is no batch norm (`cells`), and no normalizing flow in the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gzcli import ranks
from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn import ClassEmbedding, as_ways, spread_labels, ways
from gzcli.models.vae.cells import SpectralNorms
from gzcli.models.vae.ladder import BottomUp, Code, TopDown
from gzcli.models.vae.mixture import MixturePixels
from gzcli.models.vae.pixels import Pixels
from gzcli.models.vae.vae import VAE
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress

ACTIVE = 0.05  # nats of KL from which on a group counts as used


class HVAE(Model):
    """A ladder of Gaussian latents, after NVAE.

    channels, groups, cells: one entry a resolution, from the image's own on, halved each time. channels:
    width of the
      feature maps; groups: groups of latents; cells: residual cells, in either tower, before each group, or
      in all where a resolution has no groups.
    latent: channels of a group; expand: of the decoder's depthwise convolutions, times `channels`.
    pixels: the decoder's distribution over grey levels (`Pixels`), or a mixture of `mixture` discretised
    logistics over
      whole pixels; auto is bernoulli for 2 levels, gaussian for latents, mixture else.
    kl_warmup: steps over which the weight of the KL rises from 0; meanwhile the groups' shares are balanced
      (appendix A), so that none dies early. In training mode only.
    spectral: λ, weight of the sum of all convolutions' largest singular values.
    label_dropout: how often a conditional model sees the null label, which stands for `labels=None` ever
    after.
    """

    paper = "Vahdat & Kautz 2020, arXiv:2007.03898"
    likelihood = "bound"

    def __init__(
        self,
        data: DataInfo,
        *,
        channels: tuple[int, ...] = (16, 32, 48, 64),
        groups: tuple[int, ...] = (0, 1, 2, 2),
        cells: tuple[int, ...] = (0, 1, 1, 1),
        latent: int = 8,
        expand: int = 3,
        pixels: Literal["auto", "bernoulli", "gaussian", "logistic", "mixture"] = "auto",
        mixture: int = 10,
        kl_warmup: int = 0,
        spectral: float = 0.01,
        conditional: bool = False,
        label_dim: int = 32,
        label_dropout: float = 0.1,
    ):
        super().__init__(data)
        if not len(channels) == len(groups) == len(cells):
            raise UsageError(
                "`model.channels`, `model.groups` and `model.cells` differ in length",
                hint="give each one number a resolution, the image's own first, as in `groups: [0, 1, 2]`",
            )
        if not groups or groups[-1] < 1:
            raise UsageError(
                "`model.groups` has no group at the coarsest resolution",
                hint="its last number must be 1 or more",
            )
        if min(*groups, *cells) < 0 or min(*channels, latent, expand, mixture) < 1:
            raise UsageError(
                "`model.groups` and `model.cells` must not be negative, the other sizes of `model` be 1 or "
                "more"
            )
        image_channels = data.shape[0]
        if pixels == "mixture" or (pixels == "auto" and data.levels not in (2, None)):
            self.pixels = MixturePixels(image_channels, data.levels, mixture)
            outputs, self.uniforms = self.pixels.size, self.pixels.uniforms
        else:
            self.pixels = Pixels(pixels, data.levels)
            outputs, self.uniforms = self.pixels.outputs * image_channels, image_channels
        self.conditional = conditional
        self.labels = ClassEmbedding(len(data.classes), label_dim) if conditional else None
        self.encoder = BottomUp(image_channels, channels, groups, cells)
        self.decoder = TopDown(
            data.shape,
            channels,
            groups,
            cells,
            latent=latent,
            expand=expand,
            outputs=outputs,
            embed=label_dim if conditional else 0,
        )
        if isinstance(self.pixels, MixturePixels):
            self.pixels.start(self.decoder.head.bias)
        self.grids = [(latent, *grid) for grid in self.decoder.grids]
        self.sizes = [math.prod(grid) for grid in self.grids]  # latents of each group
        self.scale_of = [self.decoder.sizes.index(grid) for grid in self.decoder.grids]
        share = [
            size / self.scale_of.count(scale) for size, scale in zip(self.sizes, self.scale_of, strict=True)
        ]
        self.register_buffer("share", torch.tensor(share), persistent=False)  # s_l of `kl_weights`
        self.spectral = spectral
        self.norms = SpectralNorms(self) if spectral else None
        self.kl_warmup, self.warm = kl_warmup, 0.0 if kl_warmup else 1.0
        self.label_dropout = label_dropout

    embed, on_step = VAE.embed, VAE.on_step  # the null label and the warm-up are the VAE's

    def draw(self, n: int, noise: Noise, device: torch.device) -> list[Tensor]:
        """Standard normal eps of every group, [n, latent, h, w] each."""
        eps = noise.randn(n, sum(self.sizes)).to(device).split(self.sizes, dim=1)
        return [part.unflatten(1, grid) for part, grid in zip(eps, self.grids, strict=True)]

    def checked(self, name: str, count: int) -> int:
        if not 0 <= count <= len(self.sizes):
            raise UsageError(
                f"`{name}` is {count}, the model has {len(self.sizes)} groups",
                hint="name a number from 0 to that",
            )
        return count

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        x, n = batch.x, len(batch)
        eps = self.draw(n, batch.noise, x.device)
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
            parts[f"kl_{height}x{width}"] = sum(kl[j] for j, scale in enumerate(self.scale_of) if scale == i)
        parts["active_groups"] = (kl >= ACTIVE).float().sum()
        return {name: value if name == "loss" else value.detach() for name, value in parts.items()}

    def kl_weights(self, kl: Tensor) -> Tensor | float:
        """The weight of each group's KL [groups] in the loss: 1, or while training warms up, less and
        balanced.

        γ_l ∝ E[KL_l] / s_l, of mean 1, s_l the latents of a group over the groups of its resolution: a group
        that carries more than its share pays more, and one that carries nothing pays next to nothing for a
        start. E is over the batch, or over the part of it that `train.accumulate` hands over.
        """
        if not self.training or self.warm == 1:
            return 1.0
        gamma = (ranks.mean(kl, self).abs() + 0.01) / self.share.to(kl)
        return self.warm * gamma / gamma.mean()

    # ---- likelihood and out-of-distribution scores

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """A lower bound of log p(x): the ELBO by one draw of z, or the importance-weighted bound of
        `samples`. [B] nats.

        A conditional model without labels speaks for its null label.
        """
        e = self.embed(labels, len(x))
        return self.bound(x, self.encoder(x), e, [self.draw(len(x), noise, x.device) for _ in range(samples)])

    def bound(
        self, x: Tensor, features: Sequence[Tensor], e: Tensor | None, draws: list[list[Tensor]]
    ) -> Tensor:
        """The bound of log p(x) by those `draws` of eps, the groups without `features` being drawn from the
        prior. [B]"""
        log_w = []
        for eps in draws:
            out, codes = self.decoder(eps, features, e)
            log_ratio = sum(-code.kl() if len(draws) == 1 else code.log_ratio() for code in codes)
            log_w.append(self.pixels.log_prob(x, out) + log_ratio)
        return torch.stack(log_w).logsumexp(0) - math.log(len(draws))

    def score_elbo(self, x: Tensor, *, noise: Noise, samples: int = 1) -> Tensor:
        """−ELBO, or minus the importance-weighted bound of `samples` draws."""
        return -self.log_prob(x, noise=noise, samples=samples)

    def score_llr(self, x: Tensor, *, noise: Noise, k: int = 1, samples: int = 1) -> Tensor:
        """LLR^(>k) = ELBO − ELBO^(>k): what the k groups nearest the data add to the bound of x.

        ELBO^(>k) draws them from the prior given the groups above, whose posterior it keeps (Havtorn et al.
        2021, arXiv:2102.08248), with the same noise. High where the groups above, which hold what an image
        shows, do not tell of its pixels. Raises UsageError for a k that is not 0 … groups.
        """
        keep = len(self.sizes) - self.checked("k", k)
        e, features = self.embed(None, len(x)), self.encoder(x)
        draws = [self.draw(len(x), noise, x.device) for _ in range(samples)]
        return self.bound(x, features, e, draws) - self.bound(x, features[:keep], e, draws)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """KL of each group in nats (`kl_1` is the coarsest), `active_groups` of at least 0.05, and
        `active_units`.

        A unit is active if its posterior mean, in standard deviations of the prior, moves with x (Burda 2015,
        section 5.2).
        """
        n, kl, mean, square = 0, 0.0, 0.0, 0.0
        for batch in batches:
            e = self.embed(batch.y if self.conditional else None, len(batch))
            _, codes = self.decoder(
                self.draw(len(batch), batch.noise, batch.x.device), self.encoder(batch.x), e
            )
            mu = torch.cat([code.mu for code in codes], dim=1).cpu().double()
            n += len(batch)
            kl = kl + kl_of(codes).cpu().double().sum(0)
            mean, square = mean + mu.sum(0), square + mu.square().sum(0)
        kl, variance = kl / n, square / n - (mean / n) ** 2
        figures = {f"kl_{i}": float(value) for i, value in enumerate(kl, 1)}
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
        """Down the ladder, each group's standard deviation times `temperature`; `mean` shows each pixel's
        location, else its value is drawn too."""
        device = self.decoder.start.device
        e = None if self.labels is None else self.labels(spread_labels(labels, n, self.data, device), n)
        out, _ = self.decoder([temperature * eps for eps in self.draw(n, noise, device)], [], e)
        u = None if mean else noise.rand(n, self.uniforms, *self.data.shape[1:]).to(device)
        x = self.pixels.mean(out) if mean else self.pixels.draw(out, u)
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
        """Each image up and down the ladder, at the posterior's mean.

        keep: how many groups, from the coarsest on, are the image's own; the others are drawn from the prior
        given those, at
        `temperature`, which shows what the kept ones hold. 0 keeps all.
        """
        features, keep = self.encoder(x), self.checked("keep", keep) or len(self.sizes)
        eps = [
            torch.zeros_like(t) if i < keep else temperature * t
            for i, t in enumerate(self.draw(len(x), noise, x.device))
        ]
        x = self.pixels.mean(self.decoder(eps, features[:keep], self.embed(labels, len(x)))[0])
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",), labels=labels)

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 8) -> Applied:
        """The way from image 0 to 1, 2 to 3, … in latent space, ends included.

        Every group moves from one image's posterior mean to the other's, counted in standard deviations of
        the prior that the groups above give. Raises UsageError for fewer than two images, or steps.
        """
        still = [x.new_zeros(len(x), *grid) for grid in self.grids]
        _, codes = self.decoder(still, self.encoder(x), self.embed(None, len(x)))
        ts = [ways(code.mu, steps).unflatten(1, grid) for code, grid in zip(codes, self.grids, strict=True)]
        x = self.pixels.mean(self.decoder(ts, [], self.embed(None, len(ts[0])))[0])
        progress(1, 1, x)
        return as_ways(x, steps)


def kl_of(codes: list[Code]) -> Tensor:
    """KL(q ‖ p) of each group, [B, groups]."""
    return torch.stack([code.kl() for code in codes], dim=1)
