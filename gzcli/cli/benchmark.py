"""`gz doctor --benchmark`: how fast this machine computes, and what a step of a U-Net should cost here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from gzcli import start, units
from gzcli.cli import out
from gzcli.errors import DeviceError

SECONDS = 4.0  # of each of the measurements, of which there are seven on a device
ROWS = {  # what the engine measured → its name, divisor and unit
    "matmul_fp32": ("matmul fp32", 1e12, "TFLOP/s"),
    "matmul_bf16": ("matmul bf16", 1e12, "TFLOP/s"),
    "conv": ("U-Net blocks of 128 channels", 1e12, "TFLOP/s"),
    "small_conv": ("U-Net blocks of 32 channels", 1e12, "TFLOP/s"),
    "copy": ("copies in memory", 1e9, "GB/s"),
    "call": ("start of an operation", 1e-6, "µs"),
    "loader": ("images of 32×32 loaded", 1.0, "a second"),
}


def show_benchmark() -> dict[str, Any]:
    """Measures the machine in a process of its own and prints what was found. Returns it, as the engine does.

    Raises DeviceError where the process fails.
    """
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > start.cores() / 2:
        out.warn(
            f"other programs use this machine (load {load:.1f} on {start.cores()} cores): it is faster alone"
        )
    found = measured(SECONDS)
    devices, nets = found["devices"], found["nets"]
    rows = [
        (name, *(f"{in_digits(of[key] / divisor)} {unit}" for of in devices.values()))
        for key, (name, divisor, unit) in ROWS.items()
    ]
    for scale, net in nets.items():
        name = (
            f"ddpm on cifar10, {scale} ({net['params'] / 1e6:.1f} M, {net['flops'] / 1e12:.2f} TFLOP a step)"
        )
        rows.append((name, *(step_in_words(of["steps"][scale]) for of in devices.values())))
    out.text("")
    out.table(["measured", *("GPU" if name == "cuda" else name.upper() for name in devices)], rows)
    return found


def measured(seconds: float) -> dict[str, Any]:
    """What the engine's benchmark finds; what it does is told meanwhile.

    seconds: time of each measurement.

    Raises DeviceError where the process fails.
    """
    child = subprocess.Popen(
        [sys.executable, start.SCRIPT, "gzcli.engine.benchmark", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which ends that one
    )
    found: dict[str, Any] | None = None
    try:
        assert child.stdout and child.stderr
        for line in child.stdout:
            told = json.loads(line)
            found = told.get("result")
            if "doing" in told:
                out.info(f"measuring {told['doing']}")
        problem = child.stderr.read().strip().splitlines()
    finally:
        child.kill()
        child.wait()
    if found is None:
        last = problem[-1] if problem else "it ended without a word"
        raise DeviceError(f"the benchmark failed: {last}", hint="gz doctor")
    return found


def in_digits(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def step_in_words(seconds: float) -> str:
    """Seconds of a step, with the time of 100,000 of them."""
    rate = f"{1 / seconds:.1f} it/s" if seconds < 1 else f"{seconds:.1f} s a step"
    return f"{rate}, 100k steps {units.duration(1e5 * seconds)}"
