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
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.state import ModuleState

LOCAL_SIDES = (1, 3, 5)  # sides of the squares over which maps are averaged
# the quantile of good images, and the multiple of it that counts as a quantile of places
RARE_QUANTILE, BEYOND = 0.98, 3.0
MEAN_SHARE = 0.2  # in m / μ, this share of the mean of μ over all places is added to μ
SHRINK = 8.0  # weight, in images, of the deviation over all places in that of each place
T = TypeVar("T")


@dataclass(eq=False)
class Local(ModuleState):
    level: Tensor  # μ of m / μ, float32 [h, w]
    relate: bool  # whether maps are relative
    mean: Tensor  # μ of u, float32 [h, w]
    deviation: Tensor  # σ, float32 [h, w]
    scales: tuple[int, ...]  # k, odd; negative if values that are too low count
    shift: Tensor  # a of s_k, float32 [scales]
    unit: Tensor  # b of s_k, float32 [scales]
    whole: Tensor  # a, and 3 q / √t, float32 [2]

    def cells(self, maps: Tensor) -> Tensor:
        """The largest s_k at each place, float32, for maps [N, h, w]. If the largest of all is below s_0, the
        difference is added everywhere."""
        ratio = self.rise(maps)
        top = self.largest(maps, ratio, self.scales)
        whole = (departure(ratio / self.whole[0]) / self.whole[1]).square()
        return top + (whole - top.amax((1, 2), keepdim=True)).clamp(min=0)

    def tops(self, maps: np.ndarray) -> np.ndarray:
        """The largest of `cells` of each image, float32 [N], for an array."""
        return self.cells(torch.from_numpy(maps)).amax((1, 2)).numpy()

    def rise(self, maps: Tensor) -> Tensor:
        """ℓ for maps [N, h, w], float32 [N, 1, 1]."""
        return rise(maps, self.level)

    def largest(self, maps: Tensor, ratio: Tensor, scales: Sequence[int]) -> Tensor:
        """The largest s_k of each place among these scales; ratio: ℓ, [N, 1, 1]."""
        u = maps / ratio if self.relate else maps
        z = (u - self.mean) / self.deviation
        tops = []
        for i, k in enumerate(self.scales):
            if k in scales:
                tops.append((smooth(z if k > 0 else -z, abs(k)) - self.shift[i]) / self.unit[i])
        return torch.stack(tops).amax(0) if len(tops) > 1 else tops[0]

    def shown(self, maps: Tensor) -> Tensor:
        """The map for people, float32 [N, h, w] of maps [N, h, w]."""
        return decisive(*self.strong_and_faint(maps))

    def strong_and_faint(self, maps: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The largest s_k of each place among the scales for places that are too strong, and among those for
        places that are too faint. The latter use the mean ℓ of good images if ℓ is larger."""
        ratio, strong, faint = self.rise(maps), self.signed(1), self.signed(-1)
        return (
            self.largest(maps, ratio, strong) if strong else None,
            self.largest(maps, torch.minimum(ratio, self.whole[0]), faint) if faint else None,
        )

    def signed(self, sign: int) -> tuple[int, ...]:
        """The scales with this sign."""
        return tuple(k for k in self.scales if k * sign > 0)


def decisive(strong: Tensor | None, faint: Tensor | None) -> Tensor:
    """The map [N, h, w] of both. Places that are too faint count if one is the most unusual of its image."""
    if strong is None or faint is None:
        return one_of(strong, faint)
    counts = faint.amax((1, 2), keepdim=True) > strong.amax((1, 2), keepdim=True)
    return torch.where(counts, torch.maximum(strong, faint), strong)


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
    x = torch.from_numpy(np.ascontiguousarray(maps, np.float32))
    level = x.mean(0)
    level = level + MEAN_SHARE * level.mean() + 1e-12
    ratio = rise(x, level)
    u = x / ratio if relate else x
    n, mean, variance = len(u), u.mean(0), u.var(0, correction=0)
    pooled = variance.mean()
    deviation = ((n * variance + SHRINK * pooled) / (n + SHRINK)).sqrt() if pooled else torch.ones_like(mean)
    if even:
        mean = u.mean().expand_as(mean).clone()
        deviation = u.std(correction=0).clamp(min=1e-12).expand_as(mean).clone()
    z = (u - mean) / deviation
    tops = torch.stack([smooth(z if k > 0 else -z, abs(k)).amax((1, 2)) for k in scales]).numpy()
    shift, unit = tops.mean(1), np.maximum(tops.std(1), 1e-3)
    usual = float(np.quantile(((tops - shift[:, None]) / unit[:, None]).max(0), RARE_QUANTILE))
    middle = float(ratio.mean())
    rare = max(float(np.quantile(departure(ratio / middle).numpy(), RARE_QUANTILE)), 1e-3)
    whole = np.array([middle, BEYOND * rare / max(usual, 1) ** 0.5], np.float32)
    shifts, units, wholes = (torch.from_numpy(each) for each in (shift, unit, whole))
    return Local(level, relate, mean, deviation, tuple(scales), shifts, units, wholes)


def rise(maps: Tensor, level: Tensor) -> Tensor:
    """ℓ for maps [N, h, w], by the mean level μ of good ones, float32 [N, 1, 1]."""
    return ((maps / level).square().mean((1, 2), keepdim=True) + 1e-12).sqrt()


def departure(share: Tensor) -> Tensor:
    """u_0 for ℓ / a."""
    return torch.maximum(share, 1 / share) - 1


def smooth(maps: Tensor, k: int) -> Tensor:
    """The mean over the k × k places around each one, float32. At an edge, only existing places are
    averaged."""
    if k == 1:
        return maps
    for axis in (1, 2):
        # sums of slices cost a tenth of pooling; `pad` counts from the last axis
        n, beyond = maps.shape[axis], F.pad(maps, ((0, 0) if axis == 1 else ()) + (k // 2, k // 2))
        total = beyond.narrow(axis, 0, n).clone()
        for i in range(1, k):
            total += beyond.narrow(axis, i, n)
        inside = np.convolve(np.ones(n), np.ones(k))[k // 2 : k // 2 + n].astype(np.float32)
        maps = total / torch.from_numpy(inside)[(slice(None),) + (None,) * (2 - axis)]
    return maps
