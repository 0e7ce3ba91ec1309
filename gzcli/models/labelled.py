"""Models that are told the label of an image, or its cluster in place of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.base import Model
from gzcli.models.clusters import GUIDANCE, Clusters
from gzcli.models.nn import at_least, spread_labels


@dataclass(frozen=True)
class LabelOptions:
    """How a model is conditioned on labels.

    conditional: whether the model is conditioned on the label of an image.
    label_dropout: share of labels that training hides, 0 … 1; guidance, and images without labels, need it
      above 0.
    """

    conditional: bool = False
    label_dropout: float = 0.1


@dataclass(frozen=True)
class ClusterOptions(LabelOptions):
    """The same, and what stands for labels without them.

    clusters: number of clusters of images, by k-means of their pixels, one of which a model that is not
      conditional is told in place of a label (Bao 2022, arXiv:2212.00362). Denoisers know none for
      likelihoods and scores, which are trained by the share `label_dropout`. 0: none.
    """

    clusters: int = 0

    def count(self, data: DataInfo) -> int:
        """How many labels the model tells apart: classes, or clusters. Raises UsageError below 0."""
        at_least(0, clusters=self.clusters)
        return len(data.classes) if self.conditional else self.clusters


class Labelled(Model):
    """A model that may be conditioned on labels, or on clusters. Raises UsageError for a conditional model of
    data without labels."""

    def __init__(self, data: DataInfo, labels: ClusterOptions):
        super().__init__(data)
        if labels.conditional and not data.classes:
            raise UsageError(
                "a conditional model of data without labels",
                hint="set `model.conditional` to `false`; gz list data",
            )
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout
        self.labelled = labels.count(data) > 0  # whether it is told a label or a cluster
        found = self.labelled and not labels.conditional
        self.clusters = Clusters(data.shape, labels.clusters) if found else None

    def fit(self, batches: Iterable[Batch]) -> None:
        """Finds the clusters."""
        if self.clusters is not None:
            self.clusters.fit(batches)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels of a batch, or its clusters, and the rows [B] where they are hidden."""
        y = self.told(batch)
        return y, None if y is None else batch.noise.rand(len(batch)) < self.label_dropout

    def told(self, batch: Batch) -> Tensor | None:
        """The labels of training images, or their clusters; None where the model is told nothing."""
        if self.clusters is not None:
            return self.clusters(batch.x)
        return batch.y if self.conditional else None

    def sampled_labels(self, labels: Tensor | None, n: int, noise: Noise) -> Tensor | None:
        """The labels of n images that are drawn from nothing: those asked for, or clusters, which are drawn
        where none are given."""
        if self.clusters is None:
            return self.asked_labels(labels, n)
        return self.clusters.draw(n, noise) if labels is None else labels.to(self.device)

    def asked_labels(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels of n samples, by default spread over the classes; None for an unconditional model."""
        return spread_labels(labels, n, self.data, self.device) if self.conditional else None

    def known_labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels of given images; None where they are unknown.

        Raises UsageError for unknown labels if training never hid any.
        """
        if self.labelled and labels is None and not self.label_dropout:
            hint = "name them with `--label`, or set `model.label_dropout` and train"
            raise UsageError("a model trained without label dropout needs labels", hint=hint)
        return labels if self.conditional else None

    def strength(self, guidance: float | None) -> float:
        """The guidance of samples: what is asked for, or by default 1, and `GUIDANCE` towards clusters."""
        if guidance is not None:
            return guidance
        return GUIDANCE if self.clusters is not None and self.label_dropout else 1.0

    def check_guidance(self, guidance: float, y: Tensor | None) -> None:
        """Raises UsageError for guidance of a model that cannot be guided, or without labels."""
        if guidance != 1 and not (self.labelled and self.label_dropout):
            raise UsageError(
                f"`guidance` {guidance:g} needs a conditional model trained with label dropout",
                hint="set `model.conditional` to `true` and train, or `guidance` to 1",
            )
        if guidance != 1 and y is None:
            raise UsageError("guidance needs labels to go towards", hint="name them with `--label`")
