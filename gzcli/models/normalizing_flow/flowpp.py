"""Flow++ (Ho et al. 2019, "Improving Flow-Based Generative Models with Variational Dequantization and
Architecture Design", arXiv:1902.00275).

x → u ~ q(u | x) → logit → [squeeze → couplings over channels → couplings over columns] × scales → z. A
coupling transforms one half of the values by the CDF of a mixture of logistics, whose parameters a net of
gated convolutions and self-attention computes from the other half. No latent is split off on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow
from gzcli.models.normalizing_flow.gated import CouplingNet, GatedConv
from gzcli.models.normalizing_flow.logistic import MixLogisticCoupling
from gzcli.models.normalizing_flow.norms import ActNorm
from gzcli.types import DataInfo, Noise, Progress, no_progress

COLUMNS, CHANNELS = (3, 1), (1, 2)  # how an image is halved: dimension, and length of the runs that alternate


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

    shape: of a half; net: options of its `CouplingNet`.
    """

    def __init__(self, shape: tuple[int, int, int], components: int, **net: Any):
        super().__init__()
        C, *size = shape
        self.norms = nn.ModuleList(ActNorm(C) for _ in range(2))
        self.convs = nn.ModuleList(layers.InvertibleConv1x1(C) for _ in range(2))
        self.coupling = MixLogisticCoupling(CouplingNet(C, (2 + 3 * components) * C, size, **net), components)

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
    """An image split one way, `depth` steps over its halves, and the halves joined; `step` builds one from a
    half's shape."""

    def __init__(
        self, shape: tuple[int, int, int], way: tuple[int, int], depth: int, step: Callable[..., Step]
    ):
        super().__init__()
        self.way = way
        half = tuple(n // 2 if dim == way[0] else n for dim, n in enumerate(shape, 1))
        self.steps = nn.ModuleList(step(half) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x1, x2), log_det = split(x, self.way), x.new_zeros(len(x))
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
    """u ~ q(u | x) on [0, 1)^D: normal noise through couplings over columns that see features of x, then a
    sigmoid.

    log P(x) ≥ E_q[log p((k + u) / L) − log q(u | x)] − D log L (§3.1, eq. 12). Both work on the image
    squeezed `squeezes` times; width: channels of the features.
    """

    def __init__(self, data: DataInfo, squeezes: int, width: int, depth: int, step: Callable[..., Step]):
        super().__init__()
        self.levels, self.squeezes = data.levels, squeezes
        C, H, W = data.shape
        C, H, W = C * 4**squeezes, H >> squeezes, W >> squeezes
        self.first = nn.Conv2d(2 * C, width, 3, padding=1)
        self.features = nn.ModuleList(GatedConv(width, 3, 0, 0.0) for _ in range(3))
        self.couplings = Couplings((C, H, W), COLUMNS, depth, partial(step, context=width))

    def context(self, x: Tensor) -> Tensor:
        """What the couplings see of x, [B, height, width, channels] of a half."""
        for _ in range(self.squeezes):
            x = layers.squeeze(x)
        h = self.first(torch.cat(split(x, COLUMNS), 1)).permute(0, 2, 3, 1)
        for conv in self.features:
            h = conv(h)
        return h

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] → v = (k + u) / L, and log q(u | x) [B]."""
        eps = y = noise.randn(*x.shape).to(x)
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

    channel, checkerboard: couplings over channels, then over columns, of the image squeezed 0, 1, 2 … times;
    hidden, blocks,
    heads, dropout: of a coupling's net; attention: on maps of so many positions at most, 0 = nowhere;
    components: logistics of a mixture; dequant_couplings, dequant_blocks: of the dequantising flow; logit,
    class_weight: see `ImageFlow`.

    Raises UsageError where the image cannot be halved so often.
    """

    paper: ClassVar[str] = "arXiv:1902.00275"

    def __init__(
        self,
        data: DataInfo,
        *,
        channel: tuple[int, ...] = (0, 2),
        checkerboard: tuple[int, ...] = (4, 3),
        hidden: int = 32,
        blocks: int = 2,
        components: int = 8,
        heads: int = 4,
        attention: int = 256,
        dropout: float = 0.0,
        dequant: Literal["variational", "uniform"] = "variational",
        dequant_couplings: int = 4,
        dequant_blocks: int = 2,
        logit: float = 0.1,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        check(data.shape, channel, checkerboard, hidden, heads)
        step = partial(
            Step, components=components, hidden=hidden, heads=heads, attention=attention, dropout=dropout
        )
        dequantiser = None
        if dequant == "variational" and data.levels is not None:  # latents are continuous already
            squeezes = next(
                i for i, depths in enumerate(zip(channel, checkerboard, strict=True)) if any(depths)
            )
            dequantiser = Dequantiser(
                data, squeezes, hidden // 3, dequant_couplings, partial(step, blocks=dequant_blocks)
            )
        super().__init__(
            data, logit=logit, dequantiser=dequantiser, conditional=conditional, class_weight=class_weight
        )
        C, H, W = data.shape
        self.scales = nn.ModuleList()
        for i, depths in enumerate(zip(channel, checkerboard, strict=True)):
            shape = C * 4**i, H >> i, W >> i
            ways = [(way, depth) for way, depth in zip((CHANNELS, COLUMNS), depths, strict=True) if depth]
            self.scales.append(
                nn.ModuleList(Couplings(shape, *way, partial(step, blocks=blocks)) for way in ways)
            )
        self.build_top([shape])

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """v [B, C, H, W] in [0, 1) → its one latent, of shape `self.shapes[0]`, and log |det dz/dv| [B]."""
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
        for i in reversed(range(len(self.scales))):
            for couplings in reversed(self.scales[i]):
                h = couplings.inverse(h)
            h = layers.unsqueeze(h) if i else h
            progress(len(self.scales) - i, len(self.scales))
        return self.postprocess(h)


def check(
    shape: tuple[int, ...], channel: tuple[int, ...], checkerboard: tuple[int, ...], hidden: int, heads: int
) -> None:
    """Raises UsageError unless sizes and numbers divide as the flow asks."""
    if len(channel) != len(checkerboard) or not any(channel + checkerboard) or channel[0]:
        raise UsageError(
            "`model.channel` and `model.checkerboard` list the couplings of each scale, and "
            "`model.channel` begins with 0",
            hint="`model.channel: [0, 2]` and `model.checkerboard: [4, 3]` are the paper's",
        )
    if hidden % heads:
        raise UsageError(f"`model.hidden={hidden}` is not divisible by `model.heads={heads}`")
    squeezes = len(channel) - 1
    _, height, width = shape
    tall, wide = 2**squeezes, 2 ** max(squeezes + bool(checkerboard[-1]), 1)
    if height % tall or width % wide:
        raise UsageError(
            f"{height}×{width} cannot be halved as often as `model.checkerboard={list(checkerboard)}` asks",
            hint=f"set `data.size={-(-max(height, width) // wide) * wide}`, or fewer scales",
        )
