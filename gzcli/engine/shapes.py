"""Tensors that have a shape and no values (torch's FakeTensorMode), and what is counted of them: operations,
and bytes of tensors that are alive.

What would be read on the host, as a number, is made up: true, 1, and numbers between ¼ and ¾.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
DEVICE, META = torch.ops.prim.device.default, torch.device("meta")
EMPTY: Mapping[str, Any] = MappingProxyType({})
# Images of a batch whose size is of no interest. It is prime, so that numbers that grow with the batch, bytes
# and operations, are known by this factor.
PROBE = 251
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


class Made(NamedTuple):
    """What an operator returns for arguments of certain shapes.

    same: position of the argument that it is; None: a tensor of its own, with the fields below.
    beside: position of the argument whose memory it shares; None: it has its own.
    """

    same: int | None = None
    beside: int | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None


class Shapes(FakeTensorMode):
    """FakeTensorMode that remembers what an operator returns. So does its own cache, whose keys hold all that
    a tensor can be and take three times as long; and the base class guards each call from torch.compile."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.seen: dict[Any, Made | None] = {}  # None: it has to be asked every time

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = EMPTY
    ) -> Any:
        key = key_of(func, args, kwargs)
        made = self.seen.get(key) if key else None
        if made is None:
            out = self.dispatch(func, types, args, kwargs)
            if key and key not in self.seen:
                self.seen[key] = made_of(func, args, out) if key == key_of(func, args, kwargs) else None
            return out
        if made.same is not None:
            return args[made.same]
        with in_kernel_invocation_manager(self):
            t = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=META)
            if made.beside is not None:
                t.set_(args[made.beside].untyped_storage(), made.offset, made.shape, made.stride)
        return FakeTensor(self, t, made.device)


def key_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator and what of its arguments its result depends on; None: that is not known."""
    key: list[Any] = [func]
    for value in (*args, *kwargs.items()) if kwargs else args:
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, FakeTensor):
                if part.constant is not None or part.dtype.is_complex or part.layout is not torch.strided:
                    return None
                key += (part.shape, part.stride(), part.storage_offset(), part.dtype, part.fake_device)
            elif isinstance(part, Tensor):
                return None
            else:  # 1 is not 1.0
                key += (type(part), part)
        key.append(type(value))
    try:
        hash(found := tuple(key))
    except TypeError:
        return None
    return found


def made_of(func: Any, args: Sequence[Any], out: Any) -> Made | None:
    """What an operator has returned; None where that cannot be made again."""
    if not isinstance(out, FakeTensor) or out.constant is not None or out.dtype.is_complex:
        return None
    for i, arg in enumerate(args):
        if arg is out:
            return Made(same=i)
    if func._schema.is_mutable or out.layout is not torch.strided:
        return None
    places = {id(t.untyped_storage()): i for i, t in enumerate(args) if isinstance(t, FakeTensor)}
    beside = places.get(id(out.untyped_storage()))
    if func.is_view and beside is None:
        return None
    return Made(
        None, beside, tuple(out.shape), out.stride(), int(out.storage_offset()), out.dtype, out.fake_device
    )


class Counter(TorchDispatchMode):
    """Counts what passes by, of a batch of PROBE images, for batches of other sizes.

    batches: the sizes, in images; each number below is one for each of them.
    flops: floating-point operations of matrix products, convolutions and attention.
    alive: bytes of tensors that were made since it was entered and are alive.
    peak: the most that were alive at once since `mark`.
    operators: number of operators that compute something; one number.
    """

    def __init__(self, batches: Sequence[int]) -> None:
        super().__init__()
        self.batches = tuple(batches)
        self.flops, self.alive, self.peak = ([0] * len(self.batches) for _ in range(3))
        self.operators = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # as `Shapes`
        return False

    def mark(self) -> list[int]:
        """Begins a new count of operations, operators and peak. Returns the bytes that are alive."""
        self.flops, self.operators, self.peak = [0] * len(self.batches), 0, list(self.alive)
        return list(self.alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:  # two of three calls: autograd asks every tensor
            return META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        out = made_up(func, args) if func in READ else func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # another question about a tensor
            return out
        self.operators += not func.is_view
        if count := FLOPS.get(func._overloadpacket):
            flops = self.scaled(count(*args, **(kwargs or {}), out_val=out))
            self.flops = [a + b for a, b in zip(self.flops, flops, strict=True)]
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, FakeTensor):
                self.note(t)
        return out

    def note(self, t: Tensor) -> None:
        """Adds the bytes of a tensor's storage until it is freed."""
        storage = t.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        sizes = self.scaled(storage.nbytes())

        def freed(_: Any) -> None:
            del self.known[key]
            self.alive = [a - b for a, b in zip(self.alive, sizes, strict=True)]

        self.known[key] = weakref.ref(storage, freed)
        self.alive = [a + b for a, b in zip(self.alive, sizes, strict=True)]
        self.peak = list(map(max, self.peak, self.alive))

    def scaled(self, number: int) -> list[int]:
        """A number of a batch of PROBE images for those of `batches`: PROBE as a factor of it stands for the
        batch."""
        power = 0
        while number and number % PROBE == 0:
            number, power = number // PROBE, power + 1
        return [number * images**power for images in self.batches]


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
            with _disable_current_modes():  # else an array of memory that nothing was written to
                return func(real(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def real(like: Tensor) -> Tensor:
    """A tensor of its shape and type with made-up values, made where no mode is on."""
    if not like.dtype.is_floating_point:
        return torch.ones(tuple(like.shape), dtype=like.dtype)
    return torch.rand(tuple(like.shape)).mul_(0.5).add_(0.25).to(like.dtype)


def swapped(a: Tensor, b: Tensor) -> None:
    """Swaps two tensors, as a module does that is moved to another dtype. torch refuses it for a tensor that
    something has a weak reference to, as FakeTensorMode has to all."""
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


@contextmanager
def shapes_only(*batches: int) -> Iterator[Counter]:
    """Inside, every new tensor has a shape alone, on the CPU; what is done is counted.

    batches: sizes of a batch for which the counts are, while one of PROBE images is run.
    """
    rng, swap = torch.get_rng_state(), torch.utils.swap_tensors
    torch.utils.swap_tensors = swapped
    try:
        with (
            warnings.catch_warnings(),
            Shapes(),
            Counter(batches) as counter,
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
