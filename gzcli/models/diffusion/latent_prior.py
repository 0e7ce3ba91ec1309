"""The latent diffusion of the diffusion autoencoder — Preechakul 2022, arXiv:2111.15640, section 4. It models
the normalised codes z_sem of the training images. Sampled codes are decoded from x_T ~ N(0, I)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.diffusion.ddpm import Diffusion, DiffusionOptions, PathOptions, SamplingOptions
from gzcli.models.diffusion.diffae import CodeApplications, DiffAE
from gzcli.models.labelled import ClusterOptions, LabelOptions
from gzcli.models.nn import ClassEmbedding
from gzcli.models.nn.unet import time_embedding

TIME = 64  # sinusoids of the time


@dataclass(frozen=True)
class SkipMLPOptions:
    """The sizes of the MLP.

    width: features of a layer.
    layers: number of linear layers.
    dropout: dropout rate of each layer.
    """

    width: int = 256
    layers: int = 6
    dropout: float = 0.0


class SkipMLP(nn.Module):
    """z [B, D, 1, 1], t [B], labels → [B, outputs · D, 1, 1] (appendix A). Each linear layer but the last is
    scaled by time and label, normalised and followed by SiLU; each but the first also has the input z."""

    def __init__(self, size: int, options: SkipMLPOptions, *, classes: int, outputs: int):
        super().__init__()
        width, inner = options.width, range(options.layers - 1)
        self.time = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width))
        self.label = ClassEmbedding(classes, width) if classes else None
        self.linear = nn.ModuleList(nn.Linear(width + size if i else size, width) for i in inner)
        self.scale = nn.ModuleList(nn.Linear(width, width) for _ in inner)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in inner)
        self.dropout, self.out = nn.Dropout(options.dropout), nn.Linear(width + size, outputs * size)

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


class LatentPrior(CodeApplications):
    """A diffusion of the z_sem of `autoencoder`, a trained `diffae`; a second stage. Raises UsageError for a
    conditional model of data without labels."""

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
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
        latent, clusters = self.autoencoder.latent, ClusterOptions(labels.conditional, labels.label_dropout)
        classes = len(data.classes) if labels.conditional else 0
        net = SkipMLP(latent, mlp, classes=classes, outputs=process.outputs)
        self.diffusion = Diffusion(replace(data, shape=(latent, 1, 1), levels=None), net, process, clusters)

    @property
    def coder(self) -> DiffAE:
        return self.autoencoder

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
        """n images [n, C, H, W] in [-1, 1]: z_sem by DDIM of the prior, decoded by the autoencoder.

        code_steps: DDIM steps of z_sem, uniform in t.
        guidance: guidance scale of z_sem. 0: unconditional; 1: no guidance; above 1: sharper.
        """
        options = SamplingOptions(sampler="ddim", steps=code_steps, spacing="trailing", guidance=guidance)
        z = self.diffusion.sample(n, labels=labels, noise=noise, options=options)
        return self.autoencoder.draw(self.autoencoder.denormalise(z.flatten(1)), noise, progress, path)

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise, times: int = 50) -> Tensor:
        """The mean squared error [B] of the prior's ε for z_sem.

        times: number of evenly spaced noise levels that the error is averaged over.
        """
        z = self.autoencoder.normalise(self.autoencoder.encode(x))
        return self.diffusion.score_denoise(z[..., None, None], noise=noise, times=times)
