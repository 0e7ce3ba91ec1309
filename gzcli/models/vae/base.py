"""The base of models with an ELBO: labels that training may hide, and the warm-up of the KL's weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, Noise, no_progress
from gzcli.models.base import Model
from gzcli.models.nn.common import ClassEmbedding

LABEL_SIZE = 32  # of a label's embedding


@dataclass(frozen=True)
class LabelOptions:
    """How a model is conditioned on labels.

    conditional: whether the model is conditioned on labels.
    """

    conditional: bool = False

    def embedding(self, data: DataInfo) -> ClassEmbedding | None:
        """The embedding of the labels of `data`, None for a model without labels."""
        return ClassEmbedding(len(data.classes), LABEL_SIZE) if self.conditional else None

    @property
    def size(self) -> int:
        """The size of a label's embedding, 0 for a model without labels."""
        return LABEL_SIZE if self.conditional else 0


@dataclass(frozen=True)
class HiddenLabelOptions(LabelOptions):
    """The same with labels that training hides at random, so that images without labels have a likelihood.

    label_dropout: share of the labels that training replaces by the null label, 0 … 1; likelihoods and scores
      without labels use the null label.
    """

    label_dropout: float = 0.1


class LabelledVAE(Model):
    """A model with an ELBO that may be conditioned on labels.

    kl_warmup: steps over which the weight of the KL rises from 0 to 1.
    """

    def __init__(self, data: DataInfo, labels: HiddenLabelOptions, kl_warmup: int):
        super().__init__(data)
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout
        self.labels = labels.embedding(data)
        self.kl_warmup, self.warm = kl_warmup, 0.0 if kl_warmup else 1.0

    def embed(self, labels: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor | None:
        """The embeddings of n labels, [n, LABEL_SIZE], or None for a model without labels.

        Raises UsageError for labels of None where training had no null label.

        labels: [n] or [n, K], or None for the null label.
        drop: boolean [n], true where the null label replaces the label.
        """
        if self.labels is None:
            return None
        if labels is None and not self.label_dropout:
            raise UsageError(
                "this model was trained without a null label, so it cannot do without labels",
                hint="train it with `--set model.label_dropout=0.1`",
            )
        return self.labels(labels, n, drop)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """|x − x̂| at each pixel, of the reconstruction at the posterior's mean, over channels: [B, H, W]."""
        return (x - self.reconstruct(x, noise=noise, progress=no_progress).images).abs().mean(1)

    def on_step(self, step: int) -> None:
        if self.kl_warmup:
            self.warm = min(1.0, (step + 1) / self.kl_warmup)
