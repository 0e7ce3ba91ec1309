"""Several methods as one: a defect that one of them misses, another detects. Each score is standardised by
its mean and standard deviation over good images to which the method was not fitted. The score of an image is
the mean of its two highest. The methods are

  pca_patch   at the second size: faint structure, and what is too smooth
  pca_local   at two sizes, relative and even: what is strong in its place or out of it
  pca_local   at the first size, even but not relative: what many places share
  pca_local   of few components at the last size, if there are three: places too smooth to be good
  knn_patch   of 3 × 3 cells of any place: pieces that no good image has
  ℓ           of the first two, the size of a whole map (see `local`): foreign images

No choice is made among them, so all good images calibrate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics.alarms import neighbourhoods, patches, pca
from gzcli.metrics.alarms.fitted import Fitted, Mapped, enlarged, once, reductions, sides
from gzcli.metrics.alarms.local import decisive, fit_local, one_of
from gzcli.metrics.alarms.state import State

SMOOTH_COMPONENTS = 20  # components for places that are too smooth
MIN_STANDARDISED = (
    -6.0
)  # bound of a standardised map in the mean of maps, far below the maximum of a good image
AVERAGED_SCORES = 2  # standardised scores that are averaged


@dataclass(eq=False)
class Member(State):
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


@dataclass(eq=False)
class Combined(Fitted):
    members: tuple[Member, ...]

    def raws(self, images: Tensor) -> Iterator[tuple[Member, Tensor]]:
        """Each member and its raw values."""
        for member in self.members:
            yield member, once(images, member, partial(member.fitted.raw, images))

    def scores(self, images: Tensor) -> Tensor:
        every = torch.stack([each for member, raw in self.raws(images) for each in member.scores(raw)], 1)
        return every.topk(AVERAGED_SCORES, 1).values.mean(1)

    def maps(self, images: Tensor) -> Tensor:
        """At each place, the mean of the standardised maps of places that are too strong. If the most unusual
        place of an image is too faint, the map of the member for such places is shown where it is higher."""
        maps: dict[bool, list[Tensor]] = {True: [], False: []}
        for member, raw in self.raws(images):
            of, (mean, deviation) = member.fitted, member.usual[0]
            strong, faint = of.local.strong_and_faint(raw)
            cells = enlarged(one_of(strong, faint), of.factor, images.shape[2:])
            maps[strong is not None].append(((cells - mean) / deviation).clamp(min=MIN_STANDARDISED))
        return decisive(torch.stack(maps[True]).mean(0), next(iter(maps[False]), None))


def fit_combined(images: np.ndarray) -> Combined:
    """`combined`, fitted to good images uint8 [N, C, H, W]."""
    every = sides(images.shape[1:])
    factors, members, components = every[:2], [], []
    moved = pca.moved(images)
    for factor in factors:
        basis, residuals = pca.with_moved(moved, factor, neighbourhoods.COMPONENT_SHARE)
        components.append(len(basis.rows))
        usual = pca.strengths(residuals)
        if factor == factors[-1]:
            members.append(member(*neighbourhoods.pca_patch(basis, residuals, factor), 2))
        local = fit_local(usual, (1, 3), relate=True, even=True)
        members.append(member(pca.PcaLocal({}, factor, local, basis), usual, int(factor == factors[0])))
        if factor == factors[0]:
            local = fit_local(usual, (1,), even=True)
            members.append(member(pca.PcaLocal({}, factor, local, basis), usual))
    members += [near_patches(images, factors[0]), *(smooth_places(images, each) for each in every[2:])]
    return Combined({"factors": tuple(every), "components": tuple(components)}, tuple(members))


def smooth_places(images: np.ndarray, factor: int) -> Member:
    x = reductions(images, factor)
    usual = pca.strengths(pca.left_out(x[None], SMOOTH_COMPONENTS))
    local = fit_local(usual, (-9,), even=True)
    return member(pca.PcaLocal({}, factor, local, pca.components(x, SMOOTH_COMPONENTS)), usual)


def near_patches(images: np.ndarray, factor: int) -> Member:
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


def member(fitted: Mapped, usual: np.ndarray, whole: int = 0) -> Member:
    """A member, standardised by the maps of good images to which it was not fitted."""
    levels = fitted.local.rise(torch.from_numpy(usual)).log().flatten().numpy()
    rows = [[each.mean(), max(float(each.std()), 1e-6)] for each in (fitted.local.tops(usual), levels)]
    return Member(fitted, whole, torch.tensor(rows, dtype=torch.float32))
