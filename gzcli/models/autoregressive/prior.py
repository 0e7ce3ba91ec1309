"""The base of second stages: a distribution over the codes of a trained tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.autoregressive.tokenizer import Figures, Tokenizer
from gzcli.models.base import Model, Phase
from gzcli.models.labelled import ClusterOptions, Labelled
from gzcli.models.nn import spread_labels


class Prior(Labelled):
    """A distribution over the codes [B, T] that `tokenizer` gives to images, in raster order of its grid.

    The codes of the training set are computed once (`prepare`) and arrive as `batch.extra["codes"]`. The
    label, or the cluster of the image, is a token before the codes. Raises UsageError for a stage `tokenizer`
    that makes no codes.
    """

    best = "loss"
    tokenizer: Tokenizer

    def __init__(self, data: DataInfo, tokenizer: Model, labels: ClusterOptions):
        super().__init__(data, labels)
        if not isinstance(tokenizer, Tokenizer):
            raise UsageError("the stage `tokenizer` makes no codes", hint="make it a `vqvae` or a `vqgan`")
        self.attach("tokenizer", tokenizer)
        self.grid, self.codes, self.length = tokenizer.grid, tokenizer.codes, math.prod(tokenizer.grid)

    def phases(self) -> list[Phase]:
        """One phase, with weight decay for matrices alone."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        return [Phase("main", groups)]

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The codes of a batch's images."""
        codes = self.tokenizer.encode(batch.x).flatten(1)
        return {"codes": codes.to(torch.int16) if self.codes <= 2**15 else codes}

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels of a batch, [B] or [B, K], or its clusters, and which of them are hidden, [B]: in
        training alone."""
        y, drop = super().training_labels(batch)
        return y, drop if drop is None or self.training else torch.zeros_like(drop)

    def nll(self, codes: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """−log p(codes | labels) [B] in nats, or an upper bound of it."""
        raise NotImplementedError

    # ---- images

    def images(self, codes: Tensor) -> Tensor:
        """The images [B, C, H, W] of codes [B, T]."""
        return self.tokenizer.decode(codes.unflatten(1, self.grid))

    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress) -> Applied:
        """x through the tokenizer."""
        return self.tokenizer.reconstruct(x, noise=noise, progress=progress)

    def score_nll(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−log p(codes of x) [B] in nats; of a conditional model, under the mixture of its classes; of one of
        clusters its upper bound by the cluster of x alone."""
        codes = self.tokenizer.encode(x).flatten(1)
        if not self.conditional:
            return self.joint_nll(codes, x, noise)
        return math.log(len(self.data.classes)) - self.class_log_prob(codes, noise).logsumexp(1)

    def joint_nll(self, codes: Tensor, x: Tensor, noise: Noise) -> Tensor:
        """−log p(codes, c) [B] in nats, of the codes and the clusters c of images x; without clusters
        −log p(codes)."""
        if self.clusters is None:
            return self.nll(codes, None, noise)
        c = self.clusters(x)
        return self.nll(codes, c, noise) - self.clusters.shares[c].log()

    def class_log_prob(self, codes: Tensor, noise: Noise) -> Tensor:
        """log p(codes | class), or a lower bound of it, for every class or cluster: [B, K]."""
        return -torch.stack([self.nll(codes, y, noise) for y in self.each_class(codes)], 1)

    def each_class(self, codes: Tensor) -> list[Tensor]:
        """For every class, or cluster, its labels for all rows of codes [B, T]."""
        if self.clusters is not None:
            return list(torch.arange(len(self.clusters), device=codes.device)[:, None].expand(-1, len(codes)))
        classes = spread_labels(None, len(self.data.classes), self.data, codes.device)
        return [y.expand(len(codes), *y.shape) for y in classes]

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖² [B], the error of reconstructions."""
        return self.tokenizer.score_recon(x, noise=noise)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The tokenizer's |x − x̂| at each pixel, [B, H, W]."""
        return self.tokenizer.map_recon(x, noise=noise)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The tokenizer's figures, and in nats for each code: `entropy` of a single code, and `nats` under
        the prior, given the labels if it is conditional, and with the clusters if it is told these."""
        figures, nats, n = Figures(self.tokenizer), 0.0, 0
        for batch in batches:
            codes = figures.add(batch.x).flatten(1)
            if self.conditional:
                found = self.nll(codes, batch.y, batch.noise)
            else:
                found = self.joint_nll(codes, batch.x, batch.noise)
            nats += float(found.cpu().double().sum())
            n += codes.numel()
        return figures.found() | {"entropy": figures.entropy, "nats": nats / n}
