"""Clusters of images in place of labels — Bao 2022, "Why Are Conditional Generative Models Better Than
Unconditional Ones?", arXiv:2212.00362.

    p(x) = Σ_c p(c) p(x | c)

The clusters c are found by k-means before the training: of pixels, where Bao takes features of a
self-supervised network. The network learns p(x | c) and, where the cluster is hidden, p(x). Samples draw c by
its share of the training images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.types import Batch, Noise
from gzcli.models.nn import full_fp32, to_fp32

SIDE = 32  # images of a larger side are averaged to it before they are compared
ROUNDS = 20  # of k-means, at most
EACH = 20  # images of a cluster on average, at least: the network would learn smaller ones by heart
# of samples towards their cluster. On MNIST, fd of validation images: fm after 8 CPU-minutes 18.6 without,
# 10.4 by 1.3, 13.7 by 1.6; rf 23.4, 11.4, 16.1; fm after 40 minutes 12.6, 10.2 by 1.15, 11.4 by 1.3
GUIDANCE = 1.3


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
        """What is compared of images: their pixels, [B, dim]."""
        return F.adaptive_avg_pool2d(to_fp32(x), self.grid).flatten(1)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Finds the clusters of images by k-means, fewer of them where a cluster would have less than `EACH`
        images; the others are never drawn."""
        from sklearn.cluster import KMeans

        points = torch.cat([self.points(batch.x) for batch in batches]).cpu().numpy()
        count = min(len(self), max(1, len(points) // EACH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images that are equal, which are one cluster
            found = KMeans(count, n_init=1, max_iter=ROUNDS, random_state=0).fit(points)
        centres, shares = np.zeros(self.centres.shape, np.float32), np.zeros(len(self), np.float32)
        centres[:count], centres[count:] = found.cluster_centers_, found.cluster_centers_[0]
        shares[:count] = np.bincount(found.labels_, minlength=count) / len(points)
        centres, shares = ranks.agree((centres, shares))  # threads may round differently elsewhere
        self.centres.copy_(torch.from_numpy(centres))
        self.shares.copy_(torch.from_numpy(shares))

    def draw(self, n: int, noise: Noise) -> Tensor:
        """n clusters [n] int64, as often as their shares say, as evenly as images take labels in turn."""
        ends = self.shares.cumsum(0)
        return torch.searchsorted(ends, noise.spread(n) * ends[-1], right=True).clamp(max=len(self) - 1)
