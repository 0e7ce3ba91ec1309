"""Causal convolutions of the PixelCNN family, each with an incremental twin that computes one row or one
pixel.

Order of generation: rows from the top, pixels from the left, channels R → G → B. A vertical feature at row i
sees rows < i of the image; a horizontal feature of channel group c at (i, j) also sees pixels < j of its row
and channels < c of its pixel (masks A in the first layer and B above it: van den Oord 2016,
arXiv:1601.06759). Kernels hold the unmasked taps only and their input is shifted by padding, so nothing is
multiplied by zero; the one mask left is that between channel groups at the current pixel.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gate(y: Tensor, dim: int = 1) -> Tensor:
    """tanh(a / 2) · σ(b) for y = [a, b] along `dim`: the gated unit (arXiv:1606.05328 eq. 2); it halves that
    dimension.

    tanh(a / 2) = 2 σ(a) − 1, so that one sigmoid over contiguous memory does both: in bf16 on a CPU tanh is
    slow.
    """
    a, b = torch.sigmoid(y).chunk(2, dim)
    return torch.addcmul(-b, a, b, value=2)


def group_mask(n_out: int, n_in: int, groups: int, *, parts: int = 1, strict: bool = False) -> Tensor | None:
    """0/1 [n_out, n_in]: may output o see input i of the same pixel? None where every output may.

    Channels are split into `groups` equal runs (outputs within each of `parts`: a gated unit's two halves).
    Group c sees groups ≤ c (mask B), or < c if `strict` (mask A).
    """
    if groups == 1 and not strict:
        return None
    out = output_groups(n_out, groups, parts)[:, None]
    into = torch.arange(n_in)[None] * groups // n_in
    return (out > into if strict else out >= into).float()


def output_groups(n_out: int, groups: int, parts: int = 1) -> Tensor:
    """[n_out]: the channel group of each output."""
    part = n_out // parts
    return torch.arange(n_out) % part * groups // part


class VerticalConv(nn.Conv2d):
    """A convolution over the rows up to the current one of its input; up to the row above if `strict` (first
    layer)."""

    def __init__(
        self, n_in: int, n_out: int, kernel: tuple[int, int], *, dilation=1, stride=1, strict: bool = False
    ):
        super().__init__(n_in, n_out, kernel, dilation=dilation, stride=stride)
        self.strict = strict
        self.above = (kernel[0] - 1) * dilation  # rows kept from the past
        self.side = (kernel[1] - 1) * dilation // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.side, self.side, self.above + self.strict, -1 if self.strict else 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation)


class HorizontalConv(nn.Module):
    """A 1 × (left + 1) convolution over the pixels up to the current one, whose channels are masked by group.

    `strict` (first layer, mask A): group c of the current pixel sees groups < c only; with one group there is
    no such tap. `parts` = 2 for outputs that go through `gate`.
    """

    def __init__(
        self, n_in, n_out, left: int, *, dilation: int = 1, groups: int = 1, parts: int = 1, strict=False
    ):
        super().__init__()
        self.n_in, self.n_out, self.left, self.dilation = n_in, n_out, left, dilation
        self.groups, self.parts, self.strict = groups, parts, strict
        self.current = not (strict and groups == 1)  # is there a tap on the current pixel?
        conv = nn.Conv2d(n_in, n_out, (1, left + self.current))  # its initialisation
        self.weight, self.bias = conv.weight, conv.bias
        mask = group_mask(n_out, n_in, groups, parts=parts, strict=strict) if self.current else None
        if mask is not None:
            taps = torch.ones(n_out, n_in, left, device=mask.device)
            mask = torch.cat([taps, mask[..., None]], -1)[:, :, None]
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if pad := self.left * self.dilation:
            x = F.pad(x, (pad, 0) if self.current else (pad, -1))
        weight = self.weight if self.mask is None else self.weight * self.mask
        return F.conv2d(x, weight, self.bias, dilation=(1, self.dilation))


class RowCache:
    """The incremental twin of a `VerticalConv`: takes its input row by row, [n, C, W], returns rows of its
    output."""

    def __init__(self, conv: VerticalConv, n: int, width: int):
        self.conv, self.weight = conv, conv.weight.detach()  # read once: it may be a function of parameters
        zero = self.weight.new_zeros(n, conv.in_channels, width + 2 * conv.side)
        self.rows = deque([zero] * conv.above, maxlen=conv.above + 1)
        self.i = 0

    def __call__(self, row: Tensor) -> Tensor | None:
        """Output row i [n, n_out, W] from input row i (from row i − 1 of a strict one; zeros for i = 0).

        A strided one has an output for the first of every `stride` input rows, and None for the rest.
        """
        conv = self.conv
        self.rows.append(F.pad(row, (conv.side, conv.side)))
        self.i += 1
        if (self.i - 1) % conv.stride[0]:
            return None
        taps = torch.stack(list(self.rows)[:: conv.dilation[0]], 2)  # [n, C, kh, W + 2 side]
        return F.conv2d(taps, self.weight, conv.bias, (1, conv.stride[1]), dilation=(1, conv.dilation[1]))[
            :, :, 0
        ]


class PixelCache:
    """The incremental twin of a `HorizontalConv` within one row: its inputs, and its weights cropped by tap
    and group.

    Outputs come in group-major order: group c is columns c·w … (c + 1)·w, w = n_out / groups, each [parts, w
    / parts].
    """

    def __init__(self, conv: HorizontalConv, n: int, width: int):
        self.conv = conv
        order = output_groups(conv.n_out, conv.groups, conv.parts).argsort(stable=True)
        self.order = order = order.to(conv.weight.device)
        weight = conv.weight.detach()[order, :, 0]  # [n_out, n_in, taps]
        self.bias = conv.bias.detach()[order]
        self.past = [weight[..., t].T.contiguous() for t in range(conv.left)]
        self.pad = conv.left * conv.dilation
        self.input = weight.new_zeros(self.pad + width, n, conv.n_in)
        size, self.step = conv.n_out // conv.groups, conv.n_in // conv.groups
        self.seen = [
            (c + (not conv.strict)) * self.step for c in range(conv.groups)
        ]  # channels of the current pixel
        self.out = [slice(c * size, (c + 1) * size) for c in range(conv.groups)]
        self.now = [weight[s, :k, -1].T.contiguous() for s, k in zip(self.out, self.seen, strict=True)]

    def left(self, j: int, base: Tensor) -> Tensor:
        """`base` [n, n_out] (or [n_out]) plus what the pixels left of j contribute."""
        for t, weight in enumerate(self.past):
            base = torch.addmm(base, self.input[j + t * self.conv.dilation], weight)
        return base

    def add(self, j: int, c: int, left: Tensor) -> Tensor:
        """Group c's output [n, n_out / groups] at pixel j, given `left`'s sum."""
        left, seen = left[..., self.out[c]], self.seen[c]
        return torch.addmm(left, self.input[self.pad + j, :, :seen], self.now[c]) if seen else left

    def put(self, j: int, c: int, value: Tensor) -> None:
        """Sets group c of the input at pixel j to `value` [n, n_in / groups]."""
        self.input[self.pad + j, :, c * self.step : (c + 1) * self.step] = value
