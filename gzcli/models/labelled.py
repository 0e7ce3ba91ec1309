"""Models conditioned on the label of an image, or on its cluster — Bao 2022, "Why Are Conditional
Generative Models Better Than Unconditional Ones?", arXiv:2212.00362.

    p(x) = Σ_c p(c) p(x | c),   p(x | y) = Σ_c p(c | y) p(x | c)

Before training, k-means clusters the images by their pixels; Bao clusters features of a self-supervised
network. A conditional model has clusters within each class y. Its condition is the sum of a row for the class
and a row for the cluster, which starts at zero. Training hides the cluster alone as often as both. Sampling
draws c by its share of the training images. An existing image is assigned to the nearest cluster, so its
likelihood is log p(c) + log p(x | c), a lower bound of the mixture's. Only guidance needs the network without
a cluster, which learns from hidden clusters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice, gz, setting
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.base import Model
from gzcli.models.nn import (
    ClassEmbedding,
    Classes,
    at_least,
    every_label,
    full_fp32,
    needs_labels,
    spread_labels,
    to_fp32,
)

CLUSTER_SIDE = 32  # images of a larger side are averaged to it before they are compared
TABLE = ".table.weight"  # of a `ClassEmbedding`
MAX_KMEANS_ROUNDS = 20  # most iterations of k-means
# most classes in a likelihood without labels, because each needs its own passes
SUMMED, SUMMED_BY_ODE = 100, 10
MIN_CLUSTER = 20  # least average size of a cluster: the network would memorise smaller clusters
Guidance = float | Literal["auto"] | None
# guidance of samples towards their cluster. On MNIST after 8 CPU-minutes, of 1,000 samples against validation
# images, fm by 1.15 and 1.3: fd 9.3, 8.8, precision .82, .86, recall .86, .83, legible .87, .91, KID alike.
# Clusters within classes need less, so cfm, cddpm and dit have 1.15; cfm by 1, 1.15 and 1.3: fd 13.4,
# 9.7, 11.2, KID .009, -.004, -.001, precision .83, .86, .88, recall .89, .85, .81, legible .89, .93, .95;
# dit fd 14.0, 9.8, 12.7, KID .004, -.004, .003, precision .79, .84, .87, recall .88, .86, .82
GUIDANCE = 1.3


@dataclass(frozen=True)
class LabelOptions:
    """How a model is conditioned on labels.

    conditional: whether the model is conditioned on the label of an image.
    label_dropout: probability of hiding a label in training. Guidance and images without labels need a value
      above 0.
    """

    conditional: bool = False
    label_dropout: float = 0.1


@dataclass(frozen=True)
class ClusterOptions(LabelOptions):
    """`LabelOptions`, and clusters of images.

    clusters: number of k-means clusters of the training images on which the model is conditioned (Bao 2022,
      arXiv:2212.00362). Conditional models split them equally between classes. 0: none.
    """

    clusters: int = 0

    def count(self, data: DataInfo) -> int:
        """The number of classes or clusters on which the model is conditioned. Raises UsageError below 0, and
        for clusters within the classes of multi-label data."""
        at_least(0, clusters=self.clusters)
        if self.conditional and self.clusters and data.multilabel:
            hint = "set `model.clusters` to 0"
            raise UsageError("clusters within classes need images with one class each", hint=hint)
        classes = len(data.classes) if self.conditional else 0
        return max(self.clusters, classes) if self.clusters else classes

    def kinds(self, data: DataInfo) -> Classes:
        """The sizes for `nn.ClassEmbedding`: the number of classes or of clusters. If a class has several
        clusters, the numbers of clusters and of their classes."""
        count, classes = self.count(data), len(data.classes) if self.conditional else 0
        return (count, classes) if classes and count >= 2 * classes else count


class Clusters(nn.Module):
    """Clusters of images, `each` of them within every class, in the order of the classes. Before `fit`, all
    images of a class are in its first cluster.

    shape: (C, H, W) of images.
    count: number of clusters. Clusters beyond `each` · `classes` have no share.
    classes: number of classes; 1 for an unconditional model.
    """

    centres: Tensor  # [count, dim]
    shares: Tensor  # [count], of the training images

    def __init__(self, shape: tuple[int, ...], count: int, classes: int = 1):
        super().__init__()
        c, h, w = shape
        self.grid = (min(h, CLUSTER_SIDE), min(w, CLUSTER_SIDE))
        self.classes, self.each = classes, count // classes
        self.register_buffer("centres", torch.zeros(count, c * self.grid[0] * self.grid[1]))
        self.register_buffer("shares", torch.full((count,), 1 / count))

    def __len__(self) -> int:
        return len(self.shares)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The nearest cluster of each image, [B] int64; if y [B] is given, only among those of class y.

        x: images [B, C, H, W], or smaller ones, which are compared with block means of the centres.
        mask: [B, 1, H, W], 1 at the pixels to compare. None: all.
        """
        grid = min(self.grid[0], x.shape[2]), min(self.grid[1], x.shape[3])
        centres = self.points(self.centres.unflatten(1, (x.shape[1], *self.grid)), grid)
        # not an inference tensor, which an embedding cannot save for a gradient
        with torch.inference_mode(False), torch.no_grad(), full_fp32(x.device):
            # Σ mask (x − c)² without mask x², which all clusters share
            if mask is None:
                distance = centres.square().sum(1) - 2 * self.points(x, grid) @ centres.mT
            else:
                weight = self.points(mask.to(x).expand_as(x), grid)
                distance = weight @ centres.square().mT - 2 * self.points(mask * x, grid) @ centres.mT
            never = self.shares == 0 if y is None else (self.shares == 0) | self.outside(y)
            return distance.masked_fill(never, torch.inf).argmin(1)

    def outside(self, y: Tensor) -> Tensor:
        """A mask [B, count] of the clusters that belong to a class other than y [B]."""
        return torch.arange(len(self), device=y.device) // self.each != y[:, None]

    def points(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The vectors that k-means compares: pixels, [B, dim]."""
        return F.adaptive_avg_pool2d(to_fp32(x), grid or self.grid).flatten(1)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fits the clusters to images by k-means within each class: at most one for every `MIN_CLUSTER`
        images. Clusters beyond that number have no share. A class without images has one cluster at the mean
        of all images, as if it had this image."""
        single = self.classes == 1
        if self.centres.any():  # clusters of earlier weights, whose network was trained with them
            return self.share_out(batches, single)
        rows = [(self.points(b.x), b.index.new_zeros(len(b)) if single else b.y) for b in batches]
        points, labels = (torch.cat(part).cpu().numpy() for part in zip(*rows, strict=True))
        centres, counts = np.zeros(self.centres.shape, np.float32), np.zeros(len(self), np.float64)
        for k in range(self.classes):
            of_class = points[labels == k] if (labels == k).any() else points.mean(0, keepdims=True)
            middles, sizes = k_means(of_class, self.each)
            part = slice(k * self.each, k * self.each + len(middles))
            centres[part], counts[part] = middles, sizes
        # threads may round differently elsewhere
        centres, shares = ranks.agree((centres, (counts / counts.sum()).astype(np.float32)))
        self.centres.copy_(torch.from_numpy(centres))
        self.shares.copy_(torch.from_numpy(shares))

    def share_out(self, batches: Iterable[Batch], single: bool) -> None:
        """Recomputes the clusters' shares from other images."""
        self.shares.fill_(1 / len(self))  # no cluster is ruled out as the nearest
        labels = [self(b.x, None if single else b.y) for b in batches]
        counts = torch.cat(labels).bincount(minlength=len(self)).cpu().double()
        self.shares.copy_(torch.from_numpy(ranks.agree((counts / counts.sum()).float().numpy())))

    @property
    def class_shares(self) -> Tensor:
        """The shares of the clusters of each class, [classes, each]."""
        return self.shares[: self.classes * self.each].unflatten(0, (self.classes, self.each))

    def log_prob(self, c: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(c) of clusters c [B], or log p(c | y) if their class y is given."""
        log_p = self.shares[c].log()
        return log_p if y is None else log_p - self.class_shares.sum(1)[y].log()

    def draw(self, n: int, noise: Noise, y: Tensor | None = None) -> Tensor:
        """Draws n clusters, [n] int64, in proportion to their shares, by stratified draws. For a conditional
        model, they are clusters of the classes y [n]."""
        u, ends = noise.spread(n), self.class_shares.cumsum(1)
        y = torch.zeros(n, dtype=torch.long, device=u.device) if y is None else y
        ends = ends[y]
        place = torch.searchsorted(ends, (u * ends[:, -1])[:, None], right=True)[:, 0]
        return y * self.each + place.clamp(max=self.each - 1)


def k_means(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres of at most `count` clusters of points [n, dim], and the number of points in each."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    count = min(count, max(1, len(points) // MIN_CLUSTER))
    # one thread takes seconds; more are ten times as slow if they wait for a busy core
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # equal images belong to one cluster
        kmeans = KMeans(count, n_init=1, max_iter=MAX_KMEANS_ROUNDS, random_state=0).fit(points)
    return kmeans.cluster_centers_, np.bincount(kmeans.labels_, minlength=count)


LogProb = Callable[[Tensor | None, Any], Tensor]  # nats [B] given labels, by draws of a `Noise`


def mixture(of_class: Tensor) -> Tensor:
    """log 1/K Σ_y p(x | y) [B, …], from log p(x | y) [B, K, …]."""
    return of_class.logsumexp(1) - math.log(of_class.shape[1])


def over_classes(
    model: Model,
    log_prob: LogProb,
    n: int,
    labels: Tensor | None,
    noise: Noise | None,
    *,
    of_each: Callable[[], Tensor] | None = None,
) -> Tensor:
    """log p(x | labels) [B] of n images. For a conditional model without labels, it is log 1/K Σ_y p(x | y),
    the mixture of classes that it samples, with the same noise for each class. From lower bounds, it is a
    lower bound. Multi-label data have 2^K sets of labels, which cannot be summed. If the model has a null
    label, the result is then the density learned from images with hidden labels. Raises UsageError for more
    classes than can be summed.

    of_each: function for log p(x | y) [B, K] of all classes at once, if that takes fewer than K passes.
    """
    if labels is not None or not model.conditional or (model.data.multilabel and model.null_label):
        return log_prob(labels, noise)
    if of_each is not None:
        return mixture(of_each())
    count, most = len(model.data.classes), SUMMED_BY_ODE if model.likelihood == "ode" else SUMMED
    if count > most:
        message = f"log p(x) without labels needs a sum over {count:,} classes, and gz allows at most {most}"
        raise UsageError(
            message, hint=advice("pass labels, or use {}, which computes log p(x | y)", gz("bench"))
        )
    noises = [*(noise and noise.again() for _ in range(count - 1)), noise]
    every = every_label(model.data, n, next(model.parameters()).device)
    return mixture(torch.stack([log_prob(y, draws) for y, draws in zip(every, noises, strict=True)], 1))


class Labelled(Model):
    """A model that may be conditioned on labels, or on clusters. Raises UsageError for a conditional model of
    data without labels."""

    towards_clusters: ClassVar[float] = GUIDANCE

    def __init__(self, data: DataInfo, labels: ClusterOptions):
        super().__init__(data)
        self.conditional = needs_labels(labels.conditional, data)
        self.label_dropout = labels.label_dropout
        count = labels.count(data)
        self.labelled = count > 0  # whether it is conditioned on labels or clusters
        classes = len(data.classes) if labels.conditional else 1
        self.clusters = Clusters(data.shape, count, classes) if labels.clusters else None

    def fit(self, batches: Iterable[Batch]) -> None:
        if self.clusters is not None:
            self.clusters.fit(batches)

    def begins_anew(self, earlier: DataInfo, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values for clusters within other classes, and for the embeddings of labels. Labels start as the
        null label, so that the network initially draws as without a label. If the network no longer embeds
        labels, the null label is added to the time embedding."""
        if len(earlier.classes) == (len(self.data.classes) if self.conditional else 0):
            return {}
        anew: dict[str, Tensor] = {}
        if self.clusters is not None:
            anew |= {f"clusters.{name}": value for name, value in self.clusters.state_dict().items()}
        count = len(weights.get("clusters.shares", earlier.classes))
        modules = dict(self.named_modules())
        for name, table in ((name, value) for name, value in weights.items() if name.endswith(TABLE)):
            place, null = name.removesuffix(TABLE), table[count]
            module, time = modules.get(place), f"{place.removesuffix('label')}time.2.bias"
            if isinstance(module, ClassEmbedding):
                rows = torch.zeros_like(module.table.weight)
                rows[module.classes if module.parents else 0 :] = null
                anew[name] = rows
            elif time in weights:  # the two embeddings are added
                anew[time] = weights[time] + null
        return anew

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels or clusters of a batch, and a mask [B] of the rows in which they are hidden. In equally
        many other rows, only the cluster is hidden."""
        y = self.condition(batch)
        if y is None:
            return None, None
        u = batch.noise.rand(len(batch))
        return self.without_clusters(y, u >= 1 - self.label_dropout), u < self.label_dropout

    def without_clusters(self, y: Tensor, rows: Tensor) -> Tensor:
        """The condition y [B], reduced to the class in these rows, if a class has several clusters."""
        if self.clusters is None or not self.conditional or self.clusters.each < 2:
            return y
        return torch.where(rows, len(self.clusters) + 1 + y // self.clusters.each, y)

    def condition(self, batch: Batch) -> Tensor | None:
        """The labels or clusters of training images; None for a model without a condition."""
        y = batch.y if self.conditional else None
        return y if self.clusters is None else self.clusters(batch.x, y)

    def draw_labels(self, labels: Tensor | None, n: int, noise: Noise) -> Tensor | None:
        """The conditions of n samples: `requested_labels`, or clusters that are drawn within these."""
        y = self.requested_labels(labels, n)
        return y if self.clusters is None else self.clusters.draw(n, noise, y)

    def requested_labels(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels of n samples, by default spread over the classes; None for an unconditional model."""
        return spread_labels(labels, n, self.data, self.device) if self.conditional else None

    def image_condition(
        self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """The condition of existing images x: their nearest clusters by `Clusters.forward`, or their labels;
        None if these are unknown.

        Raises UsageError for unknown labels if training never hid any.
        """
        labels = labels if self.conditional else None
        if self.clusters is not None:
            return self.clusters(x, labels, mask)
        if self.labelled and labels is None and not self.label_dropout:
            hint = advice(
                "draw images with {}; for other commands, train with `model.label_dropout` above 0",
                Option("label"),
            )
            raise UsageError("a model trained without label dropout needs labels", hint=hint)
        return labels

    def over_classes(
        self,
        log_prob: LogProb,
        n: int,
        labels: Tensor | None,
        noise: Noise,
        of_each: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`over_classes` for a model that may have clusters. With clusters, it is the joint likelihood of an
        image and its nearest cluster of any class, a lower bound of the mixture over clusters."""
        if self.clusters:
            return log_prob(labels, noise)
        return over_classes(self, log_prob, n, labels, noise, of_each=of_each)

    def condition_log_prob(self, condition: Tensor | None, labels: Tensor | None) -> Tensor | float:
        """log p(c) of the clusters `condition`, or log p(c | labels), [B]; 0 without clusters."""
        if self.clusters is None or condition is None:
            return 0.0
        return self.clusters.log_prob(condition, labels if self.conditional else None)

    def guidance_scale(self, guidance: Guidance) -> float:
        """The guidance of samples. By default, and until it is chosen, it is 1, or `towards_clusters` for a
        model with clusters."""
        if guidance is not None and guidance != "auto":
            return guidance
        return self.towards_clusters if self.clusters is not None and self.label_dropout else 1.0

    def check_guidance(self, guidance: float, y: Tensor | None) -> None:
        """Raises UsageError for guidance without labels, or of a model that cannot be guided."""
        if guidance != 1 and not (self.labelled and self.label_dropout):
            hint = advice("train with {}, or set `guidance` to 1", setting("model.conditional", True))
            message = f"`guidance` {guidance:g} needs a conditional model trained with label dropout"
            raise UsageError(message, hint=hint)
        if guidance != 1 and y is None:
            raise UsageError("guidance needs labels", hint=advice("name them with {}", Option("label")))
