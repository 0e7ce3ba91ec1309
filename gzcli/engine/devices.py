"""Devices as torch has them."""

from __future__ import annotations

import torch


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
