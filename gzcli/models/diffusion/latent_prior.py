"""The latent diffusion of the diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640, section 4:
ω(z_{sem,t}, t).

A diffusion of the normalised semantic codes z_sem of the training images, by an MLP whose every layer sees
the noised code again; its samples are decoded from x_T ~ N(0, I).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.models.base import Model
from gzcli.models.denoising.guided import LabelOptions
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.diffae import DiffAE
from gzcli.models.diffusion.options import DiffusionOptions, PathOptions, SamplingOptions
from gzcli.models.nn import ClassEmbedding
from gzcli.models.nn.unet import time_embedding
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress

TIME = 64  # sinusoids of the time


@dataclass(frozen=True)
class SkipMLPOptions:
    """The sizes of the MLP, as keys of a recipe.

    width: of a layer, in features.
    layers: linear layers.
    dropout: share of activations that each layer drops in training, 0 … 1.
    """

    width: int = 256
    layers: int = 6
    dropout: float = 0.0


class SkipMLP(nn.Module):
    """z [B, D, 1, 1], t [B], labels → [B, D, 1, 1] (appendix A): each of the linear layers but the last is
    scaled by time and label, normalised, and goes through SiLU; each but the first also sees the input."""

    def __init__(self, size: int, options: SkipMLPOptions, *, classes: int):
        width, layers, dropout = options.width, options.layers, options.dropout
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
    """A diffusion of the z_sem of `autoencoder`, a trained `diffae`; a second stage.

    The codes of the training set are made once (`prepare`) and arrive as `batch.extra["code"]`. Raises
    UsageError for a conditional model of data without labels.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
    labels_for = ("edit",)
    autoencoder: DiffAE

    def __init__(
        self,
        data: DataInfo,
        *,
        autoencoder: Model,
        mlp: SkipMLPOptions = SkipMLPOptions(),
        process: DiffusionOptions = DiffusionOptions(schedule="linear", prediction="eps", loss_type="l1"),
        labels: LabelOptions = LabelOptions(),
    ):
        super().__init__(data)
        self.attach("autoencoder", autoencoder)
        self.conditional = labels.conditional
        latent = self.autoencoder.latent
        net = SkipMLP(latent, mlp, classes=len(data.classes) if labels.conditional else 0)
        codes = replace(data, shape=(latent, 1, 1), levels=None)
        self.diffusion = DiffusionApplications(codes, net, process, labels)

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
        path: PathOptions = PathOptions(),
        code_steps: int = 50,
        guidance: float = 1.0,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]: z_sem by DDIM of the prior, then the image of it.

        code_steps: DDIM steps of z_sem, evenly in t.
        guidance: strength of the labels on z_sem; 1: as trained, 0: without them, more: sharper.
        """
        options = SamplingOptions("ddim", code_steps, "trailing", guidance=guidance)
        z = self.diffusion.sample(n, labels=labels, noise=noise, options=options)
        return self.autoencoder.draw(self.autoencoder.denormalise(z.flatten(1)), noise, progress, path)

    # ---- scores, and applications of the autoencoder

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise, times: int = 50) -> Tensor:
        """[B]: mean squared error of the prior's ε for z_sem.

        times: evenly spaced noise levels that the error is averaged over.
        """
        z = self.autoencoder.normalise(self.autoencoder.encode(x))
        return self.diffusion.score_denoise(z[..., None, None], noise=noise, times=times)

    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """The autoencoder's: [B], mean squared error of images rebuilt from z_sem alone.

        steps: network calls.
        """
        return self.autoencoder.score_recon(x, noise=noise, steps=steps)

    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """The autoencoder's: [B], mean squared error of ε given z_sem.

        times: evenly spaced noise levels that the error is averaged over.
        """
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
        """As `diffae` does.

        steps: network calls from image to noise, and from noise to image.
        stochastic: whether x_T is the image's own, or from `noise`.
        """
        return self.autoencoder.reconstruct(
            x, noise=noise, progress=progress, steps=steps, stochastic=stochastic
        )

    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """As `diffae` does.

        frames: images of an interpolation, both ends included.
        steps: network calls from image to noise, and from noise to image.
        """
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
        """As `diffae` does.

        strength: length of the step in standard deviations of the codes along it.
        steps: network calls from image to noise, and from noise to image.
        """
        return self.autoencoder.edit(
            x, labels=labels, noise=noise, progress=progress, strength=strength, steps=steps
        )

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The autoencoder's figures."""
        return self.autoencoder.measure(batches)
