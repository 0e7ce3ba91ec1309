"""The transformer of DiT — Peebles & Xie 2023, arXiv:2212.09748: over patches of a noised image, conditioned
on time and label by adaLN-zero."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.units import as_size
from gzcli.models.nn import ClassEmbedding, Classes, at_least, stacked, zero_init
from gzcli.models.nn.layers import LayerNorm, RMSNorm, softmax_attention
from gzcli.models.nn.unet import renamed, time_embedding

FREQUENCIES = 256  # sinusoids of the time
PATCHES = range(1, 9)  # sides of a default patch
MAX_TOKENS = 1024  # most tokens with a default patch; the cost of attention is quadratic


@dataclass(frozen=True)
class DiTOptions:
    """The sizes of a network over patches: of the transformer, or of `ZigzagNet`.

    width: features of a token of dit and zigzag. A multiple of 4, and for dit of `heads`.
    layers: blocks.
    heads: attention heads of each block of dit.
    patch: patch size in pixels, one token each. Must divide the image's height and width. Default: the size
      that gives about `tokens` patches.
    tokens: approximate number of patches of dit and zigzag if `patch` is not set. The papers use 256.
    block: block of dit: as in DiT (plain), or with RMS norm, rotary positions, normalized queries and keys,
      and a gated MLP (modern; Li & He 2025, arXiv:2511.13720, table 4).
    norm_eps: number added to the variance in the norm before each plain MLP.
    expand: inner channels of a block of zigzag as a multiple of `width`.
    state: size of the state of each inner channel.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    patch: int | None = None
    tokens: int = 256
    block: Literal["plain", "modern"] = "plain"
    norm_eps: float = 1e-6
    expand: int = 2
    state: int = 16


class DiTNet(nn.Module):
    """x [B, C, H, W], t [B] or [B, times] → [B, outputs · C, H, W], with one token per patch. With classes,
    the embedding of the label, or of a null label, is added to that of the time. Raises UsageError for
    incompatible sizes."""

    position: Tensor  # [T, width]

    def __init__(
        self,
        shape: tuple[int, ...],
        options: DiTOptions,
        *,
        classes: Classes = 0,
        freq_shift: float = 0.0,
        outputs: int = 1,
        times: int = 1,
    ):
        width, layers, heads = options.width, options.layers, options.heads
        super().__init__()
        c, h, w = shape
        patch = patch_side(h, w, options.patch, options.tokens)
        if width % heads or width % 4:
            raise UsageError(
                f"`model.width` is {width}, but must be divisible by `model.heads`, {heads}, and by 4",
                hint=f"set `model.width` to {max(1, round(width / math.lcm(heads, 4))) * math.lcm(heads, 4)}",
            )
        if options.block == "modern" and width // heads % 4:
            hint = f"set `model.width` to {max(1, round(width / heads / 4)) * 4 * heads}"
            raise UsageError(
                f"rotary positions need heads whose width is a multiple of 4, not {width // heads}", hint=hint
            )
        self.patch, self.grid, self.freq_shift = patch, (h // patch, w // patch), freq_shift
        self.plain = options.block == "plain"
        self.config: dict[str, Any] = {
            "in_channels": c,
            "out_channels": outputs * c,
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "patch_size": patch,
            "norm_eps": options.norm_eps,
        }
        self.embed = stacked(nn.Conv2d(c, width, patch, stride=patch), 0)
        self.register_buffer("position", sincos(self.grid, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(times * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = ClassEmbedding(classes, width) if classes else None
        self.config["num_embeds_ada_norm"] = self.label.classes if self.label else 1
        plain = partial(Block, width, heads, options.norm_eps)
        block = plain if self.plain else partial(ModernBlock, width, heads, self.grid)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = stacked(nn.Linear(width, 2 * width), 2)
        self.out = stacked(nn.Linear(width, patch * patch * outputs * c), 0)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets the paper's initial weights: every block is the identity, and the output is zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        if self.label is not None:
            self.label.init_weights(0.02)
        for layer in (
            *(block.get_submodule("modulation") for block in self.blocks),
            self.modulation,
            self.out,
        ):
            zero_init(layer)

    def to_diffusers(self) -> nn.Module:
        """A `DiTTransformer2DModel` with the same weights. Without labels, it has one label, whose embedding
        is zero. Raises UsageError if it cannot be built."""
        from diffusers import DiTTransformer2DModel

        rows, columns = self.grid
        if rows != columns or self.freq_shift != 1 or not self.plain:
            raise UsageError(
                "diffusers supports a DiT only for square images, with plain blocks and its time embedding"
            )
        net: Any = DiTTransformer2DModel(sample_size=rows * self.patch, **self.config)
        weights = self.state_dict()
        unlabelled = torch.zeros(2, self.position.shape[1])
        weights["label.table.weight"] = unlabelled if self.label is None else self.label.null_last
        state = net.state_dict()
        for key in state:
            name = renamed(key, DIFFUSERS_NAMES)
            if part := re.search(r"\.attn1\.to_([qkv])\.", name):
                state[key] = weights[name.replace(part[0], ".qkv.")].chunk(3)["qkv".index(part[1])]
            elif name in weights:  # the others are tables of positions
                state[key] = weights[name]
        net.load_state_dict(state)
        return net.to(self.position.device).eval()

    def load_diffusers(self, state: Mapping[str, Tensor]) -> None:
        """Loads the weights of a `DiTTransformer2DModel`. Its blocks have equal time embeddings, so the first
        one is used. Raises RuntimeError if the weights do not match."""
        weights: dict[str, Tensor] = {}
        stacks: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name = renamed(key, DIFFUSERS_NAMES)
            if part := re.search(r"\.attn1\.to_([qkv])\.", name):
                stacks.setdefault(name.replace(part[0], ".qkv."), {})[part[1]] = value
            elif name != "pos_embed.pos_embed":
                weights.setdefault(name, value)
        weights |= {name: torch.cat([parts[key] for key in "qkv"]) for name, parts in stacks.items()}
        if self.label is None:
            weights.pop("label.table.weight", None)
        self.load_state_dict(weights)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """The output at times t [B], real or integer; y and `drop` are those of `ClassEmbedding`."""
        c = self.time(time_embedding(t, FREQUENCIES, freq_shift=self.freq_shift))  # [B, width]
        if self.label is not None:
            c = c + self.label(y, x.shape[0], drop)
        c = F.silu(c)
        h = self.embed(x).flatten(2).mT + self.position  # [B, T, width]
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        h = self.out(modulate(self.norm(h), shift, scale))
        # [B, rows, columns, p, q, C]
        h = h.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, self.grid)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


DIFFUSERS_NAMES = (  # patterns of the weights of `DiTTransformer2DModel`, and the names in `DiTNet`
    (r"^pos_embed\.proj", "embed"),
    (r"^proj_out_1", "modulation"),
    (r"^proj_out_2", "out"),
    # every block has the same embedding of the time
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1", "time.0"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2", "time.2"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.embedding_table", "label.table"),
    (r"^transformer_blocks", "blocks"),
    (r"\.norm1\.linear", ".modulation"),
    (r"\.attn1\.to_out\.0", ".out"),
    (r"\.ff\.net\.0\.proj", ".mlp.0"),
    (r"\.ff\.net\.2", ".mlp.2"),
)


def patch_side(h: int, w: int, patch: int | None, tokens: int) -> int:
    """The side of a patch; by default, `default_patch`. Raises UsageError if it does not divide h and w."""
    patch = default_patch(h, w, tokens) if patch is None else patch
    at_least(1, patch=patch)
    if h % patch or w % patch:
        fit = ", ".join(str(p) for p in range(1, min(h, w) // 2 + 1) if not (h % p or w % p))
        raise UsageError(
            f"images of {h}×{w} cannot be divided into patches of {patch}",
            hint=f"set `model.patch` to one of {fit}",
        )
    return patch


def default_patch(h: int, w: int, tokens: int) -> int:
    """The side in PATCHES that divides h and w and whose number of patches is closest in ratio to `tokens`.
    Raises UsageError if there are still more than MAX_TOKENS patches, because few sides divide both or the
    image is too large."""
    fit = [patch for patch in PATCHES if not (h % patch or w % patch)]
    patch = min(fit, key=lambda patch: abs(math.log(h * w / (patch**2 * tokens))))
    if h * w > MAX_TOKENS * patch**2:
        scale = min(1.0, 256 / math.sqrt(h * w))
        fits = as_size(*(max(8, math.floor(side * scale / 8) * 8) for side in (h, w)))
        raise UsageError(
            f"images of {w}×{h} make {h * w // patch**2:,} patches of {patch}×{patch}, too many to train on",
            hint=advice("use {}, or set `model.patch` or `data.latent`", setting("data.size", fits)),
        )
    return patch


class Block(nn.Module):
    """Self-attention and an MLP of h [B, T, width]. The condition c [B, width] scales and shifts their
    normalised inputs, and gates their outputs."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (LayerNorm(width, eps=e, elementwise_affine=False) for e in (1e-6, eps))
        self.qkv, self.out = stacked(nn.Linear(width, 3 * width), 3), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = stacked(nn.Linear(width, 6 * width), 6)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        qkv = self.qkv(modulate(self.norm1(h), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, D]
        h = h + gate1 * self.out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + gate2 * self.mlp(modulate(self.norm2(h), shift2, scale2))


class ModernBlock(nn.Module):
    """`Block` on a grid of patches, with the parts of current language models: RMS norms, a gated MLP, and
    queries and keys that are normalised and then rotated by the position of their patch."""

    cos: Tensor  # [T, width / heads / 2]
    sin: Tensor

    def __init__(self, width: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.heads, size, hidden = heads, width // heads, 8 * math.ceil(width / 3)
        self.norm1, self.norm2 = (RMSNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = stacked(nn.Linear(width, 3 * width), 3), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)
        self.up, self.down = stacked(nn.Linear(width, 2 * hidden), 2), nn.Linear(hidden, width)
        self.modulation = stacked(nn.Linear(width, 6 * width), 6)
        angles = rotations(grid, size)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        qkv = self.qkv(modulate(self.norm1(h), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, D]
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        h = h + gate1 * self.out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, value = self.up(modulate(self.norm2(h), shift2, scale2)).chunk(2, -1)
        return h + gate2 * self.down(F.silu(gate) * value)

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, heads, T, D] with each pair rotated by its angle (Su 2021, arXiv:2104.09864, eq. 34)."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rotations(grid: tuple[int, int], size: int) -> Tensor:
    """The angles of the pairs of a head, [rows · columns, size / 2]. Half of them follow the row and half the
    column, with frequencies from 1 to about 1/100 (Heo 2024, arXiv:2403.13298, section 3.2)."""
    freq = 100.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * freq for side in grid)
    angles = [rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)]
    return torch.cat(angles, 2).flatten(0, 1).float()


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h scaled by 1 + `scale` and shifted."""
    return h * (1 + scale) + shift


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """The embedding of positions, [rows · columns, width]: sines and cosines of the column, then of the row,
    a quarter of the width each (MAE, He 2022)."""
    freq = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = (torch.arange(side, dtype=torch.float64)[:, None] * freq for side in grid)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)  # [side, width / 2]
    positions = torch.cat([columns.expand(len(rows), -1, -1), rows[:, None].expand(-1, len(columns), -1)], 2)
    return positions.flatten(0, 1).float()
