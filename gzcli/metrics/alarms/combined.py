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

import numpy as np

from gzcli.metrics.alarms import neighbourhoods, patches, pca
from gzcli.metrics.alarms.fitted import Fitted, Mapped, enlarged, reduced, sides
from gzcli.metrics.alarms.local import decisive, fit_local, one_of, rise

SMOOTH_COMPONENTS = 20  # components for places that are too smooth
MIN_STANDARDISED = (
    -6.0
)  # bound of a standardised map in the mean of maps, far below the maximum of a good image
AVERAGED_SCORES = 2  # standardised scores that are averaged


@dataclass(frozen=True)
class Member:
    """A method, and the usual scores of good images.

    whole: number of tails of log ℓ that count: 0, 1 (the upper one) or 2.
    usual: mean and standard deviation of its score, and of log ℓ, float32 [2, 2].
    """

    fitted: Mapped
    whole: int
    usual: np.ndarray

    def scores(self, raw: np.ndarray) -> list[np.ndarray]:
        """The standardised scores of raw values, float64 [N] each."""
        (mean, deviation), (level, spread) = self.usual.astype(np.float64)
        scores = [(self.fitted.local(raw).max((1, 2)) - mean) / deviation]
        if self.whole:
            z = (np.log(rise(raw, self.fitted.local.level)) - level) / spread
            scores.append(np.abs(z) if self.whole == 2 else z)
        return scores


@dataclass(frozen=True)
class Combined(Fitted):
    members: tuple[Member, ...]

    def raws(self, images: np.ndarray) -> Iterator[tuple[Member, np.ndarray]]:
        """Each member and its raw values. Members with the same components share their residual."""
        residuals: dict[int, np.ndarray] = {}
        for member in self.members:
            of = member.fitted
            if not isinstance(of, pca.PcaLocal):
                yield member, of.raw(images)
                continue
            key = id(of.components.rows)
            if key not in residuals:
                residuals[key] = of.residual(images)
            yield member, of.of_residual(residuals[key])

    def score(self, images: np.ndarray) -> np.ndarray:
        every = np.stack([each for member, raw in self.raws(images) for each in member.scores(raw)])
        return np.sort(every, 0)[-AVERAGED_SCORES:].mean(0)

    def map(self, images: np.ndarray) -> np.ndarray:
        """At each place, the mean of the standardised maps of places that are too strong. If the most unusual
        place of an image is too faint, the map of the member for such places is shown where it is higher."""
        maps: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for member, raw in self.raws(images):
            of, (mean, deviation) = member.fitted, member.usual[0]
            strong, faint = of.local.strong_and_faint(raw)
            cells = enlarged(one_of(strong, faint), of.factor, images.shape[2:])
            maps[strong is not None].append(np.maximum((cells - mean) / deviation, MIN_STANDARDISED))
        return decisive(np.mean(maps[True], 0), next(iter(maps[False]), None))


def fit_combined(images: np.ndarray) -> Combined:
    """`combined`, fitted to good images uint8 [N, C, H, W]."""
    every = sides(images.shape[1:])
    factors, members, components = every[:2], [], []
    moved = pca.moved(images)
    for factor in factors:
        basis, residuals = pca.with_moved(moved, factor, neighbourhoods.COMPONENT_SHARE)
        components.append(len(basis.rows))
        usual = pca.strength(residuals)
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
    x = reduced(images, factor)
    usual = pca.strength(pca.left_out(x[None], SMOOTH_COMPONENTS))
    local = fit_local(usual, (-9,), even=True)
    return member(pca.PcaLocal({}, factor, local, pca.components(x, SMOOTH_COMPONENTS)), usual)


def near_patches(images: np.ndarray, factor: int) -> Member:
    x = reduced(images, factor)
    embedding = patches.embed(x, 3, 0.0)
    memory, usual = patches.remembered(embedding(x))
    local = fit_local(usual, neighbourhoods.LOCAL_SCALES, relate=True, even=True)
    return member(
        patches.KnnPatch({}, factor * patches.PATCH_STRIDE, local, factor, embedding, memory), usual
    )


def member(fitted: Mapped, usual: np.ndarray, whole: int = 0) -> Member:
    """A member, standardised by the maps of good images to which it was not fitted."""
    each = [fitted.local(usual).max((1, 2)), np.log(rise(usual, fitted.local.level))]
    rows = [[scores.mean(), max(float(scores.std()), 1e-6)] for scores in each]
    return Member(fitted, whole, np.array(rows, np.float32))
