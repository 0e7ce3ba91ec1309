"""Where a map is higher than it is on good images: the map normalised in each place, smoothed at several
scales, and the maximum of all. A defect covers few pixels, whose part in the mean of a whole image is lost.

  z      (m − μ) / σ, by the mean and deviation of good images' maps in this place
  s_k    (mean of z over k × k places − a_k) / b_k, by the mean and deviation of its maximum in a good image
  local  max over k of s_k, and over places

Maps of the good images must be of images that the method was not fitted on: others are too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALES = (1, 3, 5)  # sides of the squares over which maps are averaged
SHRINK = 8.0  # number of images as which the deviation over all places counts in that of each


@dataclass(frozen=True)
class Local:
    mean: np.ndarray  # μ, float32 [h, w]
    deviation: np.ndarray  # σ, float32 [h, w]
    scales: tuple[int, ...]  # k, odd
    shift: np.ndarray  # a, float32 [scales]
    unit: np.ndarray  # b, float32 [scales]

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        """The largest s_k of each place, float32 of maps [N, h, w]."""
        z = (maps - self.mean) / self.deviation
        rows = zip(self.scales, self.shift, self.unit, strict=True)
        smoothed = ((smooth(z, k) - shift) / unit for k, shift, unit in rows)
        top = next(smoothed)
        for each in smoothed:
            top = np.maximum(top, each)
        return top


def fit_local(maps: np.ndarray, scales: Sequence[int] = SCALES) -> Local:
    """Of the maps [N, h, w] of good images."""
    maps = np.asarray(maps, np.float32)
    n, mean = len(maps), maps.mean(0)
    variance = maps.var(0)
    pooled = float(variance.mean())
    deviation = np.sqrt((n * variance + SHRINK * pooled) / (n + SHRINK)) if pooled else np.ones_like(mean)
    z = (maps - mean) / deviation
    tops = np.stack([smooth(z, k).max((1, 2)) for k in scales])
    unit = np.maximum(tops.std(1), 1e-3)
    return Local(mean, deviation.astype(np.float32), tuple(scales), tops.mean(1), unit)


def smooth(maps: np.ndarray, k: int) -> np.ndarray:
    """The mean over the k × k places round each one, float32; beyond the edge there is nothing to average."""
    from scipy.ndimage import uniform_filter1d

    maps = np.asarray(maps, np.float32)
    if k == 1:
        return maps
    for axis in (1, 2):
        inside = uniform_filter1d(np.ones(maps.shape[axis], np.float32), k, mode="constant")
        maps = uniform_filter1d(maps, k, axis=axis, mode="constant")
        maps = maps / (inside[:, None] if axis == 1 else inside)
    return maps
