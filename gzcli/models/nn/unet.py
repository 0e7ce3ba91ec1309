"""The U-Net of DDPM (Ho 2020, appendix B), parameter for parameter the `UNet2DModel` of diffusers."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.nn.common import ClassEmbedding, stacked, zero_init
from gzcli.types import DataInfo


class UNet(nn.Module):
    """x [B, in_channels, H, W], t [B] → [B, out_channels, H, W]; any H and W, odd ones included.

    channels: width of each level, halving the resolution between levels; `layers` residual blocks a level
    (one more on the way up). attention[i]: self-attention after the blocks of level i; the middle always has
    it.
    head_dim: channels of an attention head, None = one head. classes: K > 0 adds a table of K + 1 labels to
    the time embedding. scale_shift: the time embedding scales and shifts the second norm instead of being
    added before it.
    flip, freq_shift, down_padding: conventions of checkpoints from elsewhere (Ho's own: False, 1, 0).
    Output convolution and the last layer of each branch start at zero. Raises UsageError where sizes do not
    fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: tuple[int, ...] = (32, 64, 64),
        layers: int = 2,
        attention: tuple[bool, ...] = (False, False, True),
        head_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        eps: float = 1e-5,
        classes: int = 0,
        scale_shift: bool = False,
        flip: bool = True,
        freq_shift: float = 0.0,
        down_padding: int = 1,
    ):
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": channels,
            "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            "layers_per_block": layers,
            "attention_head_dim": head_dim,
            "dropout": dropout,
            "num_class_embeds": classes + 1 if classes else None,  # the null label is the last
            "norm_num_groups": groups,
            "attn_norm_num_groups": groups,
            "norm_eps": eps,
            "flip_sin_to_cos": flip,
            "freq_shift": freq_shift,
            "downsample_padding": down_padding,
            "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        }
        for c in channels:
            for what, part in (("norm groups", groups), ("channels a head", head_dim or c)):
                if c % part:
                    raise UsageError(f"a level of {c} channels does not divide into {part} {what}")
        dim = 4 * channels[0]
        self.dim, self.flip, self.freq_shift = channels[0], flip, freq_shift
        self.time = nn.Sequential(nn.Linear(channels[0], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = ClassEmbedding(classes, dim) if classes else None

        def stage(
            widths: list[tuple[int, int]], attend: list[bool], resample: nn.Module | None = None
        ) -> Stage:
            blocks = [ResBlock(i, o, dim, groups, eps, dropout, scale_shift) for i, o in widths]
            attentions = [
                Attention(o, head_dim or o, groups, eps) if a else None
                for (_, o), a in zip(widths, attend, strict=True)
            ]
            return Stage(blocks, attentions, resample)

        c, skips, last = channels[0], [channels[0]], len(channels) - 1
        self.conv_in = stacked(nn.Conv2d(in_channels, c, 3, padding=1), 0)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, o in enumerate(channels):
            widths = [(c if j == 0 else o, o) for j in range(layers)]
            self.down.append(
                stage(widths, [attention[i]] * layers, Down(o, down_padding) if i < last else None)
            )
            skips += [o] * (layers + (i < last))
            c = o
        self.mid = stage([(c, c), (c, c)], [True, False])
        for i, o in reversed(list(enumerate(channels))):
            widths = [((c if j == 0 else o) + skips.pop(), o) for j in range(layers + 1)]
            self.up.append(stage(widths, [attention[i]] * (layers + 1), Up(o) if i else None))
            c = o
        self.norm_out = nn.GroupNorm(groups, c, eps)
        self.conv_out = stacked(zero_init(nn.Conv2d(c, out_channels, 3, padding=1)), 0)

    @classmethod
    def of(
        cls,
        data: DataInfo,
        *,
        channels: int,
        mult: tuple[int, ...],
        attention: tuple[int, ...],
        conditional: bool,
        guides: int = 0,
        **options,
    ) -> UNet:
        """The net of images like `data`: levels of width channels × mult, with attention where a side has so
        many pixels. It sees `guides` channels more than it returns."""
        return cls(
            data.shape[0] + guides,
            data.shape[0],
            channels=tuple(channels * m for m in mult),
            attention=attended(data, len(mult), attention),
            classes=len(data.classes) if conditional else 0,
            **options,
        )

    def to_diffusers(self, size: tuple[int, int]) -> nn.Module:
        """A `UNet2DModel` of the same weights, for images of that size. Raises UsageError where that one
        cannot be built."""
        from diffusers import UNet2DModel

        halvings = len(self.config["block_out_channels"]) - 1
        if any(side % 2**halvings for side in size):
            raise UsageError(
                f"diffusers cannot halve {size[0]}×{size[1]} images {halvings} times",
                hint=f"train with a `data.size` that {2**halvings} divides, or a shorter `model.mult`",
            )
        other = UNet2DModel(sample_size=size, **self.config).to(next(self.parameters()).device)
        own = self.state_dict()
        other.load_state_dict({key: own[from_diffusers(key)] for key in other.state_dict()})
        return other.eval()

    def embedding(self, t: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """What every block is told of time and label: [B, 4 C]."""
        emb = self.time(time_embedding(t, self.dim, flip=self.flip, freq_shift=self.freq_shift))
        return emb if self.label is None else emb + self.label(y, len(t), drop)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """t [B], real or integer; labels y as `ClassEmbedding` takes them, None or `drop` [B] = the null
        label."""
        emb = F.silu(self.embedding(t, y, drop))
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for block, attend in stage.pairs():
                h = attend(block(h, emb))
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h)
                skips.append(h)
        for block, attend in self.mid.pairs():
            h = attend(block(h, emb))
        for stage in self.up:
            for block, attend in stage.pairs():
                h = attend(block(torch.cat([h, skips.pop()], 1), emb))
            if stage.resample is not None:
                h = stage.resample(h, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.norm_out(h)))


def attended(data: DataInfo, levels: int, attention: tuple[int, ...]) -> tuple[bool, ...]:
    """Which of the levels have a side, of `attention`, at which there is self-attention."""
    sides = [min(data.shape[1:])]
    for _ in range(levels - 1):
        sides.append((sides[-1] + 1) // 2)
    return tuple(side in attention for side in sides)


class Stage(nn.Module):
    """The residual blocks of one resolution, the attention after each, and the change of resolution that
    follows."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[Attention | None], resample: nn.Module | None
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(a or nn.Identity() for a in attentions)
        self.resample = resample

    def pairs(self):
        return zip(self.blocks, self.attentions, strict=True)


class ResBlock(nn.Module):
    """x [B, in, H, W], emb [B, dim] → [B, out, H, W]: two pre-activated 3×3 convolutions around the
    embedding, if dim > 0."""

    def __init__(
        self, c_in: int, c_out: int, dim: int, groups: int, eps: float, dropout: float, scale_shift: bool
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = stacked(nn.Linear(dim, c_out * (1 + scale_shift)), 1 + scale_shift) if dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = 0 if self.emb is None else self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + e)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the positions of x [B, C, H, W], with a residual connection."""

    def __init__(self, c: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(groups, c, eps)
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.out = zero_init(nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).mT  # [B, HW, C]
        q, k, v = (f(h).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = softmax_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + self.out(h).mT.unflatten(2, x.shape[2:])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Softmax attention of q, k, v [B, heads, N, D]; causal: no position sees a later one."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # The fused kernel's backward takes three times as long as this on a CPU (49 positions, AMX).
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(
                scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
            )
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Down(nn.Module):
    """Half the resolution by a strided convolution; padding 0 pads right and below only, as TensorFlow's
    `SAME`."""

    def __init__(self, c: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest-neighbour enlargement to the size of the skip connection it will meet, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


def time_embedding(t: Tensor, dim: int, *, flip: bool = True, freq_shift: float = 0.0) -> Tensor:
    """[B] → [B, dim] sinusoids of wavelengths 2π … 20,000π (Vaswani 2017), cosines first if `flip`; dim is
    even."""
    half = dim // 2
    freq = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - freq_shift)))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()], 1)


DIFFUSERS = [
    (r"^time_embedding\.linear_1", "time.0"),
    (r"^time_embedding\.linear_2", "time.2"),
    (r"^class_embedding", "label.table"),
    (r"^conv_norm_out", "norm_out"),
    (r"^(down|up|mid)_blocks?\b", r"\1"),
    (r"\.resnets\.", ".blocks."),
    (r"\.time_emb_proj", ".emb"),
    (r"\.conv_shortcut", ".skip"),
    (r"\.group_norm", ".norm"),
    (r"\.to_([qkv])", r".\1"),
    (r"\.to_out\.0", ".out"),
    (r"\.(down|up)samplers\.0", ".resample"),
]


def from_diffusers(key: str) -> str:
    """The name here of a parameter of diffusers' `UNet2DModel` with sinusoidal time and convolutional
    resampling."""
    for pattern, name in DIFFUSERS:
        key = re.sub(pattern, name, key)
    return key
