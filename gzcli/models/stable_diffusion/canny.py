"""Canny edges, ControlNet's maps for sets without maps (Zhang 2023, section 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIGMA = 1.0  # of the Gaussian that smooths the grey image first, in pixels
WEAK, STRONG = 0.1, 0.2  # strengths of a gradient: of an edge's pixels, and of the strongest of them at least


def canny(x: Tensor) -> Tensor:
    """Edges of images [B, C, H, W] in [-1, 1]: white (1) on black (−1), [B, 3, H, W] on the same device
    (Canny 1986, doi:10.1109/TPAMI.1986.4767851).

    Runs on the CPU, some 10 ms for an image of 512×512.
    """
    grey = ((x.detach().float().mean(1) + 1) / 2).cpu().numpy()
    found = np.stack([edges(image) for image in grey])
    return torch.from_numpy(found).to(x).mul_(2).sub_(1)[:, None].expand(-1, 3, -1, -1)


def edges(grey: np.ndarray) -> np.ndarray:
    """Edges of an image float32 [H, W] in [0, 1], bool [H, W], as `skimage.feature.canny` finds them."""
    from scipy import ndimage

    def blurred(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, SIGMA, mode="constant")

    # near the border the Gaussian has less than its weight within the image
    smooth = blurred(grey) / (blurred(np.ones_like(grey)) + np.finfo(grey.dtype).eps)
    down, right = ndimage.sobel(smooth, axis=0), ndimage.sobel(smooth, axis=1)
    strength = np.sqrt(down * down + right * right)
    weak = ridges(down, right, strength) & (strength >= np.float32(WEAK))
    weak[[0, -1]] = weak[:, [0, -1]] = False
    lines, count = ndimage.label(weak, np.ones((3, 3)))
    kept = np.zeros(count + 1, bool)
    kept[lines[weak & (strength >= np.float32(STRONG))]] = True
    return kept[lines]


def ridges(down: np.ndarray, right: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Where the gradient is not weaker than one pixel further along it, in either direction; the strength
    there is interpolated between the neighbours on either side of its direction. Past the border it is 0."""
    tall, wide = np.abs(down), np.abs(right)
    steep, alike = tall > wide, (down > 0) == (right > 0)
    share = np.divide(
        np.minimum(tall, wide), np.maximum(tall, wide), where=strength > 0, out=np.zeros_like(tall)
    )
    rows, columns = np.indices(strength.shape) + 1
    turn = np.where(alike, 1, -1)  # rows down for a column to the right
    padded, found = np.pad(strength, 1), np.ones(strength.shape, bool)
    for way in (1, -1):
        diagonal = padded[rows + way * turn, columns + way]
        straight = padded[rows + way * turn * steep, columns + way * ~steep]
        found &= diagonal * share + straight * (1 - share.astype(np.float64)) <= strength
    return found
