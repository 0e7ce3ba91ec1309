"""The core of autoregressive models of pixels: causal convolutions, with caches that compute them row by row
or pixel by pixel, and likelihood, ordered generation and completion.

Order of generation: rows from the top, pixels from the left, channels R → G → B. A vertical feature at row i
depends on the image's rows < i. A horizontal feature of channel group c at (i, j) also depends on pixels < j
of its row and on channels < c of its pixel. The first layer has mask A, the others mask B (van den Oord 2016,
arXiv:1601.06759). Kernels contain only the unmasked taps, and padding shifts their input; only the channel
groups of the current pixel need a mask."""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.labelled import mixture, over_classes
from gzcli.models.nn import Labels, bits_per_dim, double, every_label, needs_labels, spread_labels

# ---- convolutions and their caches


def gate(y: Tensor, dim: int = 1) -> Tensor:
    """The gated unit tanh(a / 2) · σ(b) for y = [a, b] along `dim` (arXiv:1606.05328, eq. 2)."""
    # tanh(a / 2) = 2 σ(a) − 1: one sigmoid over contiguous memory serves both; tanh is slow in bf16 on a CPU
    a, b = torch.sigmoid(y).chunk(2, dim)
    return torch.addcmul(-b, a, b, value=2)


def group_mask(n_out: int, n_in: int, groups: int, *, parts: int = 1, strict: bool = False) -> Tensor | None:
    """A mask [n_out, n_in]: 1 if output o depends on input i of the same pixel. Groups up to its own are
    visible (mask B), or only earlier ones if `strict` (mask A). None if all are visible."""
    if groups == 1 and not strict:
        return None
    out = output_groups(n_out, groups, parts)[:, None]
    into = torch.arange(n_in)[None] * groups // n_in
    return (out > into if strict else out >= into).float()


def output_groups(n_out: int, groups: int, parts: int = 1) -> Tensor:
    part = n_out // parts
    return torch.arange(n_out) % part * groups // part


class VerticalConv(nn.Conv2d):
    """A convolution over the rows up to the current one; if `strict`, as in the first layer, over those above
    it."""

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
        self.above = (kernel[0] - 1) * dilation  # rows above the current one in the kernel
        self.side = (kernel[1] - 1) * dilation // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.side, self.side, self.above + self.strict, -1 if self.strict else 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation)


class HorizontalConv(nn.Module):
    """A 1 × (left + 1) convolution over the pixels up to the current one. At the current pixel it is masked
    by channel group.

    strict: whether group c depends only on groups < c of the current pixel (mask A, for the first layer).
      With a single group, the current pixel then has no tap.
    parts: 2 if a `gate` follows, otherwise 1.
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
            self.register_parameter(name, p)  # initialised like a convolution
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

    def __call__(self, row: Tensor) -> Any:
        """Output row i [n, n_out, W] from input row i. For a strict convolution, the input is row i − 1, or
        zeros. None for a row that the stride skips."""
        conv = self.conv
        self.rows.append(F.pad(row, (conv.side, conv.side)))
        self.i += 1
        if self.i % conv.stride[0]:
            return None
        taps = torch.stack(list(self.rows)[:: conv.dilation[0]], 2)  # [n, C, kh, W + 2 side]
        stride, dilation = (1, conv.stride[1]), (1, conv.dilation[1])
        return F.conv2d(taps, self.weight, conv.bias, stride, dilation=dilation)[:, :, 0]


class PixelCache:
    """Computes a `HorizontalConv` pixel by pixel within a row. Weights are stored by tap and group: group c
    has the output columns c·w … (c + 1)·w, w = n_out / groups, each [parts, w / parts].
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

    def past_sum(self, j: int, base: Tensor) -> Tensor:
        """`base` [n, n_out] or [n_out], plus the contribution of the pixels left of j."""
        for t, weight in enumerate(self.past):
            base = torch.addmm(base, self.input[j + t * self.conv.dilation], weight)
        return base

    def output(self, j: int, c: int, past: Tensor) -> Tensor:
        """Group c's output [n, n_out / groups] at pixel j, given the sum that `past_sum` returned."""
        past, visible = past[..., self.out[c]], self.visible[c]
        return torch.addmm(past, self.input[self.pad + j, :, :visible], self.now[c]) if visible else past

    def put(self, j: int, c: int, value: Tensor) -> None:
        """Sets group c of the input at pixel j to `value` [n, n_in / groups]."""
        self.input[self.pad + j, :, c * self.step : (c + 1) * self.step] = value


# ---- models


class PixelModel(Model):
    """p(x) = Π p(part_i | parts before it): rows from the top, pixels from the left, and in each pixel
    `parts` equal groups of channels.

    A subclass defines the three methods below, and forward(x, labels) [B, parts, H, W, outputs], the
    network's outputs for every part given the parts before it. Drawing a part takes `uniforms` random
    numbers.

    conditional: whether labels condition every factor.
    """

    likelihood: ClassVar[str] = "exact"
    best: ClassVar[str] = "bpd"
    takes: ClassVar[str] = "levels"
    null_label = False
    sums = ("main",)

    def __init__(self, data: DataInfo, conditional: bool, *, parts: int, uniforms: int):
        super().__init__(data)
        self.levels = grey_levels(data)
        self.conditional, self.parts, self.uniforms = needs_labels(conditional, data), parts, uniforms

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """log p of every part of x given the parts before it, [B, parts, H, W]."""
        raise NotImplementedError

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Values [n, C / parts] of a part, by inversion at u [n, uniforms] in [0, 1)."""
        raise NotImplementedError

    def incremental(self, n: int, labels: Labels) -> Any:
        """The net for n images, computed position by position. For each row, `row(above)` is called first,
        with the image's row above [n, C, W] (zeros for the first). For a known row, `keep(row)` follows.
        Otherwise `outputs(j, part)` [n, outputs] and `put(j, part, value)`, value [n, C / parts], follow for
        each pixel j and part."""
        raise NotImplementedError

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        nats = -self._pixels_log_prob(batch.x, batch.y if self.conditional else None).flatten(1).sum(1).mean()
        return {"loss": nats, "bpd": bits_per_dim(nats, self.data)}

    def log_prob(self, x: Tensor, labels: Labels = None, *, noise: Noise | None = None) -> Tensor:
        """The exact log-likelihood, [B] nats. Without labels, a conditional model has that of the mixture of
        its classes."""

        def exact(labels: Labels, noise: Noise | None) -> Tensor:
            return self._pixels_log_prob(x, labels).flatten(1).sum(1)

        return over_classes(self, exact, len(x), labels, noise)

    def map_nll(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−log p(pixel | pixels before it) in nats, [B, H, W]; it sums to −log p(x). For a conditional model,
        p is the mixture over its classes, weighted by their posterior given the earlier pixels."""
        if not self.conditional:
            return -self._pixels_log_prob(x, None).sum(1)
        every = every_label(self.data, len(x), x.device)
        of_class = torch.stack([self._pixels_log_prob(x, y).sum(1) for y in every], 1)
        log_p = mixture(double(of_class).flatten(2).cumsum(2))
        return -log_p.diff(prepend=log_p.new_zeros(len(x), 1)).unflatten(1, x.shape[2:]).to(x.dtype)

    def _pixels_log_prob(self, x: Tensor, labels: Labels) -> Tensor:
        return self.part_log_prob(self(x, labels), x)

    def _class_log_prob(self, x: Tensor, rows: int) -> Tensor:
        """log p(first `rows` rows of x | class) for every class, [B, K]."""
        every = every_label(self.data, len(x), x.device)
        return torch.stack([self._pixels_log_prob(x, y)[:, :, :rows].flatten(1).sum(1) for y in every], 1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], pixel by pixel.

        temperature: softmax temperature of every factor, above 0. 1: as trained; below 1: closer to the mode.
        """
        x = next(self.parameters()).new_zeros(n, *self.data.shape)
        if self.conditional:
            labels = spread_labels(labels, n, self.data, x.device)
        return self._generate(x, 0, labels, noise, progress, temperature)

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        *,
        rows: int | None = None,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> Applied:
        """Keeps the first rows of x and samples the others.

        A conditional model without labels takes the class that makes the kept rows most probable.

        rows: number of rows that are kept, 0 … H. Default: half.
        """
        rows = x.shape[2] // 2 if rows is None else rows
        if not 0 <= rows <= x.shape[2]:
            raise UsageError(f"`rows` is {rows}, but the images have {x.shape[2]} rows")
        x = x.to(next(self.parameters()))
        if self.conditional and labels is None:
            best = self._class_log_prob(x, rows).argmax(1)
            labels = spread_labels(None, len(self.data.classes), self.data, x.device)[best]
        labels = labels if self.conditional else None
        completed = self._generate(x, rows, labels, noise, progress, temperature)
        return Applied(completed, rows=("completed",), visible=first_rows(x, rows), how="kept", labels=labels)

    def _generate(
        self,
        x: Tensor,
        rows: int,
        labels: Labels,
        noise: Noise,
        progress: Progress,
        temperature: float,
    ) -> Tensor:
        """x with its first `rows` rows kept and all later values drawn in order."""
        if temperature <= 0:
            raise UsageError(f"`temperature` must be above 0, not {temperature}")
        n, _, height, width = x.shape
        u = noise.rand(n, self.parts, self.uniforms, height, width)
        x = x.clone()
        x[:, :, rows:] = 0
        split = x.unflatten(1, (self.parts, -1))  # a view [n, parts, C / parts, H, W]
        # without autocast: a draw follows the distribution that the weights define, at full precision
        with torch.autocast(x.device.type, enabled=False):
            net = self.incremental(n, labels)
            for i in range(height):
                net.row(x[:, :, i - 1] if i else torch.zeros_like(x[:, :, 0]))
                if i < rows:
                    net.keep(x[:, :, i])
                for j in range(width if i >= rows else 0):
                    for part in range(self.parts):
                        value = self.draw(net.outputs(j, part), u[:, part, :, i, j], temperature)
                        split[:, part, :, i, j] = value
                        net.put(j, part, value)
                progress(i + 1, height, x)
        return x


def grey_levels(data: DataInfo) -> int:
    if data.levels is None:
        message = "this model needs pixels with grey levels, which latents do not have"
        raise UsageError(message, hint="omit `data.latent`")
    return data.levels


def first_rows(x: Tensor, rows: int) -> Tensor:
    """A mask [B, 1, H, W]: 1 in the first `rows` rows of the images x [B, C, H, W], 0 below."""
    return (torch.arange(x.shape[2], device=x.device) < rows).to(x)[:, None].expand(len(x), 1, -1, x.shape[3])
