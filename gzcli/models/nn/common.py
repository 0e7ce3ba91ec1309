"""Labels, grey levels, statistics over ranks: the small things every family needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.types import DataInfo

FLOAT64 = ("cpu", "cuda")  # devices that surely compute in float64; MPS does not even hold it


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
    """The labels of n samples of a conditional model: as asked, else i % K ([n] int64, or [n, K] one-hot if
    multi-label)."""
    if labels is not None:
        return labels.to(device)
    y = torch.arange(n, device=device) % len(data.classes)
    return nn.functional.one_hot(y, len(data.classes)).float() if data.multilabel else y


@torch.no_grad()
def best_labels(distance: Callable[[Tensor], Tensor], y: Tensor, data: DataInfo) -> tuple[Tensor, Tensor]:
    """The labels y [B] or [B, K], and their distance [B], after each class was tried in their place, row by
    row, or, where there may be several, was added or taken away."""
    y, best = y.clone(), distance(y)
    for k in range(len(data.classes)):
        other = y.clone()
        if data.multilabel:
            other[:, k] = 1 - other[:, k]
        else:
            other.fill_(k)
        d = distance(other)
        better = d < best
        best = torch.where(better, d, best)
        y = torch.where(better[:, None] if data.multilabel else better, other, y)
    return y, best


def at_least(least: int, **values: int | None) -> None:
    """Raises UsageError for an option, named by its keyword, that is smaller; None is one that was not
    given."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"`{name}` must be {least} or more, not {value}")


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Images in [-1, 1] as grey levels 0 … levels − 1, int64 of the same shape."""
    return ((x + 1) * ((levels - 1) / 2)).round().clamp_(0, levels - 1).long()


def from_levels(k: Tensor, levels: int) -> Tensor:
    """Grey levels 0 … levels − 1 as images in [-1, 1]."""
    return k.to(torch.get_default_dtype()) * (2 / (levels - 1)) - 1


def to_fp32(t: Tensor) -> Tensor:
    """At least fp32: half precision, as autocast makes it, is raised; fp64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def double(t: Tensor) -> Tensor:
    """float64 where the device has it, for sums over pixels and images: elsewhere, as on a Mac's GPU, at
    least fp32.

    What is read on the host is better moved there first, `t.cpu().double()`, which loses nothing on any
    device.
    """
    return t.double() if t.device.type in FLOAT64 else to_fp32(t)


def zero_init(module: nn.Module) -> nn.Module:
    """Sets every parameter of `module` to zero, so that its branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def stacked(layer: nn.Module, matrices: int) -> nn.Module:
    """The layer, marked for optimizers of whole matrices (Muon): its weight is so many matrices of equal
    height, one above the other, such as 3 for the queries, keys and values of one linear layer; 0: none, as a
    first or last layer, whose rows or columns are pixels, codes or classes with units of their own."""
    layer.matrices = matrices
    return layer


@contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[bool]:
    """Inside, each batch norm of `model` is in training mode, and its running statistics become those of what
    passes through it, every image alike. Yields whether there are any: modules with buffers and a
    `momentum`."""
    norms = [m for m in model.modules() if hasattr(m, "momentum") and list(m.buffers(recurse=False))]
    before, rows = [(m, m.momentum, m.training) for m in norms], dict.fromkeys(norms, 0)

    def weigh(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[module] += len(inputs[0])
        module.momentum = len(inputs[0]) / rows[module]

    hooks = [m.train().register_forward_pre_hook(weigh) for m in norms]
    try:
        yield bool(norms)
    finally:
        for hook in hooks:
            hook.remove()
        for module, momentum, training in before:
            module.momentum = momentum
            module.train(training)


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 (or bf16) products: for what is to be inverted, or the same everywhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
