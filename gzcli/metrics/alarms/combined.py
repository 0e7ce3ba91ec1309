"""Several methods as one. What one of them cannot see, another does:

  aligned       defects of parts that lie in the same place
  patchcore     defects of objects that turn and move, and of textures
  knn_features  pictures of other things
  bands         defects of a few pixels in a large image

The score is the largest of theirs. Each is in units of its scores of good images to which it was not fitted:
0 is their median, and 1 their 98 % quantile. So a method that sees nothing cannot hide what another sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics.alarms.aligned import aligned
from gzcli.metrics.alarms.bands import bands
from gzcli.metrics.alarms.fitted import Fitted
from gzcli.metrics.alarms.patches import patchcore
from gzcli.metrics.alarms.state import ModuleState
from gzcli.metrics.alarms.whole import knn_features
from gzcli.metrics.pretrained import has_lite_weights

# fits to images: the method, and the score and the largest value of the map of each image by others
MEMBER_FITS: dict[str, Callable[[np.ndarray], tuple[Fitted, np.ndarray, np.ndarray]]] = {
    "aligned": aligned,
    "patchcore": patchcore,
    "knn_features": knn_features,
    "bands": bands,
}
OF_FEATURES = ("patchcore", "knn_features")  # those that need the weights of a network
UNIT_QUANTILE = 0.98  # quantile of the scores of good images that is one unit above their median
MIN_UNIT = 1e-6


@dataclass(eq=False)
class Member(ModuleState):
    """A method, and the usual values of good images.

    usual: median and unit of its score, and of the largest value of its map, float32 [2, 2].
    """

    fitted: Fitted
    usual: Tensor

    def scores(self, images: Tensor) -> Tensor:
        middle, unit = self.usual[0]
        return (self.fitted.scores(images) - middle) / unit

    def maps(self, images: Tensor) -> Tensor | None:
        maps, (middle, unit) = self.fitted.maps(images), self.usual[1]
        return None if maps is None else (maps - middle) / unit


@dataclass(eq=False)
class Combined(Fitted):
    members: tuple[Member, ...]

    def each(self, images: Tensor) -> Tensor:
        """The standardised scores of the members, [N, members]."""
        return torch.stack([member.scores(images) for member in self.members], 1)

    def scores(self, images: Tensor) -> Tensor:
        return self.each(images).amax(1)

    def maps(self, images: Tensor) -> Tensor | None:
        maps = [each for member in self.members if (each := member.maps(images)) is not None]
        return torch.stack(maps).amax(0) if maps else None


def available() -> tuple[str, ...]:
    """The members of `combined` whose packages are installed."""
    return tuple(name for name in MEMBER_FITS if name not in OF_FEATURES or has_lite_weights())


def fit_combined(images: np.ndarray, *, members: Sequence[str] | None = None) -> Combined:
    """Fits `combined` to good images uint8 [N, C, H, W]. members: names in `MEMBER_FITS`; by default
    all that are available. Raises MissingError if the weights of the network are missing."""
    members = available() if members is None else members
    return Combined({"members": tuple(members)}, tuple(member(name, images) for name in members))


def member(name: str, images: np.ndarray) -> Member:
    fitted, scores, tops = MEMBER_FITS[name](images)
    rows = [middle_and_unit(each) for each in (scores, tops)]
    return Member(fitted, torch.tensor(rows, dtype=torch.float32))


def middle_and_unit(values: np.ndarray) -> tuple[float, float]:
    middle, high = np.quantile(values, [0.5, UNIT_QUANTILE])
    return float(middle), max(float(high - middle), MIN_UNIT)
