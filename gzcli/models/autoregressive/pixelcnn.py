"""Gated PixelCNN — van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders",
arXiv:1606.05328.

p(x) = Π p(x_i | x_<i). Two stacks of gated causal convolutions compute each factor, which is a softmax over
grey levels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo
from gzcli.models.autoregressive.base import (
    HorizontalConv,
    PixelCache,
    PixelModel,
    RowCache,
    VerticalConv,
    gate,
)
from gzcli.models.nn import ClassEmbedding, Labels, Modules, from_levels, to_fp32, to_levels


class GatedBlock(nn.Module):
    """One residual layer of both stacks (paper, figure 2)."""

    def __init__(self, hidden: int, kernel: int, dilation: int, groups: int):
        super().__init__()
        reach = kernel // 2
        self.vertical = VerticalConv(hidden, 2 * hidden, (reach + 1, kernel), dilation=dilation)
        self.across = nn.Conv2d(hidden, 2 * hidden, 1, bias=False)
        self.horizontal = HorizontalConv(hidden, 2 * hidden, reach, dilation=dilation, groups=groups, parts=2)
        self.out = HorizontalConv(hidden, hidden, 0, groups=groups)

    def forward(self, v: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new v and h [B, hidden, H, W]. `bias` [B, 2, 2·hidden, 1, 1] is that of the label for the gates
        of both stacks (eq. 4)."""
        a = self.vertical(v)
        v = v + gate(a if bias is None else a + bias[:, 0])
        a = self.horizontal(h) + self.across(v)
        h = h + self.out(gate(a if bias is None else a + bias[:, 1]))
        return v, h


class PixelCNN(PixelModel):
    """Gated PixelCNN with exact likelihood.

    Each channel of the image has an equal part of `hidden` and of `head`, which are rounded up to multiples
    of the channels. RGB is generated in the order R → G → B, each channel conditioned on those before it.
    Images of two levels have one Bernoulli logit per channel. The vertical stack has a learned map of
    positions, which takes no time and reveals the border.

    hidden: channels of each stack. Multiples of 32 are fast in bf16.
    dilations: dilation of the kernel of each layer.
    kernel: kernel size of the layers in pixels; odd.
    first: kernel size of the first layer in pixels; odd, 3 or more.
    head: channels before the softmax.
    """

    takes: ClassVar[str] = "bytes"  # a softmax over 65,536 levels would fill the memory

    paper = "van den Oord et al. 2016, arXiv:1606.05328"

    def __init__(
        self,
        data: DataInfo,
        *,
        hidden: int = 64,
        dilations: tuple[int, ...] = (1, 2, 1, 4, 1, 2, 1),
        kernel: int = 3,
        first: int = 7,
        head: int = 64,
        conditional: bool = False,
    ):
        channels, height, width = data.shape
        super().__init__(data, conditional, parts=channels, uniforms=1)
        hidden, head = (-(-size // channels) * channels for size in (hidden, head))
        if kernel % 2 == 0 or first % 2 == 0 or first < 3:
            raise UsageError(
                "`model.kernel` and `model.first` must be odd, and `model.first` must be at least 3"
            )
        self.outputs = 1 if self.levels == 2 else self.levels  # logits a channel
        reach = first // 2
        self.first_vertical = VerticalConv(channels, hidden, (reach, first), strict=True)
        self.first_horizontal = HorizontalConv(channels, hidden, reach, groups=channels, strict=True)
        self.position = nn.Parameter(torch.zeros(hidden, height, width))
        self.blocks: Modules[GatedBlock] = Modules(GatedBlock(hidden, kernel, d, channels) for d in dilations)
        self.head = HorizontalConv(hidden, head, 0, groups=channels)
        self.logits = HorizontalConv(head, channels * self.outputs, 0, groups=channels)
        self.label = ClassEmbedding(len(data.classes), len(dilations) * 4 * hidden) if conditional else None
        nn.init.zeros_(self.logits.bias)
        if self.label is not None:
            self.label.init_weights(0.05)

    @torch.no_grad()
    def on_start(self, batch: Batch) -> None:
        """Sets the bias of the softmax to the grey levels of the first batch, unless it is set."""
        if self.logits.bias.any():
            return
        levels = self.levels
        k = to_levels(batch.x, levels).transpose(0, 1).flatten(1)  # [C, B · H · W]
        count = torch.stack([channel.bincount(minlength=levels) for channel in k]).to(self.logits.bias)
        share = ranks.mean_over_ranks(count / k.shape[1], self)
        log_p = (0.999 * share + 0.001 / levels).log()  # every level keeps a positive probability
        bias = log_p if self.outputs > 1 else log_p[:, 1:] - log_p[:, :1]
        self.logits.bias.copy_(bias.flatten())

    def forward(self, x: Tensor, labels: Labels = None) -> Tensor:
        """The logits of every value given the values before it, [B, C, H, W, outputs]. There is one per
        level; with two levels, only that of level 1."""
        bias = self._bias(labels, x.shape[0])
        v, h = self.first_vertical(x), self.first_horizontal(x)
        # channels_last is faster on a CPU; it is set here, since images of one channel lose it. In bf16
        # oneDNN's gradient of a dilated convolution is wrong with it, except for multiples of 16 channels
        is_affected = torch.is_grad_enabled() and h.dtype is torch.bfloat16 and h.shape[1] % 16
        layout = torch.contiguous_format if is_affected else torch.channels_last
        v = (v + self.position.to(v.dtype)).contiguous(memory_format=layout)
        h = h.contiguous(memory_format=layout)
        for block, b in zip(self.blocks, bias, strict=True):
            v, h = block(v, h, b)
        y = self.logits(F.relu(self.head(F.relu(h))))  # [B, C · outputs, H, W]
        return y.permute(0, 2, 3, 1).unflatten(-1, (-1, self.outputs)).movedim(-2, 1)

    def _bias(self, labels: Labels, n: int) -> list[Tensor | None]:
        """The labels' biases in the gates of each layer, [n, 2, 2·hidden, 1, 1] (eq. 4), if any."""
        if self.label is None:
            return [None] * len(self.blocks)
        return list(self.label(labels, n).view(n, len(self.blocks), 2, -1, 1, 1).unbind(1))

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        logits, k = to_fp32(outputs), to_levels(x, self.levels)
        if self.outputs == 1:
            return -F.binary_cross_entropy_with_logits(logits[..., 0], k.to(logits.dtype), reduction="none")
        logits, k = logits.movedim(1, 3), k.movedim(1, 3)  # [B, H, W, C, …], as they are in memory
        nats = F.cross_entropy(logits.flatten(0, 3), k.flatten(), reduction="none")
        return -nats.view(k.shape).movedim(3, 1)

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        """The grey level drawn by inversion, as a value [n, 1]: the number of levels k with P(level ≤ k) ≤
        u."""
        logits = outputs / temperature
        if self.outputs == 1:
            k = u >= torch.sigmoid(-logits)
        else:
            k = (logits.softmax(-1).cumsum(-1)[:, :-1] <= u).sum(-1, keepdim=True)
        return from_levels(k, self.levels)

    def incremental(self, n: int, labels: Labels) -> IncrementalPixelCNN:
        return IncrementalPixelCNN(self, n, labels)


class IncrementalPixelCNN:
    """Computes the vertical stack row by row, and the horizontal one by pixel and channel."""

    def __init__(self, net: PixelCNN, n: int, labels: Labels):
        width = net.data.shape[2]
        self.net, self.n, self.i = net, n, 0
        self.bias = net._bias(labels, n)
        self.layers = list(net.blocks)
        self.first_vertical = RowCache(net.first_vertical, n, width)
        self.vertical = [RowCache(b.vertical, n, width) for b in self.layers]
        self.first = PixelCache(net.first_horizontal, n, width)
        self.blocks = [(PixelCache(b.horizontal, n, width), PixelCache(b.out, n, 1)) for b in self.layers]
        self.head, self.out = PixelCache(net.head, n, 1), PixelCache(net.logits, n, 1)

    def row(self, above: Tensor) -> None:
        v = self.first_vertical(above) + self.net.position[:, self.i]  # [n, hidden, W]
        # the vertical stack's share in each block's horizontal gates, [W, n, 2·hidden], group-major
        self.base = []
        for block, vertical, (horizontal, _), bias in zip(
            self.layers, self.vertical, self.blocks, self.bias, strict=True
        ):
            a = vertical(v)
            v = v + gate(a if bias is None else a + bias[:, 0, :, 0])
            a = F.conv1d(v, block.across.weight[..., 0]) + block.horizontal.bias[:, None]
            a = a if bias is None else a + bias[:, 1, :, 0]
            self.base.append(a[:, horizontal.order].permute(2, 0, 1).contiguous())
        self.i += 1

    def keep(self, row: Tensor) -> None:
        """Does nothing, because the horizontal stack depends only on the current row; `row` feeds the
        vertical stack."""

    def outputs(self, j: int, c: int) -> Tensor:
        """The logits of channel c at pixel j of the row, [n, outputs]."""
        if c == 0:  # all channels share the contribution of the pixels on the left
            self.past = [self.first.past_sum(j, self.first.bias)]
            self.past += [
                cache.past_sum(j, base[j]) for (cache, _), base in zip(self.blocks, self.base, strict=True)
            ]
        h = self.first.output(j, c, self.past[0])
        for (horizontal, out), past in zip(self.blocks, self.past[1:], strict=True):
            horizontal.put(j, c, h)
            out.put(0, c, gate(horizontal.output(j, c, past)))
            h = h + out.output(0, c, out.bias)
        self.head.put(0, c, F.relu(h))
        self.out.put(0, c, F.relu(self.head.output(0, c, self.head.bias)))
        return self.out.output(0, c, self.out.bias)

    def put(self, j: int, c: int, value: Tensor) -> None:
        self.first.put(j, c, value)
