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
import torch
from torch import Tensor

from gzcli.metrics.alarms.local import SHRINK, fit_local
from gzcli.metrics.alarms.patches import patches_of, projected_on
from gzcli.metrics.alarms.pca import Components, PcaLocal, moved, strength, with_moved
from gzcli.metrics.alarms.state import ModuleState

NEIGHBOURHOOD_CELLS = 3  # side of a neighbourhood, in cells
COMPONENT_SHARE = 0.4  # share of the components that are used
LOCAL_SCALES = (1, 3, -9)  # scale of the local map
AT_ONCE = 32  # images whose neighbourhoods are computed together
MIN_DIVISOR_SHARE = 0.05  # least divisor, as a share of a squared distance (see `fit_whitened`)


@dataclass(eq=False)
class Whitened(ModuleState):
    rows: Tensor  # U, float32 [D, C · p · p]
    mean: Tensor  # float32 [D, h, w]
    deviation: Tensor  # σ, float32 [D, h, w]

    def distance(self, x: Tensor) -> Tensor:
        """m for residuals float32 [N, C, h, w]: float32 [N, h, w]."""
        y = coordinates(x, self.rows)
        # in place, because new memory of this size costs ten times as much as the arithmetic
        return strength(y.sub_(self.mean).div_(self.deviation))


def covariance(x: np.ndarray) -> np.ndarray:
    """The covariance, float64 [D, D], of float32 [N, D, h, w] over all images and places."""
    n, d, h, w = x.shape
    x = x.reshape(n, d, h * w)
    x = x - x.mean((0, 2), dtype=np.float64, keepdims=True).astype(np.float32)
    return (x @ x.transpose(0, 2, 1)).sum(0, dtype=np.float64) / (n * h * w - 1)


def coordinates(x: Tensor, rows: Tensor) -> Tensor:
    """U v for residuals [N, C, h, w]: float32 [N, D, h, w]."""
    return projected_on(rows, x, NEIGHBOURHOOD_CELLS)


def fit_whitened(x: np.ndarray) -> tuple[Whitened, np.ndarray]:
    """A `Whitened` fitted to residuals float32 [N, C, h, w] of good images, and the maps of these images as
    if each had been left out of the fit. Without y_i, the variance of n values is (1 − y_i² / n σ²) times
    that with it."""
    some = torch.from_numpy(x[:: max(1, len(x) // 64)])
    _, vectors = np.linalg.eigh(covariance(patches_of(some, NEIGHBOURHOOD_CELLS, 1).numpy()))
    rows = np.ascontiguousarray(vectors.T.astype(np.float32))
    y = np.empty((len(x), len(rows), *x.shape[2:]), np.float32)
    for i in range(0, len(x), AT_ONCE):
        some = torch.from_numpy(x[i : i + AT_ONCE])
        y[i : i + AT_ONCE] = coordinates(some, torch.from_numpy(rows)).numpy()
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
    arrays = (torch.from_numpy(each) for each in (rows, mean, np.sqrt(variance).astype(np.float32)))
    return Whitened(*arrays), np.sqrt(squares)


@dataclass(eq=False)
class PcaPatch(PcaLocal):
    whitened: Whitened

    def raw(self, images: Tensor) -> Tensor:
        return self.whitened.distance(self.residual(images))


def fit_pca_patch(images: np.ndarray, *, factor: int = 1) -> PcaPatch:
    """`pca_patch`, fitted to good images uint8 [N, C, H, W]."""
    return pca_patch(*with_moved(moved(images), factor, COMPONENT_SHARE), factor)[0]


def pca_patch(basis: Components, residuals: np.ndarray, factor: int) -> tuple[PcaPatch, np.ndarray]:
    """`pca_patch` from the components of good images and their held-out residuals, and its maps of these
    images."""
    whitened, maps = fit_whitened(residuals)
    local = fit_local(maps, LOCAL_SCALES, relate=True)
    return PcaPatch({"factor": factor, "components": len(basis.rows)}, factor, local, basis, whitened), maps
