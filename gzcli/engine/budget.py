"""How many images a verb can afford, and which."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

FEWEST, MOST = 500, 10_000


def subset(total: int, n: int) -> np.ndarray:
    """Sorted positions of min(n, total) images of a split: always the same ones (seed 0), larger sets hold smaller."""
    return np.sort(np.random.default_rng(0).permutation(total)[:n])


def affordable(seconds: float, budget: float, sets: int) -> int:
    """Images a split that `budget` seconds pay for at `seconds` an image: 500 … 10,000, in steps of 100."""
    return int(np.clip(budget / max(seconds * sets, 1e-9) // 100 * 100, FEWEST, MOST))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a second call takes; the first one warms up."""
    function()
    synchronise(device)
    since = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - since


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
