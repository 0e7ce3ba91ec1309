"""`python -m gzcli.engine.benchmark SECONDS`: how fast this machine computes, and what a training step costs
here by that. Prints a line of JSON before each measurement and one with the result.

A U-Net is what its residual blocks are: group norm, SiLU and a 3×3 convolution, forward and backward. The
block is measured at the two widths of the nets that are told of, so that what a step costs is its operations
over their rate, or on a GPU with a small net the time to start so many kernels.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.engine.cost import cost_of
from gzcli.engine.devices import clock, fast_bf16
from gzcli.errors import UsageError
from gzcli.recipe.resolve import resolve
from gzcli.types import DataInfo

MODEL, DATA, SCALES = "ddpm", "cifar10", ("paper", "small")
SHAPE, SIDE = (3, 32, 32), 32  # of images of CIFAR-10
WIDE, NARROW = 128, 32  # channels of the blocks
CONVOLUTIONS = 2  # of a block
REPEATS = 3  # measurements, of which the fastest counts: what else runs can only slow one down


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    matmul_fp32: operations of a product of matrices, as training sets its precision (TF32 on GPUs).
    matmul_bf16: operations of one in bf16.
    conv: operations of a wide residual block, forward and backward, in the training's precision.
    small_conv: those of a narrow one.
    copy: bytes read and written by a copy in the device's memory.
    call: seconds of an operation on a few numbers, which is what it costs to start one.
    loader: images of 3×32×32 gathered from a memory-map and normalised on the device.
    """

    matmul_fp32: float
    matmul_bf16: float
    conv: float
    small_conv: float
    copy: float
    call: float
    loader: float


def main(seconds: float) -> None:
    """Measures the CPU and the GPU, if there is one.

    seconds: time of each measurement.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    nets = {}
    for scale in SCALES:
        tell(f"the operations of a step of {MODEL} at scale {scale}")
        with contextlib.suppress(UsageError):  # the recipe does not have the scale
            nets[scale] = Net.of(scale)
    found = {}
    for name in names:
        device = torch.device(name)
        rates = measure(device, seconds)
        found[name] = vars(rates) | {
            "threads": torch.get_num_threads() if name == "cpu" else None,
            "steps": {scale: net.seconds(rates, device) for scale, net in nets.items()},
        }
    told = {scale: vars(net) for scale, net in nets.items()}
    print(json.dumps({"result": {"devices": found, "nets": told}}), flush=True)


def tell(what: str) -> None:
    """Says what is done now."""
    print(json.dumps({"doing": what}), flush=True)


# ---------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Net:
    """What a training step of a net takes.

    params: number of parameters.
    batch: images of a step.
    flops: operations of a step, forward and backward.
    calls: operations on tensors that a process starts in a step.
    width: channels at the full side.
    """

    params: int
    batch: int
    flops: float
    calls: float
    width: int

    @staticmethod
    def of(scale: str) -> Net:
        """The net of a recipe's scale for CIFAR-10, counted without its weights; no data is needed."""
        part = resolve(MODEL, data=DATA, sets=(), flags={"scale": scale}).parts[0]
        info = DataInfo(SHAPE, n=50_000, steps=part.train.steps)
        cost = cost_of(part, info)
        return Net(cost.params, part.train.batch_size, cost.flops, cost.operators, part.options["channels"])

    def seconds(self, rates: Rates, device: torch.device) -> float:
        """What a step takes by the rates of a device."""
        rate = rates.conv if self.width > (WIDE + NARROW) / 2 else rates.small_conv
        computed, started = self.flops / rate, self.calls * rates.call
        # a GPU starts the next operation while it computes; a CPU does not
        return max(computed, started) if device.type == "cuda" else computed + started


# ---------------------------------------------------------------------------- rates


def measure(device: torch.device, seconds: float) -> Rates:
    """The rates of a device.

    seconds: time of each measurement.
    """
    gpu = device.type == "cuda"
    side, numbers = (8192, 2**28) if gpu else (1024, 2**25)

    def rate(what: str, work: float, call: Callable[[], object]) -> float:
        tell(f"{what} on the {'GPU' if gpu else 'CPU'}")
        return work / fastest(call, device, seconds)

    products = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = "fp32" if dtype is torch.float32 else "bf16"
        products.append(rate(f"matmul in {name}", 2 * side**3, lambda a=a, b=b: a @ b))  # type: ignore[misc]
    blocks = []
    for width in (WIDE, NARROW):
        tell(f"blocks of {width} channels on the {'GPU' if gpu else 'CPU'}")
        blocks.append(block_rate(width, device, seconds))
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copy = rate("copies in memory", 2 * 4 * numbers, lambda: target.copy_(source))
    few = torch.zeros(8, device=device)
    call = 1 / rate("small operations", 100, lambda: [few.add_(1) for _ in range(100)])
    with tempfile.TemporaryDirectory() as folder:
        load = loader(Path(folder), device, 128)
        images = rate("the loader", 128, load)
    fp32, bf16 = products
    wide, narrow = blocks
    return Rates(fp32, bf16, wide, narrow, copy, call, images)


def block_rate(width: int, device: torch.device, seconds: float) -> float:
    """The operations in a second of a residual block of so many channels, forward and backward.

    seconds: time of the measurement.
    """
    batch = 128 if device.type == "cuda" else 8
    block = Block(width).to(device)
    x = torch.randn(batch, width, SIDE, SIDE, device=device)
    return block.operations(batch) / fastest(lambda: block.step(x), device, seconds)


def fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of a call, of the fastest of some groups of calls that take about `seconds` together."""
    call()
    began = clock(device)
    call()
    once = max(clock(device) - began, 1e-7)
    n = max(1, int(seconds / REPEATS / once))
    times = []
    for _ in range(REPEATS):
        began = clock(device)
        for _ in range(n):
            call()
        times.append((clock(device) - began) / n)
    return min(times)


class Block(nn.Module):
    """A residual block of a U-Net, in the precision that training has on the device.

    width: number of channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        parts = [
            (nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)
        ]
        self.parts = nn.Sequential(*(module for part in parts for module in part))

    def step(self, x: Tensor) -> None:
        """Forward and backward."""
        device = x.device.type
        bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else fast_bf16()
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = (x + self.parts(x)).float().mean()
        loss.backward()

    def operations(self, batch: int) -> int:
        """Of the convolutions in a step on images of 32×32; backward has twice those of forward."""
        return 3 * CONVOLUTIONS * 2 * 9 * self.width**2 * SIDE**2 * batch


def loader(folder: Path, device: torch.device, batch: int) -> Callable[[], Tensor]:
    """A call that gathers random images of a memory-map and normalises them on the device, as training does.

    folder: gets the file of the memory-map, 60 MB.
    batch: images of a call.
    """
    n, rng = 20_000, np.random.default_rng(0)
    images = np.memmap(folder / "images.u8", np.uint8, "w+", shape=(n, *SHAPE))
    images[:] = 127

    def load() -> Tensor:
        rows = torch.from_numpy(images[np.sort(rng.integers(n, size=batch))])
        return rows.to(device).float() / 127.5 - 1

    return load


if __name__ == "__main__":
    main(float(sys.argv[1]))
