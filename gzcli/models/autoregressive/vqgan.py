"""VQGAN — Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis",
arXiv:2012.09841.

    generator:     L_rec + L_VQ + λ·L_GAN,    λ = ‖∇ L_rec‖ / (‖∇ L_GAN‖ + δ) at the decoder's last layer
    (eq. 6, 7)
    discriminator: E max(0, 1 − D(x)) / 2 + E max(0, 1 + D(x̂)) / 2

L_rec is the pixels' distance and a perceptual one, L_GAN = −E D(x̂), L_VQ that of codebook.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli import ranks
from gzcli.errors import MissingError
from gzcli.models.autoregressive.codebook import Codebook
from gzcli.models.autoregressive.nets import Decoder, Encoder
from gzcli.models.autoregressive.tokenizer import Tokenizer, halvings
from gzcli.models.base import Phase
from gzcli.models.nn import LPIPS, PatchGAN, to_fp32
from gzcli.types import Batch, DataInfo, Noise


def adaptive_weight(rec: Tensor, gan: Tensor, last: nn.Module) -> Tensor:
    """λ of eq. 7, a number without gradient; the gradients are those of the global batch, so every rank has
    the same."""
    grads = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (rec, gan))
    norms = [ranks.mean(grad, last).norm() for grad in grads]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


class VQGAN(Tokenizer):
    """A convolutional tokenizer trained with a PatchGAN; a first stage, see `Tokenizer`.

    channels × mult: width of each level, of `blocks` residual blocks, the image's sides halved between
    levels; attention: whether the lowest has it. codes, dim, codebook, beta, decay, restart, cosine: as in
    `vqvae`. pixels: their distance.
    perceptual: `auto` is LPIPS where its weights are at hand, else none; `lpips` insists. The discriminator
    of `disc_layers` halvings and first width `disc_width` is trained from step `disc_start` on, and from then
    the generator by it, with
    `disc_weight`·λ. Raises UsageError for sizes that do not fit.
    """

    paper = "Esser et al. 2021, arXiv:2012.09841"

    def __init__(
        self,
        data: DataInfo,
        *,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        blocks: int = 1,
        attention: bool = True,
        groups: int = 8,
        codes: int = 512,
        dim: int = 64,
        codebook: Literal["ema", "gradient"] = "ema",
        beta: float = 0.25,
        decay: float = 0.99,
        restart: bool = True,
        cosine: bool = False,
        pixels: Literal["l1", "l2"] = "l1",
        perceptual: Literal["auto", "lpips", "none"] = "auto",
        perceptual_weight: float = 1.0,
        disc_start: int = 0,
        disc_weight: float = 0.8,
        disc_width: int = 64,
        disc_layers: int = 2,
    ):
        sizes, colours, widths = (
            halvings(data.shape, len(mult) - 1),
            data.shape[0],
            tuple(channels * m for m in mult),
        )
        super().__init__(
            data,
            grid=sizes[-1],
            encoder=Encoder(colours, widths, blocks, dim, groups, attention),
            codebook=Codebook(
                codes, dim, learned=codebook, beta=beta, decay=decay, restart=restart, cosine=cosine
            ),
            decoder=Decoder(colours, widths, blocks, dim, groups, attention, sizes),
        )
        self.discriminator = PatchGAN(data.shape, disc_width, disc_layers)
        self.pixels, self.perceptual, self.perceptual_weight = pixels, perceptual, perceptual_weight
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
        """Also finds the weights of LPIPS, which only training needs."""
        super().on_start(batch)
        if self.perceptual == "none" or self.lpips is not None:
            return
        try:
            self.attach("lpips", LPIPS.from_files().to(batch.x.device))
        except MissingError as e:
            if self.perceptual == "lpips":
                raise
            self.warnings = (f"no perceptual loss: {e.message} ({e.hint})",)

    def on_step(self, step: int) -> None:
        self.step = step + 1

    def loss(self, batch: Batch, phase: str = "generator") -> dict[str, Tensor]:
        """In evaluation the generator's loss is without its adversarial term."""
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
