"""The network of ZigMa — Hu et al. 2024, arXiv:2403.13802: a DiT with Mamba blocks instead of attention.

    h ← h + gate · Mamba(LN(h) (1 + scale) + shift)[in the block's order]

Shift, scale and gate are functions of time and label. A state-space model reads tokens in sequence. The
blocks cycle through eight continuous orders of the image, which together cover every direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gzcli.core.devices import device_kind
from gzcli.core.errors import UsageError
from gzcli.models.nn import is_shape_only, stacked, to_fp32, zero_init
from gzcli.models.nn.dit import DiTNet, DiTOptions, modulate
from gzcli.models.nn.layers import LayerNorm

KERNEL_TOKENS = 4  # tokens that the convolution covers, including the current one
DELTA = (1e-3, 1e-1)  # the range of Δ at the start
CACHE_ELEMENTS = 2**18  # elements of a chunk's states on a CPU


class ZigzagNet(DiTNet):
    """`DiTNet` with blocks of state-space models; `how` are its keywords. Raises UsageError for incompatible
    sizes."""

    def __init__(self, shape: tuple[int, ...], options: DiTOptions, **how: Any):
        width, expand, state = options.width, options.expand, options.state
        if width % 4:
            hint = f"set `model.width` to {width // 4 * 4 + 4}"
            raise UsageError(f"`model.width` is {width}, but must be divisible by 4", hint=hint)
        super().__init__(shape, replace(options, layers=0, heads=1, block="plain"), **how)
        self.plain = False
        orders = zigzags(*self.grid)
        self.blocks = nn.ModuleList(
            Block(width, expand, state, orders[i % len(orders)]) for i in range(options.layers)
        )


class Block(nn.Module):
    """A state-space model over h [B, T, width] in an order of its tokens; the condition c [B, width] scales
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
        out = self.mamba(modulate(self.norm(h), shift, scale).index_select(1, self.order))
        return h + gate * out.index_select(1, self.back)


class Mamba(nn.Module):
    """h [B, T, width] → [B, T, width], each token a function of itself and those before it (Gu & Dao 2023,
    arXiv:2312.00752, section 3.4), with the names and the initial weights of the authors' code."""

    def __init__(self, width: int, expand: int, state: int):
        super().__init__()
        inner, self.rank, self.state = expand * width, math.ceil(width / 16), state
        self.in_proj = stacked(nn.Linear(width, 2 * inner, bias=False), 2)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL_TOKENS, groups=inner)
        # it stacks three matrices of different heights
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
        x = F.silu(self.causal_conv(x))  # [B, T, D]
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(to_fp32(self.dt_proj(dt)))
        y = selective_scan(x, delta, -to_fp32(self.A_log).exp(), B, C) + self.D * x
        return self.out_proj(y * F.silu(z))

    def causal_conv(self, x: Tensor) -> Tensor:
        """The causal convolution of each channel, written as a sum because PyTorch's own is slow in bf16 on a
        CPU."""
        padded = F.pad(x, (0, 0, KERNEL_TOKENS - 1, 0))
        weight, bias = self.conv1d.weight, self.conv1d.bias
        out = x.new_zeros(()) if bias is None else bias
        for k in range(KERNEL_TOKENS):
            out = out + padded[:, k : k + x.shape[1]] * weight[:, 0, k]
        return out


def zigzags(rows: int, columns: int) -> list[Tensor]:
    """The eight orders [rows · columns] in which each token follows a neighbour: from each corner, by rows
    and by columns. Any four consecutive orders start at different corners, so four blocks also cover every
    direction."""
    grid = torch.arange(rows * columns).view(rows, columns)
    corners = [(), (0, 1), (1,), (0,)]  # axes to flip to start there: each corner follows the opposite one
    by_columns = [False, False, True, True, True, True, False, False]
    orders = []
    for dims, transposed in zip(corners * 2, by_columns, strict=True):
        order = (grid.flip(dims).T if transposed else grid.flip(dims)).clone()
        order[1::2] = order[1::2].flip(1)  # every second row from right to left
        orders.append(order.flatten())
    return orders


# ---------------------------------------------------------------------------- the selective scan


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The selective scan of Mamba (Gu & Dao 2023, eq. 2, 4 and algorithm 2), linear in tokens: y [batch, T,
    D] of x and delta > 0 [batch, T, D], A < 0 [D, N], B and C [batch, T, N]; at least in fp32, also under
    autocast.

        h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,   y_t = C_t h_t

    The recurrence runs token by token, with one fused multiply-add each: a quotient of cumulative products
    would overflow for long sequences. Terms without the state are computed for a chunk of about √T tokens at
    once. On a CPU, they are computed for as few images as fit into the cache. The forward pass keeps the
    states between chunks, and the backward pass recomputes those inside. If installed, `mamba-ssm` provides
    the kernel.
    """
    x, delta, A, B, C = map(to_fp32, (x, delta, A, B, C))
    if x.dtype == torch.float32 and (kernel := fused_scan(x.device)):
        return kernel(x.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous()).mT
    on_cpu = x.device.type == "cpu" and not is_shape_only()
    rows = CACHE_ELEMENTS // (A.numel() * math.isqrt(x.shape[1])) if on_cpu else len(x)
    parts = (t.split(max(1, rows)) for t in (x, delta, B, C))
    return torch.cat([Scan.apply(x, delta, A, B, C) for x, delta, B, C in zip(*parts, strict=True)])


@cache
def fused_scan(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel of `mamba-ssm`, of (x [batch, D, T], delta [batch, D, T], A [D, N], B [batch, N, T], C
    [batch, N, T]); None if there is none for the device."""
    if not device_kind(device).kernels:
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


class Scan(Function):
    """The recurrence over tensors [T, batch, N, D], in which a token, and the row of a channel, are
    contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        delta, B, C, A = (t.transpose(0, 1).contiguous() for t in (delta, B, C, A))  # [T, batch, ·], A [N, D]
        u = delta * x.transpose(0, 1)  # [T, batch, D]
        y, h, carried = torch.empty_like(u), u.new_zeros(u.shape[1], *A.shape), []
        for chunk in chunks(u):
            carried.append(h)
            states = run_chunk(delta[chunk], A, B[chunk], u[chunk], h)[1]
            torch.matmul(C[chunk, :, None], states, out=y[chunk, :, None])  # `out=` keeps it out of autocast
            h = states[-1].clone()
        ctx.save_for_backward(x, delta, A, B, C, u, *carried)
        return y.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, u, *carried = ctx.saved_tensors
        dy = dy.transpose(0, 1).contiguous()
        du, ddelta, dA, dB, dC = map(torch.empty_like, (u, delta, A, B, C))
        dA.zero_()
        g = torch.zeros_like(carried[0])  # of the state after the chunk
        for chunk, h in zip(reversed(list(chunks(u))), reversed(carried), strict=True):
            decay, states = run_chunk(delta[chunk], A, B[chunk], u[chunk], h)
            torch.matmul(dy[chunk, :, None], states.mT, out=dC[chunk, :, None])
            dh = C[chunk, ..., None] * dy[chunk, :, None]  # [L, batch, N, D]
            dh[-1] += g
            for t in range(len(dh) - 1, 0, -1):
                dh[t - 1].addcmul_(decay[t], dh[t])
            g = decay[0] * dh[0]
            torch.matmul(B[chunk, :, None], dh, out=du[chunk, :, None])
            torch.matmul(u[chunk, :, None], dh.mT, out=dB[chunk, :, None])
            dh[0].mul_(h)
            dh[1:].mul_(states[:-1])
            dh.mul_(decay)  # of the exponents Δ A
            ddelta[chunk] = (dh * A).sum(2)
            dA += dh.mul_(delta[chunk, :, None]).sum((0, 1))
        ddelta += du * x.transpose(0, 1)
        dx, ddelta, dB, dC = (t.transpose(0, 1) for t in (du * delta, ddelta, dB, dC))
        return dx, ddelta, dA.mT, dB, dC


def chunks(u: Tensor) -> Iterator[slice]:
    """Splits the tokens of u [T, batch, D] into about √T chunks of √T tokens, which minimises the number of
    stored states."""
    size = math.isqrt(len(u))
    return (slice(i, min(i + size, len(u))) for i in range(0, len(u), size))


def run_chunk(delta: Tensor, A: Tensor, B: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The decays exp(Δ A) and the states after each of L tokens that follow the state h [batch, N, D], both
    [L, batch, N, D]."""
    decay = (delta[:, :, None] * A).exp_()
    states = B[..., None] * u[:, :, None]
    for t in range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states
