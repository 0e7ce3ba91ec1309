"""Ways through a latent space: between two codes, and along single coordinates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Along the great circle from a to b [..., D], which keeps the norm that a generator of N(0, I) knows."""
    cos = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-0.9995, 0.9995).unsqueeze(-1)
    omega = torch.acos(cos)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


def ways(z: Tensor, steps: int, mix: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.lerp) -> Tensor:
    """From code 0 to 1, 2 to 3, … of z [n, D], ends included: [n // 2 · steps, D], pair by pair.

    Raises UsageError for fewer than two codes.
    """
    if len(z) < 2:
        raise UsageError("`interpolate` needs pairs of images, got one", hint="give a folder of two or more images")
    a, b = z[: len(z) // 2 * 2].unflatten(0, (-1, 2)).unsqueeze(2).unbind(1)  # [pairs, 1, D] each
    return mix(a, b, torch.linspace(0, 1, steps, device=z.device)[:, None]).flatten(0, 1)


def traversal(decode: Callable[[Tensor], Tensor], z: Tensor, dims: int, steps: int, span: float) -> Tensor:
    """decode(z) [steps images a row] with one coordinate of z [1, D] moved from −span to span, a row for each of the `dims`
    coordinates whose ends differ most, the first most: [dims · steps, C, H, W]."""
    size, dims = z.shape[1], min(dims, z.shape[1])
    t = torch.linspace(-span, span, steps, device=z.device)
    ends = z.repeat(2 * size, 1)
    every = torch.arange(size, device=z.device)
    ends[every, every], ends[size + every, every] = -span, span
    images = torch.cat([decode(part) for part in ends.split(64)])
    change = (images[:size] - images[size:]).flatten(1).square().sum(1)
    rows = z.repeat(dims * steps, 1)
    chosen = change.topk(dims).indices.repeat_interleave(steps)
    rows[torch.arange(len(rows), device=z.device), chosen] = t.repeat(dims)
    return torch.cat([decode(part) for part in rows.split(64)])
