"""Interpolation between two latent codes, and traversal along single coordinates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied
from gzcli.models.nn.common import at_least


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from a to b [..., D], which keeps the norm of draws from N(0, I)."""
    cos = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-0.9995, 0.9995).unsqueeze(-1)
    omega = torch.acos(cos)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


def pairs_of(x: Tensor) -> Tensor:
    """The pairs 0 and 1, 2 and 3, … of x [n, …], without an odd last one. Raises UsageError for fewer than
    two."""
    if len(x) < 2:
        raise UsageError(
            "`interpolate` needs pairs of images, got one", hint="give a folder of two or more images"
        )
    return x[: len(x) // 2 * 2]


def interpolated(
    z: Tensor, frames: int, mix: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.lerp
) -> Tensor:
    """Codes from code 0 to 1, 2 to 3, … of z [n, D], ends included: [n // 2 · frames, D], pair by pair, each
    mix(a, b, t). Raises UsageError for fewer than two codes, or frames.
    """
    at_least(2, frames=frames)
    a, b = pairs_of(z).unflatten(0, (-1, 2)).unsqueeze(2).unbind(1)  # [pairs, 1, D] each
    return mix(a, b, torch.linspace(0, 1, frames, device=z.device)[:, None]).flatten(0, 1)


def as_interpolations(images: Tensor, frames: int) -> Applied:
    """The images [pairs · frames, C, H, W] of interpolated codes, a row for each pair."""
    ends = tuple((2 * i, 2 * i + 1) for i in range(len(images) // frames))
    marks = tuple(f"{i / (frames - 1):.2f}" for i in range(frames))
    return Applied(images, rows=tuple(f"{a} → {b}" for a, b in ends), columns=frames, marks=marks, of=ends)


def traversal(decode: Callable[[Tensor], Tensor], z: Tensor, dims: int, frames: int, span: float) -> Applied:
    """Images of z [1, D] with one coordinate moved from −span to span, a row for each of the `dims`
    coordinates that change the image most, in falling order; decode: the images [n, C, H, W] of codes [n, D].
    """
    at_least(1, dims=dims, frames=frames)
    size, dims = z.shape[1], min(dims, z.shape[1])
    t = torch.linspace(-span, span, frames, device=z.device)
    ends = z.repeat(2 * size, 1)
    every = torch.arange(size, device=z.device)
    ends[every, every], ends[size + every, every] = -span, span
    images = torch.cat([decode(part) for part in ends.split(64)])
    change = (images[:size] - images[size:]).flatten(1).square().sum(1)
    rows = z.repeat(dims * frames, 1)
    chosen = change.topk(dims).indices
    rows[torch.arange(len(rows), device=z.device), chosen.repeat_interleave(frames)] = t.repeat(dims)
    images = torch.cat([decode(part) for part in rows.split(64)])
    names, marks = tuple(f"z {i}" for i in chosen.tolist()), tuple(f"{v:+.1f}" for v in t.tolist())
    return Applied(images, rows=names, columns=frames, marks=marks, of=((0,),) * dims)
