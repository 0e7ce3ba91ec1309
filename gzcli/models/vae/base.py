"""The core of the VAE family: encoders, decoders, diagonal Gaussians, applications of codes, and label
dropout.

An encoder maps images [B, C, H, W], and label embeddings e [B, E] or None, to [B, outputs]. A decoder maps
z [B, latent], and e, to [B, outputs, H, W]. No layer depends on the other images of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice, setting
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.labelled import LabelOptions
from gzcli.models.nn import (
    ClassEmbedding,
    Labels,
    as_interpolations,
    at_least,
    every_label,
    halved_sizes,
    mix_codes,
    nearer,
    pyramid,
    spread_labels,
    traversal,
)
from gzcli.models.nn.layers import ResBlock, group_norm
from gzcli.models.nn.pixels import MixturePixels, Pixels

LOG_2PI = math.log(2 * math.pi)
# Bounds of a posterior's logvar. Learned posteriors are narrower than the prior, whose logvar is 0. Images
# unlike the training images can raise the logvar without limit: at 20 their KL was 10^9 nats. The upper bound
# is log sigma ≤ 2, as in the published code of soft actor-critic (Haarnoja 2018, arXiv:1812.05905).
LOGVAR = (-20.0, 4.0)


def kl_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, e^logvar) ‖ N(0, I)), summed over the last dimension (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, e^logvar), summed over the last dimension."""
    logvar = logvar.to(z) if isinstance(logvar, Tensor) else z.new_full((), logvar)
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def reparameterise(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Draws of N(mu, e^logvar) from standard normal eps."""
    return mu + (0.5 * logvar).exp() * eps


# ---- encoders and decoders

Sizes = tuple[int, ...]  # (C, H, W) of an image, or the widths of layers


@dataclass(frozen=True)
class NetOptions:
    """Encoder and decoder.

    net: `conv`, a convolutional network, or `mlp`.
    hidden: widths of the MLP's layers, or channels of the convolutional scales, finest first. Default: 512
      and 512, or derived from `width`.
    width: channels of the finest scale, doubled at each coarser one up to 4-fold. Ignored if `hidden` is set.
    blocks: residual blocks of each scale of the convolutional network.
    latent: dimensions of z.
    """

    net: Annotated[str, ENCODER_NETS] = "conv"
    hidden: tuple[int, ...] | None = None
    width: int = 32
    blocks: int = 0
    latent: int = 32

    def widths(self, shape: Sizes) -> Sizes:
        if self.hidden or self.net == "mlp":
            return tuple(self.hidden or (512, 512))
        return tuple(self.width * 2 ** min(i, 2) for i in range(max(len(pyramid(shape)) - 1, 1)))

    def encoder(self, shape: Sizes, outputs: int, embed: int = 0) -> nn.Module:
        return ENCODER_NETS[self.net][0](shape, self.widths(shape), outputs, embed, self.blocks)

    def decoder(self, shape: Sizes, outputs: int, embed: int = 0) -> nn.Module:
        return ENCODER_NETS[self.net][1](shape, self.widths(shape), self.latent, outputs, embed, self.blocks)


def join(h: Tensor, e: Tensor | None) -> Tensor:
    """h [B, D], followed by the embeddings e [B, E] if there are any."""
    return h if e is None else torch.cat([h, e], dim=1)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    widths = (inputs, *hidden)
    layers = [m for i, o in zip(widths, hidden, strict=False) for m in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class MLPEncoder(nn.Module):
    """An MLP over the pixels, without residual blocks."""

    def __init__(self, shape: Sizes, hidden: Sizes, outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        self.net = mlp(math.prod(shape) + embed, hidden, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(x.flatten(1), e))


class MLPDecoder(nn.Module):
    """An MLP with the encoder's layers in reverse: the last of `widths` comes first."""

    def __init__(self, shape: Sizes, widths: Sizes, z: int, outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        self.shape = (outputs, *shape[1:])
        self.net = mlp(z + embed, widths[::-1], math.prod(self.shape))

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return self.net(join(z, e)).unflatten(1, self.shape)


class ConvEncoder(nn.Module):
    """A stride-2 convolution and `blocks` residual blocks at each scale of `hidden`, finest first."""

    def __init__(self, shape: Sizes, hidden: Sizes, outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in pairwise((shape[0], *hidden)):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), *(ResBlock(o, o) for _ in range(blocks))]
        self.net = nn.Sequential(*layers, group_norm(hidden[-1]), nn.GELU())
        self.head = nn.Linear(hidden[-1] * math.prod(halved_sizes(shape, len(hidden))[-1]) + embed, outputs)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return self.head(join(self.net(x).flatten(1), e))


class ConvDecoder(nn.Module):
    """At each scale, residual blocks and a transposed convolution of stride 2."""

    def __init__(self, shape: Sizes, widths: Sizes, z: int, outputs: int, embed: int = 0, blocks: int = 0):
        super().__init__()
        *self.targets, start = halved_sizes(shape, len(widths))
        self.start = (widths[-1], *start)
        self.stem = nn.Linear(z + embed, math.prod(self.start))
        self.scales = nn.ModuleList()
        for w, out in zip(reversed(widths), (*reversed(widths[:-1]), outputs), strict=True):
            up = group_norm(w), nn.GELU(), nn.ConvTranspose2d(w, out, 4, stride=2, padding=1)
            self.scales.append(nn.Sequential(*(ResBlock(w, w) for _ in range(blocks)), *up))

    def forward(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.stem(join(z, e)).unflatten(1, self.start)
        for scale, (height, width) in zip(self.scales, reversed(self.targets), strict=True):
            h = scale(h)[:, :, :height, :width]  # odd sizes were rounded up
        return h


ENCODER_NETS: dict[str, tuple[Any, Any]] = {
    "mlp": (MLPEncoder, MLPDecoder),
    "conv": (ConvEncoder, ConvDecoder),
}

LABEL_SIZE = 32  # width of a label's embedding

# ---- models


class Autoencoder(Model):
    """A model with a code z [B, latent] of each image, distributed as N(0, I)."""

    with_labels = ("analogies",)

    def code(self, x: Tensor, labels: Labels = None) -> Tensor:
        """The code of each image, without noise."""
        raise NotImplementedError

    def image(self, z: Tensor, labels: Labels = None) -> Tensor:
        """The image [B, C, H, W] of each code."""
        raise NotImplementedError

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress, frames: int = 8
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, … along straight lines of z. Each frame has the label
        of the nearer image.

        frames: images of an interpolation, both ends included.
        """
        y = nearer(labels, frames)
        x = self.image(mix_codes(self.code(x, labels), frames), y)
        progress(1, 1, x)
        return as_interpolations(x, frames, y)

    @torch.no_grad()
    def analogies(
        self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress, codes: int = 8
    ) -> Applied:
        """Decodes the code of an image with every class, so that each row has one style (Kingma 2014,
        arXiv:1406.5298, figure 1).

        codes: number of images, one per row.
        """
        at_least(1, codes=codes)
        x, y = x[:codes], None if labels is None else labels[:codes]
        n, columns = len(x), len(self.data.classes)
        z = self.code(x, y).repeat_interleave(columns, 0)
        targets = torch.stack(every_label(self.data, n, x.device), 1).flatten(0, 1)
        parts = zip(z.split(64), targets.split(64), strict=True)
        images = torch.cat([self.image(part, target) for part, target in parts])
        progress(1, 1, images)
        rows, ends = tuple(str(i) for i in range(n)), tuple((i,) for i in range(n))
        return Applied(
            images, rows=rows, columns=columns, marks=tuple(self.data.classes), of=ends, labels=targets
        )

    @torch.no_grad()
    def traverse(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        dims: int = 8,
        frames: int = 8,
        span: float = 3,
    ) -> Applied:
        """Changes the first image along the dimensions of z that change it most.

        dims: number of dimensions, one per row.
        frames: images per row.
        span: a dimension goes from −span to span, in standard deviations of the prior.
        """
        y = None if labels is None else labels[:1]

        def decode(z: Tensor) -> Tensor:
            return self.image(z, None if y is None else y.expand(len(z), *y.shape[1:]))

        return traversal(decode, self.code(x[:1], y), dims, frames, span)


class LabelledVAE(Model):
    """A model with an ELBO whose KL weight rises from 0 to 1 over `kl_warmup` steps. Training hides labels at
    random, so that images without labels have a likelihood, that of the null label."""

    likelihood = "bound"
    pixels: Pixels | MixturePixels

    def __init__(self, data: DataInfo, labels: LabelOptions, kl_warmup: int):
        super().__init__(data)
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout
        self.embed_dim = LABEL_SIZE if labels.conditional else 0
        self.labels = ClassEmbedding(len(data.classes), LABEL_SIZE) if labels.conditional else None
        self.kl_warmup, self.kl_factor = kl_warmup, 0.0 if kl_warmup else 1.0

    def embed(self, labels: Labels, n: int, drop: Tensor | None = None) -> Tensor | None:
        """The embeddings of n labels; those of the null label if labels are None or `drop` [n] is true."""
        if self.labels is None:
            return None
        if labels is None and not self.label_dropout:
            raise UsageError(
                "this model was trained without a null label, so it needs labels",
                hint=advice(
                    "give them with {}, or train with {}",
                    Option("label"),
                    setting("model.label_dropout", 0.1),
                ),
            )
        return self.labels(labels, n, drop)

    def embed_batch(self, batch: Batch) -> Tensor | None:
        """The embeddings of a batch's labels, some of them hidden."""
        n = len(batch)
        drop = None if self.labels is None else batch.noise.rand(n) < self.label_dropout
        return self.embed(batch.y, n, drop)

    def embed_samples(self, labels: Labels, n: int) -> Tensor | None:
        """The embeddings of the labels of n samples, by default spread over the classes."""
        device = next(self.parameters()).device
        return None if self.labels is None else self.labels(spread_labels(labels, n, self.data, device), n)

    def to_images(self, out: Tensor, mean: bool, noise: Noise, progress: Progress) -> Tensor:
        """The images of the decoder's outputs: the means of the pixels, or draws."""
        if mean:
            x = self.pixels.mean(out)
        else:
            x = self.pixels.draw(out, noise.rand(len(out), self.pixels.uniforms, *out.shape[2:]))
        progress(1, 1, x)
        return x

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel for the reconstruction at the posterior's mean, averaged over channels: [B,
        H, W]."""
        return (x - self.reconstruct(x, noise=noise, progress=no_progress).images).abs().mean(1)

    def on_step(self, step: int) -> None:
        if self.kl_warmup:
            self.kl_factor = min(1.0, (step + 1) / self.kl_warmup)
