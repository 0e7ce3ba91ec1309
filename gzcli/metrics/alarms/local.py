"""Where a map differs from what it is on good images: the map normalised in each place, smoothed at several
scales, and the maximum of all. A defect covers few pixels, whose part in the mean of a whole image is lost.

  u      m / (the root of the mean of (m / μ)² over the image), or m itself where `relative` is not set
  z      (u − μ) / σ, by the mean and deviation of u over good images in this place
  s_k    (mean of z over k × k places − a_k) / b_k, by the mean and deviation of its maximum in a good image;
         for a scale of −k the mean is that of −z: a place is too faint, as where an image is blurred
  local  max over k of s_k, and over places

A relative map does not rise where all of an image is unusual, as a part that lies askew is. Maps of the good
images must be of images that the method was not fitted on: others are too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALES = (1, 3, 5)  # sides of the squares over which maps are averaged
FLOOR = 0.2  # share of the mean over all places that μ is at least, where maps are made relative
SHRINK = 8.0  # number of images as which the deviation over all places counts in that of each


@dataclass(frozen=True)
class Local:
    level: np.ndarray | None  # by which relative maps are divided, float32 [h, w]; None: maps are absolute
    mean: np.ndarray  # μ, float32 [h, w]
    deviation: np.ndarray  # σ, float32 [h, w]
    scales: tuple[int, ...]  # k, odd; negative where what is too faint counts
    shift: np.ndarray  # a, float32 [scales]
    unit: np.ndarray  # b, float32 [scales]

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        """The largest s_k of each place, float32 of maps [N, h, w]."""
        z = self.normalised(maps)
        return self.largest([smooth(z if k > 0 else -z, abs(k)) for k in self.scales])

    def normalised(self, maps: np.ndarray) -> np.ndarray:
        return (relative(maps, self.level) - self.mean) / self.deviation

    def largest(self, smoothed: Sequence[np.ndarray]) -> np.ndarray:
        """The largest s_k of each place, of z as it is smoothed at each scale."""
        top = (smoothed[0] - self.shift[0]) / self.unit[0]
        for each, shift, unit in zip(smoothed[1:], self.shift[1:], self.unit[1:], strict=True):
            top = np.maximum(top, (each - shift) / unit)
        return top


def fit_local(maps: np.ndarray, scales: Sequence[int] = SCALES, *, relate: bool = False) -> Local:
    """Fits the local map on maps [N, h, w] of good images; relate: whether maps are relative."""
    maps = np.asarray(maps, np.float32)
    level = None
    if relate:
        level = maps.mean(0)
        level = level + np.float32(FLOOR * level.mean() + 1e-12)
    u = relative(maps, level)
    n, mean, variance = len(u), u.mean(0), u.var(0)
    pooled = float(variance.mean())
    deviation = np.sqrt((n * variance + SHRINK * pooled) / (n + SHRINK)) if pooled else np.ones_like(mean)
    z = (u - mean) / deviation
    tops = np.stack([smooth(z if k > 0 else -z, abs(k)).max((1, 2)) for k in scales])
    unit = np.maximum(tops.std(1), 1e-3)
    return Local(level, mean, deviation.astype(np.float32), tuple(scales), tops.mean(1), unit)


def relative(maps: np.ndarray, level: np.ndarray | None) -> np.ndarray:
    """Maps, each divided by the root of the mean square of map / level."""
    if level is None:
        return maps
    return maps / np.sqrt(np.square(maps / level).mean((1, 2), keepdims=True) + 1e-12)


def smooth(maps: np.ndarray, k: int) -> np.ndarray:
    """The mean over the k × k places around each one, float32; beyond the edge there is nothing to
    average."""
    from scipy.ndimage import uniform_filter1d

    maps = np.asarray(maps, np.float32)
    if k == 1:
        return maps
    for axis in (1, 2):
        inside = uniform_filter1d(np.ones(maps.shape[axis], np.float32), k, mode="constant")
        maps = uniform_filter1d(maps, k, axis=axis, mode="constant")
        maps = maps / (inside[:, None] if axis == 1 else inside)
    return maps
