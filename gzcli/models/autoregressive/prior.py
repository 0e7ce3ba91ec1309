"""The core of second stages: transformers that model the codes of a trained tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress
from gzcli.models.autoregressive.tokenizer import Figures, Tokenizer
from gzcli.models.base import Model, Phase
from gzcli.models.labelled import ClusterOptions, Labelled, mixture
from gzcli.models.nn import ClassEmbedding, Labels, every_label
from gzcli.models.nn.transformer import Position, TransformerOptions, Trunk, initial_std


class Prior(Labelled):
    """A distribution over the codes [B, T] to which `tokenizer` maps images, in raster order of its grid.

    The codes of the training set are computed once (`prepare`). The label or cluster of the image is a token
    before the codes. With `mask`, the last token represents an unknown code. Raises UsageError if the stage
    `tokenizer` has no codes, or codes of another kind than the prior reads.
    """

    best = "loss"
    scaled: ClassVar[bool] = False  # whether it reads codes of several scales
    tokenizer: Tokenizer

    def __init__(
        self,
        data: DataInfo,
        tokenizer: Model,
        labels: ClusterOptions,
        net: TransformerOptions,
        *,
        mask: bool = False,
        near: bool = False,
    ):
        super().__init__(data, labels)
        if not isinstance(tokenizer, Tokenizer):
            raise UsageError("the stage `tokenizer` makes no codes", hint="use a `vqvae` or a `vqgan`")
        if bool(tokenizer.codebook.scales) != self.scaled:
            scales, value = (
                ("several scales", "to a list such as [1, 2, 4]") if self.scaled else ("one scale", "to []")
            )
            hint = f"set `stages.tokenizer.model.scales` {value}"
            raise UsageError(f"`{type(self).__name__.lower()}` reads codes of {scales}", hint=hint)
        self.attach("tokenizer", tokenizer)
        self.grid, self.codes, self.length = tokenizer.grid, tokenizer.codes, math.prod(tokenizer.shape)
        self.label = ClassEmbedding(labels.kinds(data), net.width)
        self.embed: nn.Module = nn.Embedding(self.codes + mask, net.width)
        self.position = Position(self.grid, net.width)
        self.trunk = Trunk(net, near)
        self.head = nn.Linear(net.width, self.codes, bias=mask)
        self.label.init_weights(initial_std(net.width))
        for layer in (self.embed, self.head):
            nn.init.normal_(layer.weight, std=initial_std(net.width))

    def phases(self) -> list[Phase]:
        """One phase, with weight decay only for matrices."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [Phase("main", groups)]

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        codes = self.tokenizer.encode(batch.x).flatten(1)
        return {"codes": codes.to(torch.int16) if self.codes <= 2**15 else codes}

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels or clusters of a batch, and which of them are hidden (only in training)."""
        if self.training:
            return super().training_labels(batch)
        y = self.condition(batch)
        return y, None if y is None else torch.zeros(len(batch), dtype=torch.bool, device=y.device)

    def nll(self, codes: Tensor, labels: Labels, noise: Noise) -> Tensor:
        """−log p(codes | labels) [B] in nats, or an upper bound of it."""
        raise NotImplementedError

    # ---- images

    def images(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode(codes.unflatten(1, self.tokenizer.shape))

    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress) -> Applied:
        """Encodes and decodes x by the tokenizer."""
        return self.tokenizer.reconstruct(x, noise=noise, progress=progress)

    def score_nll(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−log p(codes of x) [B] in nats; for a conditional model, under the mixture of its classes. With
        clusters, it is an upper bound."""
        codes = self.tokenizer.encode(x).flatten(1)
        if self.clusters is not None or not self.conditional:
            return self.joint_nll(codes, x, None, noise)
        return -mixture(self.class_log_prob(codes, noise))

    def joint_nll(self, codes: Tensor, x: Tensor, labels: Labels, noise: Noise) -> Tensor:
        """−log p(codes | labels) [B] in nats or, with the clusters c of images x, −log p(codes, c | labels).
        For labels None, the condition is omitted."""
        c = self.clusters(x, labels) if self.clusters is not None else labels
        return self.nll(codes, c, noise) - self.condition_log_prob(c, labels)

    def class_log_prob(self, codes: Tensor, noise: Noise) -> Tensor:
        """log p(codes | class), or a lower bound of it, for every class or cluster: [B, K]."""
        return -torch.stack([self.nll(codes, y, noise) for y in self.each_class(codes)], 1)

    def each_class(self, codes: Tensor) -> list[Tensor]:
        """Yields, for every class or cluster, its label repeated for all rows of codes [B, T]."""
        if self.clusters is not None:
            return list(torch.arange(len(self.clusters), device=codes.device)[:, None].expand(-1, len(codes)))
        return every_label(self.data, len(codes), codes.device)

    def score_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖x − x̂‖² [B], the error of reconstructions."""
        return self.tokenizer.score_recon(x, noise=noise)

    def map_recon(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The tokenizer's |x − x̂| at each pixel, [B, H, W]."""
        return self.tokenizer.map_recon(x, noise=noise)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of held-out images, the first two of the tokenizer.

        mse: mean squared error of reconstructions.
        perplexity: perplexity of the codes.
        entropy: entropy of a single code, in nats.
        code_nats: NLL under the prior in nats per code, given the labels or jointly with the clusters.
        """
        figures, nats, n = Figures(self.tokenizer), 0.0, 0
        for batch in batches:
            codes = figures.add(batch.x).flatten(1)
            nll = self.joint_nll(codes, batch.x, batch.y if self.conditional else None, batch.noise)
            nats += float(nll.cpu().double().sum())
            n += codes.numel()
        return figures.as_dict() | {"entropy": figures.entropy, "code_nats": nats / n}


class OrderedPrior(Prior):
    """A prior whose `forward(codes, labels, drop)` returns the logits [B, T, codes] of each code given the
    codes before it in some order."""

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        codes, (labels, drop) = batch.extra["codes"].long(), self.training_labels(batch)
        nats = F.cross_entropy(self(codes, labels, drop).flatten(0, 1), codes.flatten())
        return {"loss": nats, "bits": nats.detach() / math.log(2)}

    def guided(self, labels: Labels, n: int, guidance: float) -> tuple[int, Tensor]:
        """The number of copies of the n rows (2 if guidance needs a copy with hidden labels), and the label
        embeddings of all rows."""
        if guidance == 1 or labels is None:
            return 1, self.label(labels, n, None)
        drop = torch.arange(2 * n, device=self.device) >= n
        return 2, self.label(torch.cat([labels, labels]), 2 * n, drop)

    def nll(self, codes: Tensor, labels: Labels, noise: Noise | None = None) -> Tensor:
        """The exact −log p(codes | labels), [B] nats; the codes [B, T] may be a beginning of the grid."""
        nats = F.cross_entropy(self(codes, labels).mT, codes, reduction="none")
        return nats.sum(1)
