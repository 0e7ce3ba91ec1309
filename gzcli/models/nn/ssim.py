"""Structural similarity of images, at one scale and at several (Wang et al. 2003, "Multi-scale structural
similarity for image quality assessment")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.core.types import moved
from gzcli.models.nn.common import to_fp32

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the scales, finest first
C1, C2 = 0.01**2, 0.03**2  # the constants that keep the quotients finite, for images in [0, 1]


def gaussian_window(size: int, sigma: float) -> Tensor:
    """The weights of a Gaussian filter, [size], which sum to 1."""
    t = torch.arange(size) - (size - 1) / 2
    w = torch.exp(-(t**2) / (2 * sigma**2))
    return w / w.sum()


def blur(x: Tensor, window: Tensor) -> Tensor:
    """Each channel of x [B, C, H, W] filtered along both sides, without padding."""
    c, k = x.shape[1], window.numel()
    w = window.to(x).expand(c, 1, k)
    return F.conv2d(F.conv2d(x, w.unsqueeze(2), groups=c), w.unsqueeze(3), groups=c)


def ssim_parts(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Means over pixels [B, C] of SSIM and of its contrast·structure, of images x and y [B, C, H, W] in [0,
    1]."""
    mu_x, mu_y = blur(x, window), blur(y, window)
    var_x, var_y = blur(x * x, window) - mu_x**2, blur(y * y, window) - mu_y**2
    cov = blur(x * y, window) - mu_x * mu_y
    cs = (2 * cov + C2) / (var_x + var_y + C2)
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return (luminance * cs).mean((2, 3)), cs.mean((2, 3))


def ms_ssim(x: Tensor, y: Tensor, *, size: int = 11, sigma: float = 1.5) -> Tensor:
    """MS-SSIM [B] of images x and y [B, C, H, W] in [-1, 1], computed in fp32; at most 1.

    Images below 64 pixels get a window of at most 7, and only the scales that are as large as the window
    count, their exponents divided by their sum. A negative contrast term is raised to 1e-4, since a negative
    number has no fractional power.

    size: side of the window in pixels.
    sigma: standard deviation of the window of 11 pixels, in pixels; it shrinks with the window.
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
