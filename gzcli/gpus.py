"""How many GPUs there are, without importing torch, and how many of them torch can use.

`python -m gzcli.core.devices` tries them in a process of its own, which `launch.usable_gpus` starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from gzcli.core.errors import first_line

INSTALL = "install the torch that fits it, see pytorch.org; `gz doctor` checks it"

OTHER_GPUS = (
    "/dev/kfd",
    "/dev/nvhost-gpu",
    "/dev/dxg",
)  # AMD's, Jetson's, those of WSL: no driver lists them


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine.

    there: those that are visible.
    usable: the first ones of them, on which torch can compute.
    why: why these are not all; "" where they are.
    """

    there: int = 0
    usable: int = 0
    why: str = ""

    @property
    def lack(self) -> str | None:
        """What torch cannot use, and why; None where it can use all."""
        if self.usable >= self.there:
            return None
        of = f"{self.usable or 'none'} of the {self.there} GPUs"
        some = "cannot use the GPU that is" if self.there == 1 else f"can use {of} that are"
        return f"torch {some} here: {self.why}"


def tried(most: int | None = None) -> Gpus:
    """The GPUs on which this process's torch computes a sum. A GPU without free memory counts as usable: the
    error that it ends with is a better one.

    most: how many are tried; None: all.
    """
    import torch

    there, seen = count_gpus(), 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the driver is too old is the error, too
            seen = torch.cuda.device_count()
            if there and not (torch.version.cuda or torch.version.hip):
                return Gpus(there, 0, f"it is built for CPUs alone ({torch.__version__})")
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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = f" (`CUDA_VISIBLE_DEVICES={visible}`)" if visible else ""
    return Gpus(there, seen, "" if seen == there else f"it sees {seen}{named}")


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


if __name__ == "__main__":
    print(json.dumps(asdict(tried())))
