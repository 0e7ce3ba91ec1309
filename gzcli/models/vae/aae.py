"""Adversarial autoencoder — Makhzani et al. 2015, arXiv:1511.05644.

Encoder and decoder lower the reconstruction error; a discriminator learns to tell draws of the prior N(0, I)
from codes; the encoder learns to deceive it, so that its codes get the prior's distribution (section 2). What
the encoder learns of both is one update here, at one pass, where the paper has two.
The variant with a discriminator of images as well (after Larsen 2015, arXiv:1512.09300) lets the decoder
answer for what it makes of draws of the prior.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gzcli.models.base import Model, Phase
from gzcli.models.gan.losses import critic_loss, generator_loss
from gzcli.models.gan.nets import Critic
from gzcli.models.nn import ClassEmbedding, as_ways, best_labels, spread_labels, to_fp32, traversal, ways
from gzcli.models.vae.nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, mlp
from gzcli.models.vae.vae import LOGVAR
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress


class AAE(Model):
    """An autoencoder whose codes are drawn to N(0, I) by a discriminator.

    hidden: widths of the MLP's layers, or of the convolutional scales, finest first; blocks: residual blocks
    of each.
    posterior: codes are a function of the image, or Gaussian. disc_hidden: widths of the code discriminator.
    code_weight: of the encoder's adversarial loss. image_weight: of the decoder's by a discriminator of
    images of width `image_width`; 0 is the paper's model without one. conditional: the decoder is told the
    label (section 4), and the code is left with the rest.
    """

    paper = "Makhzani 2015, arXiv:1511.05644"
    best = "fd"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: Literal["mlp", "conv"] = "conv",
        hidden: tuple[int, ...] = (32, 64),
        blocks: int = 0,
        latent: int = 16,
        posterior: Literal["deterministic", "gaussian"] = "deterministic",
        disc_hidden: tuple[int, ...] = (256, 256),
        code_weight: float = 10.0,
        image_weight: float = 0.0,
        image_width: int = 32,
        conditional: bool = False,
        label_dim: int = 32,
    ):
        super().__init__(data)
        self.latent, self.posterior, self.conditional = latent, posterior, conditional
        self.code_weight, self.image_weight = code_weight, image_weight
        outputs, embed = latent * (2 if posterior == "gaussian" else 1), label_dim if conditional else 0
        self.labels = ClassEmbedding(len(data.classes), label_dim) if conditional else None
        if net == "mlp":
            self.encoder = MLPEncoder(data.shape, hidden, outputs)
            self.decoder = MLPDecoder(data.shape, hidden[::-1], latent, 1, embed)
        else:
            self.encoder = ConvEncoder(data.shape, hidden, outputs, 0, blocks)
            self.decoder = ConvDecoder(data.shape, hidden, latent, 1, embed, blocks)
        self.discriminator = mlp(latent, disc_hidden, 1)
        self.critic = Critic(data.shape, image_width, spectral=True) if image_weight else None

    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """Codes [B, latent], of a Gaussian posterior its mean without eps [B, latent]."""
        if self.posterior == "deterministic":
            return to_fp32(self.encoder(x))
        mu, logvar = to_fp32(self.encoder(x)).chunk(2, dim=1)
        return mu if eps is None else mu + (0.5 * logvar.clamp(*LOGVAR)).exp() * eps

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of codes [B, latent]; without labels those of the mean of all
        classes."""
        if self.labels is None:
            return torch.tanh(to_fp32(self.decoder(z)))
        e = self.labels.table.weight[:-1].mean(0).expand(len(z), -1) if y is None else self.labels(y, len(z))
        return torch.tanh(to_fp32(self.decoder(z, e)))

    # ---- training

    def phases(self) -> list[Phase]:
        of = lambda *modules: [p for m in modules if m is not None for p in m.parameters()]  # noqa: E731
        return [
            Phase("autoencoder", of(self.encoder, self.decoder, self.labels)),
            Phase("discriminator", of(self.discriminator, self.critic)),
        ]

    def loss(self, batch: Batch, phase: str = "autoencoder") -> dict[str, Tensor]:
        x, n, y = batch.x, len(batch), batch.y if self.conditional else None
        eps, prior = batch.noise.randn(n, self.latent), batch.noise.randn(n, self.latent)
        if phase == "discriminator":
            return self.discriminator_loss(x, y, eps, prior)
        z = self.encode(x, eps)
        recon = self.distance(x, self.decode(z, y)).mean()
        code = generator_loss("nonsaturating", self.judge(z))
        loss, parts = recon + self.code_weight * code, {"recon": recon.detach(), "code": code.detach()}
        if self.critic is not None:
            image = generator_loss("nonsaturating", self.critic(self.decode(prior, y)))
            loss, parts["image"] = loss + self.image_weight * image, image.detach()
        return {"loss": loss, **parts}

    def discriminator_loss(
        self, x: Tensor, y: Tensor | None, eps: Tensor, prior: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self.encode(x, eps)
            fake = self.decode(prior, y) if self.critic is not None else None
        code = loss = critic_loss("nonsaturating", *self.judge(torch.cat([prior.to(z), z])).chunk(2))
        parts = {"code": code.detach()}
        if self.critic is not None:
            image = critic_loss("nonsaturating", *self.critic(torch.cat([x, fake])).chunk(2))
            loss, parts["image"] = code + image, image.detach()
        return {"loss": loss, **parts}

    def judge(self, z: Tensor) -> Tensor:
        """Logits [B] that codes are draws of the prior."""
        return to_fp32(self.discriminator(z)).squeeze(1)

    def distance(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """‖x − x̂‖² [B], summed over pixels."""
        return (x - x_hat).square().flatten(1).sum(1)

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
        """z ~ N(0, temperature²) decoded."""
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.decode(temperature * noise.randn(n, self.latent).to(device), y)
        progress(1, 1, x)
        return x

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, *, labels: Tensor | None = None, noise: Noise, progress: Progress
    ) -> Applied:
        """Each image through encoder and decoder."""
        x = self.decode(self.encode(x), labels)
        progress(1, 1, x)
        return Applied(x, rows=("reconstruction",), labels=labels)

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 8) -> Applied:
        """The way from image 0 to 1, 2 to 3, … in latent space, ends included. Raises UsageError for fewer
        than two images, or steps."""
        x = self.decode(ways(self.encode(x), steps))
        progress(1, 1, x)
        return as_ways(x, steps)

    @torch.no_grad()
    def traverse(
        self, x: Tensor, *, noise: Noise, progress: Progress, dims: int = 8, steps: int = 8, span: float = 3.0
    ) -> Applied:
        """The first image's code, changed along the `dims` latent dimensions that change the picture most,
        one a row, from −span to span."""
        return traversal(self.decode, self.encode(x[:1]), dims, steps, span)

    # ---- out-of-distribution scores

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖²; of a conditional model that of the best class, or, where there may be several, the best
        set that adding and taking away one by one finds from none."""
        z = self.encode(x)
        if not self.conditional:
            return self.distance(x, self.decode(z))
        of = lambda y: self.distance(x, self.decode(z, y))  # noqa: E731
        K = len(self.data.classes)
        none = x.new_zeros(len(x), K) if self.data.multilabel else x.new_zeros(len(x), dtype=torch.long)
        return best_labels(of, none, self.data)[1]

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """Minus the logit that the image's code is a draw of the prior."""
        return -self.judge(self.encode(x))
