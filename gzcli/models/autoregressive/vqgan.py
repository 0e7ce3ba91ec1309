"""VQGAN — Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis",
arXiv:2012.09841.

    generator:     L_rec + L_VQ + λ·L_GAN                                                             (eq. 6)
                   λ = ‖∇ L_rec‖ / (‖∇ L_GAN‖ + δ), gradients at the decoder's last layer             (eq. 7)
    discriminator: E max(0, 1 − D(x)) / 2 + E max(0, 1 + D(x̂)) / 2

L_rec is a distance of pixels plus a perceptual distance, L_GAN = −E D(x̂), and L_VQ is the loss of the
codebook. Encoder and decoder are those of table 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import MissingError
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.autoregressive.scales import codebook_of
from gzcli.models.autoregressive.tokenizer import CodebookOptions, Tokenizer, default_halvings
from gzcli.models.base import Phase
from gzcli.models.nn import halved_sizes, to_fp32
from gzcli.models.nn.adversarial import OBJECTIVES, LeCam, PatchGAN, critic_outputs, penalised
from gzcli.models.nn.layers import Attention, GroupNorm, ResBlock
from gzcli.models.nn.perceptual import LPIPS
from gzcli.models.nn.unet import Down, Up

GROUP_NORM_EPS = 1e-6  # of the group norms
LEVEL_WIDTHS = {
    2: (1, 2, 4),
    3: (1, 2, 2, 4),
    4: (1, 1, 2, 2, 4),
}  # channels of each level, by number of halvings
HINGE = OBJECTIVES["hinge"]


@dataclass(frozen=True)
class ConvOptions:
    """The size of encoder and decoder.

    channels: channels of the finest level. A multiple of `groups`.
    mult: channels of each level as a multiple of `channels`, finest first. Each level halves the resolution.
      Default: the authors' channels, with the fewest levels that give at most 16 codes per side.
    blocks: residual blocks of each level of the encoder; the decoder has one more.
    attention: whether the coarsest level has self-attention.
    groups: groups of each group norm.
    """

    channels: int = 32
    mult: tuple[int, ...] | None = None
    blocks: int = 1
    attention: bool = True
    groups: int = 8

    def widths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        times = default_halvings(shape)
        # as in the authors' models of 4, 8 and 16 pixels a code; coarser ones begin with more levels of 1
        mult = (
            LEVEL_WIDTHS.get(times, (1,) * (times - 4) + LEVEL_WIDTHS[4]) if self.mult is None else self.mult
        )
        return tuple(self.channels * m for m in mult)

    def block(self, i: int, o: int) -> ResBlock:
        return ResBlock(i, o, lambda c: GroupNorm(self.groups, c, GROUP_NORM_EPS), F.silu)

    def level(self, i: int, o: int, blocks: int, attend: bool) -> nn.Sequential:
        """The residual blocks of one resolution, each followed by attention if `attend`."""
        layers: list[nn.Module] = []
        for k in range(blocks):
            layers += [self.block(o if k else i, o)]
            layers += [Attention(o, o, self.groups, GROUP_NORM_EPS)] if attend else []
        return nn.Sequential(*layers)

    def middle(self, c: int) -> nn.Sequential:
        attention = [Attention(c, c, self.groups, GROUP_NORM_EPS)] if self.attention else []
        return nn.Sequential(self.block(c, c), *attention, self.block(c, c))


class Encoder(nn.Module):
    """x [B, channels, H, W] → [B, dim, h, w]."""

    def __init__(self, channels: int, dim: int, widths: tuple[int, ...], options: ConvOptions):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            options.level(i, o, options.blocks, options.attention and k == last)
            for k, (i, o) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.downs = nn.ModuleList(Down(w) for w in widths[:-1])
        self.middle = options.middle(widths[-1])
        self.norm = GroupNorm(options.groups, widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level, down in zip(self.levels, (*self.downs, nn.Identity()), strict=True):
            h = down(level(h))
        return self.conv_out(F.silu(self.norm(self.middle(h))))


class Decoder(nn.Module):
    """z [B, dim, h, w] → [B, channels, H, W]. Each level has one block more than in the encoder."""

    def __init__(
        self,
        channels: int,
        dim: int,
        widths: tuple[int, ...],
        options: ConvOptions,
        sizes: list[tuple[int, int]],
    ):
        super().__init__()
        widths, self.sizes = widths[::-1], sizes[-2::-1]
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.middle = options.middle(widths[0])
        self.levels = nn.ModuleList(
            options.level(i, o, options.blocks + 1, options.attention and k == 0)
            for k, (i, o) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.ups = nn.ModuleList(Up(w) for w in widths[:-1])
        self.norm = GroupNorm(options.groups, widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels[0](self.middle(self.conv_in(z)))
        for up, size, level in zip(self.ups, self.sizes, list(self.levels)[1:], strict=True):
            h = level(up(h, size))
        return self.conv_out(F.silu(self.norm(h)))


def adaptive_weight(rec: Tensor, gan: Tensor, last: nn.Conv2d | nn.Linear) -> Tensor:
    """λ of eq. 7, without a gradient, the same on all ranks."""
    grads = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (rec, gan))
    norms = [ranks.mean_over_ranks(grad, last).norm() for grad in grads]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


class VQGAN(Tokenizer):
    """A convolutional tokenizer trained with a PatchGAN; a first stage, see `Tokenizer`.

    Raises UsageError for sizes that do not fit.

    pixels: distance of the pixels, the mean of |x − x̂| or of its square.
    perceptual: perceptual loss in L_rec: `lpips`, `none`, or `auto` (LPIPS if its weights are in the cache).
    perceptual_weight: factor of LPIPS.
    disc_start: step at which adversarial training starts.
    disc_weight: factor of λ.
    disc_width: channels of the discriminator's first layer.
    disc_layers: number of times that the discriminator halves the resolution.
    r1: weight γ of the gradient penalty on real images, for the sum over patches (Mescheder 2018,
      arXiv:1801.04406, eq. 9).
    lecam: weight λ of LeCam regularization (Tseng 2021, arXiv:2104.03310).
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
        r1: float = 0.0,
        lecam: float = 0.0,
    ):
        widths, colours, dim = net.widths(data.shape), data.shape[0], quantise.width
        sizes = halved_sizes(data.shape, len(widths) - 1)
        encoder, codebook = Encoder(colours, dim, widths, net), codebook_of(quantise, sizes[-1])
        super().__init__(data, sizes[-1], encoder, codebook, Decoder(colours, dim, widths, net, sizes))
        self.discriminator = PatchGAN(data.shape, disc_width, disc_layers)
        self.r1, self.lecam_weight, self.lecam = r1, lecam, LeCam() if lecam else None
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
        """Moves the codes to vectors of the first batch, and loads the weights of LPIPS, which only training
        needs."""
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
        """The loss of the generator or of the discriminator. In evaluation, the generator's has no
        adversarial term."""
        if phase == "discriminator":
            return self.discriminator_loss(batch.x)
        z, logged = self.codebook(self.encoder(batch.x), batch.noise)
        x = to_fp32(self.decoder(z))
        rec = F.l1_loss(x, batch.x) if self.pixels == "l1" else F.mse_loss(x, batch.x)
        parts = {"recon": rec.detach()}
        if self.lpips is not None:
            distance = self.lpips(x, batch.x).mean()
            rec, parts["lpips"] = rec + self.perceptual_weight * distance, distance.detach()
        loss = rec + logged["loss"]
        if self.training and torch.is_grad_enabled() and self.step >= self.disc_start:
            gan = HINGE.generator(self.discriminator(x))
            weight = self.disc_weight * adaptive_weight(rec, gan, self.decoder.conv_out)
            loss, parts["gan"], parts["gan_weight"] = loss + weight * gan, gan.detach(), weight
        return logged | parts | {"loss": loss}

    def discriminator_loss(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = to_fp32(self.decoder(self.codebook.nearest(self.encoder(x))[2]))
        on_real, on_fake = critic_outputs(self.discriminator, x, fake)
        loss = 0.5 * HINGE.critic(on_real, on_fake)
        logged, learning = {"real": on_real.mean(), "fake": on_fake.mean()}, torch.is_grad_enabled()
        if self.r1 and learning:
            logged["r1"] = penalised(lambda x, y: self.discriminator(x), x)[1].mean()
            loss = loss + self.r1 * logged["r1"]
        if self.lecam is not None and learning:
            logged["lecam"] = self.lecam(on_real, on_fake)
            loss = loss + self.lecam_weight * logged["lecam"]
        return {"loss": loss, **{name: value.detach() for name, value in logged.items()}}

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−D(x), averaged over patches."""
        return -self.discriminator(x).flatten(1).mean(1)
