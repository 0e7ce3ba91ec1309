"""MaskGIT — Chang et al. 2022, "Masked Generative Image Transformer", arXiv:2202.04200.

Training hides a part cos(πr/2) of the codes, r uniform (section 3.3), and predicts them from the others.
Sampling hides all of them and keeps the most confident predictions of each pass, on the same schedule
(section 3.2).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.autoregressive.blocks import Position, Trunk, start
from gzcli.models.autoregressive.prior import Prior
from gzcli.models.autoregressive.tokenizer import draw
from gzcli.models.base import Model
from gzcli.models.nn import ClassEmbedding, to_fp32
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress


class MaskGIT(Prior):
    """A bidirectional transformer that fills in masked codes of `tokenizer`; a second stage, see `Prior`.

    width: of its `layers` blocks of `heads` attention heads. near: each begins with a depthwise 3×3
    convolution over the grid (Chu 2021, arXiv:2102.10882), which is not the paper's; without it a small net
    takes several times as long to look beyond the masks. smoothing: of the training targets. Raises
    UsageError for sizes that do not fit.
    """

    paper = "Chang et al. 2022, arXiv:2202.04200"

    def __init__(
        self,
        data: DataInfo,
        *,
        tokenizer: Model,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        near: bool = True,
        dropout: float = 0.0,
        smoothing: float = 0.1,
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        super().__init__(data, tokenizer, conditional=conditional, label_dropout=label_dropout)
        self.smoothing = smoothing
        self.label = ClassEmbedding(len(data.classes) if conditional else 0, width)
        self.embed = nn.Embedding(self.codes + 1, width)  # the last is the mask
        self.position = Position(self.grid, width)
        self.trunk = Trunk(width, layers, heads, dropout, self.grid if near else None)
        self.head = nn.Linear(width, self.codes)
        for layer in (self.label.table, self.embed, self.head):
            nn.init.normal_(layer.weight, std=start(width))
        nn.init.zeros_(self.head.bias)

    def forward(
        self, codes: Tensor, masked: Tensor, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """The logits [B, T, codes] of all codes [B, T] given those that are not masked [B, T]."""
        h = self.embed(codes.masked_fill(masked, self.codes)) + self.position()
        h = torch.cat([self.label(labels, len(codes), drop)[:, None], h], 1)
        return to_fp32(self.head(self.trunk(h)[:, 1:]))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Cross-entropy of the masked codes (eq. 1 over their number), nats a code; `nats` is that without
        smoothing."""
        codes, (labels, drop) = batch.extra["codes"].long(), self.training_labels(batch)
        share = torch.cos(0.5 * math.pi * batch.noise.rand(len(codes)).to(codes.device))
        masked = self.mask((share * self.length).ceil().long().clamp(1, self.length), batch.noise)
        log_p = self(codes, masked, labels, drop).log_softmax(-1)
        nats = -log_p.gather(-1, codes[..., None])[..., 0]
        smooth = (1 - self.smoothing) * nats - self.smoothing * log_p.mean(-1)
        mean = lambda t: ((t * masked).sum(1) / masked.sum(1)).mean()  # noqa: E731
        return {"loss": mean(smooth), "nats": mean(nats.detach())}

    def mask(self, count: Tensor, noise: Noise) -> Tensor:
        """[B, T], true at `count` [B] random places."""
        rank = noise.rand(len(count), self.length).to(count.device).argsort(1).argsort(1)
        return rank < count[:, None]

    def nll(self, codes: Tensor, labels: Tensor | None, noise: Noise, terms: int = 8) -> Tensor:
        """A bound of −log p(codes | labels), [B] nats: the mean over all orders of generation, by `terms`
        passes.

        E over m = 1 … T of T/m · Σ −log p(a masked code | the others), m codes masked (Hoogeboom 2021,
        arXiv:2110.02037, eq. 5); m is drawn from `terms` equal strata.
        """
        return self.bound(codes, labels, self.masks(codes, noise, terms))

    def masks(self, codes: Tensor, noise: Noise, terms: int = 8) -> list[Tensor]:
        """`terms` draws of what is masked [B, T]."""
        shares = ((i + noise.rand(len(codes)).to(codes.device)) / terms for i in range(terms))
        return [self.mask((1 + u * self.length).long().clamp(max=self.length), noise) for u in shares]

    def bound(self, codes: Tensor, labels: Tensor | None, masks: list[Tensor]) -> Tensor:
        """`nll` by those masks."""
        total = 0.0
        for masked in masks:
            nats = F.cross_entropy(self(codes, masked, labels).mT, codes, reduction="none")
            total = total + (nats * masked).sum(1) * (self.length / masked.sum(1)) / len(masks)
        return total

    def class_log_prob(self, codes: Tensor, noise: Noise) -> Tensor:
        """The bound of log p(codes | class) for every class, [B, K], by the same masks: of bounds by masks of
        their own the mixture would take the luckiest, and be no bound."""
        masks = self.masks(codes, noise)
        return -torch.stack([self.bound(codes, y, masks) for y in self.each_class(codes)], 1)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 10,
        temperature: float = 1.0,
        choice: float = 4.5,
        guidance: float = 1.0,
    ) -> Tensor:
        """n images [n, C, H, W] by `steps` passes.

        temperature divides the logits; choice: that of the Gumbel noise by which codes are kept, falling to 0
        at the last step (0: always the most confident ones). guidance: 1 = the labels as trained, more =
        sharper, at twice the cost.
        """
        device = self.head.weight.device
        labels = self.asked_labels(labels, n, device, guidance)
        codes = torch.zeros(n, self.length, dtype=torch.long, device=device)
        masked = torch.ones_like(codes, dtype=torch.bool)
        codes = self._fill(codes, masked, labels, noise, progress, steps, temperature, choice, guidance)
        return self.images(codes)

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 10,
        temperature: float = 1.0,
        choice: float = 4.5,
        guidance: float = 1.0,
    ) -> Applied:
        """Images [B, C, H, W] completed where mask [B, 1, H, W] is 0: codes with a hidden pixel are drawn
        given the others.

        Without a mask the middle is hidden, half as high and wide as the image. A conditional model without
        labels uses its null label. Raises UsageError where it never saw that.
        """
        if mask is None:
            height, width = x.shape[2:]
            mask = torch.ones_like(x[:, :1])
            mask[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
        hidden = mask.to(x) < 0.5
        if guidance != 1 or labels is not None:
            labels = self.asked_labels(labels, len(x), x.device, guidance)
        else:
            labels = self.known_labels(None)
        # what is hidden must not reach the codes around it: there the encoder sees the mean of what is known
        mean = (x * ~hidden).sum((1, 2, 3), keepdim=True) / (~hidden).expand_as(x).sum(
            (1, 2, 3), keepdim=True
        ).clamp(min=1)
        codes = self.tokenizer.encode(torch.where(hidden, mean, x)).flatten(1)
        masked = F.adaptive_max_pool2d(hidden.to(x), self.grid).flatten(1) > 0
        codes = self._fill(codes, masked, labels, noise, progress, steps, temperature, choice, guidance)
        done = torch.where(hidden, self.images(codes), x)
        return Applied(done, rows=("inpainted",), known=(~hidden).to(x), how="masked", labels=labels)

    def _fill(self, codes, masked, labels, noise, progress, steps, temperature, choice, guidance) -> Tensor:
        """codes [n, T] with those that are `masked` drawn given the others (algorithm of section 3.2)."""
        if temperature <= 0 or steps < 1:
            raise UsageError("`temperature` must be above 0, `steps` 1 or more")
        n, count = len(codes), masked.sum(1, keepdim=True)
        with torch.autocast(
            codes.device.type, enabled=False
        ):  # the draws are those of the net as it is, at full precision
            for i in range(steps):
                u, v = (noise.rand(n, self.length).to(self.head.weight) for _ in range(2))
                p = (self._logits(codes, masked, labels, guidance) / temperature).softmax(-1)
                codes = torch.where(masked, draw(p, u), codes)
                gumbel = -(-v.clamp(1e-6, 1 - 1e-6).log()).log()
                confidence = (
                    p.gather(-1, codes[..., None])[..., 0].log() + choice * (1 - (i + 1) / steps) * gumbel
                )
                left = (
                    (math.cos(0.5 * math.pi * (i + 1) / steps) * count).floor()
                    if i + 1 < steps
                    else 0 * count
                )
                rank = (
                    confidence.masked_fill(~masked, math.inf).argsort(1).argsort(1)
                )  # the least confident first
                masked = rank < left
                progress(i + 1, steps)
        return codes

    def _logits(self, codes: Tensor, masked: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        if guidance == 1:
            return self(codes, masked, labels)
        hidden = torch.arange(2 * len(codes), device=codes.device) >= len(codes)
        both = self(codes.repeat(2, 1), masked.repeat(2, 1), torch.cat([labels, labels]), hidden)
        with_label, without = both.chunk(2)
        return torch.lerp(without, with_label, guidance)
