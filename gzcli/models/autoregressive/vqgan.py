"""VQGAN — Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis",
arXiv:2012.09841.

    generator:     L_rec + L_VQ + λ·L_GAN                                                             (eq. 6)
                   λ = ‖∇ L_rec‖ / (‖∇ L_GAN‖ + δ), gradients at the decoder's last layer             (eq. 7)
    discriminator: E max(0, 1 − D(x)) / 2 + E max(0, 1 + D(x̂)) / 2

L_rec is a distance of pixels plus a perceptual one, L_GAN = −E D(x̂), and L_VQ the loss of codebook.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import MissingError
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.autoregressive.codebook import Codebook, CodebookOptions
from gzcli.models.autoregressive.nets import ConvOptions, Decoder, Encoder
from gzcli.models.autoregressive.tokenizer import Tokenizer
from gzcli.models.base import Phase
from gzcli.models.nn import LPIPS, PatchGAN, halvings, to_fp32


def adaptive_weight(rec: Tensor, gan: Tensor, last: nn.Conv2d | nn.Linear) -> Tensor:
    """λ of eq. 7, without a gradient.

    The gradients are means over the global batch, so that all ranks have the same λ.
    """
    grads = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (rec, gan))
    norms = [ranks.mean(grad, last).norm() for grad in grads]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


class VQGAN(Tokenizer):
    """A convolutional tokenizer trained with a PatchGAN; a first stage, see `Tokenizer`.

    Raises UsageError for sizes that do not fit.

    pixels: distance of the pixels, the mean of |x − x̂| or of its square.
    perceptual: whether LPIPS is part of L_rec: `lpips`, yes; `auto`, where its weights are in the cache;
      `none`, no.
    perceptual_weight: factor of LPIPS.
    disc_start: first step of the training of the discriminator, and of the generator against it.
    disc_weight: factor of λ.
    disc_width: channels of the discriminator's first layer.
    disc_layers: how often the discriminator halves the resolution.
    """

    paper = "Esser et al. 2021, arXiv:2012.09841"
    decoder: Decoder

    def __init__(
        self,
        data: DataInfo,
        *,
        net: ConvOptions = ConvOptions(),
        quantise: CodebookOptions = CodebookOptions(),
        pixels: Literal["l1", "l2"] = "l1",
        perceptual: Literal["auto", "lpips", "none"] = "auto",
        perceptual_weight: float = 1.0,
        disc_start: int = 0,
        disc_weight: float = 0.8,
        disc_width: int = 64,
        disc_layers: int = 2,
    ):
        widths, colours, dim = net.widths(data.shape), data.shape[0], quantise.dim
        sizes = halvings(data.shape, len(widths) - 1)
        super().__init__(
            data,
            grid=sizes[-1],
            encoder=Encoder(colours, dim, widths, net),
            codebook=Codebook(quantise),
            decoder=Decoder(colours, dim, widths, net, sizes),
        )
        self.discriminator = PatchGAN(data.shape, disc_width, disc_layers)
        self.pixels, self.perceptual_loss, self.perceptual_weight = pixels, perceptual, perceptual_weight
        self.disc_start, self.disc_weight, self.step = disc_start, disc_weight, 0
        self.lpips: LPIPS | None = None

    # ---- training

    def phases(self) -> list[Phase]:
        autoencoder = [p for part in (self.encoder, self.codebook, self.decoder) for p in part.parameters()]
        return [
            Phase("generator", autoencoder),
            Phase("discriminator", list(self.discriminator.parameters()), start=self.disc_start),
        ]

    @torch.no_grad()
    def on_start(self, batch: Batch) -> None:
        """Moves the codes to the first batch, and reads the weights of LPIPS, which only training needs."""
        super().on_start(batch)
        if self.perceptual_loss == "none" or self.lpips is not None:
            return
        try:
            self.attach("lpips", LPIPS.from_files().to(batch.x.device))
        except MissingError as e:
            if self.perceptual_loss == "lpips":
                raise
            self.warnings = (f"no perceptual loss: {e.message} ({e.hint})",)

    def on_step(self, step: int) -> None:
        self.step = step + 1

    def loss(self, batch: Batch, phase: str = "generator") -> dict[str, Tensor]:
        """The loss of the generator, in evaluation without its adversarial term, or of the discriminator."""
        if phase == "discriminator":
            return self.discriminator_loss(batch.x)
        z, found = self.codebook(self.encoder(batch.x), batch.noise)
        x = to_fp32(self.decoder(z))
        rec = F.l1_loss(x, batch.x) if self.pixels == "l1" else F.mse_loss(x, batch.x)
        parts = {"recon": rec.detach()}
        if self.lpips is not None:
            distance = self.lpips(x, batch.x).mean()
            rec, parts["lpips"] = rec + self.perceptual_weight * distance, distance.detach()
        loss = rec + found["loss"]
        if self.training and torch.is_grad_enabled() and self.step >= self.disc_start:
            gan = -self.discriminator(x).mean()
            weight = self.disc_weight * adaptive_weight(rec, gan, self.decoder.conv_out)
            loss, parts["gan"], parts["gan_weight"] = loss + weight * gan, gan.detach(), weight
        return found | parts | {"loss": loss}

    def discriminator_loss(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = to_fp32(self.decoder(self.codebook.nearest(self.encoder(x))[2]))
        on_real, on_fake = self.discriminator(torch.cat([x, fake])).chunk(2)
        loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        return {"loss": loss, "real": on_real.detach().mean(), "fake": on_fake.detach().mean()}

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−D(x), the mean over its patches."""
        return -self.discriminator(x).flatten(1).mean(1)
