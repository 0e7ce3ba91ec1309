"""Held-out scores of few images: each image is scored by a model that was not fitted on it.

The images are split into K folds. Model k is fitted to all folds but k, and scores the images of fold k. A
new image is scored by every model. Its p-value counts the held-out images whose score is at least as high as
the new image's *by the same model* (cross-conformal prediction: Vovk 2015, arXiv:1208.0806; CV+: Barber et
al. 2021, arXiv:1905.02928). Among images like these n images, a fraction of at most

  2 α + min(2 (1 − 1/K) / (n/K + 1), (1 − K/n) / (K + 1))

is flagged at the rate α, for any method (Barber et al., theorem 4 and its remark; by Vovk & Wang 2020,
arXiv:1212.4966, the factor 2 is the price of averaging p-values). If models differ little, it is about α. One
model and images to which it was not fitted (split conformal) flag at most α.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gzcli.metrics import conformal
from gzcli.metrics.alarms.fitted import Fitted, sharing, tensor

# up to this number of images, 20 folds give the lower bound; above it, 5 folds
MAX_FEW_IMAGES, FOLDS_OF_FEW, FOLDS = 180, 20, 5
USUAL_IMAGES, USUAL_QUANTILE = (
    32,
    0.995,
)  # held-out images whose maps define the usual value, and its quantile
AT_ONCE = 16  # images scored together, whose values the CPU's cache can hold
FitMethod = Callable[[np.ndarray], Fitted]


@dataclass(frozen=True)
class Calibrated:
    """The models of all folds, and the score of each held-out image by the model that was not fitted to
    it."""

    models: tuple[Fitted, ...]  # K models; a single one if no held-out image is used for fitting
    fold: np.ndarray  # int64 [n], the model that scored each held-out image
    held_out: np.ndarray  # float64 [n], their scores
    tails: int = 1
    bright: float = 1.0  # the brightest colour of the maps of images that the first model did not see

    def score(self, images: np.ndarray) -> np.ndarray:
        """The scores float64 [N, K] of images uint8 [N, C, H, W]."""
        return np.concatenate(
            [self.score_some(images[i : i + AT_ONCE]) for i in range(0, max(1, len(images)), AT_ONCE)]
        )

    def score_some(self, images: np.ndarray) -> np.ndarray:
        x = tensor(images)
        with torch.inference_mode(), sharing(x):
            return np.stack([model.scores(x).double().numpy() for model in self.models], 1)

    def map(self, images: np.ndarray) -> np.ndarray | None:
        """The mean of the models' maps, float32 [N, H, W]; None without maps."""
        maps = [model.map(images) for model in self.models]
        return np.mean([each for each in maps if each is not None], 0) if maps[0] is not None else None

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """The p-values [N] of scores [N, K]."""
        return conformal.cross_p_values(self.held_out, self.fold, scores, tails=self.tails)

    def bound(self, fpr: float) -> float:
        """The largest share of good images that may be flagged at this rate by any method."""
        return bound(fpr, len(self.held_out), len(self.models))


def bound(fpr: float, n: int, folds: int) -> float:
    if folds == 1:
        return fpr
    size = n / folds
    return 2 * fpr + min(2 * (1 - 1 / folds) / (size + 1), (1 - folds / n) / (folds + 1))


def folds_of(n: int) -> int:
    return min(n, FOLDS_OF_FEW if n <= MAX_FEW_IMAGES else FOLDS)


def cross(
    images: np.ndarray,
    fit: FitMethod,
    *,
    spare: np.ndarray | None = None,
    folds: int | None = None,
    tails: int = 1,
) -> Calibrated:
    """Calibrates a method on the images to which it is fitted. `spare` images are part of every fit but do
    not calibrate. The folds are drawn with a fixed seed."""
    n = len(images)
    k = folds or folds_of(n)
    fold = np.random.default_rng(0).permutation(np.arange(n) % k)
    models, held_out = [], np.empty(n)
    for i in range(k):
        rest = images[fold != i]
        model = fit(rest if spare is None else np.concatenate([spare, rest]))
        held_out[fold == i] = model.score(images[fold == i])
        models.append(model)
    return Calibrated(tuple(models), fold, held_out, tails, brightest(models[0], images[fold == 0]))


def split(fitted: Fitted, held_out: np.ndarray, *, tails: int = 1) -> Calibrated:
    """Calibrates a fitted method on images to which it was not fitted."""
    scores = fitted.score(held_out)
    fold = np.zeros(len(scores), np.int64)
    return Calibrated((fitted,), fold, scores, tails, brightest(fitted, held_out))


def brightest(fitted: Fitted, held_out: np.ndarray) -> float:
    """The map value that gets the brightest colour, measured on images to which nothing was fitted; 1 without
    maps."""
    maps = fitted.map(held_out[:USUAL_IMAGES])
    return 1.0 if maps is None else max(float(quantiles(maps).mean()), 1e-6)


def quantiles(maps: np.ndarray) -> np.ndarray:
    """The `BRIGHT` quantile of each of the maps [N, H, W]."""
    return np.quantile(maps.reshape(len(maps), -1), USUAL_QUANTILE, axis=1)
