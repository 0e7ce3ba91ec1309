"""The selective scan of Mamba — Gu & Dao 2023, arXiv:2312.00752, eq. 2, 4 and algorithm 2 — in plain PyTorch,
linear in tokens.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,   y_t = C_t h_t          (A < 0 diagonal, so that no state grows)

The recurrence runs token by token, with one fused multiply-add each: a quotient of cumulative products would
overflow beyond short sequences. Terms that do not depend on the state are computed for a chunk of about √T
tokens at once; on a CPU, for so few images that they fit in the cache. The forward pass keeps the states
between chunks, and the backward pass recomputes the states inside them, as the authors' kernel does. That
kernel, of the package `mamba-ssm`, is used on a GPU where it is installed. A file of its own, as an algorithm
with its own backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gzcli.models.nn import to_fp32, valueless

CACHED = 2**18  # elements of a chunk's states on a CPU


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y [batch, T, D] of x and delta > 0 [batch, T, D], A < 0 [D, N], B and C [batch, T, N]; at least in
    fp32, also under autocast. Differentiable once."""
    x, delta, A, B, C = map(to_fp32, (x, delta, A, B, C))
    if x.dtype == torch.float32 and (kernel := fused(x.device)):
        return kernel(x.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous()).mT
    on_cpu = x.device.type == "cpu" and not valueless()
    rows = CACHED // (A.numel() * math.isqrt(x.shape[1])) if on_cpu else len(x)
    parts = (t.split(max(1, rows)) for t in (x, delta, B, C))
    return torch.cat([Scan.apply(x, delta, A, B, C) for x, delta, B, C in zip(*parts, strict=True)])


@cache
def fused(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel of `mamba-ssm`, of (x [batch, D, T], delta [batch, D, T], A [D, N], B [batch, N, T], C
    [batch, N, T]); None where there is none for the device."""
    if device.type != "cuda":
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


class Scan(Function):
    """The recurrence over tensors of [T, batch, N, D]: in this order both a token and a channel's row are
    contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        delta, B, C, A = (t.transpose(0, 1).contiguous() for t in (delta, B, C, A))  # [T, batch, ·], A [N, D]
        u = delta * x.transpose(0, 1)  # [T, batch, D]
        y, h, carried = torch.empty_like(u), u.new_zeros(u.shape[1], *A.shape), []
        for chunk in chunks(u):
            carried.append(h)
            states = run(delta[chunk], A, B[chunk], u[chunk], h)[1]
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
            decay, states = run(delta[chunk], A, B[chunk], u[chunk], h)
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
        return (
            (du * delta).transpose(0, 1),
            ddelta.transpose(0, 1),
            dA.mT,
            dB.transpose(0, 1),
            dC.transpose(0, 1),
        )


def chunks(u: Tensor) -> Iterator[slice]:
    """The tokens of u [T, batch, D] in about √T chunks of √T tokens, which keeps the fewest states."""
    size = math.isqrt(len(u))
    return (slice(i, min(i + size, len(u))) for i in range(0, len(u), size))


def run(delta: Tensor, A: Tensor, B: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The decays exp(Δ A) and the states after each of L tokens that follow the state h [batch, N, D], both
    [L, batch, N, D]."""
    decay = (delta[:, :, None] * A).exp_()
    states = B[..., None] * u[:, :, None]
    for t in range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states
