"""Flow++ (Ho et al. 2019, "Improving Flow-Based Generative Models with Variational Dequantization and
Architecture Design", arXiv:1902.00275).

x → u ~ q(u | x) → logit → [squeeze → couplings over channels → couplings over columns] × scales → z. A
coupling transforms one half of the values by the CDF of a mixture of logistics. A network of gated
convolutions and self-attention computes its parameters from the other half. No latents are split off.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.core.units import as_size
from gzcli.models.nn.common import Modules
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import FlowOptions, ImageFlow
from gzcli.models.normalizing_flow.dequantise import grey_levels
from gzcli.models.normalizing_flow.gated import CouplingNet, CouplingOptions, GatedConv
from gzcli.models.normalizing_flow.logistic import MixLogisticCoupling
from gzcli.models.normalizing_flow.norms import ActNorm

Shape = tuple[int, int, int]  # (C, H, W)

# the two ways to halve an image: the dimension, and the length of the alternating runs
COLUMNS, CHANNELS = (3, 1), (1, 2)


def split(x: Tensor, way: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The two halves of x [B, C, H, W]: even and odd columns, as in the paper's code, or channels.

    Of squeezed channels (… a b c d, the squares (a b / c d)) the halves are the even rows a b and the odd
    rows c d.
    """
    dim, run = way
    x1, x2 = x.unflatten(dim, (-1, 2, run)).unbind(dim + 1)
    return x1.flatten(dim, dim + 1).contiguous(), x2.flatten(dim, dim + 1).contiguous()


def join(x1: Tensor, x2: Tensor, way: tuple[int, int]) -> Tensor:
    """The inverse of `split`."""
    dim, run = way
    return torch.stack([x.unflatten(dim, (-1, run)) for x in (x1, x2)], dim + 1).flatten(dim, dim + 2)


class Step(nn.Module):
    """ActNorm and 1×1 convolution of each half, a coupling that changes the second, and the halves swapped.

    shape: of a half, (C, H, W).
    options: the coupling and its network.
    context: channels of the context that the network is given beside the first half, 0 for none.
    """

    def __init__(self, shape: Shape, options: CouplingOptions, context: int = 0):
        super().__init__()
        C, H, W = shape
        self.norms: Modules[ActNorm] = Modules(ActNorm(C) for _ in range(2))
        self.convs: Modules[layers.InvertibleConv1x1] = Modules(layers.InvertibleConv1x1(C) for _ in range(2))
        net = CouplingNet(C, (2 + 3 * options.components) * C, (H, W), options, context)
        self.coupling = MixLogisticCoupling(net, options.components)

    def forward(self, x1: Tensor, x2: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The new halves, and the log-det [B]."""
        (x1, log_det1), (x2, log_det2) = (
            conv(x, norm) for x, conv, norm in zip((x1, x2), self.convs, self.norms, strict=True)
        )
        y2, log_det = self.coupling(x1, x2, context)
        return y2, x1, log_det + log_det1 + log_det2

    def inverse(self, y2: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        x2 = self.coupling.inverse(x1, y2, context)
        return tuple(
            norm.inverse(conv.inverse(x))
            for x, conv, norm in zip((x1, x2), self.convs, self.norms, strict=True)
        )


class Couplings(nn.Module):
    """An image split one way, `depth` steps over its halves, and the halves joined."""

    def __init__(
        self, shape: Shape, way: tuple[int, int], depth: int, options: CouplingOptions, context: int = 0
    ):
        super().__init__()
        self.way = way
        C, H, W = (n // 2 if dim == way[0] else n for dim, n in enumerate(shape, 1))
        self.steps: Modules[Step] = Modules(Step((C, H, W), options, context) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x1, x2), log_det = split(x, self.way), x.new_zeros(x.shape[0])
        for step in self.steps:
            x1, x2, step_log_det = step(x1, x2, context)
            log_det = log_det + step_log_det
        return join(x1, x2, self.way), log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        x1, x2 = split(y, self.way)
        for step in reversed(self.steps):
            x1, x2 = step.inverse(x1, x2, context)
        return join(x1, x2, self.way)


class Dequantiser(nn.Module):
    """u ~ q(u | x) on [0, 1)^D: normal noise through couplings over columns that are conditioned on features
    of x, then a sigmoid.

    log P(x) ≥ E_q[log p((k + u) / L) − log q(u | x)] − D log L (§3.1, eq. 12).

    squeezes: how often the image is squeezed, for the features and the couplings.
    width: channels of the features.
    depth: number of couplings.
    options: the couplings and their networks.
    """

    def __init__(self, data: DataInfo, squeezes: int, width: int, depth: int, options: CouplingOptions):
        super().__init__()
        self.levels, self.squeezes = grey_levels(data), squeezes
        C, H, W = data.shape
        C, H, W = C * 4**squeezes, H >> squeezes, W >> squeezes
        self.first = nn.Conv2d(2 * C, width, 3, padding=1)
        self.features = nn.ModuleList(GatedConv(width, 3, 0, 0.0) for _ in range(3))
        self.couplings = Couplings((C, H, W), COLUMNS, depth, options, width)

    def context(self, x: Tensor) -> Tensor:
        """The features of x for the couplings, [B, height, width, channels], of the size of a half."""
        for _ in range(self.squeezes):
            x = layers.squeeze(x)
        h = self.first(torch.cat(split(x, COLUMNS), 1)).permute(0, 2, 3, 1)
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
        log_q = layers.gaussian_log_prob(eps) - log_det + (F.softplus(y) + F.softplus(-y)).flatten(1).sum(1)
        return layers.dequantise(x, self.levels, y.sigmoid())[0], log_q


class FlowPP(ImageFlow):
    """Flow++, with a bound on the likelihood that variational dequantisation tightens.

    Latents are continuous and are not dequantised. Raises UsageError where the image cannot be halved so
    often.

    channel: number of couplings over channels at each size of the image, squeezed 0, 1, 2 … times.
    checkerboard: number of couplings over columns at each size, which follow those over channels.
    dequant_couplings: couplings of the dequantising flow.
    dequant_blocks: blocks of a coupling's network in the dequantising flow.
    """

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
        options: FlowOptions = FlowOptions(dequant="variational", logit=0.1),
    ):
        check(data.shape, channel, checkerboard, couplings)
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
            ways = [(way, count) for way, count in zip((CHANNELS, COLUMNS), counts, strict=True) if count]
            self.scales.append(Modules(Couplings(shape, *way, couplings) for way in ways))
        self.build_top([shape])

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """v [B, C, H, W] in [0, 1) → the one latent, of shape `self.shapes[0]`, and log |det dz/dv| [B]."""
        h, log_det = self.preprocess(v)
        for i, scale in enumerate(self.scales):
            h = layers.squeeze(h) if i else h
            for couplings in scale:
                h, couplings_log_det = couplings(h)
                log_det = log_det + couplings_log_det
        return [h], log_det

    def decode(self, z: list[Tensor], progress: Progress = no_progress) -> Tensor:
        """The inverse of `encode`."""
        [h] = z
        for done, scale in enumerate(reversed(self.scales), 1):
            for couplings in reversed(scale):
                h = couplings.inverse(h)
            h = layers.unsqueeze(h) if done < len(self.scales) else h
            progress(done, len(self.scales))
        return self.postprocess(h)


def check(
    shape: tuple[int, ...],
    channel: tuple[int, ...],
    checkerboard: tuple[int, ...],
    couplings: CouplingOptions,
) -> None:
    """Raises UsageError unless the lists fit together, the heads the channels, and the scales the image."""
    if len(channel) != len(checkerboard) or not any(channel + checkerboard) or channel[0]:
        raise UsageError(
            "`model.channel` and `model.checkerboard` list the couplings of each scale, and "
            "`model.channel` begins with 0",
            hint="`model.channel: [0, 2]` and `model.checkerboard: [4, 3]` are the paper's",
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
            f"{height}×{width} cannot be halved as often as `model.checkerboard={list(checkerboard)}` asks",
            hint=f"set `data.size={as_size(*fitting)}`, or fewer scales",
        )
