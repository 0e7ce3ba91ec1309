"""Flow++ (Ho et al. 2019, "Improving Flow-Based Generative Models with Variational Dequantization and
Architecture Design", arXiv:1902.00275).

x → u ~ q(u | x) → logit → [squeeze → couplings over channels → couplings over columns] × scales → z. A
coupling transforms one half of the values by the CDF of a mixture of logistics. A network of gated
convolutions and self-attention (§3.3) computes its parameters from the other half. The network's features are
[B, H, W, C], the layout of layer norm and attention. No latents are split off.

The CDF F(x) = Σ_k π_k σ((x − μ_k) / s_k) gives y = logit F(x), which is monotone and onto the reals (§3.2).
Everything is computed from log F and log (1 − F), each a logsumexp, so that no tail rounds to 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.core.units import as_size
from gzcli.models.nn import Layer, Modules, to_fp32
from gzcli.models.nn.layers import softmax_attention
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow, ImageFlowOptions, grey_levels
from gzcli.models.normalizing_flow.layers import ActNorm


@dataclass(frozen=True)
class CouplingOptions:
    """The couplings and their networks.

    hidden: channels of a coupling's network.
    blocks: blocks of a coupling's network, each of a gated convolution and attention.
    components: number of logistics in a coupling's mixture.
    heads: attention heads.
    attention: largest number of positions of a feature map with attention. 0: no attention.
    dropout: probability of dropout in a coupling's network.
    """

    hidden: int = 32
    blocks: int = 2
    components: int = 8
    heads: int = 4
    attention: int = 256
    dropout: float = 0.0


class GatedConv(nn.Module):
    """norm(h + a · σ(b)), (a, b) from convolutions of concat-ELU features (§3.3.1; PixelCNN++)."""

    def __init__(self, hidden: int, second: int, context: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(2 * hidden, hidden, 3, padding=1)
        self.context = nn.Linear(2 * context, hidden) if context else None
        self.dropout = nn.Dropout(dropout)
        self.out = shrink_init(nn.Conv2d(2 * hidden, 2 * hidden, second, padding=second // 2))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        a = channels_last(self.conv, concat_elu(h))
        if self.context is not None and context is not None:
            a = a + self.context(concat_elu(context))
        return self.norm(h + F.glu(channels_last(self.out, self.dropout(concat_elu(a))), -1))


class GatedAttention(nn.Module):
    """norm(h + a · σ(b)), (a, b) from self-attention over all positions (§3.3.2)."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = shrink_init(nn.Linear(hidden, 2 * hidden))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        qkv = self.qkv(h).flatten(1, 2).unflatten(2, (3, self.heads, -1))  # [B, HW, 3, heads, D]
        a = softmax_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(h.shape)
        return self.norm(h + F.glu(self.out(self.dropout(a)), -1))


class CouplingNet(nn.Module):
    """x₁ [B, channels, H, W] → [B, out, H, W], by blocks of a gated convolution and, on small maps,
    attention. An embedding of positions is added once, at the start."""

    def __init__(
        self, channels: int, out: int, size: tuple[int, int], options: CouplingOptions, context: int = 0
    ):
        super().__init__()
        hidden, dropout = options.hidden, options.dropout
        attend = size[0] * size[1] <= options.attention
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.position = nn.Parameter(0.01 * torch.randn(*size, hidden))
        self.blocks = nn.ModuleList()
        for _ in range(options.blocks):
            self.blocks.append(GatedConv(hidden, 1, context, dropout))
            self.blocks.extend([GatedAttention(hidden, options.heads, dropout)] if attend else [])
        self.last = shrink_init(nn.Conv2d(hidden, out, 3, padding=1))

    def forward(self, x1: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x1).permute(0, 2, 3, 1) + self.position
        for block in self.blocks:
            h = block(h, context)
        return self.last(h.permute(0, 3, 1, 2))


def channels_last(conv: nn.Conv2d, h: Tensor) -> Tensor:
    return conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def concat_elu(h: Tensor) -> Tensor:
    """[elu(h), elu(−h)] along the channels of h [B, H, W, C]."""
    return F.elu(torch.cat([h, -h], -1))


@torch.no_grad()
def shrink_init(module: Layer) -> Layer:
    """The module with its initial parameters scaled by a tenth (`init_scale` of the paper's code)."""
    for p in module.parameters():
        p.mul_(0.1)
    return module


MIN_LOG_SCALE = -7.0  # the least log scale of a component, as in the paper's code
# iterations of the inverse; 2,000 random mixtures of 32 logistics with scales ≥ e^-7 took at most 32
ITERATIONS = 40


@dataclass
class LogisticCDF:
    """A mixture of K logistics for each value of x [B, …]; its parameters are [B, K, …]."""

    log_pi: Tensor
    mean: Tensor
    log_scale: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, mean: Tensor, log_scale: Tensor) -> LogisticCDF:
        return cls(logits.log_softmax(1), mean, log_scale.clamp_min(MIN_LOG_SCALE))

    def logit_cdf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = logit F(x) and log dy/dx = log f − log F − log (1 − F), f = F' the density (eq. 14)."""
        z = (x[:, None] - self.mean) * (-self.log_scale).exp()
        log_sigmoid = F.logsigmoid(z)
        below = self.log_pi + log_sigmoid  # log π_k σ(z_k)
        above = below - z  # log π_k σ(−z_k)
        density = above + log_sigmoid - self.log_scale  # log of π_k σ(z_k) σ(−z_k) / s_k
        log_cdf, log_tail = below.logsumexp(1), above.logsumexp(1)
        return log_cdf - log_tail, density.logsumexp(1) - log_cdf - log_tail

    def inverse_logit_cdf(self, y: Tensor) -> Tensor:
        """The x with logit F(x) = y, by Newton's method inside a bracket, with bisection if a step leaves it.

        The solution for a single component k is x_k = μ_k + s_k y; that of the mixture is between the
        smallest and the largest x_k. The number of iterations is fixed, so that the host need not wait.
        """
        solutions = self.mean + self.log_scale.exp() * y[:, None]
        low, high = solutions.amin(1), solutions.amax(1)
        x = best = (low + high) / 2
        least_error, step = torch.full_like(y, torch.inf), high - low
        for _ in range(ITERATIONS):
            value, log_slope = self.logit_cdf(x)
            error = value - y
            closer = error.abs() < least_error
            best, least_error = torch.where(closer, x, best), torch.where(closer, error.abs(), least_error)
            low, high = torch.where(error < 0, x, low), torch.where(error > 0, x, high)
            newton = x - error * (-log_slope).exp()
            # also bisects if Newton's step is more than half of the previous one
            good = (newton > low) & (newton < high) & ((newton - x).abs() < step / 2)
            after = torch.where(good, newton, (low + high) / 2)
            x, step = after, (after - x).abs()
        return best


class MixLogisticCoupling(nn.Module):
    """y₁ = x₁, y₂ = logit F(x₂) · exp(a) + b with a, b and the mixture F of K = `components` from x₁ (eq.
    13–16); a is bounded by tanh, and the means are relative to points spread over [−2, 2]."""

    start: Tensor

    def __init__(self, net: nn.Module, components: int):
        super().__init__()
        self.net = net
        middle = (components - 1) / 2
        start = 2 * (torch.arange(components) - middle) / max(middle, 1)
        self.register_buffer("start", start[:, None, None, None], persistent=False)

    def parameters_of(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, LogisticCDF]:
        """a and b, each [B, C₂, H, W], and the mixture."""
        K = len(self.start)
        h = to_fp32(self.net(x1, context)).unflatten(1, (2 + 3 * K, -1))
        logits, mean, log_scale = h[:, 2:].split(K, 1)
        return h[:, 0].tanh(), h[:, 1], LogisticCDF.from_logits(logits, mean + self.start, log_scale)

    def forward(self, x1: Tensor, x2: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b, mixture = self.parameters_of(x1, context)
        y, log_slope = mixture.logit_cdf(x2)
        return y * a.exp() + b, (a + log_slope).flatten(1).sum(1)

    def inverse(self, x1: Tensor, y2: Tensor, context: Tensor | None = None) -> Tensor:
        a, b, mixture = self.parameters_of(x1, context)
        return mixture.inverse_logit_cdf((y2 - b) * (-a).exp())


ImageShape = tuple[int, int, int]  # (C, H, W)
# the two ways to halve an image: the dimension, and the length of the alternating runs
COLUMN_HALVES, CHANNEL_HALVES = (3, 1), (1, 2)


def split_halves(x: Tensor, way: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The two halves of x [B, C, H, W]: even and odd columns or, of channels from `squeeze`, those of even
    and odd rows."""
    dim, run = way
    x1, x2 = x.unflatten(dim, (-1, 2, run)).unbind(dim + 1)
    return x1.flatten(dim, dim + 1).contiguous(), x2.flatten(dim, dim + 1).contiguous()


def join(x1: Tensor, x2: Tensor, way: tuple[int, int]) -> Tensor:
    dim, run = way
    return torch.stack([x.unflatten(dim, (-1, run)) for x in (x1, x2)], dim + 1).flatten(dim, dim + 2)


class FlowppStep(nn.Module):
    """ActNorm and a 1×1 convolution of each half, a coupling that changes the second half, then a swap."""

    def __init__(self, shape: ImageShape, options: CouplingOptions, context: int = 0):
        super().__init__()
        C, H, W = shape
        self.norms: Modules[ActNorm] = Modules(ActNorm(C) for _ in range(2))
        self.convs: Modules[layers.InvertibleConv1x1] = Modules(layers.InvertibleConv1x1(C) for _ in range(2))
        net = CouplingNet(C, (2 + 3 * options.components) * C, (H, W), options, context)
        self.coupling = MixLogisticCoupling(net, options.components)

    def forward(self, x1: Tensor, x2: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The new halves, and the log-det [B]."""
        x1, log_det1 = self.convs[0](x1, self.norms[0])
        x2, log_det2 = self.convs[1](x2, self.norms[1])
        y2, log_det = self.coupling(x1, x2, context)
        return y2, x1, log_det + log_det1 + log_det2

    def inverse(self, y2: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        halves = (x1, self.coupling.inverse(x1, y2, context))
        triples = zip(halves, self.convs, self.norms, strict=True)
        return tuple(norm.inverse(conv.inverse(x)) for x, conv, norm in triples)


class Couplings(nn.Module):
    """`depth` steps over the halves of an image that is split one way."""

    def __init__(
        self, shape: ImageShape, way: tuple[int, int], depth: int, options: CouplingOptions, context: int = 0
    ):
        super().__init__()
        self.way = way
        C, H, W = (n // 2 if dim == way[0] else n for dim, n in enumerate(shape, 1))
        self.steps: Modules[FlowppStep] = Modules(
            FlowppStep((C, H, W), options, context) for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x1, x2), log_det = split_halves(x, self.way), x.new_zeros(x.shape[0])
        for step in self.steps:
            x1, x2, step_log_det = step(x1, x2, context)
            log_det = log_det + step_log_det
        return join(x1, x2, self.way), log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        x1, x2 = split_halves(y, self.way)
        for step in reversed(self.steps):
            x1, x2 = step.inverse(x1, x2, context)
        return join(x1, x2, self.way)


class Dequantiser(nn.Module):
    """u ~ q(u | x) on [0, 1)^D: normal noise through couplings conditioned on x, then a sigmoid."""

    def __init__(self, data: DataInfo, squeezes: int, width: int, depth: int, options: CouplingOptions):
        super().__init__()
        self.levels, self.squeezes = grey_levels(data), squeezes
        C, H, W = data.shape
        C, H, W = C * 4**squeezes, H >> squeezes, W >> squeezes
        self.first = nn.Conv2d(2 * C, width, 3, padding=1)
        self.features = nn.ModuleList(GatedConv(width, 3, 0, 0.0) for _ in range(3))
        self.couplings = Couplings((C, H, W), COLUMN_HALVES, depth, options, width)

    def context(self, x: Tensor) -> Tensor:
        """The features of x for the couplings, [B, height, width, channels], at the size of a half."""
        for _ in range(self.squeezes):
            x = layers.squeeze(x)
        h = self.first(torch.cat(split_halves(x, COLUMN_HALVES), 1)).permute(0, 2, 3, 1)
        for conv in self.features:
            h = conv(h)
        return h

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] → v = (k + u) / L, and log q(u | x) [B]."""
        eps = y = noise.randn(*x.shape).to(x.dtype)
        for _ in range(self.squeezes):
            y = layers.squeeze(y)
        y, log_det = self.couplings(y, self.context(x))
        for _ in range(self.squeezes):
            y = layers.unsqueeze(y)
        # du/dy = σ(y) σ(−y)
        log_q = layers.gaussian_log_prob(eps) - log_det - layers.log_logistic(y)
        return layers.dequantise(x, self.levels, y.sigmoid())[0], log_q


class FlowPP(ImageFlow):
    """Flow++, whose bound on the likelihood is tightened by variational dequantisation.

    Latents are continuous and are not dequantised. Raises UsageError if the image cannot be halved that
    often.

    channel: number of channel couplings at each image size, squeezed 0, 1, 2 … times.
    checkerboard: number of column couplings at each size, after the channel couplings.
    dequant_couplings: couplings of the dequantization flow.
    dequant_blocks: blocks of a coupling's network in the dequantization flow.
    """

    takes: ClassVar[str] = "levels"

    paper: ClassVar[str] = "arXiv:1902.00275"

    def __init__(
        self,
        data: DataInfo,
        *,
        channel: tuple[int, ...] = (0, 2),
        checkerboard: tuple[int, ...] = (4, 3),
        couplings: CouplingOptions = CouplingOptions(),
        dequant_couplings: int = 4,
        dequant_blocks: int = 2,
        options: ImageFlowOptions = ImageFlowOptions(dequant="variational", logit=0.1),
    ):
        check_scales(data.shape, channel, checkerboard, couplings)
        depths = list(zip(channel, checkerboard, strict=True))
        dequantiser = partial(
            Dequantiser,
            squeezes=next(i for i, counts in enumerate(depths) if any(counts)),
            width=couplings.hidden // 3,
            depth=dequant_couplings,
            options=replace(couplings, blocks=dequant_blocks),
        )
        if data.levels is None:
            options = replace(options, dequant="uniform")
        super().__init__(data, options, dequantiser)
        C, H, W = data.shape
        self.scales: Modules[Modules[Couplings]] = Modules()
        for i, counts in enumerate(depths):
            shape = C * 4**i, H >> i, W >> i
            ways = [
                (way, count)
                for way, count in zip((CHANNEL_HALVES, COLUMN_HALVES), counts, strict=True)
                if count
            ]
            self.scales.append(Modules(Couplings(shape, *way, couplings) for way in ways))
        self.build_top([shape])

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        h, log_det = self.preprocess(v)
        for i, scale in enumerate(self.scales):
            h = layers.squeeze(h) if i else h
            for couplings in scale:
                h, couplings_log_det = couplings(h)
                log_det = log_det + couplings_log_det
        return [h], log_det

    def decode(self, z: list[Tensor], progress: Progress = no_progress) -> Tensor:
        [h] = z
        for count, scale in enumerate(reversed(self.scales), 1):
            for couplings in reversed(scale):
                h = couplings.inverse(h)
            h = layers.unsqueeze(h) if count < len(self.scales) else h
            progress(count, len(self.scales))
        return self.postprocess(h)


def check_scales(
    shape: tuple[int, ...],
    channel: tuple[int, ...],
    checkerboard: tuple[int, ...],
    couplings: CouplingOptions,
) -> None:
    """Raises UsageError unless the lists are consistent, the heads divide the channels, and the scales suit
    the image."""
    if len(channel) != len(checkerboard) or not any(channel + checkerboard) or channel[0]:
        raise UsageError(
            "`model.channel` and `model.checkerboard` must list the couplings of each scale, and "
            "`model.channel` must begin with 0",
            hint="use the paper's `model.channel: [0, 2]` and `model.checkerboard: [4, 3]`",
        )
    if couplings.hidden % couplings.heads:
        raise UsageError(
            f"`model.hidden={couplings.hidden}` is not divisible by `model.heads={couplings.heads}`"
        )
    squeezes = len(channel) - 1
    _, height, width = shape
    tall, wide = 2**squeezes, 2 ** max(squeezes + bool(checkerboard[-1]), 1)
    if height % tall or width % wide:
        fitting = (-(-side // wide) * wide for side in (height, width))
        raise UsageError(
            f"images of {height}×{width} cannot be halved as often as "
            f"`model.checkerboard={list(checkerboard)}` needs",
            hint=f"set `data.size={as_size(*fitting)}`, or fewer scales",
        )
