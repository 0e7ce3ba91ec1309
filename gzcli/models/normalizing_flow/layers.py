"""The invertible layers of image flows. `forward` maps data to latents, and also returns log |det|.

Transforms and log-dets are computed in fp32 also under autocast. Only the networks inside couplings run in
low precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.models.nn import from_levels, full_fp32, to_fp32, within, zero_init

# a channel with a smaller standard deviation counts as constant and keeps its scale; dequantised 8-bit noise
# has 1.1e-3
MIN_STD = 1e-4


class Bijection(nn.Module):
    """An invertible layer: forward(x) -> (y, log |det dy/dx| [B], or a scalar if it is the same for every
    image), inverse(y) -> x."""

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Initialised(nn.Module):
    """A layer that the first batch initialises that passes through it while `initialising` is true."""

    initialized: Tensor  # boolean scalar, a buffer
    initialising: bool = False


@contextmanager
def initialising(model: nn.Module) -> Iterator[bool]:
    """A context in which the first batch initialises new layers. Yields whether there are any."""
    fresh = [m for m in model.modules() if isinstance(m, Initialised) and not m.initialized]
    for m in fresh:
        m.initialising = True
    try:
        yield bool(fresh)
    finally:
        for m in fresh:
            m.initialising = False


def moments(x: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of each channel of x [B, C, H, W], over the batch of all ranks."""
    x = to_fp32(x)
    mean = ranks.mean_over_ranks(x.mean((0, 2, 3)), module)
    return mean, ranks.mean_over_ranks((x - per_channel(mean)).square().mean((0, 2, 3)), module).sqrt()


class ActNorm(Bijection, Initialised):
    """y = (x + bias) · exp(log_scale), with zero mean and unit variance on the first batch (Glow, §3.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialising:
            self.initialise(x)
        y = (x + per_channel(self.bias)) * per_channel(self.log_scale.exp())
        return y, self.log_scale.sum() * x[0, 0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        return y * per_channel((-self.log_scale).exp()) - per_channel(self.bias)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Fits the scale and the bias to the batch of all ranks, once."""
        mean, std = moments(x, self)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.where(std > MIN_STD, std, 1.0).log())
        self.initialized.fill_(True)


def per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def dequantise(x: Tensor, levels: int, u: Tensor) -> tuple[Tensor, float]:
    """Images [B, C, H, W] in [-1, 1] as v = (k + u) / levels in [0, 1), with u uniform on [0, 1); and the
    term −D·log levels, because E_u[log p_v(v)] − D log L is a lower bound of log P(k) (Theis 2016, eq. 4)."""
    k = (x + 1) * ((levels - 1) / 2)
    return (k + u) / levels, -math.log(levels) * x[0].numel()


def quantise(v: Tensor, levels: int) -> Tensor:
    """The inverse of `dequantise`: the image in [-1, 1] of the grey levels whose bins contain v."""
    return from_levels(within((v * levels).floor(), 0, levels - 1), levels)


def squeeze(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, 4C, H/2, W/2], channels-last: each 2×2 square becomes channels (Dinh 2017, §3.6)."""
    B, C, H, W = x.shape
    squares = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, H/2, W/2, C, 2, 2]
    return squares.reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    B, C, H, W = x.shape
    squares = x.view(B, C // 4, 2, 2, H, W).permute(0, 4, 2, 5, 3, 1)  # [B, H, 2, W, 2, C/4]
    return squares.reshape(B, 2 * H, 2 * W, C // 4).permute(0, 3, 1, 2)


def gaussian_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, 1) summed over all but the first dimension, [B]."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def log_logistic(y: Tensor) -> Tensor:
    """The log-density of the standard logistic distribution, summed over all but the first dimension, [B]."""
    return -(F.softplus(y) + F.softplus(-y)).flatten(1).sum(1)


class Logit(Bijection):
    """logit(alpha/2 + (1 − alpha) v) for v in [0, 1] (Dinh 2017, §4.1)."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        p = self.alpha / 2 + (1 - self.alpha) * v
        y = p.log() - (-p).log1p()
        # d logit / dp = 1 / (p (1 − p)), and log p + log(1 − p) = −softplus(−y) − softplus(y)
        log_det = F.softplus(y) + F.softplus(-y) + math.log(1 - self.alpha)
        return y, log_det.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.alpha / 2) / (1 - self.alpha)


class InvertibleConv1x1(Bijection):
    """y = W x at each pixel with W = P L (U + diag(s)): log |det W| = Σ log |s| (Glow, §3.2, eq. 10–11). P is
    drawn once."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        s = upper.diagonal()
        self.register_buffer("permutation", p.argmax(1))
        self.register_buffer("sign", s.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(s.abs().log())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s), both [C, C]."""
        eye = torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())

    def weight(self) -> Tensor:
        lower, upper = self.factors()
        return (lower @ upper)[self.permutation]

    def inverse_weight(self) -> Tensor:
        """W⁻¹ = (U + diag(s))⁻¹ L⁻¹ Pᵀ, by two triangular solves."""
        lower, upper = self.factors()
        p_t = torch.eye(len(self.sign), dtype=lower.dtype, device=lower.device)[self.permutation].T
        inverse = torch.linalg.solve_triangular(lower, p_t, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inverse, upper=True)

    def forward(self, x: Tensor, norm: ActNorm | None = None) -> tuple[Tensor, Tensor]:
        """W x; or W norm(x), with ActNorm folded into W, which saves two passes over the pixels."""
        if norm is not None and norm.initialising:
            norm.initialise(x)
        with full_fp32(x.device):
            if norm is None:
                return _linear(x, self.weight()), self.log_s.sum() * x[0, 0].numel()
            weight = self.weight() * norm.log_scale.exp()
            log_det = (self.log_s + norm.log_scale).sum() * x[0, 0].numel()
            return _linear(x, weight, weight @ norm.bias), log_det

    def inverse(self, y: Tensor) -> Tensor:
        with full_fp32(y.device):
            return _linear(y, self.inverse_weight())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matrix and the bias applied at each pixel, in one product if x is channels-last."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


# ---- couplings and their networks


class AffineCoupling(Bijection):
    """y₁ = x₁, y₂ = (x₂ + t(x₁)) · exp(s(x₁)) on halves of the channels (Glow, table 1), the first changed if
    `flip`.

    s = a · tanh(raw) has a learned range a for each channel. The bound stabilises training; a can still grow
    to the scales of 1e3 that dequantised constant pixels need.
    """

    outputs = 2  # outputs of the network for each changed channel

    def __init__(self, channels: int, net: nn.Module, *, flip: bool = False):
        super().__init__()
        self.net, self.flip = net, flip
        changed = channels // 2 if flip else channels - channels // 2
        self.log_range = nn.Parameter(torch.full((changed,), math.log(2.0)))

    def shift_and_log_scale(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = x1 if context is None else torch.cat([x1, context], 1)
        shift, raw = split_channels(self.net(inputs), x1.dtype)
        return shift, per_channel(self.log_range.exp()) * raw.tanh()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return split_channels(x)[::-1] if self.flip else split_channels(x)

    def join(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([x2, x1] if self.flip else [x1, x2], 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = self.split(x)
        shift, log_scale = self.shift_and_log_scale(x1, context)
        return self.join(x1, (x2 + shift) * log_scale.exp()), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        y1, y2 = self.split(y)
        shift, log_scale = self.shift_and_log_scale(y1, context)
        return self.join(y1, y2 * (-log_scale).exp() - shift)


class AdditiveCoupling(Bijection):
    """y₁ = x₁, y₂ = x₂ + t(x₁) (NICE, Dinh 2014): volume-preserving."""

    outputs = 1

    def __init__(self, channels: int, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split_channels(x)
        return torch.cat([x1, x2 + self.net(x1).to(x.dtype)], 1), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = split_channels(y)
        return torch.cat([y1, y2 - self.net(y1).to(y.dtype)], 1)


class SplitPrior(nn.Module):
    """Takes x₂, half of the channels, out of the flow as eps = (x₂ − mean(x₁)) / std(x₁) ~ N(0, 1) (Glow,
    §3.6): forward(x) -> (x₁, eps, log |det d eps / d x₂|); inverse(x₁, eps) -> x"""

    def __init__(self, channels: int):
        super().__init__()
        self.net = ZeroConv(channels // 2, 2 * (channels - channels // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x1, x2 = split_channels(x)
        mean, log_std = split_channels(self.net(x1), x1.dtype)
        return x1, (x2 - mean) * (-log_std).exp(), -log_std.flatten(1).sum(1)

    def inverse(self, x1: Tensor, eps: Tensor) -> Tensor:
        mean, log_std = split_channels(self.net(x1), x1.dtype)
        return torch.cat([x1, mean + eps * log_std.exp()], 1)


class Permute(Bijection):
    """A permutation of the channels of x."""

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]):
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("back", torch.tensor(order).argsort(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(())

    def inverse(self, y: Tensor) -> Tensor:
        return y[:, self.back]


def checkerboard(channels: int) -> list[int]:
    """The order of squeezed channels with the black squares of a checkerboard in the first half. In a square
    (a b / c d), a and d are black, so a split into halves is a checkerboard mask."""
    return sorted(range(channels), key=lambda i: i % 4 in (1, 2))


def split_channels(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The first C // 2 channels and the rest, cast to `dtype`."""
    # a cast makes the half dense, which speeds up elementwise kernels
    first, second = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
    return (first, second) if dtype is None else (first.to(dtype), second.to(dtype))


class ZeroConv(nn.Conv2d):
    """A 3×3 convolution that starts at zero, times exp(3 · log_scale), learned (Glow's `Conv2dZeros`)."""

    bias: Tensor

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)
        zero_init(self)
        self.log_scale = nn.Parameter(torch.zeros(out))

    def forward(self, h: Tensor) -> Tensor:
        scale = (3 * self.log_scale).exp()  # scales the weights, so that it costs nothing per pixel
        return F.conv2d(h, self.weight * scale[:, None, None, None], self.bias * scale, padding=1)


class ActNormConv(nn.Module):
    """A convolution and ActNorm, folded into the weights, which costs nothing per pixel."""

    def __init__(self, channels: int, out: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
        self.norm = ActNorm(out)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm.initialising:
            self.norm.initialise(self.conv(h))
        scale = self.norm.log_scale.exp()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.norm.bias * scale
        return F.conv2d(h, weight, bias, padding=self.conv.padding)


class ConvNet(nn.Module):
    """Glow's network: convolutions of 3×3, 1×1 and 3×3, the first two with ActNorm and ReLU."""

    def __init__(self, channels: int, out: int, hidden: int):
        super().__init__()
        self.first = ActNormConv(channels, hidden, 3)
        self.second = ActNormConv(hidden, hidden, 1)
        self.last = ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        return self.last(F.relu(self.second(h), inplace=True))
