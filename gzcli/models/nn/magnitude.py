"""The U-Net of EDM2 — Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion
Models", arXiv:2312.02696, configuration G: every layer keeps the expected magnitude of its activations,
Σ a_i² / N = 1, and every weight has a constant magnitude. There are no biases and no learned norms."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.nn import ClassEmbedding, Classes, to_fp32
from gzcli.models.nn.unet import UNetOptions, attended, widths_of

NORM_EPS = 1e-4
RESIDUAL = 0.3  # t of the sum of a residual branch (table 6)
MAX_ACTIVATION = 256.0  # activations are clamped to ± this value (section 2.4)
FREQUENCY = 2.65 / 1000  # of ¼ ln σ, which rises by that from the least σ, .002, to the largest, 80, per time


def normalised(x: Tensor, dims: int | tuple[int, ...] = 1) -> Tensor:
    """x, normalised to a root mean square of 1 over these dimensions."""
    return x / (NORM_EPS + to_fp32(x).square().mean(dims, keepdim=True).sqrt().to(x.dtype))


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596  # E silu(N(0, 1))² = .596² (eq. 81)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)  # eq. 88


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """The concatenation, scaled so that both parts contribute equally to the next layer (eq. 103, t = ½)."""
    n, m = a.shape[1], b.shape[1]
    return torch.cat([a * ((n + m) / (2 * n)) ** 0.5, b * ((n + m) / (2 * m)) ** 0.5], 1)


class MPWeight(nn.Module):
    """A linear layer, or a convolution with a `kernel`. The weights of each output are normalised to 1 (eq.
    47). In training, they are reset to magnitude 1, so that the effective learning rate is the optimizer's
    (eq. 66)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *((kernel, kernel) if kernel else ())))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():  # bypasses the version counter: the values only change by rounding
                self.weight.data.copy_(normalised(self.weight, dims))
        w = normalised(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        return F.linear(x, w) if len(dims) == 1 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(nn.Module):
    """√2 cos(2π (f c + φ)) of times t [B], [B, features]; f ~ N(0, 1), φ ~ U(0, 1) (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features))
        self.register_buffer("phases", torch.rand(features))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.phases.dtype)[:, None] * FREQUENCY * self.frequencies + self.phases
        return math.sqrt(2) * (2 * math.pi * angle).cos()


class Uncertainty(nn.Module):
    """u(t) [B], the log of the expected error at a noise level. It minimizes loss / e^u + u, which makes all
    levels contribute equally (eq. 21 and appendix B.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.fourier, self.linear = MPFourier(128), MPWeight(128, 1)
        self.gain = nn.Parameter(torch.zeros(()))  # so that training starts unweighted

    def forward(self, t: Tensor) -> Tensor:
        return to_fp32(self.linear(self.fourier(t), self.gain)).squeeze(1)


class Block(nn.Module):
    """A residual block of x [B, inputs, H, W] and an embedding [B, features], with cosine attention unless
    `heads` is 0.

    scale: factor by which the sides are resized before the block.
    cats: channels of the encoder that are concatenated to x.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        features: int,
        heads: int,
        encoder: bool = False,
        scale: float = 1.0,
        cats: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.encoder, self.scale, self.cats, self.dropout = heads, encoder, scale, cats, dropout
        inputs += cats
        self.skip = MPWeight(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.first = MPWeight(outputs if encoder else inputs, outputs, 3)
        self.second, self.embed = MPWeight(outputs, outputs, 3), MPWeight(features, outputs)
        self.gain = nn.Parameter(torch.zeros(()))
        self.qkv = MPWeight(outputs, 3 * outputs, 1) if heads else None
        self.project = MPWeight(outputs, outputs, 1) if heads else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        if self.scale != 1:
            x = F.avg_pool2d(x, 2) if self.scale < 1 else F.interpolate(x, scale_factor=2)
        if self.encoder:
            x = normalised(self.skip(x))
        y = self.first(mp_silu(x)) * (self.embed(e, self.gain) + 1)[:, :, None, None]
        y = self.second(F.dropout(mp_silu(y), self.dropout, self.training))
        x = mp_sum(x if self.encoder else self.skip(x), y, RESIDUAL)
        if self.qkv is not None and self.project is not None:
            q, k, v = normalised(self.qkv(x).unflatten(1, (3, self.heads, -1)), 3).flatten(4).mT.unbind(1)
            y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
            x = mp_sum(x, self.project(y), RESIDUAL)
        return x.clamp(-MAX_ACTIVATION, MAX_ACTIVATION)


class MPUNet(nn.Module):
    """x [B, in_channels, H, W], t [B] → [B, out_channels, H, W]. Images are padded so that they can be
    halved."""

    any_size = True

    def __init__(self, data: DataInfo, options: UNetOptions, classes: Classes, guides: int, outputs: int):
        super().__init__()
        mult, c = widths_of(data.shape, options), data.shape[0]
        widths, layers = [options.channels * m for m in mult], options.layers
        self.patch, area, features = options.patch, options.patch**2, max(widths)
        if options.head_dim and any(w % options.head_dim for w in widths):
            narrowest = f"the {min(widths)} channels of a level"
            message = f"`model.head_dim` is {options.head_dim}, but must divide {narrowest}"
            raise UsageError(message, hint=f"set `model.head_dim` to {options.channels} or a divisor of it")
        self.side = self.patch * 2 ** (len(widths) - 1)
        heads = [
            w // (options.head_dim or w) if attends else 0
            for w, attends in zip(widths, attended(data.shape, len(widths), options), strict=True)
        ]
        self.fourier, self.time = MPFourier(widths[0]), MPWeight(widths[0], features)
        self.label = ClassEmbedding(classes, features) if classes else None
        # a channel of ones replaces biases
        self.input = MPWeight((c + guides) * area + 1, width := widths[0], 3)
        block, skips = partial(Block, features=features, dropout=options.dropout), [width]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, (w, h) in enumerate(zip(widths, heads, strict=True)):
            for scale in [0.5] * (i > 0) + [1.0] * layers:
                self.encoder.append(block(width, w, heads=h * (scale == 1), encoder=True, scale=scale))
                skips.append(width := w)
        self.decoder.extend(block(width, width, heads=h) for h in (heads[-1], 0))
        for i, (w, h) in enumerate(zip(reversed(widths), reversed(heads), strict=True)):
            if i:
                self.decoder.append(block(width, width, heads=0, scale=2.0))
            for _ in range(layers + 1):
                self.decoder.append(block(width, w, heads=h, cats=skips.pop()))
                width = w
        self.output, self.gain = MPWeight(width, outputs * c * area, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        e = self.time(self.fourier(t))
        if self.label is not None:
            e = mp_sum(e, normalised(self.label(y, len(x), drop)), 0.5)
        e, (height, width) = mp_silu(e), x.shape[2:]
        x = F.pixel_unshuffle(F.pad(x, (0, -width % self.side, 0, -height % self.side)), self.patch)
        skips = [x := self.input(torch.cat([x, torch.ones_like(x[:, :1])], 1))]
        for block in self.encoder:
            skips.append(x := block(x, e))
        for block in self.decoder:
            x = block(mp_cat(x, skips.pop()) if block.cats else x, e)
        return F.pixel_shuffle(self.output(x, self.gain), self.patch)[:, :, :height, :width]

    def to_diffusers(self, *_: Any) -> nn.Module:
        raise UsageError("diffusers has no magnitude-preserving U-Net", hint="train with `model.net=unet`")
