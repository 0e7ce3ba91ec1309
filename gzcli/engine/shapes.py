"""Tensors that have a shape and no values (torch's FakeTensorMode), and what is counted of them: operations,
and bytes of tensors that are alive.

What would be read on the host, as a number, is made up: true, 1, and numbers between ¼ and ¾.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
READ = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **named: Any
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **named: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# Floating-point operations by operator; torch knows the attention of GPUs alone.
FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(TorchDispatchMode):
    """Counts what passes by.

    flops: floating-point operations of matrix products, convolutions and attention.
    operators: number of operators that compute something.
    alive: bytes of tensors that were made since it was entered and are alive.
    peak: the most that were alive at once since `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operators = self.alive = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def mark(self) -> int:
        """Begins a new count of operations, operators and peak. Returns the bytes that are alive."""
        self.flops, self.operators, self.peak = 0, 0, self.alive
        return self.alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = made_up(func, args) if func in READ else func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question about a tensor
            return out
        self.operators += not func.is_view
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, FakeTensor):
                self.note(t)
        return out

    def note(self, t: Tensor) -> None:
        """Adds the bytes of a tensor's storage until it is freed."""
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed(_: Any) -> None:
            del self.known[key]
            self.alive -= size

        self.known[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def made_up(func: Any, args: tuple[Any, ...]) -> Any:
    """The value that the host reads of a tensor: its own where it is known, as of a constant."""
    try:
        return func(*args)
    except DataDependentOutputException:
        if func is not aten._local_scalar_dense.default or args[0].dtype == torch.bool:
            return True
        return 0.5 if args[0].dtype.is_floating_point else 1


class Host(TorchFunctionMode):
    """Gives the host arrays and lists of made-up values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__) and isinstance(args[0], FakeTensor):
            return func(real(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def real(like: Tensor) -> Tensor:
    """A tensor of its shape and type with made-up values."""
    with _disable_current_modes():
        if not like.dtype.is_floating_point:
            return torch.ones(tuple(like.shape), dtype=like.dtype)
        return torch.rand(tuple(like.shape)).mul_(0.5).add_(0.25).to(like.dtype)


def swapped(a: Tensor, b: Tensor) -> None:
    """Swaps two tensors, as a module does that is moved to another dtype. torch refuses it for a tensor that
    something has a weak reference to, as FakeTensorMode has to all."""
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


@contextmanager
def shapes_only() -> Iterator[Counter]:
    """Inside, every new tensor has a shape alone, on the CPU; what is done is counted."""
    rng, swap = torch.get_rng_state(), torch.utils.swap_tensors
    torch.utils.swap_tensors = swapped
    try:
        with (
            warnings.catch_warnings(),
            FakeTensorMode(allow_non_fake_inputs=True),
            Counter() as counter,
            Host(),
        ):
            warnings.simplefilter("ignore")  # a copy of a module asks where its tensors lie
            yield counter
    finally:
        torch.utils.swap_tensors = swap
        torch.set_rng_state(rng)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
