"""Principal components of good images, whose residual contains what is new in an image. `pca` is the mean of
the squared residual over an image. `pca_local` compares the residual at each place with that of good images
(see `local`) and takes the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gzcli.metrics.alarms.fitted import Fitted, Mapped, enlarged, reduced
from gzcli.metrics.alarms.local import SCALES, fit_local

COMPONENTS = 60  # of `pca`
MOST = 300  # components of `pca_local`, if there are that many images
SHARES = (1.0, 0.4)  # shares of these components that the search tries
EVEN = 1e-4  # rows need no second pass if the least variance is at least this share of the largest
PARTS = 4  # parts of the good images; each is reduced by the components of the others


@dataclass(frozen=True)
class Components:
    mean: np.ndarray  # float32 [D]
    rows: np.ndarray  # float32 [components, D], orthonormal, in descending order of variance

    def first(self, k: int) -> Components:
        return replace(self, rows=self.rows[:k])

    def residual(self, x: np.ndarray) -> np.ndarray:
        """The residual of images float32 [N, C, h, w] without their components, in the same shape."""
        flat = x.reshape(len(x), -1) - self.mean
        return (flat - (flat @ self.rows.T) @ self.rows).reshape(x.shape)

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """Images float32 [N, C, h, w] in these components, [N, components]."""
        return (x.reshape(len(x), -1) - self.mean) @ self.rows.T


def components(x: np.ndarray, most: int) -> Components:
    """The first principal components of float32 [N, ...], at most N − 1."""
    flat = x.reshape(len(x), -1)
    mean = flat.mean(0)
    flat = flat - mean
    most = min(most, max(1, len(flat) - 1), flat.shape[1])
    if len(flat) <= flat.shape[1]:
        values, vectors = np.linalg.eigh((flat @ flat.T).astype(np.float64))
        values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
        if values[-1] > EVEN * values[0]:
            # u_i X / √λ_i, orthonormal up to the rounding of X Xᵀ, which is at most about 1e-7 λ_1 / λ_k
            return Components(mean, (vectors / np.sqrt(values)).astype(np.float32).T @ flat)
        rows = np.linalg.qr((vectors.astype(np.float32).T @ flat).T)[0].T
        keep = values > 1e-9 * max(values[0], 1e-30)
        return Components(mean, np.ascontiguousarray(rows[keep]))
    exact = flat.astype(np.float64)
    _, vectors = np.linalg.eigh(exact.T @ exact)
    return Components(mean, np.ascontiguousarray(vectors[:, ::-1][:, :most].T.astype(np.float32)))


def count_of(share: float, x: np.ndarray) -> int:
    """The number of components that a share of those of images [N, …] amounts to, at most `MOST`."""
    return max(1, round(share * min(MOST, len(x) - 1, x[0].size)))


def strength(residual: np.ndarray) -> np.ndarray:
    """The root mean square over the channels, [N, h, w]."""
    if residual.shape[1] == 1:
        return np.abs(residual[:, 0])
    return np.sqrt(np.square(residual).mean(1))


@dataclass(frozen=True)
class Pca(Fitted):
    factor: int
    components: Components

    def score(self, images: np.ndarray) -> np.ndarray:
        residual = self.components.residual(reduced(images, self.factor))
        return np.square(residual, dtype=np.float64).mean((1, 2, 3))

    def map(self, images: np.ndarray) -> np.ndarray:
        cells = strength(self.components.residual(reduced(images, self.factor)))
        return enlarged(cells, self.factor, images.shape[2:])


@dataclass(frozen=True)
class PcaLocal(Mapped):
    components: Components

    def raw(self, images: np.ndarray) -> np.ndarray:
        return strength(self.components.residual(reduced(images, self.factor)))


def fit_pca(images: np.ndarray, *, factor: int = 1, k: int = COMPONENTS) -> Pca:
    """Fits `pca` to good images uint8 [N, C, H, W]. k: number of components."""
    basis = components(reduced(images, factor), k)
    return Pca({"factor": factor, "components": len(basis.rows)}, factor, basis)


def fit_pca_local(
    images: np.ndarray,
    *,
    factor: int = 1,
    share: float = 1.0,
    scales: Sequence[int] = SCALES,
    relate: bool = False,
    even: bool = False,
) -> PcaLocal:
    """Fits `pca_local`. share: share of all components to use, at most `MOST`.

    The usual residual at each place is that of images to which the components were not fitted: each of
    `PARTS` parts is reduced by the components of the others."""
    x = reduced(images, factor)
    k = count_of(share, x)
    basis, residuals = components(x, k), strength(left_out(x, k))
    parameters = {"factor": factor, "components": len(basis.rows), "scales": tuple(scales)}
    parameters |= {"relative": relate, "even": even}
    return PcaLocal(parameters, factor, fit_local(residuals, scales, relate=relate, even=even), basis)


def left_out(x: np.ndarray, k: int) -> np.ndarray:
    """The residual of each image without its first k components of the other parts' images, in the shape of
    x.

    Images R have the components u_i Xᵣ / √λ_i, where Xᵣ is centred. The residual of an image is x − m − aᵀ
    Xᵣ, where m is their mean and a = U Λ⁻¹ Uᵀ Xᵣ (x − m). All of these follow from the products of the
    images."""
    flat = x.reshape(len(x), -1)
    if flat.shape[1] < len(x) - len(x) // PARTS:  # then `components` decomposes a smaller matrix
        return left_by_components(x, k)
    flat = flat - flat.mean(0)
    products, left = (flat @ flat.T).astype(np.float64), np.eye(len(x))
    for part in parts_of(len(x)):
        rest = ~part
        within, across = products[np.ix_(rest, rest)], products[np.ix_(rest, part)]
        means = within.mean(0)
        across = across - means[:, None]
        across -= across.mean(0)
        values, vectors = np.linalg.eigh(within - means - means[:, None] + means.mean())
        most = max(1, min(k, len(values) - 1))
        values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
        if values[-1] <= EVEN * values[0]:
            return left_by_components(x, k)
        left[np.ix_(part, rest)] = -1 / rest.sum() - ((vectors / values) @ (vectors.T @ across)).T
    return (left.astype(np.float32) @ flat).reshape(x.shape)


def left_by_components(x: np.ndarray, k: int) -> np.ndarray:
    residuals = np.empty_like(x)
    for part in parts_of(len(x)):
        residuals[part] = components(x[~part], k).residual(x[part])
    return residuals


def parts_of(n: int) -> Iterator[np.ndarray]:
    """For each of `PARTS` parts, which of n images are in it."""
    for part in range(min(PARTS, n)):
        yield np.arange(n) % PARTS == part
