"""Causal convolutions of the PixelCNN family, and caches that compute them row by row or pixel by pixel.

Order of generation: rows from the top, pixels from the left, channels R → G → B. A vertical feature at row i
sees rows < i of the image; a horizontal feature of channel group c at (i, j) also sees pixels < j of its row
and channels < c of its pixel (masks A in the first layer and B above it: van den Oord 2016,
arXiv:1601.06759). Kernels hold the unmasked taps alone, and padding shifts their input, so that nothing is
multiplied by zero; only the channel groups of the current pixel need a mask.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gate(y: Tensor, dim: int = 1) -> Tensor:
    """The gated unit tanh(a / 2) · σ(b) for y = [a, b] along `dim` (arXiv:1606.05328, eq. 2)."""
    # tanh(a / 2) = 2 σ(a) − 1: one sigmoid over contiguous memory serves both; tanh is slow in bf16 on a CPU
    a, b = torch.sigmoid(y).chunk(2, dim)
    return torch.addcmul(-b, a, b, value=2)


def group_mask(n_out: int, n_in: int, groups: int, *, parts: int = 1, strict: bool = False) -> Tensor | None:
    """0/1 [n_out, n_in]: 1 where output o sees input i of the same pixel: groups ≤ its own (mask B), or < its
    own if `strict` (mask A); None where all outputs see all inputs."""
    if groups == 1 and not strict:
        return None
    out = output_groups(n_out, groups, parts)[:, None]
    into = torch.arange(n_in)[None] * groups // n_in
    return (out > into if strict else out >= into).float()


def output_groups(n_out: int, groups: int, parts: int = 1) -> Tensor:
    part = n_out // parts
    return torch.arange(n_out) % part * groups // part


class VerticalConv(nn.Conv2d):
    """A convolution over the rows up to the current one, or if `strict`, as in the first layer, above it."""

    bias: Tensor

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: tuple[int, int],
        *,
        dilation: int = 1,
        stride: int = 1,
        strict: bool = False,
    ):
        super().__init__(n_in, n_out, kernel, dilation=dilation, stride=stride)
        self.strict = strict
        self.above = (kernel[0] - 1) * dilation  # rows that are needed beside the current one
        self.side = (kernel[1] - 1) * dilation // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.side, self.side, self.above + self.strict, -1 if self.strict else 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation)


class HorizontalConv(nn.Module):
    """A 1 × (left + 1) convolution over the pixels up to the current one, masked by channel group at the
    current one.

    strict: whether group c sees only groups < c of the current pixel (mask A, of the first layer); with one
      group the current pixel then has no tap.
    parts: 2 where `gate` follows.
    """

    weight: Tensor
    bias: Tensor
    mask: Tensor | None

    def __init__(
        self,
        n_in: int,
        n_out: int,
        left: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        parts: int = 1,
        strict: bool = False,
    ):
        super().__init__()
        self.n_in, self.n_out, self.left, self.dilation = n_in, n_out, left, dilation
        self.groups, self.parts, self.strict = groups, parts, strict
        self.current = not (strict and groups == 1)  # whether the current pixel has a tap
        for name, p in nn.Conv2d(n_in, n_out, (1, left + self.current)).named_parameters():
            self.register_parameter(name, p)  # with the initial values of a convolution
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
    """Computes a `VerticalConv` row by row, from rows [n, C, W] of its input."""

    def __init__(self, conv: VerticalConv, n: int, width: int):
        # the weight is read once: `weight_norm` computes it at every reading
        self.conv, self.weight = conv, conv.weight.detach()
        zero = self.weight.new_zeros(n, conv.in_channels, width + 2 * conv.side)
        self.rows = deque([zero] * conv.above, maxlen=conv.above + 1)
        self.i = -1

    def __call__(self, row: Tensor) -> Tensor:
        """Output row i [n, n_out, W] from input row i; of a strict convolution from row i − 1, or zeros."""
        self.push(row)
        return self.output()

    def push(self, row: Tensor) -> None:
        self.rows.append(F.pad(row, (self.conv.side, self.conv.side)))
        self.i += 1

    @property
    def has_output(self) -> bool:
        """Whether there is an output for the row that was entered last: a strided one skips rows."""
        return self.i % self.conv.stride[0] == 0

    def output(self) -> Tensor:
        conv = self.conv
        taps = torch.stack(list(self.rows)[:: conv.dilation[0]], 2)  # [n, C, kh, W + 2 side]
        stride, dilation = (1, conv.stride[1]), (1, conv.dilation[1])
        return F.conv2d(taps, self.weight, conv.bias, stride, dilation=dilation)[:, :, 0]


class PixelCache:
    """Computes a `HorizontalConv` pixel by pixel within a row, with the weights by tap and group: group c is
    columns c·w … (c + 1)·w of the outputs, w = n_out / groups, each [parts, w / parts].
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
        # how many channels of the current pixel each group sees
        self.visible = [(c + (not conv.strict)) * self.step for c in range(conv.groups)]
        self.out = [slice(c * size, (c + 1) * size) for c in range(conv.groups)]
        self.now = [weight[s, :k, -1].T.contiguous() for s, k in zip(self.out, self.visible, strict=True)]

    def left(self, j: int, base: Tensor) -> Tensor:
        """`base` [n, n_out] or [n_out], plus the contribution of the pixels left of j."""
        for t, weight in enumerate(self.past):
            base = torch.addmm(base, self.input[j + t * self.conv.dilation], weight)
        return base

    def add(self, j: int, c: int, left: Tensor) -> Tensor:
        """Group c's output [n, n_out / groups] at pixel j, given the sum that `left` returned."""
        left, visible = left[..., self.out[c]], self.visible[c]
        return torch.addmm(left, self.input[self.pad + j, :, :visible], self.now[c]) if visible else left

    def put(self, j: int, c: int, value: Tensor) -> None:
        """Sets group c of the input at pixel j to `value` [n, n_in / groups]."""
        self.input[self.pad + j, :, c * self.step : (c + 1) * self.step] = value
