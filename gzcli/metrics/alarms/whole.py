"""Methods that score an image as a whole: the baselines of `gz ood`, see `metrics.baselines`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gzcli.metrics import baselines
from gzcli.metrics.alarms.fitted import Fitted, reduced
from gzcli.metrics.alarms.pca import Components, components
from gzcli.metrics.quality.neighbours import nearest_rows

KTH_NEIGHBOUR, PCA_COMPONENTS = 5, 64  # number of the neighbour, and of components


@dataclass(frozen=True)
class Plain(Fitted):
    """A score of an image that needs no good images."""

    name: str

    def score(self, images: np.ndarray) -> np.ndarray:
        return PLAIN_METHODS[self.name](np.asarray(images))


PLAIN_METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "png": baselines.png_size,
    "mean": baselines.pixel_mean,
}


@dataclass(frozen=True)
class KnnPixels(Fitted):
    """The distance to the `NEIGHBOUR`-th nearest good image, in the first principal components."""

    components: Components
    bank: np.ndarray  # float32 [N, dimensions]

    def score(self, images: np.ndarray) -> np.ndarray:
        k = min(KTH_NEIGHBOUR, len(self.bank))
        return nearest_rows(self.components.coordinates(reduced(images, 1)), self.bank, k=k)[0][:, -1]


def fit_png(images: np.ndarray) -> Plain:
    return Plain({}, "png")


def fit_mean(images: np.ndarray) -> Plain:
    return Plain({}, "mean")


def fit_knn_pixels(images: np.ndarray) -> KnnPixels:
    x = reduced(images, 1)
    basis = components(x, PCA_COMPONENTS)
    return KnnPixels({"components": len(basis.rows)}, basis, basis.coordinates(x))
