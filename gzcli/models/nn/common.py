"""Labels, sizes, grey levels, precision and normalisation, for every family of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from gzcli.core.devices import kind_of
from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.nn.norms import GroupNorm

CALIBRATION = 20  # batches from which the statistics of batch norm are computed

Layer = TypeVar("Layer", bound=nn.Module)


class Modules(nn.ModuleList, Generic[Layer]):
    """A list of modules of one type, for type checkers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Layer]: ...

        def __reversed__(self) -> Iterator[Layer]: ...


class ClassEmbedding(nn.Module):
    """Embeds labels: [B] integers, [B, K] multi-hot, or None, which is the null label, the last row of the
    table.

    Multi-hot labels are embedded as the sum of their classes' rows, so the zero vector stands for no class.

    classes: number of classes K.
    dim: size of the embedding.
    """

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor:
        """The embeddings of n labels, [n, dim].

        y: labels [n] or [n, K], or None for the null label.
        drop: boolean [n], true where the null label replaces the label (classifier-free guidance).
        """
        null = self.table.weight[self.classes]
        if y is None:
            return null.expand(n, -1)
        e = self.table(y) if y.ndim == 1 else y.to(null.dtype) @ self.table.weight[: self.classes]
        return e if drop is None else torch.where(drop[:, None], null, e)


def spread_labels(labels: Tensor | None, n: int, data: DataInfo, device: torch.device) -> Tensor:
    """The labels of n samples of a conditional model: those given, else sample i has class i % K.

    They are [n] int64, or [n, K] one-hot for multi-label data.
    """
    if labels is not None:
        return labels.to(device)
    y = torch.arange(n, device=device) % len(data.classes)
    return nn.functional.one_hot(y, len(data.classes)).float() if data.multilabel else y


@torch.no_grad()
def best_labels(distance: Callable[[Tensor], Tensor], y: Tensor, data: DataInfo) -> tuple[Tensor, Tensor]:
    """Labels of a smaller distance [B] than y, and that distance, by coordinate descent over the classes:
    each in turn replaces a row's label, or is added to or removed from its set, and stays where that is
    nearer."""
    y, best = y.clone(), distance(y)
    for k in range(len(data.classes)):
        changed = y.clone()
        if data.multilabel:
            changed[:, k] = 1 - changed[:, k]
        else:
            changed.fill_(k)
        d = distance(changed)
        better = d < best
        best = torch.where(better, d, best)
        y = torch.where(better[:, None] if data.multilabel else better, changed, y)
    return y, best


def halvings(shape: tuple[int, ...], times: int) -> list[tuple[int, int]]:
    """(height, width) of the feature maps of images (C, H, W): the image's own, then halved `times` times,
    rounded up."""
    sizes = [(shape[1], shape[2])]
    for _ in range(times):
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


def at_least(least: int, **values: int | None) -> None:
    """Raises UsageError for an option below `least`. Each keyword is an option; None: it is not set."""
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


def valueless() -> bool:
    """Whether new tensors have a shape and no values now: on the meta device, or under FakeTensorMode."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None or torch.get_default_device().type == "meta"


def double(t: Tensor) -> Tensor:
    """float64 where the device has it, else (MPS) at least fp32. For sums over pixels and images.

    A value that is read on the host is exact on every device by `t.cpu().double()`.
    """
    return t.double() if kind_of(t.device).float64 else to_fp32(t)


def group_norm(width: int) -> GroupNorm:
    """Group norm over `width` channels, of the most groups among 8, 4, 2 and 1 that divide them."""
    return GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width)


def zero_init(module: Layer) -> Layer:
    """Sets every parameter of `module` to zero, so that its branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def stacked(layer: Layer, matrices: int) -> Layer:
    """The layer, marked for an optimizer of whole matrices (Muon).

    matrices: how many matrices of equal height its weight stacks, as 3 for queries, keys and values; 0
      excludes the layer from such an optimizer, as suits first and last layers, whose rows or columns are
      pixels, codes or classes, with units of their own.
    """
    layer.matrices = matrices  # type: ignore[assignment]  # torch declares tensors and modules alone
    return layer


@contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[int]:
    """A context in which batch norms are in training mode, and their running statistics become the means over
    all images of the forward passes. Yields how many batches to pass, 0 without batch norms, which are
    modules with buffers and a `momentum`.
    """
    norms = [m for m in model.modules() if hasattr(m, "momentum") and list(m.buffers(recurse=False))]
    before, rows = [(m, m.momentum, m.training) for m in norms], dict.fromkeys(norms, 0)

    def weigh(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[module] += len(inputs[0])
        module.momentum = len(inputs[0]) / rows[module]  # type: ignore[assignment]

    hooks = [m.train().register_forward_pre_hook(weigh) for m in norms]
    try:
        yield CALIBRATION if norms else 0
    finally:
        for hook in hooks:
            hook.remove()
        for module, momentum, training in before:
            module.momentum = momentum
            module.train(training)


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """A context in which products and convolutions are in full fp32: no autocast, no TF32. For maps that are
    inverted, for likelihoods, and for results that must not depend on the device."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
