"""The precision of a training. On a CPU it is chosen by how fast a core computes in each type, measured once
per machine and stored with the costs of trainings. Instructions for bf16 guarantee nothing: on some CPUs fp32
is faster. Without a clear gain it is fp32, so that the choice does not depend on what else the CPU does."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.devices import cpu_name, device_kind
from gzcli.core.errors import UsageError
from gzcli.store import cache_files, files
from gzcli.store.paths import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

Rates = dict[str, dict[str, float]]  # type → kind of work → GFLOP/s

MAPS, SIDE, BATCH = 32, 28, 16  # side of a 3×3 convolution between equally many feature maps
TOKENS, WIDTH = 1024, 256  # sides of a product [TOKENS, WIDTH] · [WIDTH, WIDTH]
WORK = {  # GFLOP of an output and its two gradients
    "convolution": 6e-9 * 9 * MAPS**2 * SIDE**2 * BATCH,
    "product": 6e-9 * TOKENS * WIDTH**2,
}
ROUNDS = 4  # repetitions; the fastest one counts
# times as fast as fp32 that bf16 must be, because other programs change a measured ratio by up to 1.4
GAIN = 1.25
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
INFO = Path("/proc/cpuinfo")


@cache
def instruction_sets() -> tuple[str, ...]:
    """The CPU's instruction sets for products and convolutions, by their names in Linux."""
    lines = INFO.read_text().splitlines() if INFO.is_file() else []
    flags = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return tuple(name for name in SETS if name in flags)


def chosen_precision(precision: str, kind: str) -> str:
    """The precision on a kind of device: fp32, bf16 or fp16. `auto` selects a 16-bit type if the device gains
    from it; on a CPU, this is measured. Raises UsageError for fp16 if the device does not compute in it."""
    import torch

    if precision == "fp16" and not device_kind(kind).fp16:
        hint = "use `bf16`, which works on many CPUs, or `fp32`"
        raise UsageError("`train.precision: fp16` needs a GPU", hint=hint)
    if precision != "auto":
        return precision
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return faster(cpu_rates(cpu_name())) if kind == "cpu" else "fp32"


def speed_title() -> str:
    """A line for the user with the rates of a CPU core in each type and the type that `auto` selects."""
    speeds = cpu_rates(cpu_name())
    cells = [f"{kind} {of['product']:.0f} and {of['convolution']:.0f}" for kind, of in speeds.items()]
    sets = " ".join(instruction_sets()) or platform.machine()
    facts = f"{sets}; GFLOP/s per core for matrix products and convolutions: {', '.join(cells)}"
    return f"{facts}; `precision: auto` uses {faster(speeds)}"


def cpu_rates(cpu: str) -> Rates:
    """The rates of one core of the named CPU."""
    import torch

    # torch without oneDNN, as on Macs, lacks the operator; without instructions bf16 takes 20 times as long
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    types = ("fp32", "bf16") if bf16 else ("fp32",)
    return _stored((cpu, *instruction_sets(), torch.__version__, *types), types)


def faster(rates: Rates) -> str:
    """The type for a step that consists of each kind of work in equal parts: bf16 if it is clearly faster."""
    seconds = {kind: sum(WORK[work] / rate for work, rate in of.items()) for kind, of in rates.items()}
    return "bf16" if "bf16" in seconds and seconds["fp32"] > GAIN * seconds["bf16"] else "fp32"


@cache
def _stored(terms: tuple[str, ...], types: tuple[str, ...]) -> Rates:
    """The stored rates, otherwise new ones. One process of the machine measures while the others wait, so all
    ranks of a run read the same."""
    digest = hashlib.sha256("\n".join(terms).encode()).hexdigest()[:16]
    path = cache_dir("costs", f"rates-{digest}.json")
    with cache_files.exclusive(path):
        if (rates := cache_files.read(path, partial(_read, types=types))) is None:
            cache_files.write(path, files.write_json, rates := measured_rates(types))
        return rates


def _read(path: Path, types: tuple[str, ...]) -> Rates:
    """The rates in a file. Raises an error unless it has a positive one for each type and kind of work."""
    tree = files.read_object(path)
    rates = {kind: {work: float(tree[kind][work]) for work in WORK} for kind in types}
    if not all(0 < rate < math.inf for of in rates.values() for rate in of.values()):
        raise ValueError("a rate is not a positive number")
    return rates


def measured_rates(types: tuple[str, ...]) -> Rates:
    """The rates, measured in CPU time of this thread, so that other programs hardly affect them."""
    import torch
    from torch.nn import functional as F

    draws = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=draws)
    with torch.inference_mode(False):  # its tensors have no gradients
        image, kernel = randn(BATCH, MAPS, SIDE, SIDE), randn(MAPS, MAPS, 3, 3)
        rows, matrix = randn(TOKENS, WIDTH), randn(WIDTH, WIDTH)
    works = {
        "convolution": (partial(F.conv2d, padding=1), image.requires_grad_(), kernel.requires_grad_()),
        "product": (torch.mm, rows.requires_grad_(), matrix.requires_grad_()),
    }
    least: dict[tuple[str, str], float] = {}
    with _one_thread(), torch.inference_mode(False), torch.enable_grad():
        for _ in range(1 + ROUNDS):  # the first one prepares kernels, and is never the fastest
            for kind in types:
                for work, (function, x, weight) in works.items():
                    seconds = _seconds(function, x, weight, kind == "bf16")
                    least[kind, work] = min(seconds, least.get((kind, work), seconds))
    return {kind: {work: round(WORK[work] / least[kind, work], 1) for work in works} for kind in types}


def _seconds(function: Any, x: Tensor, weight: Tensor, half: bool) -> float:
    """The seconds for an output and its gradients under autocast, as in a step."""
    import torch

    since = time.thread_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = function(x, weight)
    torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    return max(time.thread_time() - since, 1e-9)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
