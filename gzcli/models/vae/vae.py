"""Variational autoencoder — Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.

    log p(x) ≥ ELBO = E_q(z|x) [log p(x | z)] − KL(q(z | x) ‖ N(0, I))          (eq. 3)

The unit is nats per discrete image: the first term is a sum over pixels, never a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.labelled import LabelOptions, over_classes
from gzcli.models.nn import Labels, bits_per_dim, double, to_fp32
from gzcli.models.nn.perceptual import ms_ssim
from gzcli.models.nn.pixels import PixelKind, distribution
from gzcli.models.vae.base import (
    LOGVAR,
    Autoencoder,
    LabelledVAE,
    NetOptions,
    kl_normal,
    log_normal,
    reparameterise,
)


@dataclass(frozen=True)
class VAEOptions:
    """The distribution of the pixels, and the training bound. Likelihoods and scores use a KL of weight 1.

    pixels: the decoder's distribution over grey levels (`mixture`: over whole pixels). auto: bernoulli for 2
      levels, gaussian for latents, otherwise logistic.
    mixture: number of discretized logistics in a pixel's mixture.
    recon: `likelihood` trains −log p(x | z); `ms_ssim` trains D·(1 − MS-SSIM) of the decoder's mean, where D
      is the number of pixels. The scales of gaussian and logistic pixels are then not trained, and the
      likelihood is a loose bound.
    beta: weight of the KL in the loss (Higgins 2017).
    kl_warmup: steps over which the weight of the KL rises from 0.
    iwae: samples of the importance-weighted bound in the loss (Burda 2015, arXiv:1509.00519, eq. 8). 1: the
      ELBO.
    """

    pixels: PixelKind = "auto"
    mixture: int = 1
    recon: Literal["likelihood", "ms_ssim"] = "likelihood"
    beta: float = 1.0
    kl_warmup: int = 0
    iwae: int = 1


class VAE(Autoencoder, LabelledVAE):
    """A VAE with a Gaussian posterior."""

    paper = "Kingma & Welling 2013, arXiv:1312.6114"
    costly = ("regret",)
    sums = ("main",)

    def __init__(
        self,
        data: DataInfo,
        nets: NetOptions = NetOptions(),
        options: VAEOptions = VAEOptions(),
        labels: LabelOptions = LabelOptions(),
    ):
        super().__init__(data, labels, options.kl_warmup)
        if options.recon == "ms_ssim" and options.iwae > 1:
            message = "`model.iwae` above 1 needs `model.recon: likelihood`"
            raise UsageError(message, hint="set `model.iwae` to 1, or `model.recon` to `likelihood`")
        if options.recon == "ms_ssim" and options.pixels == "mixture":
            text = "`model.recon: ms_ssim` trains the means of pixels, which have no gradient in a mixture"
            raise UsageError(text, hint="set `model.pixels=logistic`")
        self.pixels = distribution(options.pixels, data.shape[0], data.levels, options.mixture)
        self.recon, self.beta, self.iwae = options.recon, options.beta, options.iwae
        self.latent, self.dims = nets.latent, math.prod(data.shape)
        self.encoder = nets.encoder(data.shape, 2 * nets.latent, self.embed_dim)
        self.decoder = nets.decoder(data.shape, self.pixels.size, self.embed_dim)
        if self.pixels.init_bias is not None:  # the bias of the last layer is the same for all pixels
            *_, bias = self.decoder.parameters()
            self.pixels.init_bias(pixel_bias := torch.empty(self.pixels.size))
            bias.data.copy_(pixel_bias.repeat_interleave(len(bias) // len(pixel_bias)))

    def encode(self, x: Tensor, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q(z | x): mu and logvar [B, latent], fp32, logvar within bounds."""
        mu, logvar = to_fp32(self.encoder(x, e)).chunk(2, dim=1)
        return mu, logvar.clamp(*LOGVAR)

    def code(self, x: Tensor, labels: Labels = None) -> Tensor:
        return self.encode(x, self.embed(labels, len(x)))[0]

    def image(self, z: Tensor, labels: Labels = None) -> Tensor:
        return self.pixels.mean(self.decoder(z, self.embed(labels, len(z))))

    def to_latent(self, x: Tensor) -> Tensor:
        """The posterior's mean as an image of a single pixel, [B, latent, 1, 1]."""
        return self.code(x)[:, :, None, None]

    def from_latent(self, z: Tensor) -> Tensor:
        """The locations of the pixels [B, C, H, W] for z [B, latent, 1, 1]."""
        return self.image(z.flatten(1))

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        x = batch.x
        eps, e = self.draws(len(batch), batch.noise, self.iwae), self.embed_batch(batch)
        mu, logvar = self.encode(x, e)
        beta = self.beta * self.kl_factor if self.training else self.beta
        if self.iwae > 1:
            log_px, log_ratio = self.weights(x, mu, logvar, eps, e)  # [B, k] each
            loss = math.log(self.iwae) - torch.logsumexp(log_px + beta * log_ratio, dim=1)
            recon, kl = -log_px.mean(1), -log_ratio.mean(1)
        else:
            out = self.decoder(reparameterise(mu, logvar, eps[:, 0]), e)
            recon, kl = self.distance(x, out), kl_normal(mu, logvar)
            loss = recon + beta * kl
        parts = {"loss": loss.mean(), "recon": recon.mean().detach(), "kl": kl.mean().detach()}
        if self.recon == "likelihood" and self.data.levels is not None:
            parts["bpd"] = bits_per_dim(parts["recon"] + parts["kl"], self.data)
        # Burda 2015, section 5.2: a unit is active if its posterior mean varies with x
        parts["active_units"] = (mu.detach().var(0, unbiased=False) > 0.01).float().sum()
        return parts

    def draws(self, n: int, noise: Noise, k: int) -> Tensor:
        """k standard normal draws for each of n images, [n, k, latent]."""
        return noise.randn(n, k * self.latent).unflatten(1, (k, self.latent))

    def distance(self, x: Tensor, out: Tensor) -> Tensor:
        """The reconstruction loss [B] of the decoder's output [B, size, H, W]."""
        if self.recon == "ms_ssim":
            return self.dims * (1 - ms_ssim(x, self.pixels.mean(out)))
        return -self.pixels.log_prob(x, out)

    def weights(
        self, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, e: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log p(x | z) and log p(z) − log q(z | x), [B, k] each, at z = mu + sigma·eps [B, k, latent]."""
        k = eps.shape[1]
        mu, logvar = mu.unsqueeze(1), logvar.unsqueeze(1)
        z = reparameterise(mu, logvar, eps)
        e = None if e is None else e.repeat_interleave(k, 0)
        out = self.decoder(z.flatten(0, 1), e)
        log_px = self.pixels.log_prob(x.repeat_interleave(k, 0), out).unflatten(0, (-1, k))
        return log_px, log_normal(z) - log_normal(z, mu, logvar)

    # ---- likelihood

    def log_prob(self, x: Tensor, labels: Labels = None, *, noise: Noise, k: int = 1) -> Tensor:
        """A lower bound of log p(x), [B] nats. Without labels, a conditional model has the bound of the
        mixture of its classes.

        k: samples of z. 1: the ELBO; more: the importance-weighted bound.
        """

        def bound(labels: Labels, noise: Noise) -> Tensor:
            if k > 1:
                return self.iwae_bound(x, noise, k, labels)
            recon, kl = self.elbo_parts(x, noise, labels)
            return -(recon + kl)

        return over_classes(self, bound, len(x), labels, noise)

    def elbo_parts(self, x: Tensor, noise: Noise, labels: Labels = None) -> tuple[Tensor, Tensor]:
        """−log p(x | z) at one z ~ q, and KL, [B] each: the ELBO is minus their sum."""
        e = self.embed(labels, len(x))
        mu, logvar = self.encode(x, e)
        out = self.decoder(reparameterise(mu, logvar, noise.randn(len(x), self.latent)), e)
        return -self.pixels.log_prob(x, out), kl_normal(mu, logvar)

    def iwae_bound(self, x: Tensor, noise: Noise, k: int, labels: Labels = None) -> Tensor:
        """log 1/k Σ p(x, z_i) / q(z_i | x), z_i ~ q, [B] (Burda 2015, eq. 8), in chunks of 16 samples."""
        e = self.embed(labels, len(x))
        mu, logvar = self.encode(x, e)
        parts = (self.weights(x, mu, logvar, eps, e) for eps in self.draws(len(x), noise, k).split(16, dim=1))
        log_w = [log_px + log_ratio for log_px, log_ratio in parts]
        return torch.logsumexp(torch.cat(log_w, dim=1), dim=1) - math.log(k)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of held-out images.

        recon: reconstruction term of the ELBO, in nats per image.
        kl: KL term of the ELBO, in nats per image.
        active_units: number of dimensions whose posterior mean has a variance above 0.01 (Burda 2015,
          section 5.2).
        iwae100: −IWAE-100 of the first 1,000 images, in nats per image.
        """
        sums, means, bounds, images = [], [], [], 0
        for batch in batches:
            labels = batch.y if self.conditional else None
            sums.append(torch.stack(self.elbo_parts(batch.x, batch.noise, labels), 1))
            means.append(self.encode(batch.x, self.embed(labels, len(batch)))[0])
            if images < 1000:
                bounds.append(-self.iwae_bound(batch.x, batch.noise, 100, labels))
            images += len(batch)
        recon, kl = torch.cat(sums).cpu().double().mean(0).tolist()
        active = (torch.cat(means).var(0) > 0.01).sum().item()
        iwae100 = torch.cat(bounds)[:1000].cpu().double().mean().item()
        return {"recon": recon, "kl": kl, "active_units": active, "iwae100": iwae100}

    # ---- out-of-distribution scores

    def score_elbo(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−ELBO, with one sample of z."""
        return -self.log_prob(x, noise=noise)

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The reconstruction loss at the posterior's mean. A conditional model uses the hidden label, which
        takes one pass; the score `elbo` takes one pass for each class."""
        e = self.embed(None, len(x))
        return self.distance(x, self.decoder(self.encode(x, e)[0], e))

    def score_kl(self, x: Tensor, *, noise: Noise) -> Tensor:
        """KL(q(z | x) ‖ p(z)). A conditional model uses the hidden label, as for `recon`."""
        return kl_normal(*self.encode(x, self.embed(None, len(x))))

    def score_iwae(self, x: Tensor, *, noise: Noise, k: int = 100) -> Tensor:
        """−IWAE-k.

        k: samples of z in the importance-weighted bound.
        """
        return -self.log_prob(x, noise=noise, k=k)

    def score_regret(
        self, x: Tensor, *, noise: Noise, steps: int = 100, samples: int = 4, lr: float = 0.05
    ) -> Tensor:
        """Likelihood regret of the ELBO with fixed samples of z (Xiao 2020, arXiv:2003.02977, eq. 5). For a
        conditional model it uses the ELBO with the hidden label, because the mixture of K classes would need
        K optimisations for each image.

        steps: steps of Adam on the posterior's mean and log-variance, starting from the encoder's.
        samples: draws of z in the ELBO.
        lr: learning rate of Adam.
        """
        e = self.embed(None, len(x))
        e = None if e is None else e.detach()
        eps = self.draws(len(x), noise, samples)
        with torch.inference_mode(False):  # inference tensors have no gradients, but their copies do
            images, eps = x.detach().clone(), eps.clone()

        def elbo(mu: Tensor, logvar: Tensor) -> Tensor:
            log_px, _ = self.weights(images, mu, logvar, eps, e)
            return double(log_px).mean(1) - kl_normal(mu, logvar)

        start = self.encode(images, e)
        # Adam works elementwise on the sum over images, so a score does not depend on its batch
        with torch.inference_mode(False), torch.enable_grad():
            mu, logvar = (t.detach().clone().requires_grad_() for t in start)
            # gradients are in nats; an eps far above rounding prevents a random walk of unused dimensions
            adam = torch.optim.Adam([mu, logvar], lr=lr, eps=1e-2)
            value = elbo(mu, logvar)
            first = best = value.detach()
            for _ in range(steps):
                mu.grad, logvar.grad = torch.autograd.grad(-value.sum(), [mu, logvar])
                adam.step()
                value = elbo(mu, logvar)
                best = torch.maximum(best, value.detach())
        return (best - first).to(x.dtype)

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        mean: bool = True,
        temperature: float = 1.0,
    ) -> Tensor:
        """Decodes z ~ N(0, temperature²).

        mean: whether each pixel is the location of its distribution instead of a sample.
        temperature: standard deviation of z.
        """
        e = self.embed_samples(labels, n)
        out = self.decoder(temperature * noise.randn(n, self.latent), e)
        return self.to_images(out, mean, noise, progress)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress) -> Applied:
        """Encodes and decodes each image at the posterior's mean."""
        e = self.embed(labels, len(x))
        x = self.to_images(self.decoder(self.encode(x, e)[0], e), True, noise, progress)
        return Applied(x, rows=("reconstruction",), labels=None if e is None else labels)
