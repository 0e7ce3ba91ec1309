"""Adversarial autoencoder — Makhzani et al. 2015, arXiv:1511.05644.

Encoder and decoder minimise the reconstruction error. A discriminator learns to distinguish codes from draws
of the prior N(0, I), and the encoder learns to deceive it, so that codes become distributed as the prior
(section 2). The encoder has one update for both losses; the paper has two. A variant also has a discriminator
of images (after Larsen 2015, arXiv:1512.09300), which trains the decoder on draws of the prior.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.base import Phase
from gzcli.models.nn import ClassEmbedding, Labels, best_labels, spread_labels, to_fp32
from gzcli.models.nn.adversarial import OBJECTIVES, Critic, CriticOptions, critic_outputs
from gzcli.models.vae.base import LABEL_SIZE, LOGVAR, Autoencoder, NetOptions, mlp, reparameterise

LOSS = OBJECTIVES["nonsaturating"]


class AAE(Autoencoder):
    """An autoencoder whose codes a discriminator makes N(0, I).

    A conditional decoder receives the label (section 4), so that the code need not contain it.

    posterior: code of an image: a function of it (`deterministic`), or a sample of a Gaussian (`gaussian`).
    disc_hidden: widths of the layers of the discriminator of codes.
    code_weight: weight of the encoder's adversarial loss, besides the squared error summed over pixels.
    image_weight: weight of the decoder's adversarial loss by a discriminator of images. 0: no such
      discriminator, as in the paper.
    image_width: channels of the finest scale of the discriminator of images.
    conditional: whether the model is conditioned on labels.
    """

    paper = "Makhzani 2015, arXiv:1511.05644"
    best = "fd"
    sums = ("autoencoder",)

    def __init__(
        self,
        data: DataInfo,
        *,
        nets: NetOptions = NetOptions(latent=16),
        posterior: Literal["deterministic", "gaussian"] = "deterministic",
        disc_hidden: tuple[int, ...] = (256, 256),
        code_weight: float = 10.0,
        image_weight: float = 0.0,
        image_width: int = 32,
        conditional: bool = False,
    ):
        super().__init__(data)
        self.latent, self.posterior, self.conditional = nets.latent, posterior, conditional
        self.code_weight, self.image_weight = code_weight, image_weight
        self.labels = ClassEmbedding(len(data.classes), LABEL_SIZE) if conditional else None
        self.encoder = nets.encoder(data.shape, nets.latent * (2 if posterior == "gaussian" else 1))
        self.decoder = nets.decoder(data.shape, data.shape[0], LABEL_SIZE if conditional else 0)
        self.discriminator = mlp(nets.latent, disc_hidden, 1)
        self.critic: Critic | None = None
        if image_weight:
            self.critic = Critic(data.shape, image_width, options=CriticOptions(spectral=True))

    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """The codes [B, latent]; for a Gaussian posterior, a sample with eps [B, latent], or the mean."""
        if self.posterior == "deterministic":
            return to_fp32(self.encoder(x))
        mu, logvar = to_fp32(self.encoder(x)).chunk(2, dim=1)
        return mu if eps is None else reparameterise(mu, logvar.clamp(*LOGVAR), eps)

    def decode(self, z: Tensor, y: Labels = None) -> Tensor:
        """The images in [-1, 1] of codes [B, latent]. Without labels y, the mean embedding is used."""
        if self.labels is None:
            return torch.tanh(to_fp32(self.decoder(z)))
        e = self.labels.table.weight[:-1].mean(0).expand(len(z), -1) if y is None else self.labels(y, len(z))
        return torch.tanh(to_fp32(self.decoder(z, e)))

    def code(self, x: Tensor, labels: Labels = None) -> Tensor:
        return self.encode(x)

    def image(self, z: Tensor, labels: Labels = None) -> Tensor:
        return self.decode(z, labels)

    # ---- training

    def phases(self) -> list[Phase]:
        autoencoder, judges = (self.encoder, self.decoder, self.labels), (self.discriminator, self.critic)
        return [
            Phase("autoencoder", [p for m in autoencoder if m is not None for p in m.parameters()]),
            Phase("discriminator", [p for m in judges if m is not None for p in m.parameters()]),
        ]

    def loss(self, batch: Batch, phase: str = "autoencoder") -> dict[str, Tensor]:
        x, n, y = batch.x, len(batch), batch.y if self.conditional else None
        eps, prior = batch.noise.randn(n, self.latent), batch.noise.randn(n, self.latent)
        if phase == "discriminator":
            return self.discriminator_loss(x, y, eps, prior)
        z = self.encode(x, eps)
        recon, code = self.distance(x, self.decode(z, y)).mean(), LOSS.generator(self.prior_logits(z))
        loss = recon + self.code_weight * code
        parts = {"recon": recon.detach(), "code": code.detach()}
        if self.critic is not None:
            image = LOSS.generator(self.critic(self.decode(prior, y)))
            loss, parts["image"] = loss + self.image_weight * image, image.detach()
        return {"loss": loss, **parts}

    def discriminator_loss(self, x: Tensor, y: Labels, eps: Tensor, prior: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self.encode(x, eps)
        code = loss = LOSS.critic(*critic_outputs(self.prior_logits, prior, z))
        parts = {"code": code.detach()}
        if self.critic is not None:
            with torch.no_grad():
                fake = self.decode(prior, y)
            image = LOSS.critic(*critic_outputs(self.critic, x, fake))
            loss, parts["image"] = code + image, image.detach()
        return {"loss": loss, **parts}

    def prior_logits(self, z: Tensor) -> Tensor:
        """The logits [B] that codes [B, latent] are draws of the prior."""
        return to_fp32(self.discriminator(z)).squeeze(1)

    def distance(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """‖x − x̂‖² [B], summed over pixels."""
        return (x - x_hat).square().flatten(1).sum(1)

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self, n: int, *, labels: Labels = None, noise: Noise, progress: Progress, temperature: float = 1.0
    ) -> Tensor:
        """Decodes z ~ N(0, temperature²).

        temperature: standard deviation of z.
        """
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.decode(temperature * noise.randn(n, self.latent), y)
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress) -> Applied:
        """Encodes and decodes each image."""
        x = self.decode(self.encode(x), labels)
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",), labels=labels)

    # ---- out-of-distribution scores

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖², for a conditional model with the labels that minimize it."""
        return self.distance(x, self.best_reconstruction(x))

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel, averaged over channels, with the labels of `score_recon`: [B, H, W]."""
        return (x - self.best_reconstruction(x)).abs().mean(1)

    def best_reconstruction(self, x: Tensor) -> Tensor:
        """x̂ [B, C, H, W]; for a conditional model, with the labels that minimise ‖x − x̂‖²."""
        z, K = self.encode(x), len(self.data.classes)
        if not self.conditional:
            return self.decode(z)
        start = x.new_zeros(len(x), K) if self.data.multilabel else x.new_zeros(len(x), dtype=torch.long)
        return self.decode(z, best_labels(lambda y: self.distance(x, self.decode(z, y)), start, self.data)[0])

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """Minus the logit that the image's code is a sample of the prior."""
        return -self.prior_logits(self.encode(x))
