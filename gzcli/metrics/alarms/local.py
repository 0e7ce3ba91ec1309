"""A local score: where a map differs from the maps of good images. The map is normalised at each place and
smoothed at several scales; the score is the maximum. A defect covers few pixels, so it would be lost in a
mean over the image.

  u      m / (the root of the mean of (m / μ)² over the image), or m itself if `relative` is not set
  z      (u − μ) / σ, by the mean and deviation of u over good images in this place
  s_k    (mean of z over k × k places − a_k) / b_k, by the mean and deviation of its maximum in a good image;
         for a scale of −k the mean is that of −z: a place is too faint, as where an image is blurred
  s_0    t (u_0 / 3 q)², where u_0 = max(ℓ / a, a / ℓ) − 1, ℓ is the root of the mean of (m / μ)² over the
         image and a its mean over good images; q and t are what 2 % of the good images exceed, by u_0 and
         by the largest s_k
  local  max over k of s_k, and over places, or s_0, whichever is larger

A relative map does not rise if a whole image is unusual, such as a part at another angle. No place of a
foreign image need be more unusual than the most unusual place of a good one, but the image is unusual, or too
simple, throughout. s_0 detects that. It hardly ever determines the score of a good image, so the threshold
for small defects does not change. The good images must be images to which the method was not fitted, because
maps of others are too low.

The map that people see (`Local.shown`) excludes s_0, which a strong defect raises everywhere. Such a defect
also raises ℓ, and all other places of a relative map would be too faint. Therefore places that are too faint
are shown only if one of them is the most unusual place of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

LOCAL_SIDES = (1, 3, 5)  # sides of the squares over which maps are averaged
# the quantile of good images, and the multiple of it that counts as a quantile of places
RARE_QUANTILE, BEYOND = 0.98, 3.0
MEAN_SHARE = 0.2  # in m / μ, this share of the mean of μ over all places is added to μ
SHRINK = 8.0  # weight, in images, of the deviation over all places in that of each place
T = TypeVar("T")


@dataclass(frozen=True)
class Local:
    level: np.ndarray  # μ of m / μ, float32 [h, w]
    relate: bool  # whether maps are relative
    mean: np.ndarray  # μ of u, float32 [h, w]
    deviation: np.ndarray  # σ, float32 [h, w]
    scales: tuple[int, ...]  # k, odd; negative if values that are too low count
    shift: np.ndarray  # a of s_k, float32 [scales]
    unit: np.ndarray  # b of s_k, float32 [scales]
    whole: np.ndarray  # a, and 3 q / √t, float32 [2]

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        """The largest s_k at each place, float32, for maps [N, h, w]. If the largest of all is below s_0, the
        difference is added everywhere."""
        ratio = rise(maps, self.level)
        top = self.largest(maps, ratio, self.scales)
        whole = np.square(departure(ratio / self.whole[0]) / self.whole[1])
        return top + np.maximum(0, whole - top.max((1, 2)))[:, None, None]

    def largest(self, maps: np.ndarray, ratio: np.ndarray, scales: Sequence[int]) -> np.ndarray:
        """The largest s_k of each place among these scales; ratio: ℓ, [N]."""
        u = maps / ratio[:, None, None] if self.relate else maps
        z = (u - self.mean) / self.deviation
        standard = {k: each for k, *each in zip(self.scales, self.shift, self.unit, strict=True)}
        top = np.full(z.shape, -np.inf, np.float32)
        for k in scales:
            shift, unit = standard[k]
            top = np.maximum(top, (smooth(z if k > 0 else -z, abs(k)) - shift) / unit)
        return top

    def shown(self, maps: np.ndarray) -> np.ndarray:
        """The map for people, float32 [N, h, w] of maps [N, h, w]."""
        return decisive(*self.strong_and_faint(maps))

    def strong_and_faint(self, maps: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The largest s_k of each place among the scales for places that are too strong, and among those for
        places that are too faint. The latter use the mean ℓ of good images if ℓ is larger."""
        ratio, strong, faint = rise(maps, self.level), self.signed(1), self.signed(-1)
        return (
            self.largest(maps, ratio, strong) if strong else None,
            self.largest(maps, np.minimum(ratio, self.whole[0]), faint) if faint else None,
        )

    def signed(self, sign: int) -> tuple[int, ...]:
        """The scales with this sign."""
        return tuple(k for k in self.scales if k * sign > 0)


def decisive(strong: np.ndarray | None, faint: np.ndarray | None) -> np.ndarray:
    """The map [N, h, w] of both. Places that are too faint count if one is the most unusual of its image."""
    if strong is None or faint is None:
        return one_of(strong, faint)
    counts = faint.max((1, 2)) > strong.max((1, 2))
    return np.where(counts[:, None, None], np.maximum(strong, faint), strong)


def one_of(strong: T | None, faint: T | None) -> T:
    """The map of places that are too strong if there is one, otherwise that of those that are too faint."""
    only = faint if strong is None else strong
    assert only is not None
    return only


def fit_local(
    maps: np.ndarray, scales: Sequence[int] = LOCAL_SIDES, *, relate: bool = False, even: bool = False
) -> Local:
    """Fits the local map on maps [N, h, w] of good images.

    relate: whether maps are relative.
    even: whether all places share one mean and deviation. If edges are at other places in each image, the
      statistics of a place would hide what is unusual at an edge.
    """
    maps = np.asarray(maps, np.float32)
    level = maps.mean(0)
    level = level + np.float32(MEAN_SHARE * level.mean() + 1e-12)
    ratio = rise(maps, level)
    u = maps / ratio[:, None, None] if relate else maps
    n, mean, variance = len(u), u.mean(0), u.var(0)
    pooled = float(variance.mean())
    deviation = np.sqrt((n * variance + SHRINK * pooled) / (n + SHRINK)) if pooled else np.ones_like(mean)
    if even:
        mean, deviation = np.full_like(mean, u.mean()), np.full_like(mean, max(float(u.std()), 1e-12))
    z = (u - mean) / deviation
    tops = np.stack([smooth(z if k > 0 else -z, abs(k)).max((1, 2)) for k in scales])
    shift, unit = tops.mean(1), np.maximum(tops.std(1), 1e-3)
    usual = float(np.quantile(((tops - shift[:, None]) / unit[:, None]).max(0), RARE_QUANTILE))
    middle = ratio.mean()
    rare = max(float(np.quantile(departure(ratio / middle), RARE_QUANTILE)), 1e-3)
    whole = np.array([middle, BEYOND * rare / max(usual, 1) ** 0.5], np.float32)
    return Local(level, relate, mean, deviation.astype(np.float32), tuple(scales), shift, unit, whole)


def rise(maps: np.ndarray, level: np.ndarray) -> np.ndarray:
    """ℓ for maps [N, h, w], float32 [N]."""
    return np.sqrt(np.square(maps / level).mean((1, 2)) + np.float32(1e-12))


def departure(share: np.ndarray) -> np.ndarray:
    """u_0 for ℓ / a."""
    return np.maximum(share, 1 / share) - 1


def smooth(maps: np.ndarray, k: int) -> np.ndarray:
    """The mean over the k × k places around each one, float32. At an edge, only existing places are
    averaged."""
    from scipy.ndimage import uniform_filter1d

    maps = np.asarray(maps, np.float32)
    if k == 1:
        return maps
    for axis in (1, 2):
        inside = uniform_filter1d(np.ones(maps.shape[axis], np.float32), k, mode="constant")
        maps = uniform_filter1d(maps, k, axis=axis, mode="constant")
        maps = maps / (inside[:, None] if axis == 1 else inside)
    return maps
