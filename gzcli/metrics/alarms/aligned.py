"""Several methods of images whose parts lie in the same place. Each score is standardised by its mean and
standard deviation over good images to which the method was not fitted. The score of an image is the mean of
its two highest. The methods are

  pca_patch   at the second size: faint structure, and what is too smooth
  pca_local   at two sizes, relative and even: what is strong in its place or out of it
  pca_local   at the first size, even but not relative: what many places share
  pca_local   of few components at the last size, if there are three: places too smooth to be good
  knn_patch   of 3 × 3 cells of any place: pieces that no good image has
  ℓ           of the first two, the size of a whole map (see `local`): foreign images

Larger images are first reduced to about 128 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics.alarms import neighbourhoods, patches, pca
from gzcli.metrics.alarms.fitted import (
    Fitted,
    Mapped,
    enlarged,
    once,
    reduced,
    reductions,
    shared,
    sides,
)
from gzcli.metrics.alarms.local import decisive, fit_local, one_of
from gzcli.metrics.alarms.state import ModuleState

SMOOTH_COMPONENTS = 20  # components for places that are too smooth
MIN_STANDARDISED = (
    -6.0
)  # bound of a standardised map in the mean of maps, far below the maximum of a good image
AVERAGED_SCORES = 2  # standardised scores that are averaged
MAX_SIDE = 128  # approximate pixels to which the shorter side of larger images is reduced
MAPS_AT_ONCE = 16  # images whose maps are enlarged together


@dataclass(eq=False)
class Member(ModuleState):
    """A method, and the usual scores of good images.

    whole: number of tails of log ℓ that count: 0, 1 (the upper one) or 2.
    usual: mean and standard deviation of its score, and of log ℓ, float32 [2, 2].
    """

    fitted: Mapped
    whole: int
    usual: Tensor

    def scores(self, raw: Tensor) -> list[Tensor]:
        """The standardised scores of raw values, float32 [N] each."""
        local, ((mean, deviation), (level, spread)) = self.fitted.local, self.usual
        scores = [(local.cells(raw).amax((1, 2)) - mean) / deviation]
        if self.whole:
            z = (local.rise(raw)[:, 0, 0].log() - level) / spread
            scores.append(z.abs() if self.whole == 2 else z)
        return scores


MemberMaps = tuple[Member, np.ndarray]  # a member, and its raw values of good images


@dataclass(eq=False)
class Aligned(Fitted):
    members: tuple[Member, ...]

    def raws(self, images: Tensor) -> list[Tensor]:
        """The raw values of each member."""
        x = small(images)
        return [once(images, member, partial(member.fitted.raw, x)) for member in self.members]

    def scores(self, images: Tensor) -> Tensor:
        return self.scores_of(self.raws(images))

    def scores_of(self, raws: Sequence[Tensor]) -> Tensor:
        pairs = zip(self.members, raws, strict=True)
        every = torch.stack([each for member, raw in pairs for each in member.scores(raw)], 1)
        return every.topk(AVERAGED_SCORES, 1).values.mean(1)

    def maps(self, images: Tensor) -> Tensor:
        return self.maps_of(self.raws(images), images.shape[1:])

    def maps_of(self, raws: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """At each place, the mean of the standardised maps of places that are too strong. If the most unusual
        place of an image is too faint, the map of the member for such places is shown where it is higher."""
        maps: dict[bool, list[Tensor]] = {True: [], False: []}
        for member, raw in zip(self.members, raws, strict=True):
            of, (mean, deviation) = member.fitted, member.usual[0]
            strong, faint = of.local.strong_and_faint(raw)
            cells = enlarged(one_of(strong, faint), of.factor * reduction(shape), shape[1:])
            maps[strong is not None].append(((cells - mean) / deviation).clamp(min=MIN_STANDARDISED))
        return decisive(torch.stack(maps[True]).mean(0), next(iter(maps[False]), None))


def reduction(shape: Sequence[int]) -> int:
    """The factor by which images [C, H, W] are reduced at first."""
    return max(1, round(min(shape[1:]) / MAX_SIDE))


def small(images: Tensor) -> Tensor:
    """Images uint8 [N, C, H, W], reduced to about `MAX_SIDE` pixels and rounded."""
    factor = reduction(images.shape[1:])
    return images if factor == 1 else shared(images, factor, lambda: (255 * reduced(images, factor)).round())


def fit_aligned(images: np.ndarray) -> Aligned:
    """Fits `aligned` to good images uint8 [N, C, H, W]."""
    return aligned(images)[0]


def aligned(images: np.ndarray) -> tuple[Aligned, np.ndarray, np.ndarray]:
    """`aligned`, and the score and the largest value of the map of each of these images, by members that were
    fitted to others."""
    factor = reduction(images.shape[1:])
    if factor > 1:
        images = (255 * reductions(images, factor)).round().astype(np.uint8)
    model, usual = fitted_members(images)
    raws = [torch.from_numpy(each) for each in usual]
    tops = [
        model.maps_of([raw[i : i + MAPS_AT_ONCE] for raw in raws], images.shape[1:]).amax((1, 2))
        for i in range(0, len(images), MAPS_AT_ONCE)
    ]
    return model, model.scores_of(raws).numpy(), torch.cat(tops).numpy()


def fitted_members(images: np.ndarray) -> tuple[Aligned, list[np.ndarray]]:
    """`aligned`, and the raw values of the good images for each member."""
    every = sides(images.shape[1:])
    factors, pairs, components = every[:2], [], []
    moved = pca.moved(images)
    for factor in factors:
        basis, residuals = pca.with_moved(moved, factor, neighbourhoods.COMPONENT_SHARE)
        components.append(len(basis.rows))
        strengths = pca.strengths(residuals)
        if factor == factors[-1]:
            pairs.append(member(*neighbourhoods.pca_patch(basis, residuals, factor), 2))
        local = fit_local(strengths, (1, 3), relate=True, even=True)
        pairs.append(member(pca.PcaLocal({}, factor, local, basis), strengths, int(factor == factors[0])))
        if factor == factors[0]:
            local = fit_local(strengths, (1,), even=True)
            pairs.append(member(pca.PcaLocal({}, factor, local, basis), strengths))
    pairs += [near_patches(images, factors[0]), *(smooth_places(images, each) for each in every[2:])]
    members, usual = [each for each, _ in pairs], [each for _, each in pairs]
    return Aligned({"factors": tuple(every), "components": tuple(components)}, tuple(members)), usual


def smooth_places(images: np.ndarray, factor: int) -> MemberMaps:
    x = reductions(images, factor)
    usual = pca.strengths(pca.left_out(x[None], SMOOTH_COMPONENTS))
    local = fit_local(usual, (-9,), even=True)
    return member(pca.PcaLocal({}, factor, local, pca.components(x, SMOOTH_COMPONENTS)), usual)


def near_patches(images: np.ndarray, factor: int) -> MemberMaps:
    x = reductions(images, factor)
    embedding = patches.embed(x, 3, 0.0)
    memory, usual = patches.remembered(embedding(x))
    local = fit_local(usual, neighbourhoods.LOCAL_SCALES, relate=True, even=True)
    return member(
        patches.KnnPatch(
            {}, factor * patches.PATCH_STRIDE, local, factor, embedding, torch.from_numpy(memory)
        ),
        usual,
    )


def member(fitted: Mapped, usual: np.ndarray, whole: int = 0) -> MemberMaps:
    """A member, standardised by the maps of good images to which it was not fitted, and these maps."""
    levels = fitted.local.rise(torch.from_numpy(usual)).log().flatten().numpy()
    rows = [[each.mean(), max(float(each.std()), 1e-6)] for each in (fitted.local.tops(usual), levels)]
    return Member(fitted, whole, torch.tensor(rows, dtype=torch.float32)), usual
