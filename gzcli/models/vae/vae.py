"""Variational autoencoder — Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.

    log p(x) ≥ ELBO = E_q(z|x) [log p(x | z)] − KL(q(z | x) ‖ N(0, I))                                   (eq.
    3)

in nats per discrete image: the first term is a sum over pixels, never a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn import ClassEmbedding, as_ways, double, spread_labels, to_fp32, traversal, ways
from gzcli.models.vae.nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from gzcli.models.vae.pixels import Pixels
from gzcli.models.vae.ssim import ms_ssim
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress

LOG_2PI = math.log(2 * math.pi)
# Of a posterior's logvar. The learned ones lie between the two: none is wider than the prior, whose logvar is
# 0. Images unlike any that were learned drive it up at will, and e^logvar with it: at 20 their KL was 10^9
# nats. The upper bound is log sigma ≤ 2, that of the Gaussian heads of soft actor-critic's published code
# (Haarnoja 2018, arXiv:1812.05905).
LOGVAR = (-20.0, 4.0)


def kl_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, e^logvar) ‖ N(0, I)), summed over the last dimension (appendix B)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, e^logvar), summed over the last dimension."""
    logvar = logvar.to(z) if isinstance(logvar, Tensor) else z.new_full((), logvar)
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)


class VAE(Model):
    """A Gaussian-latent VAE.

    hidden: widths of the MLP's layers, or of the convolutional scales, finest first; None takes the net's own
    default.
    blocks: residual blocks a scale, of the convolutional net.
    pixels: the decoder's distribution over grey levels (`Pixels`).
    beta: weight of the KL in the loss (Higgins 2017); ELBO, bpd and log_prob are always those of beta = 1.
    kl_warmup: steps over which that weight rises from 0; in training mode only.
    iwae: samples of the importance-weighted bound that is trained (Burda 2015, arXiv:1509.00519, eq. 8); 1 is
    the ELBO.
    recon: `ms_ssim` trains D·(1 − MS-SSIM) of the decoder's mean in place of −log p(x | z), D the number of
    pixels;
      the scales of `gaussian` and `logistic` pixels then stay untrained, and log_prob, still a bound, is a
      loose one.
    label_dropout: how often a conditional model sees the null label, which stands for `labels=None` ever
    after.
    """

    paper = "Kingma & Welling 2013, arXiv:1312.6114"
    likelihood = "bound"
    costly = ("regret",)
    HIDDEN: ClassVar = {"mlp": (512, 512), "conv": (32, 64)}

    def __init__(
        self,
        data: DataInfo,
        *,
        net: Literal["mlp", "conv"] = "conv",
        hidden: tuple[int, ...] | None = None,
        blocks: int = 0,
        latent: int = 32,
        pixels: Literal["auto", "bernoulli", "gaussian", "logistic"] = "auto",
        recon: Literal["likelihood", "ms_ssim"] = "likelihood",
        beta: float = 1.0,
        kl_warmup: int = 0,
        iwae: int = 1,
        conditional: bool = False,
        label_dim: int = 32,
        label_dropout: float = 0.1,
    ):
        super().__init__(data)
        if recon == "ms_ssim" and iwae > 1:
            raise UsageError(
                "`model.iwae` above 1 needs `model.recon: likelihood`", hint="set one of the two back"
            )
        hidden = tuple(hidden or self.HIDDEN[net])
        self.pixels = Pixels(pixels, data.levels)
        self.recon, self.beta, self.kl_warmup, self.iwae = recon, beta, kl_warmup, iwae
        self.latent, self.label_dropout = latent, label_dropout
        self.dims = math.prod(data.shape)
        self.warm = 0.0 if kl_warmup else 1.0
        self.conditional = conditional
        self.labels = ClassEmbedding(len(data.classes), label_dim) if conditional else None
        embed = label_dim if conditional else 0
        if net == "mlp":
            self.encoder = MLPEncoder(data.shape, hidden, 2 * latent, embed)
            self.decoder = MLPDecoder(data.shape, hidden[::-1], latent, self.pixels.outputs, embed)
        else:
            self.encoder = ConvEncoder(data.shape, hidden, 2 * latent, embed, blocks)
            self.decoder = ConvDecoder(data.shape, hidden, latent, self.pixels.outputs, embed, blocks)

    def encode(self, x: Tensor, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q(z | x): mu and logvar [B, latent], fp32, logvar within bounds."""
        mu, logvar = to_fp32(self.encoder(x, e)).chunk(2, dim=1)
        return mu, logvar.clamp(*LOGVAR)

    def embed(self, labels: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor | None:
        """[n, label_dim], or None where the model knows no labels."""
        if self.labels is None:
            return None
        if labels is None and not self.label_dropout:
            raise UsageError(
                "this model was trained without a null label, so it cannot do without labels",
                hint="train it with `--set model.label_dropout=0.1`",
            )
        return self.labels(labels, n, drop)

    def to_latent(self, x: Tensor) -> Tensor:
        """The posterior's mean, as a picture of one pixel: [B, latent, 1, 1]."""
        return self.encode(x, self.embed(None, len(x)))[0][:, :, None, None]

    def from_latent(self, z: Tensor) -> Tensor:
        """The mean of the pixels that z [B, latent, 1, 1] stands for."""
        return self.pixels.mean(self.decoder(z.flatten(1), self.embed(None, len(z))))

    # ---- training

    def on_step(self, step: int) -> None:
        if self.kl_warmup:
            self.warm = min(1.0, (step + 1) / self.kl_warmup)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        x, n = batch.x, len(batch)
        eps = batch.noise.randn(n, self.iwae * self.latent).unflatten(1, (self.iwae, self.latent))
        drop = batch.noise.rand(n) < self.label_dropout if self.labels is not None else None
        e = self.embed(batch.y, n, drop)
        mu, logvar = self.encode(x, e)
        beta = self.beta * self.warm if self.training else self.beta
        if self.iwae > 1:
            log_px, log_ratio = self.weights(x, mu, logvar, eps, e)  # [B, k] each
            loss = math.log(self.iwae) - torch.logsumexp(log_px + beta * log_ratio, dim=1)
            recon, kl = -log_px.mean(1), -log_ratio.mean(1)
        else:
            out = self.decoder(mu + (0.5 * logvar).exp() * eps[:, 0], e)
            recon, kl = self.distance(x, out), kl_normal(mu, logvar)
            loss = recon + beta * kl
        parts = {"loss": loss.mean(), "recon": recon.mean().detach(), "kl": kl.mean().detach()}
        if self.recon == "likelihood" and self.data.levels is not None:
            parts["bpd"] = (parts["recon"] + parts["kl"]) / (self.dims * math.log(2))
        # Burda 2015, section 5.2: a unit is active if its posterior mean moves with x
        parts["active_units"] = (mu.detach().var(0, unbiased=False) > 0.01).float().sum()
        return parts

    def distance(self, x: Tensor, out: Tensor) -> Tensor:
        """The reconstruction loss [B] of the decoder's output."""
        if self.recon == "ms_ssim":
            return self.dims * (1 - ms_ssim(x, self.pixels.mean(out)))
        return -self.pixels.log_prob(x, out)

    def weights(
        self, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, e: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log p(x | z) and log p(z) − log q(z | x), [B, k] each, at z = mu + sigma·eps; eps [B, k,
        latent]."""
        k = eps.shape[1]
        mu, logvar = mu.unsqueeze(1), logvar.unsqueeze(1)
        z = mu + (0.5 * logvar).exp() * eps
        e = None if e is None else e.repeat_interleave(k, 0)
        log_px = self.pixels.log_prob(x.repeat_interleave(k, 0), self.decoder(z.flatten(0, 1), e)).unflatten(
            0, (-1, k)
        )
        return log_px, log_normal(z) - log_normal(z, mu, logvar)

    # ---- likelihood

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise, k: int = 1) -> Tensor:
        """A lower bound of log p(x): the ELBO by one sample of z, or IWAE-k for k > 1. [B] nats.

        A conditional model without labels speaks for its null label.
        """
        if k > 1:
            return self.iwae_bound(x, noise, k, labels)
        recon, kl = self.elbo_parts(x, noise, labels)
        return -(recon + kl)

    def elbo_parts(self, x: Tensor, noise: Noise, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """−log p(x | z) at one z ~ q, and KL, [B] each: the ELBO is minus their sum."""
        e = self.embed(labels, len(x))
        mu, logvar = self.encode(x, e)
        eps = noise.randn(len(x), self.latent).to(x.device)
        out = self.decoder(mu + (0.5 * logvar).exp() * eps, e)
        return -self.pixels.log_prob(x, out), kl_normal(mu, logvar)

    def iwae_bound(self, x: Tensor, noise: Noise, k: int, labels: Tensor | None = None) -> Tensor:
        """log 1/k Σ p(x, z_i) / q(z_i | x), z_i ~ q (Burda 2015, eq. 8), in chunks of 16 samples. [B]"""
        e = self.embed(labels, len(x))
        mu, logvar = self.encode(x, e)
        eps = noise.randn(len(x), k * self.latent).to(x.device).unflatten(1, (k, self.latent))
        log_w = [sum(self.weights(x, mu, logvar, part, e)) for part in eps.split(16, dim=1)]
        return torch.logsumexp(torch.cat(log_w, dim=1), dim=1) - math.log(k)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Nats an image of `recon` and `kl`, of which the ELBO is minus the sum; the number of
        `active_units`, whose posterior mean varies by more than .01 (Burda 2015, section 5.2); −IWAE-100 of
        the first 1,000 images, `iwae100`."""
        sums, means, bounds = [], [], []
        for batch in batches:
            labels = batch.y if self.conditional else None
            parts = self.elbo_parts(batch.x, batch.noise, labels)
            sums.append(torch.stack(parts, 1))
            means.append(self.encode(batch.x, self.embed(labels, len(batch)))[0])
            if sum(map(len, bounds)) < 1000:
                bounds.append(-self.iwae_bound(batch.x, batch.noise, 100, labels))
        recon, kl = torch.cat(sums).cpu().double().mean(0).tolist()
        active = (torch.cat(means).var(0) > 0.01).sum().item()
        return {
            "recon": recon,
            "kl": kl,
            "active_units": active,
            "iwae100": torch.cat(bounds)[:1000].cpu().double().mean().item(),
        }

    # ---- out-of-distribution scores

    def score_elbo(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−ELBO, one sample of z."""
        return -self.log_prob(x, noise=noise)

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The reconstruction loss at the posterior's mean."""
        e = self.embed(None, len(x))
        return self.distance(x, self.decoder(self.encode(x, e)[0], e))

    def score_kl(self, x: Tensor, *, noise: Noise) -> Tensor:
        """KL(q(z | x) ‖ p(z))."""
        return kl_normal(*self.encode(x, self.embed(None, len(x))))

    def score_iwae(self, x: Tensor, *, noise: Noise, k: int = 100) -> Tensor:
        """−IWAE-k."""
        return -self.iwae_bound(x, noise, k)

    def score_regret(
        self, x: Tensor, *, noise: Noise, steps: int = 100, samples: int = 4, lr: float = 0.05
    ) -> Tensor:
        """Likelihood regret (Xiao 2020, arXiv:2003.02977, eq. 5): what the ELBO gains when q is fitted to one
        image.

        Adam moves mu and logvar of each image, from the encoder's, on the ELBO over `samples` fixed draws;
        the best ELBO on the way counts, so the regret is never negative. The images' sum is minimised and
        Adam works
        elementwise: a score does not depend on the batch.
        """
        e = self.embed(None, len(x))
        e = None if e is None else e.detach()
        eps = noise.randn(len(x), samples * self.latent).to(x.device).unflatten(1, (samples, self.latent))
        with torch.inference_mode(False), torch.enable_grad():
            x, eps = x.detach().clone(), eps.clone()
            mu, logvar = (t.detach().clone().requires_grad_() for t in self.encode(x, e))
            # gradients are in nats: eps far above rounding keeps dead dimensions from walking at random
            adam = torch.optim.Adam([mu, logvar], lr=lr, eps=1e-2)
            first = best = None
            for step in range(steps + 1):
                log_px, _ = self.weights(x, mu, logvar, eps, e)
                elbo = double(log_px).mean(1) - kl_normal(mu, logvar)
                first = elbo.detach() if first is None else first
                best = elbo.detach() if best is None else torch.maximum(best, elbo.detach())
                if step < steps:
                    mu.grad, logvar.grad = torch.autograd.grad(-elbo.sum(), [mu, logvar])
                    adam.step()
        return (best - first).to(x.dtype)

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        mean: bool = True,
        temperature: float = 1.0,
    ) -> Tensor:
        """z ~ N(0, temperature²) decoded; `mean` shows each pixel's location, else its value is drawn too."""
        device = next(self.parameters()).device
        e = None if self.labels is None else self.labels(spread_labels(labels, n, self.data, device), n)
        z = temperature * noise.randn(n, self.latent).to(device)
        out = self.decoder(z, e)
        x = (
            self.pixels.mean(out)
            if mean
            else self.pixels.draw(out, noise.rand(n, *self.data.shape).to(device))
        )
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, *, labels: Tensor | None = None, noise: Noise, progress: Progress
    ) -> Applied:
        """Each image through encoder and decoder, at the posterior's mean."""
        e = self.embed(labels, len(x))
        x = self.pixels.mean(self.decoder(self.encode(x, e)[0], e))
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",), labels=None if e is None else labels)

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 8) -> Applied:
        """The way from image 0 to 1, 2 to 3, … in latent space, ends included. Raises UsageError for fewer
        than two images, or steps."""
        mu = self.encode(x, self.embed(None, len(x)))[0]
        z = ways(mu, steps)
        x = self.pixels.mean(self.decoder(z, self.embed(None, len(z))))
        progress(1, 1, x)
        return as_ways(x, steps)

    @torch.no_grad()
    def traverse(
        self, x: Tensor, *, noise: Noise, progress: Progress, dims: int = 8, steps: int = 8, span: float = 3.0
    ) -> Applied:
        """The first image's code, changed along the `dims` latent dimensions that change the picture most,
        one a row, from −span to span."""
        mu = self.encode(x[:1], self.embed(None, 1))[0]
        return traversal(
            lambda z: self.pixels.mean(self.decoder(z, self.embed(None, len(z)))), mu, dims, steps, span
        )
