"""The semantic codes of the diffusion autoencoder: their moments, and a linear classifier of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli import ranks
from gzcli.models.base import Model, Phase
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.semantic import Encoder
from gzcli.models.nn import full_fp32, to_fp32
from gzcli.types import Batch, DataInfo

DECAY = 0.95  # of the running mean and covariance of z_sem


class SemanticCodes(Model):
    """An encoder of z_sem [B, latent] beside a diffusion that is told it. Where the data have labels a linear
    classifier of the normalised z_sem learns in a phase of its own, without a gradient to the encoder."""

    mean: Tensor  # [latent], of z_sem
    cov: Tensor  # [latent, latent]
    batches: Tensor  # [], how many both have seen

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
        """The classifier's loss, by softmax, or by one sigmoid a label where an image may have several, and
        its accuracy."""
        with torch.no_grad():
            z = self.encode(x)
        logits, y = to_fp32(head(self.normalise(z))), self.one_hot(y).to(z)
        error = F.binary_cross_entropy_with_logits if self.data.multilabel else F.cross_entropy
        return {"loss": error(logits, y), "accuracy": (self.seen(logits) == y).all(1).float().mean()}

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
        """The moments of z_sem of all `batches` under the present encoder. The running ones are of the
        encoder in training, with its dropout, and the codes of averaged weights are far from them."""
        z = torch.cat([self.encode(batch.x) for batch in batches])
        self.mean.copy_(z.mean(0))
        with full_fp32(z.device):
            self.cov.copy_((z - self.mean).mT @ (z - self.mean) / len(z))

    def encode(self, x: Tensor) -> Tensor:
        """z_sem [B, latent] of images."""
        return to_fp32(self.encoder(x))

    def normalise(self, z: Tensor) -> Tensor:
        """z_sem with mean 0 and variance 1 in every coordinate."""
        return (z - self.mean) / self.std

    def denormalise(self, z: Tensor) -> Tensor:
        return self.mean + z * self.std

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=1e-8).sqrt()

    def moved(self, z: Tensor, y: Tensor, strength: float, head: nn.Linear) -> Tensor:
        """Codes z [B, latent] moved towards labels y by the weights of `head`, as `edit` says."""
        change = self.one_hot(y).to(z) - self.seen(head(self.normalise(z))).to(z)  # [B, K]
        w = change @ head.weight / self.std  # of z_sem as it is
        along = w @ self.cov
        return z + strength * along / (w * along).sum(1, keepdim=True).clamp(min=1e-12).sqrt()

    def seen(self, logits: Tensor) -> Tensor:
        """The labels [B, K] 0/1 that the classifier sees."""
        return (logits > 0).long() if self.data.multilabel else self.one_hot(logits.argmax(1))

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as [B, K] 0/1."""
        return y if self.data.multilabel else F.one_hot(y, len(self.data.classes))
