"""The residual of principal components around each place, whitened by its covariance. A neighbourhood of p ×
p cells of all channels is rotated to coordinates that are uncorrelated over all places of good images. Each
coordinate is divided by its standard deviation at its place. Their root mean square is a Mahalanobis distance
whose covariance is diagonal in these coordinates. It detects what is unusual for the grain of a surface, such
as a faint line across it, although none of the line's pixels is unusual by itself.

  v      the neighbourhood of a place in the residual
  y      U (v − the mean), by the eigenvectors U of the covariance of v over all places
  m      the root of the mean of (y / σ)² over the coordinates, by their deviation σ in this place
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gzcli.metrics.alarms.local import SHRINK, fit_local
from gzcli.metrics.alarms.patches import patches_of, projected_on
from gzcli.metrics.alarms.pca import Components, PcaLocal, moved, with_moved

NEIGHBOURHOOD_CELLS = 3  # side of a neighbourhood, in cells
COMPONENT_SHARE = 0.4  # share of the components that are used
LOCAL_SCALES = (1, 3, -9)  # scale of the local map
AT_ONCE = 32  # images whose neighbourhoods are computed together
MIN_DIVISOR_SHARE = 0.05  # least divisor, as a share of a squared distance (see `fit_whitened`)


@dataclass(frozen=True)
class Whitened:
    rows: np.ndarray  # U, float32 [D, C · p · p]
    mean: np.ndarray  # float32 [D, h, w]
    deviation: np.ndarray  # σ, float32 [D, h, w]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """m for residuals float32 [N, C, h, w]: float32 [N, h, w]."""
        out = np.empty((len(x), *self.mean.shape[1:]), np.float32)
        for i in range(0, len(x), AT_ONCE):
            y = coordinates(x[i : i + AT_ONCE], self.rows)
            y -= self.mean
            y /= self.deviation
            np.square(y, out=y).mean(1, out=out[i : i + AT_ONCE])
        return np.sqrt(out)


def covariance(x: np.ndarray) -> np.ndarray:
    """The covariance, float64 [D, D], of float32 [N, D, h, w] over all images and places."""
    n, d, h, w = x.shape
    x = x.reshape(n, d, h * w)
    x = x - x.mean((0, 2), dtype=np.float64, keepdims=True).astype(np.float32)
    return (x @ x.transpose(0, 2, 1)).sum(0, dtype=np.float64) / (n * h * w - 1)


def coordinates(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """U v for residuals [N, C, h, w]: float32 [N, D, h, w]."""
    return projected_on(rows, patches_of(x, NEIGHBOURHOOD_CELLS, 1))


def fit_whitened(x: np.ndarray) -> tuple[Whitened, np.ndarray]:
    """A `Whitened` fitted to residuals float32 [N, C, h, w] of good images, and the maps of these images as
    if each had been left out of the fit. Without y_i, the variance of n values is (1 − y_i² / n σ²) times
    that with it."""
    _, vectors = np.linalg.eigh(covariance(patches_of(x[:: max(1, len(x) // 64)], NEIGHBOURHOOD_CELLS, 1)))
    rows = np.ascontiguousarray(vectors.T.astype(np.float32))
    y = np.empty((len(x), len(rows), *x.shape[2:]), np.float32)
    for i in range(0, len(x), AT_ONCE):
        y[i : i + AT_ONCE] = coordinates(x[i : i + AT_ONCE], rows)
    mean = y.mean(0)
    y -= mean
    variance = np.einsum("ndhw,ndhw->dhw", y, y) / len(y)
    pooled = variance.mean((1, 2), keepdims=True)
    n = len(y) + SHRINK
    variance = (len(y) * variance + SHRINK * pooled) / n + 1e-4 * pooled.mean() + 1e-12
    squares = np.empty((len(y), *y.shape[2:]), np.float32)
    for i, each in enumerate(y):
        z = np.square(each) / variance
        squares[i] = (z / np.maximum(1 - z / n, MIN_DIVISOR_SHARE)).mean(0)
    return Whitened(rows, mean, np.sqrt(variance).astype(np.float32)), np.sqrt(squares)


@dataclass(frozen=True)
class PcaPatch(PcaLocal):
    whitened: Whitened

    def of_residual(self, residual: np.ndarray) -> np.ndarray:
        return self.whitened(residual)


def fit_pca_patch(images: np.ndarray, *, factor: int = 1) -> PcaPatch:
    """`pca_patch`, fitted to good images uint8 [N, C, H, W]."""
    return pca_patch(*with_moved(moved(images), factor, COMPONENT_SHARE), factor)[0]


def pca_patch(basis: Components, residuals: np.ndarray, factor: int) -> tuple[PcaPatch, np.ndarray]:
    """`pca_patch` from the components of good images and their held-out residuals, and its maps of these
    images."""
    whitened, maps = fit_whitened(residuals)
    local = fit_local(maps, LOCAL_SCALES, relate=True)
    return PcaPatch({"factor": factor, "components": len(basis.rows)}, factor, local, basis, whitened), maps
