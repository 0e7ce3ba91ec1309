"""The latent diffusion of the diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640, section 4:
ω(z_{sem,t}, t).

A diffusion of the normalised semantic codes z_sem of the training images, by an MLP whose every layer sees
the noised code again; its samples are decoded from x_T ~ N(0, I).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.base import Model
from gzcli.models.diffusion.applications import Applications
from gzcli.models.nn import ClassEmbedding
from gzcli.models.nn.unet import time_embedding
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress

TIME = 64  # sinusoids of the time


class SkipMLP(nn.Module):
    """z [B, D, 1, 1], t [B], labels → [B, D, 1, 1] (appendix A): each but the last of `layers` linear layers
    is scaled by time and label, normalised, and through SiLU; the input stands beside what each but the first
    is given."""

    def __init__(self, size: int, *, width: int, layers: int, dropout: float, classes: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width))
        self.label = ClassEmbedding(classes, width) if classes else None
        inner = range(layers - 1)
        self.linear = nn.ModuleList(nn.Linear(width + size if i else size, width) for i in inner)
        self.scale = nn.ModuleList(nn.Linear(width, width) for _ in inner)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in inner)
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(width + size, size)

    def forward(self, z: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        z = h = z.flatten(1)
        emb = self.time(time_embedding(t, TIME))
        if self.label is not None:
            emb = emb + self.label(y, len(z), drop)
        emb = F.silu(emb)
        for linear, scale, norm in zip(self.linear, self.scale, self.norm, strict=True):
            h = self.dropout(F.silu(norm(linear(h) * (1 + scale(emb)))))
            h = torch.cat([h, z], 1)
        return self.out(h)[..., None, None]


class LatentPrior(Model):
    """A diffusion of the z_sem of `autoencoder`, a trained `diffae`, of `layers` layers of `width`; a second
    stage.

    The codes of the training set are made once (`prepare`) and arrive as `batch.extra["code"]`. The keys of
    the process are those of `ddpm`; conditional: labels may be asked for. Raises UsageError for a conditional
    model of data without labels.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
    labels_for = ("edit",)

    def __init__(
        self,
        data: DataInfo,
        *,
        autoencoder: Model,
        width: int = 256,
        layers: int = 6,
        dropout: float = 0.0,
        timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "linear",
        prediction: Literal["eps", "x0", "v"] = "eps",
        loss_type: Literal["l2", "l1", "huber"] = "l1",
        min_snr: float | None = None,
        time_sampling: Literal["uniform", "stratified"] = "stratified",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        super().__init__(data)
        self.attach("autoencoder", autoencoder)
        self.conditional = conditional
        self.diffusion = Applications(
            replace(data, shape=(autoencoder.latent, 1, 1), levels=None),
            SkipMLP(
                autoencoder.latent,
                width=width,
                layers=layers,
                dropout=dropout,
                classes=len(data.classes) if conditional else 0,
            ),
            timesteps=timesteps,
            schedule=schedule,
            zero_snr=False,
            prediction=prediction,
            loss_type=loss_type,
            min_snr=min_snr,
            time_sampling=time_sampling,
            conditional=conditional,
            label_dropout=label_dropout,
        )

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The semantic codes of a batch's images, normalised."""
        return {"code": self.autoencoder.normalise(self.autoencoder.encode(batch.x))}

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        return self.diffusion.loss(replace(batch, x=batch.extra["code"].to(batch.x)[..., None, None]))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Literal["ancestral", "ddim", "dpmpp", "dpmpp_sde", "unipc", "heun"] = "dpmpp",
        steps: int = 20,
        spacing: Literal["trailing", "leading", "linspace", "karras", "logsnr"] = "karras",
        code_steps: int = 50,
        guidance: float = 1.0,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]: z_sem by `code_steps` DDIM steps of the prior, and by `guidance`
        towards `labels`; the image by `steps` steps of `sampler`, along the levels of `spacing`."""
        z = self.diffusion.sample(
            n,
            labels=labels,
            noise=noise,
            sampler="ddim",
            steps=code_steps,
            spacing="trailing",
            guidance=guidance,
        )
        z = self.autoencoder.denormalise(z.flatten(1))
        return self.autoencoder.draw(z, noise, progress, sampler=sampler, steps=steps, spacing=spacing)

    # ---- scores, and what the autoencoder can

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise, times: int = 50) -> Tensor:
        """[B]: how badly the prior denoises z_sem: the mean squared error of its ε over `times` noise
        levels."""
        z = self.autoencoder.normalise(self.autoencoder.encode(x))
        return self.diffusion.score_denoise(z[..., None, None], noise=noise, times=times)

    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """The autoencoder's: [B], mean squared error of images rebuilt from z_sem alone."""
        return self.autoencoder.score_recon(x, noise=noise, steps=steps)

    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """The autoencoder's: [B], mean squared error of ε given z_sem."""
        return self.autoencoder.score_denoise(x, noise=noise, times=times)

    def reconstruct(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 50,
        stochastic: bool = True,
    ) -> Applied:
        """As `diffae` does."""
        return self.autoencoder.reconstruct(
            x, noise=noise, progress=progress, steps=steps, stochastic=stochastic
        )

    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """As `diffae` does."""
        return self.autoencoder.interpolate(x, noise=noise, progress=progress, frames=frames, steps=steps)

    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 3.0,
        steps: int = 50,
    ) -> Applied:
        """As `diffae` does."""
        return self.autoencoder.edit(
            x, labels=labels, noise=noise, progress=progress, strength=strength, steps=steps
        )

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The autoencoder's figures."""
        return self.autoencoder.measure(batches)
