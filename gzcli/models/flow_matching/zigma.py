"""ZigMa, a DiT-style zigzag Mamba diffusion model — Hu et al. 2024, arXiv:2403.13802: flow matching by a DiT
with Mamba blocks in place of attention.

    h ← h + gate · Mamba(LN(h) (1 + scale) + shift)[in the block's order]

Shift, scale and gate are functions of time and label. A state-space model reads tokens one after another, in
an order. The blocks take turns with the eight continuous orders of the image ("heterogeneous layerwise
scan"). Together they cover every direction, at the cost of one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.flow_matching.fm import FlowMatching, FlowOptions
from gzcli.models.flow_matching.selective_scan import selective_scan
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import stacked, to_fp32, zero_init
from gzcli.models.nn.dit import DiTNet, DiTOptions, modulated
from gzcli.models.nn.layers import LayerNorm

KERNEL = 4  # tokens that the convolution sees, itself included
DELTA = (1e-3, 1e-1)  # the range of Δ at the start


@dataclass(frozen=True)
class ZigzagOptions:
    """The sizes of the network.

    width: features of a token, a multiple of 4.
    layers: number of blocks.
    patch: side in pixels of the patch that a token stands for; must divide the image's sides; null: the one
      that makes about `tokens` of an image.
    tokens: patches of an image that `patch` is chosen for where it is null.
    expand: inner channels of a block in units of `width`.
    state: size of the state of each inner channel.
    """

    width: int = 128
    layers: int = 8
    patch: int | None = None
    tokens: int = 256
    expand: int = 2
    state: int = 16


class ZigzagNet(DiTNet):
    """`DiTNet` with blocks of state-space models. Raises UsageError where sizes do not fit."""

    def __init__(self, shape: tuple[int, ...], options: ZigzagOptions, *, classes: int = 0):
        width, expand, state = options.width, options.expand, options.state
        if width % 4:
            raise UsageError(
                f"`model.width` is {width}, which must divide by 4",
                hint=f"set `model.width` to {width // 4 * 4 + 4}",
            )
        empty = DiTOptions(width=width, layers=0, heads=1, patch=options.patch, tokens=options.tokens)
        super().__init__(shape, empty, classes=classes)
        orders = zigzags(*self.grid)
        self.blocks = nn.ModuleList(
            Block(width, expand, state, orders[i % len(orders)]) for i in range(options.layers)
        )

    def to_diffusers(self) -> nn.Module:
        raise UsageError("diffusers has no blocks of state-space models")


class Block(nn.Module):
    """A state-space model over h [B, T, width] in an order of its tokens. The condition c [B, width] scales
    and shifts its normalised input, and gates its output."""

    order: Tensor  # [T]
    back: Tensor  # [T], its inverse

    def __init__(self, width: int, expand: int, state: int, order: Tensor):
        super().__init__()
        self.norm = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mamba = Mamba(width, expand, state)
        self.modulation = stacked(zero_init(nn.Linear(width, 3 * width)), 3)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c)[:, None].chunk(3, -1)
        out = self.mamba(modulated(self.norm(h), shift, scale).index_select(1, self.order))
        return h + gate * out.index_select(1, self.back)


class Mamba(nn.Module):
    """h [B, T, width] → [B, T, width], each token a function of itself and those before it (Gu & Dao 2023,
    arXiv:2312.00752, section 3.4), with the names and the initial weights of the authors' code."""

    def __init__(self, width: int, expand: int, state: int):
        super().__init__()
        inner, self.rank, self.state = expand * width, math.ceil(width / 16), state
        self.in_proj = stacked(nn.Linear(width, 2 * inner, bias=False), 2)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner)
        # it stacks three matrices of unequal heights
        self.x_proj = stacked(nn.Linear(inner, self.rank + 2 * state, bias=False), 0)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))  # [D, N], A = −1 … −N
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = map(math.log, DELTA)
        delta = (low + (high - low) * torch.rand(inner)).exp()
        self.dt_proj.bias.data = delta + (-torch.expm1(-delta)).log()  # the inverse of softplus

    def forward(self, h: Tensor) -> Tensor:
        x, z = self.in_proj(h).chunk(2, -1)
        x = F.silu(self.convolved(x))  # [B, T, D]
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(to_fp32(self.dt_proj(dt)))
        y = selective_scan(x, delta, -to_fp32(self.A_log).exp(), B, C) + self.D * x
        return self.out_proj(y * F.silu(z))

    def convolved(self, x: Tensor) -> Tensor:
        """The causal convolution of each channel of x [B, T, D], as a sum: PyTorch's depthwise convolution is
        slow in bf16 on a CPU."""
        before = F.pad(x, (0, 0, KERNEL - 1, 0))
        weight, bias = self.conv1d.weight, self.conv1d.bias
        out = x.new_zeros(()) if bias is None else bias
        for k in range(KERNEL):
            out = out + before[:, k : k + x.shape[1]] * weight[:, 0, k]
        return out


def zigzags(rows: int, columns: int) -> list[Tensor]:
    """The eight orders [rows · columns] in which each token follows a neighbour: from each corner, by rows
    and by columns.

    Of any four consecutive orders no two start at the same corner, so that a network of four blocks covers
    every direction too.
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    corners = [(), (0, 1), (1,), (0,)]  # axes to flip to start there: each corner follows the opposite one
    turned = [grid.flip(dims) for dims in corners]
    by_columns = [False, False, True, True, True, True, False, False]
    return [snake(g.T if columns else g) for g, columns in zip(turned * 2, by_columns, strict=True)]


def snake(grid: Tensor) -> Tensor:
    """The entries of a grid row by row, every second row from right to left."""
    grid = grid.clone()
    grid[1::2] = grid[1::2].flip(1)
    return grid.flatten()


class ZigMa(FlowMatching):
    """State-space blocks over patches that predict the velocity, at a cost linear in the number of patches.

    Raises UsageError for sizes that do not fit, and for a conditional model of data without labels.
    """

    paper = "Hu et al. 2024, arXiv:2403.13802"

    def __init__(
        self,
        data: DataInfo,
        *,
        zigzag: ZigzagOptions = ZigzagOptions(),
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = ZigzagNet(data.shape, zigzag, classes=labels.count(data))
        super().__init__(data, net, flow, labels)
