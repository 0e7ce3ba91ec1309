"""Functions for models of every family: labels, sizes, grey levels, precision, interpolation of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gzcli.core.devices import device_kind
from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, gz
from gzcli.core.types import Applied, DataInfo

Layer = TypeVar("Layer", bound=nn.Module)
Classes = int | tuple[int, int]  # or (clusters, classes)
Labels = Tensor | None  # [B] int64 or, multi-hot, [B, K]; None if they are unknown


class Modules(nn.ModuleList, Generic[Layer]):
    """A list of modules of one type, for type checkers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Layer]: ...

        def __reversed__(self) -> Iterator[Layer]: ...


def zero_init(module: Layer) -> Layer:
    """Sets every parameter of `module` to zero, so that its branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def stacked(layer: Layer, matrices: int) -> Layer:
    """Marks a layer for an optimizer of whole matrices (Muon), and returns it.

    matrices: number of matrices of equal height in the weight, such as 3 for queries, keys and values. 0
      excludes first and last layers, whose rows or columns are pixels, codes or classes.
    """
    layer.matrices = matrices  # type: ignore[assignment]  # torch declares tensors and modules alone
    return layer


# ---- labels


class ClassEmbedding(nn.Module):
    """Embeds labels: [B] integers, [B, K] multi-hot, or None, which is the null label, row K of the table.
    Multi-hot labels are embedded as the sum of their classes' rows, so zeros stand for no class.

    For clusters within classes, the embedding is the sum of a row for the class and a row for the cluster,
    which starts at zero. Label K + 1 + i is the i-th class without a cluster.

    classes: number K of classes or clusters; or K clusters and the number of their classes, which have
      equally many clusters each, in order.
    dim: size of the embedding.
    """

    def __init__(self, classes: Classes, dim: int):
        super().__init__()
        self.classes, self.parents = classes if isinstance(classes, tuple) else (classes, 0)
        self.table = nn.Embedding(self.classes + 1 + self.parents, dim)
        self.clear_clusters()

    def clear_clusters(self) -> None:
        if self.parents:
            nn.init.zeros_(self.table.weight.data[: self.classes])

    def init_weights(self, std: float) -> None:
        """Sets the rows to normal draws, and those of clusters within classes to zero."""
        nn.init.normal_(self.table.weight, std=std)
        self.clear_clusters()

    @property
    def rows(self) -> Tensor:
        """The embedding of every label, [K + 1 + parents, dim]."""
        table = self.table.weight
        if not self.parents:
            return table
        each = self.classes // self.parents
        shared = table[self.classes + 1 :].repeat_interleave(each, 0)
        return table + nn.functional.pad(shared, (0, 0, 0, len(table) - len(shared)))

    @property
    def null_last(self) -> Tensor:
        """The embeddings of the K labels and of the null label, [K + 1, dim]."""
        return self.rows[: self.classes + 1]

    def forward(self, y: Tensor | None, n: int, drop: Tensor | None = None) -> Tensor:
        """The embeddings of n labels, [n, dim]. Rows in which the boolean `drop` [n] is true get the null
        label's."""
        null = self.table.weight[self.classes]
        if y is None:
            return null.expand(n, -1)
        rows = self.rows
        e = nn.functional.embedding(y, rows) if y.ndim == 1 else y.to(null.dtype) @ rows[: self.classes]
        return e if drop is None else torch.where(drop[:, None], null, e)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Loads clusters of earlier versions, which had no row for their class; the row becomes zero."""
        if (name := f"{prefix}table.weight") in state_dict:
            state_dict[name] = with_rows(state_dict[name], self.table.weight)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def with_rows(t: Tensor, like: Tensor) -> Tensor:
    """t with rows of zeros appended up to the number of rows of `like`."""
    missing = len(like) - len(t) if t.ndim and t.shape[1:] == like.shape[1:] else 0
    return t if missing <= 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


def needs_labels(conditional: bool, data: DataInfo) -> bool:
    """The value of the option `conditional`. Raises UsageError if it is true although the data have no
    labels."""
    if conditional and not data.classes:
        hint = advice(
            "set `model.conditional` to `false`, or choose a set with classes from {}", gz("list", "data")
        )
        raise UsageError("`model.conditional` needs a data set with labels", hint=hint)
    return conditional


def spread_labels(labels: Tensor | None, n: int, data: DataInfo, device: torch.device) -> Tensor:
    """The labels of n samples, [n] int64 or [n, K]; None: sample i has class i % K."""
    if labels is not None:
        return labels.to(device)
    y = torch.arange(n, device=device) % len(data.classes)
    return nn.functional.one_hot(y, len(data.classes)).float() if data.multilabel else y


def every_label(data: DataInfo, n: int, device: torch.device) -> list[Tensor]:
    """The label of each class, repeated for n images."""
    classes = spread_labels(None, len(data.classes), data, device)
    return [y.expand(n, *y.shape) for y in classes]


@torch.no_grad()
def best_labels(distance: Callable[[Tensor], Tensor], y: Tensor, data: DataInfo) -> tuple[Tensor, Tensor]:
    """Labels whose distance [B] is at most that of y, and this distance, found by coordinate descent. Each
    class in turn replaces a row's label, or is toggled in its set, if that reduces the distance."""
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


# ---- sizes and grey levels


def halved_sizes(shape: tuple[int, ...], times: int) -> list[tuple[int, int]]:
    """The (height, width) of images (C, H, W), and of their 1 … `times` halvings, rounded up."""
    sizes = [(shape[1], shape[2])]
    for _ in range(times):
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


def pyramid(shape: tuple[int, ...], coarsest: int = 4) -> list[tuple[int, int]]:
    """(height, width) of the feature maps of images (C, H, W), halved until no side is above `coarsest`."""
    times = 0
    while max(halved_sizes(shape, times)[-1]) > coarsest:
        times += 1
    return halved_sizes(shape, times)


def at_least(minimum: int, **values: float | None) -> None:
    """Raises UsageError for an option below `minimum`. Each keyword is an option; None means that it is not
    set."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UsageError(f"`{name}` must be {minimum} or more, not {value}")


def within(x: Tensor, low: float = -1, high: float = 1) -> Tensor:
    """x clamped to [low, high]. Values that are not finite become NaN, so that `gz` still detects an
    overflow."""
    return torch.where(x.isfinite(), x.clamp(low, high), math.nan)


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Images in [-1, 1] as grey levels 0 … levels − 1, int64 of the same shape."""
    return ((x + 1) * ((levels - 1) / 2)).round().clamp_(0, levels - 1).long()


def from_levels(k: Tensor, levels: int) -> Tensor:
    """Grey levels 0 … levels − 1 as images in [-1, 1]."""
    return k.to(torch.get_default_dtype()) * (2 / (levels - 1)) - 1


def on_levels(x: Tensor, levels: int) -> Tensor:
    """x rounded to the nearest grey level in [-1, 1]; NaN if it is not finite."""
    return from_levels(within(((x + 1) * ((levels - 1) / 2)).round(), 0, levels - 1), levels)


def bits_per_dim(nats: Tensor, data: DataInfo) -> Tensor:
    """Nats of an image as bits per dimension, without a gradient."""
    return nats.detach() / (math.prod(data.shape) * math.log(2))


# ---- precision


def to_fp32(t: Tensor) -> Tensor:
    """t in at least fp32: half precision, as from autocast, is converted; fp64 is unchanged."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def double(t: Tensor) -> Tensor:
    """float64 if the device has it, otherwise (MPS) at least fp32. For sums over pixels and images.

    For a value that the host reads, `t.cpu().double()` is exact on every device.
    """
    return t.double() if device_kind(t.device).float64 else to_fp32(t)


def is_shape_only() -> bool:
    """Whether new tensors have no values: on the meta device, or under FakeTensorMode."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None or torch.get_default_device().type == "meta"


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """A context of full fp32, without autocast and TF32, so that results do not depend on the device. torch
    has one TF32 setting for all threads: the first thread that enters changes it, and the last that leaves
    restores it."""
    with _precise:
        if not _precise_before:
            before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        else:
            before = _precise_before[-1]
        _precise_before.append(before)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _precise:
            products, convolutions = _precise_before.pop()
            if not _precise_before:
                torch.set_float32_matmul_precision(products)
                torch.backends.cudnn.allow_tf32 = convolutions


_precise = Lock()
_precise_before: list[tuple[str, bool]] = []  # torch's earlier settings, once for each open context


CALIBRATION = 20  # batches from which the statistics of batch norm are computed


@contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[int]:
    """A context in which batch norms (modules with buffers and a `momentum`) are in training mode. Their
    running statistics become the means over all images that pass. Yields the number of batches to pass; 0
    without batch norms."""
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


# ---- interpolation between two codes, and traversal along single coordinates


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from a to b [..., D], which keeps the norm of draws from N(0, I)."""
    cos = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-0.9995, 0.9995).unsqueeze(-1)
    omega = torch.acos(cos)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


def complete_pairs(x: Tensor) -> Tensor:
    """x [n, …] without the last image if n is odd. Raises UsageError for fewer than two images."""
    if len(x) < 2:
        hint = "give a folder of two or more images"
        raise UsageError("`interpolate` needs pairs of images, not one image", hint=hint)
    return x[: len(x) // 2 * 2]


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # (a, b, t) → a for t = 0, b for t = 1


def mix_codes(z: Tensor, frames: int, mix: Mix = torch.lerp) -> Tensor:
    """Codes [n // 2 · frames, D] that lead from code 0 to 1, 2 to 3, … of z [n, D], pair by pair, including
    both ends."""
    at_least(2, frames=frames)
    a, b = complete_pairs(z).unflatten(0, (-1, 2)).unsqueeze(2).unbind(1)  # [pairs, 1, D] each
    return mix(a, b, torch.linspace(0, 1, frames, dtype=z.dtype, device=z.device)[:, None]).flatten(0, 1)


def nearer(labels: Labels, frames: int) -> Labels:
    """The labels [n // 2 · frames, …] of interpolations between images with labels [n, …]: each frame has the
    label of the nearer end."""
    if labels is None:
        return None
    pairs, frame = (torch.arange(count, device=labels.device) for count in (len(labels) // 2, frames))
    return labels[(2 * pairs[:, None] + (frame * 2 >= frames)).flatten()]


def as_interpolations(images: Tensor, frames: int, labels: Labels = None) -> Applied:
    """The images [pairs · frames, C, H, W] of interpolated codes, a row for each pair, and their labels."""
    ends = tuple((2 * i, 2 * i + 1) for i in range(len(images) // frames))
    marks = tuple(f"{i / (frames - 1):.2f}" for i in range(frames))
    rows = tuple(f"{a} → {b}" for a, b in ends)
    return Applied(images, rows=rows, columns=frames, marks=marks, of=ends, labels=labels)


def traversal(decode: Callable[[Tensor], Tensor], z: Tensor, dims: int, frames: int, span: float) -> Applied:
    """Images of z [1, D] with one coordinate moved from −span to span. There is a row for each of the `dims`
    coordinates that change the image most, the strongest first. decode: codes [n, D] → images [n, C, H,
    W]."""
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
