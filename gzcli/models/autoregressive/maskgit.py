"""MaskGIT — Chang et al. 2022, "Masked Generative Image Transformer", arXiv:2202.04200.

Training masks the fraction cos(πr/2) of the codes, with r uniform, and predicts them from the rest (section
3.3). Sampling begins with all codes masked. Each pass keeps the most confident predictions, as many as the
same schedule gives (section 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.autoregressive.prior import Prior
from gzcli.models.autoregressive.tokenizer import draw
from gzcli.models.base import Model
from gzcli.models.denoising.applications import centre_mask
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import Labels, to_fp32
from gzcli.models.nn.transformer import TransformerOptions


@dataclass(frozen=True)
class FillOptions:
    """How hidden codes are filled in.

    steps: passes of the network.
    temperature: softmax temperature of the codes, above 0. 1: as trained.
    choice: scale of the Gumbel noise when a pass selects which codes to keep. It falls to 0 at the last step.
      0: always the most confident codes.
    guidance: classifier-free guidance scale, at twice the cost. 1: no guidance; above 1: sharper. Default: 1,
      or 1.3 when sampling clusters.
    """

    steps: int = 10
    temperature: float = 1.0
    choice: float = 4.5
    guidance: float | None = None


class MaskGIT(Prior):
    """A bidirectional transformer that fills in masked codes of `tokenizer`; a second stage, see `Prior`.

    Raises UsageError for sizes that do not fit.

    near: whether each block begins with a depthwise 3×3 convolution over the grid (Chu 2021,
      arXiv:2102.10882). Not in the paper. Small networks learn faster with it.
    smoothing: label smoothing of the training targets.
    """

    paper = "Chang et al. 2022, arXiv:2202.04200"

    def __init__(
        self,
        data: DataInfo,
        *,
        tokenizer: Model,
        net: TransformerOptions = TransformerOptions(),
        near: bool = True,
        smoothing: float = 0.1,
        condition: ClusterOptions = ClusterOptions(),
    ):
        super().__init__(data, tokenizer, condition, net, mask=True, near=near)
        self.smoothing = smoothing
        nn.init.zeros_(self.head.bias)

    def forward(
        self, codes: Tensor, masked: Tensor, labels: Labels = None, drop: Tensor | None = None
    ) -> Tensor:
        """The logits [B, T, codes] of all codes [B, T] given the codes that are not `masked` [B, T]."""
        h = self.embed(codes.masked_fill(masked, self.codes)) + self.position()
        h = torch.cat([self.label(labels, len(codes), drop)[:, None], h], 1)
        return to_fp32(self.head(self.trunk(h, grids=[self.grid])[:, 1:]))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The cross-entropy of the masked codes (eq. 1 over their number) in nats per code. Also logs `nats`,
        the same without smoothing."""
        codes, (labels, drop) = batch.extra["codes"].long(), self.training_labels(batch)
        share = torch.cos(0.5 * math.pi * batch.noise.rand(len(codes)))
        masked = self.mask((share * self.length).ceil().long().clamp(1, self.length), batch.noise)
        log_p = self(codes, masked, labels, drop).log_softmax(-1)
        nats = -log_p.gather(-1, codes[..., None])[..., 0]
        smooth = (1 - self.smoothing) * nats - self.smoothing * log_p.mean(-1)
        return {"loss": masked_mean(masked, smooth), "nats": masked_mean(masked, nats.detach())}

    def mask(self, count: Tensor, noise: Noise) -> Tensor:
        """A mask [B, T] that is true at `count` [B] random places."""
        rank = noise.rand(len(count), self.length).argsort(1).argsort(1)
        return rank < count[:, None]

    def nll(self, codes: Tensor, labels: Labels, noise: Noise, terms: int = 8) -> Tensor:
        """An upper bound of −log p(codes | labels), [B] nats, estimated by `terms` passes. It is the mean
        over m = 1 … T, with m codes masked, of T/m · Σ −log p(masked code | the others) (Hoogeboom 2021,
        arXiv:2110.02037, eq. 5)."""
        return self.bound(codes, labels, self.masks(codes, noise, terms))

    def masks(self, codes: Tensor, noise: Noise, terms: int = 8) -> list[Tensor]:
        """`terms` random masks [B, T], true where a code is masked; their sizes are stratified."""
        shares = ((i + noise.rand(len(codes))) / terms for i in range(terms))
        return [self.mask((1 + u * self.length).long().clamp(max=self.length), noise) for u in shares]

    def bound(self, codes: Tensor, labels: Labels, masks: list[Tensor]) -> Tensor:
        """`nll`, estimated by the given masks."""
        total = self.head.weight.new_zeros(len(codes))
        for masked in masks:
            nats = F.cross_entropy(self(codes, masked, labels).mT, codes, reduction="none")
            total = total + (nats * masked).sum(1) * (self.length / masked.sum(1)) / len(masks)
        return total

    def class_log_prob(self, codes: Tensor, noise: Noise) -> Tensor:
        """A lower bound of log p(codes | class) for every class, [B, K]."""
        # all classes share the masks: otherwise the mixture would favour the class with the best ones
        masks = self.masks(codes, noise)
        return -torch.stack([self.bound(codes, y, masks) for y in self.each_class(codes)], 1)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: FillOptions = FillOptions(),
    ) -> Tensor:
        """Draws n images [n, C, H, W]. All codes are drawn at once and refined pass by pass."""
        guidance, labels = self.guidance_scale(options.guidance), self.draw_labels(labels, n, noise)
        self.check_guidance(guidance, labels)
        options = replace(options, guidance=guidance)
        codes = torch.zeros(n, self.length, dtype=torch.long, device=self.device)
        masked = torch.ones_like(codes, dtype=torch.bool)
        return self.images(self._fill(codes, masked, labels, noise, progress, options))

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: FillOptions = FillOptions(),
    ) -> Applied:
        """Fills in images x where mask is 0: draws the codes with a hidden pixel, given the others.

        Without a mask the middle is hidden, half as high and wide as the image. A conditional model without
        labels uses its null label, or with clusters the nearest one by the known pixels.
        """
        hidden = (centre_mask(x) if mask is None else mask.to(x)) < 0.5
        guidance = 1.0 if options.guidance is None else options.guidance
        if labels is not None or (guidance != 1 and self.clusters is None):
            labels = self.requested_labels(labels, len(x))
        condition = self.image_condition(x, labels, ~hidden)
        self.check_guidance(guidance, condition)
        # hidden pixels would leak into neighbouring codes: the encoder gets the mean of known ones instead
        visible = (~hidden).expand_as(x).sum((1, 2, 3), keepdim=True).clamp(min=1)
        mean = (x * ~hidden).sum((1, 2, 3), keepdim=True) / visible
        codes = self.tokenizer.encode(torch.where(hidden, mean, x)).flatten(1)
        masked = F.adaptive_max_pool2d(hidden.to(x), self.grid).flatten(1) > 0
        codes = self._fill(codes, masked, condition, noise, progress, options)
        inpainted = torch.where(hidden, self.images(codes), x)
        return Applied(inpainted, rows=("inpainted",), visible=(~hidden).to(x), how="masked", labels=labels)

    def _fill(
        self,
        codes: Tensor,
        masked: Tensor,
        labels: Labels,
        noise: Noise,
        progress: Progress,
        options: FillOptions,
    ) -> Tensor:
        """The codes [n, T], with the masked ones drawn given the rest (algorithm of section 3.2)."""
        steps = options.steps
        if options.temperature <= 0 or steps < 1:
            raise UsageError("`temperature` must be above 0, and `steps` must be at least 1")
        n, count = len(codes), masked.sum(1, keepdim=True)
        # without autocast: a draw follows the distribution that the weights define, at full precision
        with torch.autocast(codes.device.type, enabled=False):
            for i in range(steps):
                u, v = (noise.rand(n, self.length) for _ in range(2))
                p = (self._logits(codes, masked, labels, options.guidance) / options.temperature).softmax(-1)
                codes = torch.where(masked, draw(p, u), codes)
                gumbel = -(-v.clamp(1e-6, 1 - 1e-6).log()).log()
                log_p = p.gather(-1, codes[..., None])[..., 0].log()
                confidence = log_p + options.choice * (1 - (i + 1) / steps) * gumbel
                share = math.cos(0.5 * math.pi * (i + 1) / steps) if i + 1 < steps else 0.0
                # the least confident codes stay masked, (share · count) of them
                rank = confidence.masked_fill(~masked, math.inf).argsort(1).argsort(1)
                masked = rank < (share * count).floor()
                progress(i + 1, steps)
        return codes

    def _logits(self, codes: Tensor, masked: Tensor, labels: Labels, guidance: float | None) -> Tensor:
        """The logits of `forward`, extrapolated away from those without labels by the scale `guidance`."""
        if guidance is None or guidance == 1 or labels is None:
            return self(codes, masked, labels)
        hidden = torch.arange(2 * len(codes), device=codes.device) >= len(codes)
        logits = self(codes.repeat(2, 1), masked.repeat(2, 1), torch.cat([labels, labels]), hidden)
        with_label, without = logits.chunk(2)
        return torch.lerp(without, with_label, guidance)


def masked_mean(masked: Tensor, t: Tensor) -> Tensor:
    """The mean of t [B, T] over the masked positions of each row, then over the rows."""
    return ((t * masked).sum(1) / masked.sum(1)).mean()
