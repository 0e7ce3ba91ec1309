"""Models conditioned on the label of an image, or on its cluster — Bao 2022, "Why Are Conditional
Generative Models Better Than Unconditional Ones?", arXiv:2212.00362.

    p(x) = Σ_c p(c) p(x | c)

The clusters c are found by k-means of the pixels before training; Bao clusters features of a self-supervised
network. The network learns p(x | c) and, where the cluster is hidden, p(x). Samples draw c by its share of
the training images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.base import Model
from gzcli.models.nn import at_least, full_fp32, spread_labels, to_fp32

SIDE = 32  # images of a larger side are averaged to it before they are compared
ROUNDS = 20  # of k-means, at most
MIN_CLUSTER = 20  # least images a cluster on average: the network would memorise smaller ones
# guidance of samples towards their cluster. On MNIST, fd of validation images: fm after 8 CPU-minutes 18.6
# without, 10.4 by 1.3, 13.7 by 1.6; rf 23.4, 11.4, 16.1; fm after 40 minutes 12.6, 10.2 by 1.15, 11.4 by 1.3
GUIDANCE = 1.3


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
    """`LabelOptions`, and clusters in place of missing labels.

    clusters: number of clusters of images, by k-means of their pixels; 0: none. An unconditional model is
      conditioned on the cluster in place of a label (Bao 2022, arXiv:2212.00362). Likelihoods and scores of
      denoisers hide it, as training does for the share `label_dropout`.
    """

    clusters: int = 0

    def count(self, data: DataInfo) -> int:
        """The number of classes or clusters on which the model is conditioned. Raises UsageError below 0."""
        at_least(0, clusters=self.clusters)
        return len(data.classes) if self.conditional else self.clusters


class Clusters(nn.Module):
    """Clusters of images; before `fit` all images are in the first one.

    shape: (C, H, W) of images.
    count: number of clusters.
    """

    centres: Tensor  # [count, dim]
    shares: Tensor  # [count], of the training images

    def __init__(self, shape: tuple[int, ...], count: int):
        super().__init__()
        c, h, w = shape
        self.grid = (min(h, SIDE), min(w, SIDE))
        self.register_buffer("centres", torch.zeros(count, c * self.grid[0] * self.grid[1]))
        self.register_buffer("shares", torch.full((count,), 1 / count))

    def __len__(self) -> int:
        return len(self.shares)

    def forward(self, x: Tensor) -> Tensor:
        """The cluster of each image x [B, C, H, W], [B] int64."""
        with full_fp32(x.device):
            # ‖x − c‖² without ‖x‖², which all clusters share
            return (self.centres.square().sum(1) - 2 * self.points(x) @ self.centres.mT).argmin(1)

    def points(self, x: Tensor) -> Tensor:
        """The vectors that k-means compares: pixels, [B, dim]."""
        return F.adaptive_avg_pool2d(to_fp32(x), self.grid).flatten(1)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fits the clusters to images by k-means: at most one for every `MIN_CLUSTER` images. Clusters beyond
        that number are never drawn."""
        from sklearn.cluster import KMeans

        points = torch.cat([self.points(batch.x) for batch in batches]).cpu().numpy()
        count = min(len(self), max(1, len(points) // MIN_CLUSTER))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # equal images are one cluster
            kmeans = KMeans(count, n_init=1, max_iter=ROUNDS, random_state=0).fit(points)
        centres, shares = np.zeros(self.centres.shape, np.float32), np.zeros(len(self), np.float32)
        centres[:count], centres[count:] = kmeans.cluster_centers_, kmeans.cluster_centers_[0]
        shares[:count] = np.bincount(kmeans.labels_, minlength=count) / len(points)
        centres, shares = ranks.agree((centres, shares))  # threads may round differently elsewhere
        self.centres.copy_(torch.from_numpy(centres))
        self.shares.copy_(torch.from_numpy(shares))

    def draw(self, n: int, noise: Noise) -> Tensor:
        """n clusters [n] int64 in proportion to their shares, by stratified draws."""
        ends = self.shares.cumsum(0)
        return torch.searchsorted(ends, noise.spread(n) * ends[-1], right=True).clamp(max=len(self) - 1)


class Labelled(Model):
    """A model that may be conditioned on labels, or on clusters. Raises UsageError for a conditional model of
    data without labels."""

    def __init__(self, data: DataInfo, labels: ClusterOptions):
        super().__init__(data)
        if labels.conditional and not data.classes:
            hint = "set `model.conditional` to `false`; gz list data"
            raise UsageError("a conditional model of data without labels", hint=hint)
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout
        self.labelled = labels.count(data) > 0  # whether it is conditioned on labels or clusters
        clustered = self.labelled and not labels.conditional
        self.clusters = Clusters(data.shape, labels.clusters) if clustered else None

    def fit(self, batches: Iterable[Batch]) -> None:
        if self.clusters is not None:
            self.clusters.fit(batches)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels or clusters of a batch, and the rows [B] where they are hidden."""
        y = self.condition(batch)
        return y, None if y is None else batch.noise.rand(len(batch)) < self.label_dropout

    def condition(self, batch: Batch) -> Tensor | None:
        """The labels or clusters of training images; None for a model without a condition."""
        if self.clusters is not None:
            return self.clusters(batch.x)
        return batch.y if self.conditional else None

    def draw_labels(self, labels: Tensor | None, n: int, noise: Noise) -> Tensor | None:
        """The labels of n samples: `requested_labels`, or clusters, drawn where `labels` is None."""
        if self.clusters is None:
            return self.requested_labels(labels, n)
        return self.clusters.draw(n, noise) if labels is None else labels.to(self.device)

    def requested_labels(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels of n samples, by default spread over the classes; None for an unconditional model."""
        return spread_labels(labels, n, self.data, self.device) if self.conditional else None

    def image_labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels of given images; None where they are unknown.

        Raises UsageError for unknown labels if training never hid any.
        """
        if self.labelled and labels is None and not self.label_dropout:
            hint = "name them with `--label`, or set `model.label_dropout` and train"
            raise UsageError("a model trained without label dropout needs labels", hint=hint)
        return labels if self.conditional else None

    def guidance_scale(self, guidance: float | None) -> float:
        """The guidance of samples, by default 1, or `GUIDANCE` towards clusters."""
        if guidance is not None:
            return guidance
        return GUIDANCE if self.clusters is not None and self.label_dropout else 1.0

    def check_guidance(self, guidance: float, y: Tensor | None) -> None:
        """Raises UsageError for guidance of a model that cannot be guided, or without labels."""
        if guidance != 1 and not (self.labelled and self.label_dropout):
            hint = "set `model.conditional` to `true` and train, or `guidance` to 1"
            message = f"`guidance` {guidance:g} needs a conditional model trained with label dropout"
            raise UsageError(message, hint=hint)
        if guidance != 1 and y is None:
            raise UsageError("guidance needs labels to go towards", hint="name them with `--label`")
