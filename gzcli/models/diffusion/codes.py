"""The codes of the diffusion autoencoder: images to codes and back, the moments of the semantic codes, and a
linear classifier of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.types import Batch, DataInfo, Progress, no_progress
from gzcli.models.base import Model, Phase
from gzcli.models.denoising import samplers
from gzcli.models.denoising.schedule import Level
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.semantic import Encoder
from gzcli.models.nn import full_fp32, to_fp32

DECAY = 0.95  # of the running mean and covariance of z_sem


class SemanticCodes(Model):
    """An encoder of z_sem [B, latent] and a diffusion conditioned on z_sem.

    Where the data have labels, a linear classifier of the normalised z_sem is trained in a phase of its own,
    without a gradient to the encoder.
    """

    mean: Tensor  # running mean of z_sem, [latent]
    cov: Tensor  # running covariance of z_sem, [latent, latent]
    batches: Tensor  # number of batches in both, []

    def __init__(self, data: DataInfo, latent: int, encoder: Encoder, diffusion: DiffusionApplications):
        super().__init__(data)
        self.latent, self.encoder, self.diffusion = latent, encoder, diffusion
        self.head = nn.Linear(latent, len(data.classes)) if data.classes else None
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("cov", torch.eye(latent))
        self.register_buffer("batches", torch.zeros(()))

    def phases(self) -> list[Phase]:
        main = Phase("main", [*self.encoder.parameters(), *self.diffusion.parameters()])
        return [main] if self.head is None else [main, Phase("classifier", list(self.head.parameters()))]

    def classified(self, x: Tensor, y: Tensor, head: nn.Linear) -> dict[str, Tensor]:
        """The loss and the accuracy of the classifier `head`, by softmax, or for multi-label data by a
        sigmoid for each label."""
        with torch.no_grad():
            z = self.encode(x)
        logits, y = to_fp32(head(self.normalise(z))), self.one_hot(y).to(z)
        error = F.binary_cross_entropy_with_logits if self.data.multilabel else F.cross_entropy
        return {"loss": error(logits, y), "accuracy": (self.predicted(logits) == y).all(1).float().mean()}

    @torch.no_grad()
    def keep_moments(self, z: Tensor) -> None:
        """Updates the running mean and covariance with z_sem [B, latent] of the batches of all ranks."""
        with torch.autocast(z.device.type, enabled=False):
            mean = ranks.mean(z.mean(0), self)
            cov = ranks.mean((z - mean).mT @ (z - mean) / len(z), self)
        weight = (1 / (self.batches + 1)).clamp(min=1 - DECAY)
        self.mean.lerp_(mean, weight)
        self.cov.lerp_(cov, weight)
        self.batches += 1

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes mean and covariance of z_sem over all `batches`. The running moments are those of the
        encoder in training, with dropout; the codes of averaged weights are far from them."""
        z = torch.cat([self.encode(batch.x) for batch in batches])
        self.mean.copy_(z.mean(0))
        with full_fp32(z.device):
            self.cov.copy_((z - self.mean).mT @ (z - self.mean) / len(z))

    def encode(self, x: Tensor) -> Tensor:
        """z_sem [B, latent] of images."""
        return to_fp32(self.encoder(x))

    def invert(self, x: Tensor, z: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The stochastic code x_T of images x with semantic codes z."""
        return samplers.ddim_inverse(
            self.diffusion.denoiser(z, clip=False), x, self.path(steps), progress=progress
        )

    def decode(self, z: Tensor, x_T: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The images [B, C, H, W] of both codes, by DDIM."""
        denoise = self.diffusion.denoiser(z, clip=False)
        return self.diffusion.into_range(samplers.ddim(denoise, x_T, self.path(steps), progress=progress))

    def path(self, steps: int) -> list[Level]:
        """The noise levels of at most `steps` steps, for both directions."""
        return self.diffusion.schedule.spaced(min(steps, self.diffusion.timesteps))

    def normalise(self, z: Tensor) -> Tensor:
        """z_sem scaled to mean 0 and variance 1 in every coordinate."""
        return (z - self.mean) / self.std

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return self.mean + z * self.std

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=1e-8).sqrt()

    def moved(self, z: Tensor, y: Tensor, strength: float, head: nn.Linear) -> Tensor:
        """Codes z [B, latent] moved towards labels y along the weights of `head`, as in `edit`."""
        change = self.one_hot(y).to(z) - self.predicted(head(self.normalise(z))).to(z)  # [B, K]
        w = change @ head.weight / self.std  # weights of z_sem that is not normalised
        along = w @ self.cov
        return z + strength * along / (w * along).sum(1, keepdim=True).clamp(min=1e-12).sqrt()

    def predicted(self, logits: Tensor) -> Tensor:
        """The labels [B, K] 0/1 that the classifier predicts."""
        return (logits > 0).long() if self.data.multilabel else self.one_hot(logits.argmax(1))

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as [B, K] 0/1."""
        return y if self.data.multilabel else F.one_hot(y, len(self.data.classes))
