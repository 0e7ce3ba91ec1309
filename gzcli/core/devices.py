"""Everything that is particular to a kind of device: cpu, cuda, mps.

The functions that the command line needs (number, names and memory of GPUs) work without torch. The others
import it when they are called. `python -m gzcli.core.devices` tries the GPUs in a separate process, which
`launch.usable_gpus` starts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gzcli.core.errors import DeviceError, first_line

if TYPE_CHECKING:
    import torch

    from gzcli.core.sections import LaunchSection

T = TypeVar("T")

INSTALL_HINT = "install a matching build of torch (see pytorch.org); then run `gz doctor`"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
OTHER_GPUS = ("/dev/kfd", "/dev/nvhost-gpu", "/dev/dxg")  # AMD's, Jetson's, WSL's: no driver lists them


@dataclass(frozen=True)
class Kind:
    """How gz uses a kind of device."""

    flops: float  # operations in a second of a trial, approximately
    batch: float = 1.0  # how many images are drawn or scored together, as a multiple of the usual number
    queued: bool = True  # whether work is queued, so that the host waits when it reads a result
    shared: bool = False  # whether its memory is the host's
    fused: bool = False  # whether torch has fused optimizers for it
    float64: bool = True
    fp16: bool = True  # whether it computes in fp16
    channels_last: bool = False  # whether convolutions gain from channels last
    compiled: bool = False  # whether steps gain from `torch.compile`
    streams: bool = False  # whether copies run beside the computation
    kernels: bool = False  # whether it runs kernels of other libraries, such as `mamba-ssm`
    backend: str = "gloo"  # of torch.distributed


_GAINS = {"fused": True, "channels_last": True, "compiled": True, "streams": True, "kernels": True}
CUDA = Kind(40e12, 2.0, **_GAINS, backend="nccl")
DEVICE_KINDS: Mapping[str, Kind] = {
    "cpu": Kind(40e9, 0.5, queued=False, shared=True, fused=True, fp16=False),
    "cuda": CUDA,
    "mps": Kind(1e12, shared=True, float64=False),
}
UNKNOWN_KIND = Kind(10e12, float64=False)


def device_kind(device: torch.device | str) -> Kind:
    """The row of DEVICE_KINDS for a device such as `cuda:1`; UNKNOWN_KIND if it has none."""
    return DEVICE_KINDS.get(
        device.partition(":")[0] if isinstance(device, str) else device.type, UNKNOWN_KIND
    )


def batch_of(usual: int, device: torch.device) -> int:
    """How many images are drawn or scored together on a device."""
    return int(usual * device_kind(device).batch)


# ---------------------------------------------------------------------------- GPUs without torch


@dataclass(frozen=True)
class Gpus:
    """The number of visible GPUs, and how many of them torch can use, counted from the first."""

    there: int = 0
    usable: int = 0
    why: str = ""  # why not all of them are usable

    @property
    def lack(self) -> str | None:
        """Which GPUs torch cannot use, and why; None if it can use all."""
        if self.usable >= self.there:
            return None
        of = f"{self.usable or 'none'} of the {self.there} GPUs"
        some = "cannot use the GPU" if self.there == 1 else f"can use {of}"
        return f"torch {some} on this machine: {self.why}"


def count_gpus() -> int:
    """The visible CUDA devices."""
    visible = os.environ.get(VISIBLE_DEVICES)
    if visible is None:
        return installed_gpus()
    named = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    if not named or "MIG-" in visible or any(Path(node).exists() for node in OTHER_GPUS):
        return len(named)
    return min(len(named), installed_gpus())  # a variable may name more than there are


def installed_gpus() -> int:
    """The GPUs of NVIDIA's driver, whether or not they are visible."""
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir():
        return len(list(driver.iterdir()))
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


@cache
def gpu_name() -> str:
    """The name of the first GPU."""
    return next(iter(_nvidia_smi("--query-gpu=name", "--format=csv,noheader")), "GPU").strip()


def gpu_memory() -> int | None:
    """Bytes of the smallest visible GPU; None if the driver does not report them."""
    visible = [name.strip() for name in os.environ.get(VISIBLE_DEVICES, "").split(",") if name.strip()]
    sizes = []
    for line in _nvidia_smi("--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"):
        index, uuid, memory = [*(cell.strip() for cell in line.split(",")), "", ""][:3]
        if memory.isdigit() and (not visible or any(index == v or uuid.startswith(v) for v in visible)):
            sizes.append(int(memory) << 20)
    return min(sizes, default=None)


def _nvidia_smi(*words: str) -> list[str]:
    """The output lines of `nvidia-smi`; none if it is missing or does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


@cache
def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def host_memory() -> int:
    """Bytes of this machine's memory."""
    import psutil

    return psutil.virtual_memory().total


# ---------------------------------------------------------------------------- the devices of this process


def tried(most: int | None = None) -> Gpus:
    """The first `most` GPUs on which this process's torch computes a sum. A GPU without free memory counts as
    usable, because the later error is clearer."""
    import torch

    there, seen = count_gpus(), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver that is too old raises an error as well
            seen = torch.cuda.device_count()
            if there and not (torch.version.cuda or torch.version.hip):
                return Gpus(there, 0, f"this build is for CPUs only ({torch.__version__})")
            if there or seen:
                torch.cuda.init()
    except Exception as e:
        return Gpus(max(there, seen), 0, first_line(e))
    there = max(there, seen)
    for i in range(seen if most is None else min(seen, most)):
        try:
            torch.ones(1, device=f"cuda:{i}").add(1).item()
        except Exception as e:
            if "out of memory" not in str(e):
                return Gpus(there, i, f"{torch.cuda.get_device_name(i)}: {first_line(e)}")
    visible = os.environ.get(VISIBLE_DEVICES)
    named = f" (`{VISIBLE_DEVICES}={visible}`)" if visible else ""
    return Gpus(there, seen, "" if seen == there else f"it sees {seen}{named}")


def pick_device(launch: LaunchSection) -> torch.device:
    """The device of a verb that runs in one process. Raises DeviceError if a GPU was requested and there
    is none that torch can use."""
    import torch

    if launch.cpu or launch.gpus == 0:
        return torch.device("cpu")
    if (gpus := tried(1)).usable:
        return torch.device("cuda")
    if launch.gpus:
        raise DeviceError(gpus.lack or "there is no GPU here", hint=INSTALL_HINT)
    if gpus.lack:
        warnings.warn(f"{gpus.lack}; using the CPU", stacklevel=2)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_kind(launch: LaunchSection) -> str:
    """The kind of device that accelerate trains on."""
    import torch

    if launch.cpu:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_planned() -> None:
    """Raises DeviceError if the `gz` that started this process planned with GPUs, but torch can use none.
    Without this check, accelerate would silently use the CPU."""
    import torch

    if os.environ.get("GZ_GPUS", "0") != "0" and not torch.cuda.is_available():
        raise DeviceError(tried(1).lack or "there is no GPU here any longer", hint=INSTALL_HINT)


def trains_on_cpu(gpus: int, processes: int) -> bool:
    """Whether a training with this number of CUDA devices uses the CPU; one process on a Mac uses its GPU."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return not gpus and not (apple and processes == 1)


def environment(gpus: int, on_cpu: bool) -> dict[str, str]:
    """Environment variables for a process that trains on this number of CUDA devices."""
    return {} if gpus else {**({"ACCELERATE_USE_CPU": "true"} if on_cpu else {}), VISIBLE_DEVICES: ""}


def titles(gpus: Gpus) -> list[tuple[str, str]]:
    """(device, facts) to print for each GPU that torch can use, and for the CPU last."""
    import torch

    lines = []
    for i in range(gpus.usable):
        props = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if props.major >= 8 else "no bf16"
        lines.append((f"gpu {i}", f"{props.name}, {props.total_memory / 2**30:.0f} GiB, {bf16}"))
    if not gpus.lack and torch.backends.mps.is_available():
        lines.append(("gpu", "Apple MPS"))
    return [*lines, ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]


def use_of_rank(kind: str) -> None:
    """Selects the GPU that torch's launcher assigned to this process."""
    import torch

    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def half(precision: str) -> torch.dtype | None:
    """The 16-bit type that a step computes in by autocast; None for fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def fast_kernels() -> None:
    """Allows TF32 in products, and has cuDNN choose the fastest convolutions."""
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def deterministic_kernels() -> None:
    """Allows only kernels whose results are bit-for-bit reproducible."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


# ---------------------------------------------------------------------------- work, memory and speed


def _library(device: torch.device) -> Any:
    """The torch module of a device that queues its work, such as `torch.cuda`. None for a CPU, or if torch
    has no such module."""
    import torch

    return (
        torch.get_device_module(device)
        if device_kind(device).queued and device.type in DEVICE_KINDS
        else None
    )


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished its queued work, which must precede every timing."""
    import torch

    if _library(device):
        torch.accelerator.synchronize(device)


def clock(device: torch.device, kind: str = "wall") -> float:
    """The time in seconds, read after the device has finished its queued work. On a CPU, the kind "cpu" is
    the CPU time of this process."""
    synchronise(device)
    return time.process_time() if clock_of(device, kind) == "cpu" else time.monotonic()


def clock_of(device: torch.device, kind: str) -> str:
    """The kind of clock for a device: "cpu" for a CPU, otherwise "wall"."""
    return "cpu" if kind == "cpu" and not device_kind(device).queued else "wall"


def empty_cache(device: torch.device) -> None:
    """Releases the memory that torch has cached."""
    if library := _library(device):
        library.empty_cache()


def seed(device: torch.device, number: int) -> None:
    """Seeds the global generators of the CPU and of the device."""
    import torch

    torch.default_generator.manual_seed(number)
    if device.type == "cuda":  # its own function would wait until CUDA is first used
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    elif library := _library(device):
        library.manual_seed(number)


class SideStream:
    """A stream for copies beside the compute stream. On devices without streams, the work runs
    immediately."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _library(device).Stream(device) if device_kind(device).streams else None

    def started(self, work: Callable[[], T]) -> tuple[T, Any]:
        """The result of `work`, whose copies may still be running, and the event that marks their end."""
        if self.stream is None:
            return work(), None
        with _library(self.device).stream(self.stream):
            return work(), self.stream.record_event()

    def ended(self, result: T, event: Any) -> T:
        """A result of `started` for the compute stream, which waits for the copies; the host does not
        wait."""
        if event is None:
            return result
        import torch
        from torch.utils._pytree import tree_leaves

        current = _library(self.device).current_stream(self.device)
        current.wait_event(event)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.device.type == self.device.type:
                t.record_stream(current)  # its memory is not used again before this stream is done with it
        return result


def peak_memory(device: torch.device) -> int | None:
    """The peak memory of this process in bytes; None if the system does not report it. It is device memory if
    that is counted, otherwise the machine's, libraries included."""
    if device.type == "cuda":
        return _library(device).max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def memory_now(device: torch.device) -> int:
    """The bytes of that memory that this process uses now. On a device that counts its peak, the peak starts
    again."""
    if device.type == "cuda":
        _library(device).reset_peak_memory_stats(device)
        return _library(device).memory_allocated(device)
    import psutil  # one of accelerate's own dependencies

    return psutil.Process().memory_info().rss


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an exception means that the device or the machine ran out of memory."""
    import torch

    return isinstance(e, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(e)


# Dense TFLOP/s (10¹²) of matrix products that are summed in fp32, by words of a device's name. From NVIDIA's
# data sheets, whose metrics "with sparsity" are halved; of GeForce from the white papers of GA102 (table 2),
# AD102 and Blackwell RTX (appendix A). A missing precision is not computed by tensor cores.
PEAKS: Mapping[str, Mapping[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 418, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},  # SXM
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
    "V100 PCIE": {"fp16": 112, "fp32": 14},
    "V100": {"fp16": 125, "fp32": 15.7},  # SXM2
    "T4": {"fp16": 65, "fp32": 8.1},
}
# words in the names of devices that are not in the table
VARIANTS = ("SUPER", "Ti", "Laptop", "D", "MIG", "Ada")


def short_title(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else device.type.upper()


def title(device: torch.device) -> str:
    """The name of a GPU, such as `NVIDIA H100`, or the kind of another device, such as `cpu`."""
    return _library(device).get_device_name(device) if device.type == "cuda" else device.type


def peak(device: torch.device, precision: str) -> float | None:
    """The dense FLOP/s of a device in "bf16", "fp16", "tf32" or "fp32"; None if unknown, which includes every
    CPU."""
    return peak_of(title(device), precision) if device.type == "cuda" else None


def peak_of(name: str, precision: str) -> float | None:
    """The dense FLOP/s of a device, looked up by its driver's name for it; None if unknown."""
    words = set(re.split(r"[ \-/]", name))
    device = next((device for device in PEAKS if words.issuperset(device.split())), None)
    tera = PEAKS[device].get(precision) if device and words.isdisjoint(VARIANTS) else None
    return None if tera is None else 1e12 * tera


if __name__ == "__main__":
    print(json.dumps(asdict(tried())))
