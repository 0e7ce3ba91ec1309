"""Networks net(x, t, y, drop) of a noised image, its time and its label, with classifier-free guidance (Ho &
Salimans 2022, arXiv:2207.12598).

x [B, C, H, W]; t [B]; y: labels [B] or [B, K], or None where they are unknown; drop [B]: rows whose label is
hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.denoising.clusters import GUIDANCE, Clusters
from gzcli.models.nn import at_least, spread_labels, to_fp32
from gzcli.sizes import Size, sides
from gzcli.types import Batch, DataInfo, Noise


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
class GuidedOptions(LabelOptions):
    """The same, and what stands for labels without them.

    clusters: number of clusters of images, by k-means of their pixels, one of which the network of a model
      that is not conditional is told in place of a label (Bao 2022, arXiv:2212.00362); likelihoods and
      scores know none, and are trained by the share `label_dropout`. 0: none.
    """

    clusters: int = 0

    def count(self, data: DataInfo) -> int:
        """How many labels the network tells apart: classes, or clusters. Raises UsageError below 0."""
        at_least(0, clusters=self.clusters)
        return len(data.classes) if self.conditional else self.clusters


class Guided(Model):
    """A model that may be conditioned on labels. Raises UsageError for a conditional model of data without
    labels."""

    latents = True
    net: nn.Module

    def __init__(self, data: DataInfo, net: nn.Module, labels: GuidedOptions):
        super().__init__(data)
        if labels.conditional and not data.classes:
            raise UsageError(
                "a conditional model of data without labels", hint="set `model.conditional` to `false`"
            )
        self.net, self.conditional, self.label_dropout = net, labels.conditional, labels.label_dropout
        self.labelled = labels.count(data) > 0  # whether the network is told a label or a cluster
        found = self.labelled and not labels.conditional
        self.clusters = Clusters(data.shape, labels.clusters) if found else None

    def fit(self, batches: Iterable[Batch]) -> None:
        """Finds the clusters."""
        if self.clusters is not None:
            self.clusters.fit(batches)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def drawn_shape(self, size: Size | None) -> tuple[int, ...]:
        """The shape (C, H, W) of images that are drawn.

        size: in pixels; None: that of the training images.

        Raises UsageError for another size where the network is made for one, or where latents are drawn.
        """
        if size is None or sides(size) == self.data.shape[1:]:
            return self.data.shape
        if self.data.levels is None or not getattr(self.net, "any_size", False):
            why = "latents" if self.data.levels is None else "one size of images"
            height, width = self.data.shape[1:]
            raise UsageError(
                f"`size` {size}: the network of `{type(self).__name__}` is made for {why}",
                hint=f"leave `size` out: it draws {width}×{height}; the U-Nets of ddpm, fm and sgm draw any",
            )
        return self.data.shape[0], *sides(size)

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels of a batch, or its clusters, and the rows [B] where they are hidden."""
        y = self.told(batch)
        return y, None if y is None else batch.noise.rand(len(batch)) < self.label_dropout

    def told(self, batch: Batch) -> Tensor | None:
        """The labels of training images, or their clusters; None where the network is told nothing."""
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
            raise UsageError(
                "a model trained without label dropout needs labels", hint="set `model.label_dropout`"
            )
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

    def guided(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The guided output u + scale · (c − u) in fp32, of the outputs c with labels and u without (eq. 6,
        where w = scale − 1).

        It takes one pass of a doubled batch; at scales 1 and 0 one pass of the batch.
        """
        if y is None or scale in (0, 1):
            return to_fp32(self.net(x, t, y if scale else None))
        n = x.shape[0]
        hidden = torch.arange(2 * n, device=x.device) >= n
        both = to_fp32(self.net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, y]), hidden))
        return torch.lerp(both[n:], both[:n], scale)

    def guided_within(
        self,
        predict: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        scale: float,
        interval: Sequence[float],
    ) -> Tensor:
        """Guidance within an interval of times (Kynkäänniemi 2024, arXiv:2404.07724): predict(x, t, y, scale)
        for rows whose time t [B] is in the interval, and predict(x, t, y, 1), which takes half the passes of
        the network, outside.

        Rows may be at different times of [0, 1], as in the adaptive solver.
        """
        low, high = interval
        if scale == 1 or (low <= 0 and high >= 1):
            return predict(x, t, y, scale)
        inside = (low <= t) & (t <= high)
        if bool(inside.all()):
            return predict(x, t, y, scale)
        if not bool(inside.any()):
            return predict(x, t, y, 1.0)
        out = torch.empty_like(x)
        for rows, strength in ((inside, scale), (~inside, 1.0)):
            out[rows] = predict(x[rows], t[rows], None if y is None else y[rows], strength)
        return out

    def into_range(self, x: Tensor) -> Tensor:
        """Images clamped to [-1, 1]; latents unchanged."""
        return x if self.data.levels is None else x.clamp(-1, 1)


def stratified(u: Tensor, noise: Noise) -> Tensor:
    """Uniform draws u [B], moved so that each of the equal shares of [0, 1) has one (Kingma 2021,
    arXiv:2107.00630, appendix I.1).

    There are as many shares as the global batch has rows; a `noise` without a global batch leaves u
    unchanged.
    """
    total, start = getattr(noise, "total", None), getattr(noise, "start", 0)
    if not total:
        return u
    return (u + (start + torch.arange(len(u), device=u.device))) / total


def logit_normal(u: Tensor) -> Tensor:
    """Uniform draws u as draws of (0, 1) whose logits are standard normal (Esser 2024, arXiv:2403.03206,
    section 3.1)."""
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
