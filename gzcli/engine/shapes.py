"""Tensors that have a shape and no values (torch's FakeTensorMode): what a model draws and computes is found
without its memory and time.

What would be read on the host as an array is one half everywhere; a model that reads a number raises.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gzcli.core.types import Batch, Noise
from gzcli.models.base import Model

Draw = tuple[str, tuple[int, ...], int | None]  # method, shape and bound of `Noise._draw`
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Flops(TorchDispatchMode):
    """Counts floating-point operations by torch's formulas. Unlike FlopCounterMode it takes a gradient of a
    gradient, and knows the attention of CPUs."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is _flash:
            self.total += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif func._overloadpacket is _flash_backward:
            self.total += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Arrays(TorchFunctionMode):
    """Gives the host arrays of one half in the place of tensors without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def without_values(model: Model, batch: Batch) -> tuple[Model, Batch, FakeTensorMode]:
    """Copies of a model and of a batch whose tensors have no values, and the mode in which they are used."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = [model, *vars(model).get("attached", {}).values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    blank = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})
    noise: Any = batch.noise
    start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
    x, y, index, start, extra = tree_map_only(
        Tensor, mode.from_tensor, (batch.x, batch.y, batch.index, start, batch.extra)
    )
    return blank, Batch(x, y, index, RecordedNoise(noise.total, start), extra), mode
