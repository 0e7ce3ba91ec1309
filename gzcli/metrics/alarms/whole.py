"""Methods that score an image as a whole: baselines of `gz ood`, see `metrics.baselines`, and the distances
to good images, in pixels or in features of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics import baselines
from gzcli.metrics.alarms.features import features, remembered_features
from gzcli.metrics.alarms.fitted import Fitted, reduced, reductions
from gzcli.metrics.alarms.pca import Components, components

KTH_NEIGHBOUR, PCA_COMPONENTS = 5, 64  # number of the neighbour, and of components
MIN_DEVIATION_SHARE = 1e-3  # least deviation of a feature, as a share of that of all


@dataclass(eq=False)
class PngSize(Fitted):
    """The size of an image as a PNG, which no graph can compute."""

    exports: ClassVar[bool] = False

    def scores(self, images: Tensor) -> Tensor:
        return torch.from_numpy(baselines.png_size(images.numpy()))


@dataclass(eq=False)
class PixelMean(Fitted):
    def scores(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3))


@dataclass(eq=False)
class Nearest(Fitted):
    """The distance to the fifth nearest good image."""

    bank: Tensor  # float32 [N, dimensions]

    def coordinates(self, images: Tensor) -> Tensor:
        """Those in which images are compared, [N, dimensions]."""
        raise NotImplementedError

    def scores(self, images: Tensor) -> Tensor:
        squares = (self.coordinates(images)[:, None] - self.bank).square().sum(2)
        k = min(KTH_NEIGHBOUR, len(self.bank))
        return squares.topk(k, 1, largest=False).values[:, -1].sqrt()


@dataclass(eq=False)
class KnnPixels(Nearest):
    components: Components

    def coordinates(self, images: Tensor) -> Tensor:
        return self.components.coordinates(reduced(images, 1))


@dataclass(eq=False)
class KnnFeatures(Nearest):
    """In the features of the whole image, each standardised."""

    mean: Tensor  # float32 [dimensions]
    deviation: Tensor

    def coordinates(self, images: Tensor) -> Tensor:
        return (features(images)[1] - self.mean) / self.deviation


def fit_png(images: np.ndarray) -> PngSize:
    return PngSize({})


def fit_mean(images: np.ndarray) -> PixelMean:
    return PixelMean({})


def fit_knn_pixels(images: np.ndarray) -> KnnPixels:
    x = reductions(images, 1)
    basis = components(x, PCA_COMPONENTS)
    bank = basis.coordinates(torch.from_numpy(x))
    return KnnPixels({"components": len(basis.rows)}, bank, basis)


def fit_knn_features(images: np.ndarray) -> KnnFeatures:
    """Fits `knn_features`. Raises MissingError if the weights of the network are missing."""
    rows = remembered_features(images)[1]
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    deviation = deviation + MIN_DEVIATION_SHARE * rows.std()
    return KnnFeatures({}, (rows - mean) / deviation, mean, deviation)
