"""How many GPUs there are, without importing torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

OTHER_GPUS = (
    "/dev/kfd",
    "/dev/nvhost-gpu",
    "/dev/dxg",
)  # AMD's, Jetson's, those of WSL: no driver lists them


def count_gpus() -> int:
    """The visible CUDA devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed_gpus()
    named = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    if not named or "MIG-" in visible or any(Path(node).exists() for node in OTHER_GPUS):
        return len(named)
    return min(len(named), installed_gpus())  # names alone are no GPUs


def installed_gpus() -> int:
    """The GPUs of NVIDIA's driver, whether or not they are visible."""
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir():
        return len(list(driver.iterdir()))
    try:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in out.splitlines())
