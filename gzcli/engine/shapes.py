"""Tensors that have a shape and no values (torch's FakeTensorMode): what a model draws and computes is found
without its memory and time.

What would be read on the host as an array is one half everywhere; a model that reads a number raises.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gzcli.core.types import Batch, Noise
from gzcli.models.base import Model

aten = torch.ops.aten
Draw = tuple[str, tuple[int, ...], int | None]  # method, shape and bound of `Noise._draw`


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# Floating-point operations by operator; torch knows the attention of GPUs alone.
FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Flops(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas: FlopCounterMode has hooks on modules, which
    do not take a gradient of a gradient."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Arrays(TorchFunctionMode):
    """Gives the host arrays of one half in the place of tensors without values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor):
            return np.full(tuple(args[0].shape), 0.5).astype(str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


class RecordedNoise(Noise):
    """Noise that writes down what is drawn; its draws are zero, or have no values."""

    def __init__(self, total: int, start: Tensor):
        self.total, self.start, self.device = total, start, start.device
        self.made: list[Draw] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.made.append((method, tuple(int(n) for n in shape), high))
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        return torch.zeros(shape, dtype=dtype, device=self.device)


@contextmanager
def shapes_only(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Inside, every new tensor has a shape alone."""
    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), mode or FakeTensorMode(allow_non_fake_inputs=True), Arrays():
            warnings.simplefilter("ignore")  # a copy of a module asks where its tensors lie
            yield
    finally:
        torch.set_rng_state(rng)


def without_values(
    model: Model, batch: Batch, extra: Mapping[str, Any]
) -> tuple[Model, Batch, FakeTensorMode]:
    """Copies of a model and of a batch whose tensors have no values, and the mode in which they are used."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = [model, *vars(model).get("attached", {}).values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    other = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})
    noise: Any = batch.noise
    start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
    blank = RecordedNoise(noise.total, mode.from_tensor(start))
    fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in extra.items()}
    y = None if batch.y is None else mode.from_tensor(batch.y)
    return other, Batch(mode.from_tensor(batch.x), y, mode.from_tensor(batch.index), blank, fake), mode
