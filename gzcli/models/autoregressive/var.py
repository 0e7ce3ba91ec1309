"""VAR — Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", arXiv:2404.02905.

    p(q) = Π_k p(q_k | q_1 … q_{k−1})                                                                 (eq. 6)

The codes of a scale are drawn at once. Their input is down(Σ_{j<k} φ_j(up(C[q_j])), h_k), the tokenizer's sum
over the earlier scales.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.models.autoregressive.prior import OrderedPrior
from gzcli.models.autoregressive.scales import ScaledCodebook
from gzcli.models.autoregressive.tokenizer import draw
from gzcli.models.autoregressive.transformer import DrawOptions, truncated_probs
from gzcli.models.base import Model
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import Labels, to_fp32
from gzcli.models.nn.transformer import TransformerOptions, initial_std


class VAR(OrderedPrior):
    """A transformer over the scales of the codes of `tokenizer`; a second stage, see `Prior`.

    The label's embedding is added to every input. Raises UsageError for sizes that do not fit.

    near: whether each block begins with a depthwise 3×3 convolution over the codes of each scale (Chu 2021,
      arXiv:2102.10882). Not in the paper.
    """

    paper = "Tian et al. 2024, arXiv:2404.02905"
    scaled = True
    # at the last scale. On MNIST after 2 + 2 CPU-minutes, of 1,000 samples against validation images, by 1.3
    # and 2, without `near`: fd 90, 48, precision .86, .90, recall .56, .46
    towards_clusters = 2.0
    visible: Tensor

    def __init__(
        self,
        data: DataInfo,
        *,
        tokenizer: Model,
        net: TransformerOptions = TransformerOptions(),
        near: bool = True,
        condition: ClusterOptions = ClusterOptions(),
    ):
        super().__init__(data, tokenizer, condition, net, near=near)
        self.embed = nn.Linear(self.book.options.dim, net.width)
        scales = self.book.scales
        self.level = nn.Parameter(initial_std(net.width) * torch.randn(len(scales), net.width))
        level = torch.cat([torch.full((s.stop - s.start,), k) for k, s in enumerate(scales)])
        self.register_buffer("visible", level[:, None] >= level, persistent=False)

    @property
    def book(self) -> ScaledCodebook:
        assert isinstance(self.tokenizer.codebook, ScaledCodebook)
        return self.tokenizer.codebook

    def forward(self, codes: Tensor, labels: Labels = None, drop: Tensor | None = None) -> Tensor:
        """The logits [B, T, codes] of each code [B, T], given the codes of coarser scales."""
        sums = zip(range(len(self.level)), self.book.sums(codes), strict=False)
        h = torch.cat([self.inputs(f, k) for k, f in sums], 1)
        h = h + self.label(labels, len(codes), drop)[:, None]
        return to_fp32(self.head(self.trunk(h, visible=self.visible, grids=self.book.grids)))

    def inputs(self, f: Tensor, k: int) -> Tensor:
        """The inputs [B, T_k, width] of scale k, from the sum f [B, dim, h, w] of the scales before it."""
        place = self.position().mT.unflatten(1, self.grid)[None]
        return self.embed(self.book.shrink(f, k).mT) + self.book.shrink(place, k).mT + self.level[k]

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
        """Draws n images [n, C, H, W], scale by scale; keys and values of coarser scales are cached.

        guidance: classifier-free guidance scale at the last scale, at twice the cost. It grows linearly from
          1 at the first scale. 1: no guidance; above 1: sharper. Default: 1, or 2 for models with clusters.
        """
        guidance, labels = self.guidance_scale(guidance), self.draw_labels(labels, n, noise)
        self.check_guidance(guidance, labels)
        return self.images(self._generate(n, labels, noise, progress, options, guidance))

    def _generate(
        self,
        n: int,
        labels: Labels,
        noise: Noise,
        progress: Progress,
        options: DrawOptions,
        guidance: float,
    ) -> Tensor:
        """Codes [n, T]."""
        u, scales = noise.rand(n, self.length), self.book.scales
        passes, label = self.guided(labels, n, guidance)
        caches = self.trunk.caches(passes * n, self.length)
        codes, f = [], label.new_zeros(n, self.book.options.dim, *self.grid)
        # without autocast: a draw follows the distribution that the weights define, at full precision
        with torch.autocast(self.device.type, enabled=False):
            for k, scale in enumerate(scales):
                h = self.inputs(f, k).repeat(passes, 1, 1) + label[:, None]
                logits = self.head(self.trunk(h, caches=caches, grids=[self.book.grids[k]]))
                if passes == 2:
                    growth = k / max(1, len(scales) - 1)
                    logits = torch.lerp(logits[n:], logits[:n], 1 + (guidance - 1) * growth)
                codes.append(draw(truncated_probs(logits, options), u[:, scale]))
                f = f + self.book.part(codes[-1], k)
                progress(k + 1, len(scales))
        return torch.cat(codes, 1)
