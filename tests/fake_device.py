"""A GPU where there is none: tensors on the device `fake` have a shape and a type but no values, and every
operation on them is checked as a GPU would, or a Mac's, run without a kernel. Tensors on the CPU are real.

  MixedDevices  tensors of two devices in one operation (but for CPU scalars, which a GPU takes too)
  NoFloat64     a tensor of float64 on the device, which MPS cannot hold
  syncs         where the host waited for the device: `.item()`, a condition on a tensor, `.cpu()`, sizes by
                values, and copies to the device that are not from pinned memory and non-blocking
What is read from the device is made up: true, 1, and numbers between ¼ and ¾.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "fake"
PACKAGE = Path(__file__).resolve().parents[1] / "gzcli"
aten = torch.ops.aten

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip(f"torch {torch.__version__} makes no device in Python, 2.10 does", allow_module_level=True)


class NoFloat64(AssertionError):
    """A tensor of float64 on the device."""


class Module(backend_registration._DummyBackendModule):
    """`torch.fake`. It says that it is there only while a test is on the device."""

    here = False

    def is_available(self) -> bool:
        return self.here

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return module.here


class Generator(torch.Generator):
    """Of the CPU or, so it says, of the device."""

    def __new__(cls, device="cpu"):
        here = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if here else device)
        made.here = here
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self.here else super().device


# What autocast does on a GPU (ATen/autocast_mode.h): these in half precision, these in the widest type among
# their inputs, all else that it knows in fp32.
HALF = (
    "_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d "
    "conv_transpose2d.input convolution conv_transpose3d.input prelu addmm addmv addr matmul einsum mm "
    "mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell "
    "_thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "_scaled_dot_product_flash_attention scaled_dot_product_attention"
)
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"


def _cast(name: str) -> Any:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")
    half, widest = name in HALF.split(), name in WIDEST.split()
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args, **kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        dtype = torch.float32
        if half or (widest and all(t.dtype != torch.float32 for t in tensors)):
            dtype = torch.get_autocast_dtype(NAME)
        to = lambda t: t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t  # noqa: E731
        with torch._C._ExcludeDispatchKeyGuard(off):
            return operator(*tree_map_only(torch.Tensor, to, args), **tree_map_only(torch.Tensor, to, kwargs))

    return cast


def _set_up() -> list[torch.library.Library]:
    """Once in a process, before its first backward pass, which starts a thread for every device there is."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    fallthrough = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    fallthrough.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        name = name.removeprefix("aten::")
        with contextlib.suppress(AttributeError):  # an operator without a place in Python
            library.impl(name, _cast(name), "AutocastPrivateUse1")
    return [fallthrough, library]


module = Module()
_libraries = _set_up()
DEVICE = torch.device(NAME, 0)


class OnDevice(TorchDispatchMode):
    """Runs what concerns the device without values, all else as ever; notes where the host waits."""

    def __init__(self):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.syncs: set[str] = set()
        self.answer = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        ours = [t for t in tensors if isinstance(t, FakeTensor)]
        target = kwargs.get("device")
        inference = torch.is_inference_mode_enabled() and func.namespace == "aten"
        if inference and func._can_decompose():  # autograd, which is off, would have taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.is_pinned.default:
            return pinned(args[0])
        if func is aten._pin_memory.default:
            copy = args[0].clone()
            copy.in_pinned_memory = True
            return copy
        if not ours and (target is None or torch.device(target).type != NAME):
            return func(*args, **kwargs)
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            self.sync("read")
            dtype = tensors[0].dtype
            if dtype == torch.bool or func is not aten._local_scalar_dense.default:
                return self.answer
            return 0.5 if dtype.is_floating_point else 1
        if target is not None and torch.device(target).type == "cpu":
            self.sync("read")
            return made_up(self.run(func, args, kwargs | {"device": DEVICE}), kwargs.get("dtype"))
        if func is aten.copy_.default:
            waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
            if not isinstance(args[0], FakeTensor):
                self.sync("read")
                return args[0].copy_(made_up(args[1], args[0].dtype))
            if not isinstance(args[1], FakeTensor) and (waits or not pinned(args[1])):
                self.sync("copy")
        if func is aten._to_copy.default and not ours:
            if not (kwargs.get("non_blocking") and pinned(args[0])):
                self.sync("copy")
            if (dtype := kwargs.get("dtype") or args[0].dtype) == torch.float64:
                raise NoFloat64(f"a copy of float64 to the device at {where()}")
            with self.fakes:  # straight, as `from_tensor` would hold on to a parameter
                return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=DEVICE)
        if func in (aten.bincount.default, aten.nonzero.default):
            self.sync("size")
            with self.fakes:
                if func is aten.bincount.default:
                    return args[0].new_empty(max(kwargs.get("minlength", 0), *args[2:3], 1))
                return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func.overloadpacket in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            args = (args[0], [self.position(i) for i in args[1]], *args[2:])
        return self.run(func, args, kwargs)

    def position(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """What to index with: positions in place of a mask, whose number is known to the device alone."""
        if index is None or (isinstance(index, FakeTensor) and index.dtype != torch.bool):
            return index
        self.sync("size" if isinstance(index, FakeTensor) else "copy")
        shape = index.numel() if index.dtype == torch.bool else index.shape
        with self.fakes:
            return torch.empty(shape, dtype=torch.int64, device=DEVICE)

    def run(self, func, args, kwargs) -> Any:
        if not all(isinstance(t, FakeTensor) for t in tensors_in((*args, *kwargs.values()))):
            args, kwargs = tree_map_only(torch.Tensor, self.fake_of, (args, kwargs))
        out = self.fakes.dispatch(func, (), args, kwargs)
        for t in tensors_in(out if isinstance(out, tuple | list) else (out,)):
            if t.dtype in (torch.float64, torch.complex128) and t.device.type == NAME:
                raise NoFloat64(f"{func} makes {t.dtype} on the device at {where()}")
        return out

    def fake_of(self, t: torch.Tensor) -> FakeTensor:
        return t if isinstance(t, FakeTensor) else self.fakes.from_tensor(t, static_shapes=True)

    def sync(self, kind: str) -> None:
        self.syncs.add(f"{kind} {where()}")


@contextlib.contextmanager
def on_device() -> Iterator[OnDevice]:
    """Inside, tensors can be made on `DEVICE` and moved there."""
    module.here, before, torch.Generator = True, torch.Generator, Generator
    swap = torch.utils.swap_tensors  # by which a module that is moved a second time would get what it has
    torch.utils.swap_tensors = lambda a, b: None if a.device == b.device else swap(a, b)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1.0, device=…)` is a copy to the device
    try:
        with OnDevice() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        module.here, torch.Generator, torch.utils.swap_tensors = False, before, swap


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among the arguments of an operator, of lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def where() -> str:
    """file::function of the innermost frame of gz."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(PACKAGE)):
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            return f"{Path(path).relative_to(PACKAGE)}::{name}"
        frame = frame.f_back
    return "?"


def made_up(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A real tensor of its shape."""
    dtype, shape = dtype or like.dtype, tuple(like.shape)
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator) * 0.5 + 0.25).to(dtype)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.ones(shape, dtype=dtype)


def pinned(t: torch.Tensor) -> bool:
    return getattr(t, "in_pinned_memory", False)
