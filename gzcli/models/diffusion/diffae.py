"""Diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640.

An image has two codes. The semantic code z_sem = E(x) is a vector. The stochastic code x_T is the noise from
which the diffusion given z_sem generates x; it is found by running DDIM backwards.

    L = E ‖ε_θ(x_t, t, E(x)) − ε‖²                                    (eq. 6; or of the image, or of v)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.hints import gz
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model, Phase
from gzcli.models.denoising.applications import interpolate_images
from gzcli.models.diffusion.ddpm import Diffusion, DiffusionOptions, PathOptions, SamplingOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import (
    as_interpolations,
    at_least,
    complete_pairs,
    full_fp32,
    mix_codes,
    slerp,
    spread_labels,
    stacked,
    to_fp32,
)
from gzcli.models.nn.layers import Attention, GroupNorm
from gzcli.models.nn.unet import Down, ResBlock, Stage, UNet, UNetOptions, attended, patched, widths_of

GROUP_NORM_EPS = 1e-5
DECAY = 0.95  # decay of the running mean and covariance of z_sem
MEASURED_IMAGES = 256  # images for `measure`


class SemanticEncoder(nn.Module):
    """x [B, C, H, W] → z_sem [B, latent]: the encoder of a U-Net without time, averaged over positions."""

    def __init__(self, data: DataInfo, latent: int, options: UNetOptions):
        super().__init__()
        groups, layers, self.patch = options.groups, options.layers, options.patch
        widths = [options.channels * m for m in widths_of(data.shape, options)]

        def stage(c: int, o: int, attend: Sequence[bool], down: nn.Module | None = None) -> Stage:
            inputs = [c, *[o] * (len(attend) - 1)]
            blocks = [
                ResBlock(i, o, 0, groups, GROUP_NORM_EPS, options.dropout, scale_shift=False) for i in inputs
            ]
            attention = [
                Attention(o, options.head_dim or o, groups, GROUP_NORM_EPS) if a else None for a in attend
            ]
            return Stage(blocks, attention, down)

        c = widths[0]
        self.conv_in = stacked(nn.Conv2d(data.shape[0] * self.patch**2, c, 3, padding=1), 0)
        self.down = nn.ModuleList()
        for k, (o, attend) in enumerate(zip(widths, attended(data.shape, len(widths), options), strict=True)):
            down = Down(o) if k < len(widths) - 1 else None
            self.down.append(stage(c, o, [attend] * layers, down))
            c = o
        self.mid = stage(c, c, [True, False])
        self.norm_out = GroupNorm(groups, c, GROUP_NORM_EPS)
        self.out = nn.Linear(c, latent)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(patched(x, self.patch))
        for stage in [*self.down, self.mid]:
            h = stage(h)[-1]
        return self.out(F.silu(self.norm_out(h)).mean((2, 3)))


class CodedUNet(UNet):
    """A U-Net with blocks conditioned on time and on a code [B, latent], instead of the label."""

    def __init__(self, *args: Any, latent: int, **options: Any):
        super().__init__(*args, scale_shift=True, **options)
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.emb = Modulation(4 * self.dim, latent, block.conv1.out_channels)

    def embedding(self, t: Tensor, y: Any, drop: Tensor | None) -> Tensor:
        emb = super().embedding(t, None, drop)
        return torch.cat([emb, y.to(emb.dtype)], 1)


class Modulation(nn.Module):
    """The scale and shift of the normalised h by time and code: z_s (t_s h + t_b) (eq. 7), with z_s and t_s
    close to 1 at first. It maps [B, dim + latent] to [B, 2 · channels]: the scale minus 1, then the shift, as
    in `ResBlock`."""

    def __init__(self, dim: int, latent: int, channels: int):
        super().__init__()
        self.split = (dim, latent)
        self.time, self.code = stacked(nn.Linear(dim, 2 * channels), 2), nn.Linear(latent, channels)

    def forward(self, emb: Tensor) -> Tensor:
        t, z = emb.split(self.split, 1)
        scale, shift = self.time(t).chunk(2, 1)
        z = 1 + self.code(z)
        return torch.cat([z * (1 + scale) - 1, z * shift], 1)


class CodeApplications(Model):
    """Applications that use codes, shared by the autoencoder and the prior of its codes."""

    labels_for = ("edit",)
    coder: Any  # the autoencoder, a `DiffAE`

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 50,
        stochastic: bool = True,
    ) -> Applied:
        """Encodes and decodes images.

        steps: network calls in each direction.
        stochastic: whether x_T is the code of the image. Otherwise it is drawn from noise, which shows only
          the content of z_sem.
        """
        at_least(1, steps=steps)
        coder, z = self.coder, self.coder.encode(x)
        x_T = coder.invert(x, z, steps, half_progress(progress, 0)) if stochastic else noise.randn(*x.shape)
        decoded = coder.decode(z, x_T, steps, half_progress(progress, 1) if stochastic else progress)
        return Applied(decoded, rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, …: z_sem on a line, x_T on the sphere (section 5.2).
        Raises UsageError for fewer than two images, or frames.

        frames: images of an interpolation, both ends included.
        steps: network calls in each direction.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x, coder = complete_pairs(x), self.coder
        z = coder.encode(x)
        x_T = interpolate_images(coder.invert(x, z, steps, half_progress(progress, 0)), frames, slerp)
        images = coder.decode(mix_codes(z, frames), x_T, steps, half_progress(progress, 1))
        return as_interpolations(images, frames)

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 3.0,
        steps: int = 50,
    ) -> Applied:
        """Changes images from their labels, or the predicted ones, to `labels` by a step of z_sem (section
        5.3). The noise x_T stays the same, and an image that has these labels does not change.
        Raises UsageError for data without labels.

        strength: step length in standard deviations of the codes along its direction.
        steps: network calls in each direction.
        """
        coder = self.coder
        if coder.head is None:
            raise UsageError("`edit` needs a model of data with labels", hint=gz("list", "data"))
        at_least(1, steps=steps)
        z, labels = coder.encode(x), spread_labels(labels, len(x), coder.data, x.device)
        x_T = coder.invert(x, z, steps, half_progress(progress, 0))
        z = coder.move_codes(z, labels, strength, coder.head, y)
        edited = coder.decode(z, x_T, steps, half_progress(progress, 1))
        return Applied(edited, rows=("edited",), labels=labels)

    @torch.no_grad()
    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """The mean squared error [B] of images rebuilt from z_sem, with random x_T.

        steps: network calls.
        """
        rebuilt = self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images
        return (x - rebuilt).square().flatten(1).mean(1)

    @torch.no_grad()
    def map_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """|x − x̂| at each pixel [B, H, W] for images rebuilt from z_sem alone, averaged over channels."""
        return (x - self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images).abs().mean(1)

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """The mean squared error [B] of the network's estimate of ε given z_sem.

        times: number of evenly spaced noise levels that the error is averaged over.
        """
        return self.coder.diffusion.errors(x, self.coder.encode(x), noise, times)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of the first held-out images, with values in [0, 1] and rebuilt in 50 steps.

        mse: mean squared error of images rebuilt from both codes.
        mse_semantic: mean squared error of images rebuilt from z_sem alone.
        accuracy: accuracy of the classifier.
        """
        sums: dict[str, float] = defaultdict(float)
        n = 0
        for batch in batches:
            for name, stochastic in (("mse", True), ("mse_semantic", False)):
                rebuilt = self.reconstruct(batch.x, noise=batch.noise, stochastic=stochastic).images
                sums[name] += float((0.5 * (batch.x - rebuilt)).square().flatten(1).mean(1).sum())
            if self.coder.head is not None:
                sums["accuracy"] += len(batch) * float(self.coder.loss(batch, "classifier")["accuracy"])
            n += len(batch)
            if n >= MEASURED_IMAGES:
                break
        return {name: total / n for name, total in sums.items()}


def half_progress(progress: Progress, half: int) -> Progress:
    """Maps the progress from image to noise (half = 0), or from noise to image (1), to the progress of
    both."""
    return lambda i, n, x=None: progress(half * n + i, 2 * n, x)


class DiffAE(CodeApplications):
    """An encoder of z_sem [B, latent] and a U-Net that denoises given z_sem; the first stage of
    `latent_prior`.

    Without a prior it samples z_sem from a Gaussian with the running moments of the training codes.
    If the data have labels, a linear classifier of the normalised z_sem is trained in its own phase, without
    a gradient to the encoder. Raises UsageError for sizes that do not fit.

    latent: dimensions of z_sem.
    encoder_mult: width of each level of the encoder as a multiple of `channels`. Default: 1, 2, 4, 8, 8, one
      level more than the U-Net.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
    mean: Tensor  # running mean of z_sem, [latent]
    cov: Tensor  # running covariance of z_sem, [latent, latent]
    batches: Tensor  # number of batches in both, []

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        unet: UNetOptions = UNetOptions(),
        encoder_mult: tuple[int, ...] | None = None,
        process: DiffusionOptions = DiffusionOptions(),
    ):
        net = CodedUNet.of(data, unet, outputs=process.outputs, latent=latent)
        if encoder_mult is None:
            encoder_mult = tuple(2 ** min(i, 3) for i in range(len(widths_of(data.shape, unet)) + 1))
        encoder = SemanticEncoder(data, latent, replace(unet, mult=encoder_mult))
        super().__init__(data)
        # to the diffusion a code [B, latent] is a multi-hot label [B, K]
        coded = replace(data, classes=("z_sem",), multilabel=True)
        labels = ClusterOptions(conditional=True, label_dropout=0.0)
        self.latent, self.encoder = latent, encoder
        self.diffusion = Diffusion(coded, net, process, labels)
        self.head = nn.Linear(latent, len(data.classes)) if data.classes else None
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("cov", torch.eye(latent))
        self.register_buffer("batches", torch.zeros(()))

    @property
    def coder(self) -> DiffAE:
        return self

    # ---- training

    def phases(self) -> list[Phase]:
        main = Phase("main", [*self.encoder.parameters(), *self.diffusion.parameters()])
        return [main] if self.head is None else [main, Phase("classifier", list(self.head.parameters()))]

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the denoiser given the code. In the phase `classifier`, it is the classifier's
        cross-entropy, by softmax or, for multi-label data, by one sigmoid per label."""
        if phase == "classifier" and self.head is not None and batch.y is not None:
            with torch.no_grad():
                z = self.encode(batch.x)
            logits, y = to_fp32(self.head(self.normalise(z))), self.one_hot(batch.y).to(z)
            error = F.binary_cross_entropy_with_logits if self.data.multilabel else F.cross_entropy
            correct = (self.predicted_labels(logits) == y).all(1)
            return {"loss": error(logits, y), "accuracy": correct.float().mean()}
        z = self.encode(batch.x)
        if self.training:
            self.keep_moments(z.detach())
        return self.diffusion.loss(replace(batch, y=z))

    @torch.no_grad()
    def keep_moments(self, z: Tensor) -> None:
        """Updates the running moments with z_sem [B, latent] of the batches of all ranks."""
        with torch.autocast(z.device.type, enabled=False):
            mean = ranks.mean_over_ranks(z.mean(0), self)
            cov = ranks.mean_over_ranks((z - mean).mT @ (z - mean) / len(z), self)
        weight = (1 / (self.batches + 1)).clamp(min=1 - DECAY)
        self.mean.lerp_(mean, weight)
        self.cov.lerp_(cov, weight)
        self.batches += 1

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes the moments of z_sem for the averaged weights; the running moments are those of the
        encoder in training."""
        z = torch.cat([self.encode(batch.x) for batch in batches])
        self.mean.copy_(z.mean(0))
        with full_fp32(z.device):
            self.cov.copy_((z - self.mean).mT @ (z - self.mean) / len(z))

    # ---- images and codes

    def encode(self, x: Tensor) -> Tensor:
        """z_sem [B, latent] of images."""
        return to_fp32(self.encoder(x))

    def invert(self, x: Tensor, z: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The stochastic code x_T of images x with semantic codes z."""
        return self.diffusion.to_noise(x, z, steps, progress)

    def decode(self, z: Tensor, x_T: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The images [B, C, H, W] of both codes, by DDIM."""
        return self.diffusion.into_range(self.diffusion.to_data(x_T, z, steps, 1.0, progress))

    def normalise(self, z: Tensor) -> Tensor:
        """z_sem, normalised to mean 0 and variance 1 in every coordinate."""
        return (z - self.mean) / self.std

    def denormalise(self, z: Tensor) -> Tensor:
        return self.mean + z * self.std

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=1e-8).sqrt()

    def move_codes(
        self, z: Tensor, labels: Tensor, strength: float, head: nn.Linear, y: Tensor | None = None
    ) -> Tensor:
        """Codes z [B, latent] of images with labels y, or the predicted ones, moved towards `labels` along Σ
        w. Here w are the weights of `head` for `labels` minus those for y, and Σ is the covariance of the
        training codes. The paper's direction w leaves the distribution of codes with correlated coordinates
        (Haufe 2014, doi:10.1016/j.neuroimage.2013.10.067)."""
        source = self.predicted_labels(head(self.normalise(z))) if y is None else self.one_hot(y)
        change = self.one_hot(labels).to(z) - source.to(z)  # [B, K]
        w = change @ head.weight / self.std  # weights for z_sem before normalisation
        along = w @ self.cov
        return z + strength * along / (w * along).sum(1, keepdim=True).clamp(min=1e-12).sqrt()

    def predicted_labels(self, logits: Tensor) -> Tensor:
        """The labels that the classifier predicts, [B, K] of 0 and 1."""
        return (logits > 0).long() if self.data.multilabel else self.one_hot(logits.argmax(1))

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as [B, K] of 0 and 1."""
        return y if self.data.multilabel else F.one_hot(y, len(self.data.classes))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        path: PathOptions = PathOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] of codes drawn from the Gaussian."""
        variances, axes = torch.linalg.eigh(self.cov)
        root = axes * variances.clamp(min=0).sqrt() @ axes.mT
        return self.draw(self.mean + noise.randn(n, self.latent) @ root, noise, progress, path)

    def draw(self, z: Tensor, noise: Noise, progress: Progress, path: PathOptions) -> Tensor:
        """Images [n, C, H, W] of semantic codes z [n, latent], each with a stochastic code of `noise`."""
        options = SamplingOptions(**asdict(path))
        return self.diffusion.sample(len(z), labels=z, noise=noise, progress=progress, options=options)

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The squared Mahalanobis distance [B] of z_sem to the Gaussian of the training codes."""
        d = self.encode(x) - self.mean
        floor = 1e-4 * self.cov.diagonal().mean()  # guards against rounding in directions without variance
        cov = self.cov + floor * torch.eye(self.latent, dtype=d.dtype, device=d.device)
        return (d * torch.linalg.solve(cov, d.mT).mT).sum(1)
