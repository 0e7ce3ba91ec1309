"""Multi-scale structural similarity (Wang 2003, "Multi-scale structural similarity for image quality
assessment")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.models.nn import to_fp32
from gzcli.types import moved

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1


def gaussian_window(size: int, sigma: float) -> Tensor:
    """[size], sums to 1, largest in the middle."""
    t = torch.arange(size) - (size - 1) / 2
    w = torch.exp(-(t**2) / (2 * sigma**2))
    return w / w.sum()


def blur(x: Tensor, window: Tensor) -> Tensor:
    """Separable filter of each channel, without padding."""
    c, k = x.shape[1], window.numel()
    w = window.to(x).expand(c, 1, k)
    return F.conv2d(F.conv2d(x, w.unsqueeze(2), groups=c), w.unsqueeze(3), groups=c)


def ssim_parts(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Mean luminance·contrast·structure and mean contrast·structure: x, y [B, C, H, W] in [0, 1] → [B, C]
    each."""
    mu_x, mu_y = blur(x, window), blur(y, window)
    var_x, var_y = blur(x * x, window) - mu_x**2, blur(y * y, window) - mu_y**2
    cov = blur(x * y, window) - mu_x * mu_y
    cs = (2 * cov + C2) / (var_x + var_y + C2)
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return (luminance * cs).mean((2, 3)), cs.mean((2, 3))


def ms_ssim(x: Tensor, y: Tensor, *, size: int = 11, sigma: float = 1.5) -> Tensor:
    """MS-SSIM of images [B, C, H, W] in [-1, 1], in fp32 → [B], at most 1.

    Small images get a smaller window (7 below 64 px, at most the image) and only the scales that still hold
    it; the weights of those left are divided by their sum. A negative contrast term, which has no fractional
    power, counts as (almost) none.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = (to_fp32(x) + 1) / 2, (to_fp32(y) + 1) / 2
        side = min(x.shape[2:])
        size = min(size, side) if side >= 64 else min(7, size, side)
        window = moved(gaussian_window(size, sigma * size / 11), x.device)
        scales = 1
        while scales < len(WEIGHTS) and side // 2**scales >= size:
            scales += 1
        weights = moved(torch.tensor(WEIGHTS[:scales]), x.device)
        weights = weights / weights.sum()
        value = x.new_ones(x.shape[0], x.shape[1])
        for i in range(scales):
            whole, cs = ssim_parts(x, y, window)
            value = value * (whole if i == scales - 1 else cs).clamp_min(1e-4) ** weights[i]
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return value.mean(1)
