"""The base of second stages: a distribution over the codes of a trained tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.autoregressive.tokenizer import Figures, Tokenizer
from gzcli.models.base import Model, Phase
from gzcli.models.denoising.guided import LabelOptions
from gzcli.models.nn import spread_labels
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress


class Prior(Model):
    """A distribution over the codes [B, T] that `tokenizer` gives to images, in raster order of its grid.

    The codes of the training set are computed once (`prepare`) and arrive as `batch.extra["codes"]`. The
    label is a token before the codes. Raises UsageError for a stage `tokenizer` that makes no codes.
    """

    best = "loss"
    tokenizer: Tokenizer

    def __init__(self, data: DataInfo, tokenizer: Model, labels: LabelOptions):
        super().__init__(data)
        if labels.conditional and not data.classes:
            raise UsageError("`model.conditional` needs a data set with labels", hint="gz list data")
        if not isinstance(tokenizer, Tokenizer):
            raise UsageError("the stage `tokenizer` makes no codes", hint="make it a `vqvae` or a `vqgan`")
        self.attach("tokenizer", tokenizer)
        self.grid, self.codes, self.length = tokenizer.grid, tokenizer.codes, math.prod(tokenizer.grid)
        self.conditional, self.label_dropout = labels.conditional, labels.label_dropout

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
        """The labels of a batch, [B] or [B, K], and which of them are hidden, [B]."""
        if not self.conditional:
            return None, None
        dropout = self.label_dropout if self.training else 0.0
        return batch.y, batch.noise.rand(len(batch)) < dropout

    def nll(self, codes: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """−log p(codes | labels) [B] in nats, or an upper bound of it."""
        raise NotImplementedError

    # ---- images

    def images(self, codes: Tensor) -> Tensor:
        """The images [B, C, H, W] of codes [B, T]."""
        return self.tokenizer.decode(codes.unflatten(1, self.grid))

    def asked_labels(
        self, labels: Tensor | None, n: int, device: torch.device, guidance: float
    ) -> Tensor | None:
        """The labels of n samples, by default spread over the classes; None for an unconditional model.
        Raises UsageError for guidance that the model was not trained for."""
        if guidance != 1 and not (self.conditional and self.label_dropout):
            raise UsageError(
                f"`guidance` {guidance:g} needs a conditional model trained with label dropout",
                hint="set `model.conditional` to `true` and train, or `guidance` to 1",
            )
        return spread_labels(labels, n, self.data, device) if self.conditional else None

    def known_labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels of given images; None where they are unknown. Raises UsageError for unknown labels if
        training never hid any."""
        if self.conditional and labels is None and not self.label_dropout:
            hint = "name them with `--label`, or set `model.label_dropout` and train"
            raise UsageError("a model trained without label dropout needs labels", hint=hint)
        return labels if self.conditional else None

    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress) -> Applied:
        """x through the tokenizer."""
        return self.tokenizer.reconstruct(x, noise=noise, progress=progress)

    def score_nll(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−log p(codes of x) [B] in nats; of a conditional model, under the mixture of its classes."""
        codes = self.tokenizer.encode(x).flatten(1)
        if not self.conditional:
            return self.nll(codes, None, noise)
        return math.log(len(self.data.classes)) - self.class_log_prob(codes, noise).logsumexp(1)

    def class_log_prob(self, codes: Tensor, noise: Noise) -> Tensor:
        """log p(codes | class), or a lower bound of it, for every class: [B, K]."""
        return -torch.stack([self.nll(codes, y, noise) for y in self.each_class(codes)], 1)

    def each_class(self, codes: Tensor) -> list[Tensor]:
        """For every class its labels for all rows of codes [B, T]."""
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
        the prior, given the labels if it is conditional."""
        figures, nats, n = Figures(self.tokenizer), 0.0, 0
        for batch in batches:
            codes = figures.add(batch.x).flatten(1)
            nats += float(
                self.nll(codes, batch.y if self.conditional else None, batch.noise).cpu().double().sum()
            )
            n += codes.numel()
        return figures.found() | {"entropy": figures.entropy, "nats": nats / n}
