"""Device, threads, precision and accelerate, as a recipe asks for them."""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from gzcli.core import devices, ranks
from gzcli.core.errors import DeviceError, UsageError
from gzcli.core.parts import Part
from gzcli.core.sections import LaunchSection

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions that a step computes in by autocast


def pick_device(launch: LaunchSection) -> torch.device:
    """The device of a verb that runs in one process.

    Raises DeviceError where a GPU was asked for and there is none that torch can use.
    """
    if launch.cpu or launch.gpus == 0:
        return torch.device("cpu")
    found = devices.tried(1)
    if found.usable:
        return torch.device("cuda")
    if launch.gpus:
        raise DeviceError(found.lack or "there is no GPU here", hint=devices.INSTALL)
    if found.lack:
        warnings.warn(f"{found.lack}; the CPU is used", stacklevel=2)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_planned() -> None:
    """Raises DeviceError where the `gz` that started this process planned with GPUs, and torch can use none:
    accelerate would take the CPU without a word."""
    if os.environ.get("GZ_GPUS", "0") != "0" and not torch.cuda.is_available():
        raise DeviceError(devices.tried(1).lack or "there is no GPU here any more", hint=devices.INSTALL)


def prepare_torch(part: Part) -> None:
    """Sets threads as the recipe records them, so that a resume repeats it; deterministic kernels or TF32."""
    if part.launch.threads:
        torch.set_num_threads(part.launch.threads)
    if part.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        fast_kernels()


def precision(part: Part) -> str:
    """accelerate's name of the training precision; `auto` is bf16 where the device gains from it.

    Raises UsageError for fp16 without a GPU.
    """
    cpu = part.launch.cpu
    gpu, mps = torch.cuda.is_available() and not cpu, torch.backends.mps.is_available() and not cpu
    chosen = chosen_precision(part.train.precision, "cuda" if gpu else "mps" if mps else "cpu")
    if chosen == "fp16" and not gpu:
        raise UsageError(
            "`train.precision: fp16` needs a GPU", hint="`bf16` works on many CPUs, `fp32` on all"
        )
    return "no" if chosen == "fp32" else chosen


def chosen_precision(asked: str, kind: str) -> str:
    """fp32, bf16 or fp16: what was asked for, and for `auto` a 16-bit type where a device gains from it.

    kind: type of the device, as "cuda".
    """
    if asked != "auto":
        return asked
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if kind == "cpu" and fast_bf16() else "fp32"


def fast_bf16() -> bool:
    """Whether the CPU has instructions for bf16."""
    # a torch without oneDNN, as on Macs, does not know the operator
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_kernels() -> None:
    """Allows TF32 in products, and has cuDNN choose the fastest convolutions."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def accelerate(part: Part) -> Accelerator:
    """The Accelerator of a recipe.

    accelerate's state is reset first, as a later stage may have another precision than the one before.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()
    ranks.meet_again("cuda" if torch.cuda.is_available() and not part.launch.cpu else "cpu")
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=part.launch.timeout))
    return Accelerator(mixed_precision=precision(part), cpu=part.launch.cpu, kwargs_handlers=[patience])


def ddp(*, every_parameter: bool) -> DistributedDataParallelKwargs:
    """How DDP sums gradients: in buckets that the gradients are views of, which saves a copy of them.

    Buffers are not broadcast at every forward: the models keep them equal on all ranks. The graph is not
    declared static: it is another one in the last of the micro-batches, and where a phase is not due.

    every_parameter: whether each step gives every parameter a gradient. If not, as where a phase leaves the
      parameters of others without, DDP looks at every step for those that have none.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(
        find_unused_parameters=not every_parameter, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished its queued work, as a clock must before it is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: of the device's memory where that is counted, else of the
    machine's, libraries included; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def memory_now(device: torch.device) -> int:
    """The bytes that this process holds now: of the device's memory where that is counted, else of the
    machine's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    import psutil  # one of accelerate's own dependencies

    return psutil.Process().memory_info().rss


def title(device: torch.device) -> str:
    """The name of a GPU, as `NVIDIA H100`; of another device its kind, as `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def clock(device: torch.device, kind: str = "wall") -> float:
    """Seconds, after the device has finished its queued work: of time, or of work of this process's cores
    where the kind is "cpu" and the device a CPU."""
    synchronise(device)
    return time.process_time() if kind == "cpu" and device.type == "cpu" else time.monotonic()


def seed(device: torch.device, number: int) -> None:
    """Seeds the global generators of the CPU and of the device."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)
