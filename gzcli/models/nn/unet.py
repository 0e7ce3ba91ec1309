"""The U-Net of DDPM (Ho 2020, appendix B), parameter for parameter the `UNet2DModel` of diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.types import DataInfo
from gzcli.models.nn import ClassEmbedding, Classes, Modules, stacked, with_rows, zero_init
from gzcli.models.nn.layers import Attention, GroupNorm

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_LAST_SIDE = 7  # least side of the last level, in positions
LEVEL_WIDTHS = (1, 2, 2, 2, 4, 4)  # widths of the levels, the last for all further ones
ATTENDED = (16, 8)  # sides, in positions, near which levels have self-attention
MAX_LAST_SIDE = 22  # the largest such side


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Details in which published U-Nets differ.

    downsample_padding: zero padding of strided convolutions: 1 on each side, or 0: only one row and one
      column at the end, as in DDPM's code.
    flip_sin_to_cos: whether cosines come first in the embedding of the time.
    freq_shift: number that is subtracted from the number of frequencies in their exponents.
    norm_eps: number added to the variance in group normalisation.
    resnet_time_scale_shift: how the embedding of time and label enters a residual block: added before the
      second norm (default), or as scale and shift of that norm (scale_shift; Dhariwal & Nichol 2021,
      arXiv:2105.05233).
    downsample_type: layer that changes the resolution: a convolution (conv), or a residual block
      whose two branches are averaged or repeated (resnet; the same paper).
    """

    downsample_padding: Literal[0, 1] = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    downsample_type: Literal["conv", "resnet"] = "conv"


@dataclass(frozen=True)
class UNetOptions(Constants):
    """The sizes of a U-Net.

    channels: width of the first level, in feature maps.
    mult: width of each level as a multiple of `channels`. Every level halves the resolution. Default: widths
      1, 2, 2, 2, 4, 4, down to 7 … 13 positions on the shorter side.
    layers: residual blocks of each level of the encoder; the decoder has one more.
    attention: resolutions at which a level has self-attention. The lowest level always has it. Default: those
      nearest to 16 and 8.
    head_dim: channels of an attention head. Default: one head.
    dropout: dropout rate of each residual block.
    groups: groups of each group normalization. Must divide the width of every level.
    patch: patch size (space-to-depth factor). Images are zero-padded to a multiple of it.
    """

    channels: int = 32
    mult: tuple[int, ...] | None = None
    layers: int = 1
    attention: tuple[int, ...] | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    groups: int = 8
    patch: int = 1


@dataclass(frozen=True)
class Levels:
    """The resolutions of a U-Net, the finest first.

    channels: width of each resolution.
    attention: whether each resolution has self-attention.
    layers: residual blocks of each resolution in the encoder; the decoder has one more.
    head_dim: channels of an attention head; None: one head.
    constants: constants of the layers.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    attention: tuple[bool, ...] = (False, False, True)
    layers: int = 2
    head_dim: int | None = None
    constants: Constants = Constants()


class UNet(nn.Module):
    """x [B, in_channels, H, W], t [B] → [B, out_channels, H, W]; any H and W, odd ones included.

    The last convolution of each residual branch and the output start at zero, so that a new network returns
    zero. With `classes`, the embedding of a label, or of a null label, is added to that of the time. With
    `scale_shift`, the embedding scales and shifts the second norm instead of being added before it. Raises
    UsageError for incompatible sizes."""

    any_size = True  # a U-Net trained at one size draws other sizes too, because no weight belongs to a place

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: Levels,
        *,
        dropout: float = 0.0,
        groups: int = 8,
        patch: int = 1,
        classes: Classes = 0,
        scale_shift: bool = False,
    ):
        super().__init__()
        channels, attention, head_dim = levels.channels, levels.attention, levels.head_dim
        constants, eps = levels.constants, levels.constants.norm_eps
        scale_shift = scale_shift or constants.resnet_time_scale_shift == "scale_shift"
        sizes = (4 * channels[0], groups, eps, dropout, scale_shift)
        resnet, padding = constants.downsample_type == "resnet", constants.downsample_padding
        for c in channels:
            if c % (head_dim or c):
                raise UsageError(
                    f"a level of {c} channels cannot be divided into heads of {head_dim} channels"
                )
        self.config = config_of(levels, dropout, groups, scale_shift=scale_shift)
        self.config |= {"in_channels": in_channels, "out_channels": out_channels}
        self.embed_time = partial(
            time_embedding,
            dim=channels[0],
            freq_shift=constants.freq_shift,
            cos_first=constants.flip_sin_to_cos,
        )
        self.dim, self.patch, dim = channels[0], patch, 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = ClassEmbedding(classes, dim) if classes else None
        # the null label is the last
        self.config["num_class_embeds"] = self.label.classes + 1 if self.label else None

        def parts(widths: list[tuple[int, int]], *attend: bool) -> tuple[list[Any], list[Any]]:
            blocks = [ResBlock(i, o, *sizes) for i, o in widths]
            outputs = zip((o for _, o in widths), attend, strict=True)
            return blocks, [Attention(o, head_dim or o, groups, eps) if a else None for o, a in outputs]

        c, skips, deepest = channels[0], [channels[0]], len(channels) - 1
        self.conv_in = stacked(nn.Conv2d(in_channels * patch**2, c, 3, padding=1), 0)
        self.down: Modules[Stage] = Modules()
        self.up: Modules[UpStage] = Modules()
        for i, o in enumerate(channels):
            half = (ResDown(o, o, *sizes) if resnet else Down(o, padding)) if i < deepest else None
            widths = [(c if j == 0 else o, o) for j in range(levels.layers)]
            self.down.append(Stage(*parts(widths, *[attention[i]] * levels.layers), half))
            skips += [o] * (levels.layers + (half is not None))
            c = o
        self.mid = Stage(*parts([(c, c), (c, c)], True, False))
        for i, o in reversed(list(enumerate(channels))):
            widths = [((c if j == 0 else o) + skips.pop(), o) for j in range(levels.layers + 1)]
            double = (ResUp(o, o, *sizes) if resnet else Up(o)) if i else None
            self.up.append(UpStage(*parts(widths, *[attention[i]] * (levels.layers + 1)), double))
            c = o
        self.norm_out = GroupNorm(groups, c, eps)
        self.conv_out = stacked(zero_init(nn.Conv2d(c, out_channels * patch**2, 3, padding=1)), 0)

    @classmethod
    def of(
        cls,
        data: DataInfo,
        options: UNetOptions,
        *,
        classes: Classes = 0,
        guides: int = 0,
        outputs: int = 1,
        **more: Any,
    ) -> Self:
        """The network for images like `data`, with `guides` additional input channels and `outputs` output
        channels per image channel."""
        c, mult = data.shape[0], widths_of(data.shape, options)
        widths, attention = (
            tuple(options.channels * m for m in mult),
            attended(data.shape, len(mult), options),
        )
        constants = Constants(**{f.name: getattr(options, f.name) for f in fields(Constants)})
        levels = Levels(widths, attention, options.layers, options.head_dim, constants)
        more |= {"dropout": options.dropout, "groups": options.groups, "patch": options.patch}
        return cls(c + guides, outputs * c, levels, classes=classes, **more)

    def to_diffusers(self, size: tuple[int, ...], channels: int, *, null: bool = True) -> nn.Module:
        """A `UNet2DModel` with the same weights, for images of that size and the first channels of the
        output. Its last label is the null label. Raises UsageError if it cannot be built."""
        from diffusers import UNet2DModel

        if self.patch > 1:
            raise UsageError(
                "diffusers has no U-Net with patches", hint=advice("train with {}", setting("model.patch", 1))
            )
        halvings = len(self.config["block_out_channels"]) - 1
        if any(side % 2**halvings for side in size):
            raise UsageError(
                f"diffusers cannot halve {size[0]}×{size[1]} images {halvings} times",
                hint=f"train with a `data.size` divisible by {2**halvings}, or with a shorter `model.mult`",
            )
        config = self.config | {"out_channels": channels}
        if self.label is not None and not null:
            config["num_class_embeds"] = self.label.classes
        net: Any = UNet2DModel(sample_size=size, **config)
        state = self.state_dict()
        if self.label is not None:
            state["label.table.weight"] = self.label.null_last
        shapes = {key: len(value) for key, value in net.state_dict().items()}
        net.load_state_dict({key: state[renamed(key, DIFFUSERS_NAMES)][:n] for key, n in shapes.items()})
        return net.to(next(self.parameters()).device).eval()

    def load_diffusers(self, state: Mapping[str, Tensor]) -> None:
        """Loads the weights of a `UNet2DModel`. If it has no null label, that becomes zero. Raises
        RuntimeError if the weights do not match."""
        weights = {renamed(key, (*DIFFUSERS_NAMES, *OLD_NAMES)): value for key, value in state.items()}
        if self.label is not None:
            weights["label.table.weight"] = with_rows(weights["label.table.weight"], self.label.table.weight)
        self.load_state_dict(weights)

    def embedding(self, t: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """The embedding of time and label on which every block is conditioned: [B, 4 C]."""
        emb = self.time(self.embed_time(t))
        return emb if self.label is None else emb + self.label(y, t.shape[0], drop)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """The output at times t [B], real or integer; y and `drop` are those of `ClassEmbedding`."""
        emb = F.silu(self.embedding(t, y, drop))
        skips = [self.conv_in(patched(x, self.patch))]
        for stage in self.down:
            skips += stage(skips[-1], emb)
        h = self.mid(skips[-1], emb)[-1]
        for stage in self.up:
            h = stage(h, emb, skips)
        out = self.conv_out(F.silu(self.norm_out(h)))
        if self.patch == 1:
            return out
        return F.pixel_shuffle(out, self.patch)[..., : x.shape[-2], : x.shape[-1]]


def config_of(levels: Levels, dropout: float, groups: int, *, scale_shift: bool) -> dict[str, Any]:
    """The configuration of a `UNet2DModel`, in diffusers' names, without channels of input and output."""
    attention, resnet = levels.attention, levels.constants.downsample_type == "resnet"
    down, up = ("ResnetDownsample", "ResnetUpsample") if resnet else ("Down", "Up")
    return {
        "block_out_channels": levels.channels,
        "down_block_types": tuple(f"{'AttnDown' if a else down}Block2D" for a in attention),
        "up_block_types": tuple(f"{'AttnUp' if a else up}Block2D" for a in reversed(attention)),
        "layers_per_block": levels.layers,
        "attention_head_dim": levels.head_dim,
        "dropout": dropout,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        **asdict(levels.constants),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "upsample_type": levels.constants.downsample_type,
    }


class TimesUNet(UNet):
    """A U-Net whose second input is several times, [B, `times`]."""

    def __init__(self, *sizes: Any, times: int, **options: Any):
        super().__init__(*sizes, **options)
        self.time[0] = nn.Linear(times * self.dim, 4 * self.dim)


DIFFUSERS_NAMES = (  # patterns of the names of weights of `UNet2DModel`, and the names here
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
)

OLD_NAMES = (
    (r"\.query\b", ".q"),
    (r"\.key\b", ".k"),
    (r"\.value\b", ".v"),
    (r"\.proj_attn\b", ".out"),
)  # of 2022


def renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    """This package's name for the weight that diffusers calls `key`."""
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def positions(shape: tuple[int, ...], patch: int) -> int:
    """The number of positions on the shorter side of images of a shape [C, H, W]. Raises UsageError for a
    patch below 1."""
    if patch < 1:
        raise UsageError(f"`model.patch` cannot be {patch}", hint="set `model.patch` to 1 or more")
    return math.ceil(min(shape[1:]) / patch)


def widths_of(shape: tuple[int, ...], options: UNetOptions) -> tuple[int, ...]:
    """The width of each level, in units of `channels`, for images of a shape [C, H, W]."""
    side = positions(shape, options.patch)
    if options.mult is not None:
        return options.mult
    levels = 1
    while (side := (side + 1) // 2) >= MIN_LAST_SIDE:
        levels += 1
    return (*LEVEL_WIDTHS, *LEVEL_WIDTHS[-1:] * levels)[:levels]


def attended(shape: tuple[int, ...], levels: int, options: UNetOptions) -> tuple[bool, ...]:
    """Whether each of these levels has self-attention, for images of a shape [C, H, W]."""
    sides = [positions(shape, options.patch)]
    for _ in range(levels - 1):
        sides.append((sides[-1] + 1) // 2)
    at = options.attention
    if at is None:
        nearest = [min(sides, key=lambda side: abs(math.log(side / ideal))) for ideal in ATTENDED]
        at = tuple(side for side in nearest if side <= MAX_LAST_SIDE)
    return tuple(side in at for side in sides)


def patched(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, C p², H / p, W / p], with the pixels of each patch as channels. Sides are padded
    with zeros to a multiple of p."""
    if patch == 1:
        return x
    return F.pixel_unshuffle(F.pad(x, (0, -x.shape[-1] % patch, 0, -x.shape[-2] % patch)), patch)


class Stage(nn.Module):
    """The residual blocks of one resolution, the attention after each, and the layer that leads to the next
    one."""

    def __init__(
        self, blocks: list[ResBlock], attentions: list[Attention | None], resample: nn.Module | None = None
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(a or nn.Identity() for a in attentions)
        self.resample = resample

    def forward(self, h: Tensor, emb: Tensor | None = None) -> list[Tensor]:
        """The outputs, for h [B, C, H, W], of each block and of the change of resolution, in order."""
        outputs = []
        for block, attend in zip(self.blocks, self.attentions, strict=True):
            h = attend(block(h, emb))
            outputs.append(h)
        return outputs if self.resample is None else [*outputs, self.resample(h, emb)]


class UpStage(Stage):
    """A stage of the decoder. Its blocks also receive the encoder's outputs at their resolution."""

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:  # type: ignore[override]
        """The output of the stage; each block removes the last output of the encoder from `skips`."""
        for block, attend in zip(self.blocks, self.attentions, strict=True):
            h = attend(block(torch.cat([h, skips.pop()], 1), emb))
        return h if self.resample is None else self.resample(h, size=tuple(skips[-1].shape[-2:]), emb=emb)


class ResBlock(nn.Module):
    """Two pre-activated 3×3 convolutions of x [B, in, H, W] around the embedding [B, dim], if dim > 0."""

    def __init__(
        self, c_in: int, c_out: int, dim: int, groups: int, eps: float, dropout: float, scale_shift: bool
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb: nn.Module | None = None
        if dim:
            self.emb = stacked(nn.Linear(dim, c_out * (1 + scale_shift)), 1 + scale_shift)
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        h = self.conv1(self.resized(F.silu(self.norm1(x)), size))
        x = self.resized(x, size)
        if self.emb is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + self.emb(emb)[:, :, None, None])
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))

    def resized(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """The input of either branch at the resolution of the output."""
        return x


class ResDown(ResBlock):
    """A residual block that halves the resolution."""

    def resized(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True)


class ResUp(ResBlock):
    """A residual block that enlarges to the size of the next skip connection."""

    def resized(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return F.interpolate(x, size=size, mode="nearest")


class Down(nn.Module):
    """Halves the resolution by a strided convolution."""

    def __init__(self, c: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest-neighbour enlargement to the size of the next skip connection, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int], emb: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


def time_embedding(t: Tensor, dim: int, *, freq_shift: float = 0.0, cos_first: bool = True) -> Tensor:
    """Embeds times: [B] → [B, dim], cosines, then sines, with wavelengths 2π … 20,000π (Vaswani 2017);
    optionally sines first. For several times, [B, k] → [B, k · dim]."""
    half = dim // 2
    freq = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - freq_shift)))
    angle = t.float()[..., None] * freq
    waves = [angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()]
    return torch.cat(waves, -1).flatten(1)
