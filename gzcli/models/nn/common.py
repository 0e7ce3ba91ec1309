"""Labels, grey levels, statistics over ranks: the small things every family needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.types import DataInfo


class ClassEmbedding(nn.Module):
    """The one door by which labels enter: [B] integers, [B, K] multi-hot, or None, the null label (row K).

    Multi-hot labels are embedded as the sum of their classes' rows; no class at all is the zero vector.
    """

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor:
        """[n, dim]; rows where `drop` [n] is true get the null label (classifier-free guidance)."""
        null = self.table.weight[self.classes]
        if y is None:
            return null.expand(n, -1)
        e = self.table(y) if y.ndim == 1 else y.to(null.dtype) @ self.table.weight[: self.classes]
        return e if drop is None else torch.where(drop[:, None], null, e)


def spread_labels(labels: Tensor | None, n: int, data: DataInfo, device: torch.device) -> Tensor:
    """The labels of n samples of a conditional model: as asked, else i % K ([n] int64, or [n, K] one-hot if multi-label)."""
    if labels is not None:
        return labels.to(device)
    y = torch.arange(n, device=device) % len(data.classes)
    return nn.functional.one_hot(y, len(data.classes)).float() if data.multilabel else y


def at_least(least: int, **values: int | None) -> None:
    """Raises UsageError for an option, named by its keyword, that is smaller; None is one that was not given."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"`{name}` must be {least} or more, not {value}")


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Images in [-1, 1] as grey levels 0 … levels − 1, int64 of the same shape."""
    return ((x + 1) * ((levels - 1) / 2)).round().clamp_(0, levels - 1).long()


def from_levels(k: Tensor, levels: int) -> Tensor:
    """Grey levels 0 … levels − 1 as images in [-1, 1]."""
    return k.to(torch.get_default_dtype()) * (2 / (levels - 1)) - 1


def full(t: Tensor) -> Tensor:
    """At least fp32: half precision, as autocast makes it, is raised; fp64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def zero_init(module: nn.Module) -> nn.Module:
    """Sets every parameter of `module` to zero, so that its branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


@torch.no_grad()
def all_mean(t: Tensor) -> Tensor:
    """The mean of a statistic over all ranks (equal batches); itself when there is one process. No gradient."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return t
    t = t.detach().clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


@torch.no_grad()
def all_rows(t: Tensor) -> Tensor:
    """The rows of all ranks, of equal number, in the order of the ranks; `t` itself when there is one process."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)
