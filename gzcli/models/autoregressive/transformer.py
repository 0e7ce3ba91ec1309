"""The GPT over codes of VQGAN — Esser, Rombach & Ommer 2021, arXiv:2012.09841, section 3.2: p(s) = Π p(s_i |
s_<i)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, DataInfo, Noise, Progress, no_progress
from gzcli.models.autoregressive.base import first_rows
from gzcli.models.autoregressive.prior import OrderedPrior
from gzcli.models.autoregressive.tokenizer import draw
from gzcli.models.base import Model
from gzcli.models.labelled import ClusterOptions, Clusters
from gzcli.models.nn import Labels, spread_labels, to_fp32
from gzcli.models.nn.transformer import TransformerOptions


@dataclass(frozen=True)
class DrawOptions:
    """How a code is drawn from its distribution.

    temperature: softmax temperature, above 0. 1: as trained.
    top_k: number of most likely codes to draw from. Default: all.
    top_p: total probability of the most likely codes to draw from (nucleus sampling; Holtzman 2019,
      arXiv:1904.09751). 1: all codes.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


class Transformer(OrderedPrior):
    """A causal transformer over the codes of `tokenizer`, in raster order; a second stage, see `Prior`.

    The label's embedding is the first token. The input at each position also has a learned vector of the row
    and the column of the code that it predicts. Raises UsageError for sizes that do not fit.
    """

    paper = "Esser et al. 2021, arXiv:2012.09841"

    def __init__(
        self,
        data: DataInfo,
        *,
        tokenizer: Model,
        net: TransformerOptions = TransformerOptions(),
        condition: ClusterOptions = ClusterOptions(label_dropout=0.0),
    ):
        super().__init__(data, tokenizer, condition, net)

    def forward(self, codes: Tensor, labels: Labels = None, drop: Tensor | None = None) -> Tensor:
        """The logits [B, T, codes] of each of the grid's first codes [B, T], given the codes before it."""
        n, t = codes.shape
        first = self.label(labels, n, drop)[:, None]
        h = torch.cat([first, self.embed(codes[:, :-1])], 1) + self.position()[:t]
        return to_fp32(self.head(self.trunk(h, causal=True)))

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: DrawOptions = DrawOptions(),
        guidance: float | None = None,
    ) -> Tensor:
        """Draws n images [n, C, H, W], code by code; keys and values of earlier codes are cached.

        guidance: classifier-free guidance scale, at twice the cost (Ho 2022, arXiv:2207.12598). 1: no
          guidance; above 1: sharper. Default: 1, or 1.3 for models with clusters.
        """
        guidance, labels = self.guidance_scale(guidance), self.draw_labels(labels, n, noise)
        self.check_guidance(guidance, labels)
        codes = torch.zeros(n, 0, dtype=torch.long, device=self.device)
        return self.images(self._generate(codes, labels, noise, progress, options, guidance))

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        *,
        rows: int | None = None,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: DrawOptions = DrawOptions(),
    ) -> Applied:
        """Keeps the first rows of x and samples the others, given their codes.

        A conditional model without labels takes the class that makes the kept codes most probable. With
        clusters, one is drawn given these codes, from the class if that is given.

        rows: number of rows of pixels that are kept, a multiple of the rows that a code covers. Default:
          about half.
        """
        height, step = x.shape[2], -(-x.shape[2] // self.grid[0])
        rows = height // 2 // step * step if rows is None else rows
        if not 0 <= rows <= height or (rows % step and rows < height):
            raise UsageError(f"`rows` must be a multiple of {step} up to {height}, not {rows}")
        first = -(-rows // step) * self.grid[1]
        # codes depend on pixels around theirs, so the hidden rows are overwritten by the last kept one
        last = x[:, :, max(rows - 1, 0) : max(rows, 1)].expand(-1, -1, height - rows, -1)
        visible = torch.cat([x[:, :, :rows], last], 2)
        codes = self.tokenizer.encode(visible).flatten(1)[:, :first]
        labels = labels if self.conditional else None
        if self.clusters is None:
            if self.conditional and labels is None and first:
                best = self.class_log_prob(codes, noise).argmax(1)
                labels = spread_labels(None, len(self.data.classes), self.data, x.device)[best]
            condition = labels = self.requested_labels(labels, len(x))
        else:
            condition = self.draw_cluster(self.clusters, codes, labels, noise)
            labels = condition // self.clusters.each if self.conditional else None
        completed = self.images(self._generate(codes, condition, noise, progress, options, 1.0))
        completed = torch.cat([x[:, :, :rows], completed[:, :, rows:]], 2)
        return Applied(completed, rows=("completed",), visible=first_rows(x, rows), how="kept", labels=labels)

    def draw_cluster(self, clusters: Clusters, codes: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """A cluster [B] drawn from p(c | codes, labels) given the first codes of images."""
        joint = clusters.shares.log().expand(len(codes), -1)
        if labels is not None:
            joint = joint.masked_fill(clusters.outside(labels), -math.inf)
        if codes.shape[1]:
            joint = joint + self.class_log_prob(codes, noise)
        return draw(joint.softmax(1), noise.rand(len(codes)))

    def _generate(
        self,
        codes: Tensor,
        labels: Labels,
        noise: Noise,
        progress: Progress,
        options: DrawOptions,
        guidance: float,
    ) -> Tensor:
        """Codes [n, T]: `codes` [n, kept], followed by codes drawn in order."""
        n, start = codes.shape
        u = noise.rand(n, self.length)
        codes = torch.cat([codes, codes.new_zeros(n, self.length - start)], 1)
        # without autocast: a draw follows the distribution that the weights define, at full precision
        with torch.autocast(codes.device.type, enabled=False):
            passes, first = self.guided(labels, n, guidance)
            caches, position = self.trunk.caches(passes * n, self.length), self.position()
            h = torch.cat([first[:, None], self.embed(codes[:, :start]).repeat(passes, 1, 1)], 1)
            for i in range(start, self.length):
                h = h + position[i + 1 - h.shape[1] : i + 1]
                logits = self.head(self.trunk(h, causal=h.shape[1] > 1, caches=caches)[:, -1])
                if passes == 2:
                    logits = torch.lerp(logits[n:], logits[:n], guidance)
                codes[:, i] = draw(truncated_probs(logits, options), u[:, i])
                h = self.embed(codes[:, i : i + 1]).repeat(passes, 1, 1)
                progress(i + 1, self.length)
        return codes


def truncated_probs(logits: Tensor, options: DrawOptions) -> Tensor:
    """The unnormalised distribution [..., K] from which codes are drawn, for logits [..., K]."""
    temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
    if temperature <= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise UsageError(
            "`temperature` must be above 0, `top_k` at least 1, and `top_p` above 0 and at most 1"
        )
    p = (logits / temperature).softmax(-1)
    if top_k is not None and top_k < p.shape[-1]:
        p = p * (p >= p.topk(top_k, -1).values[..., -1:])
    if top_p < 1:  # the code with which the sum reaches top_p is kept
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered * (before < top_p * ordered.sum(-1, keepdim=True))
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
    return p
