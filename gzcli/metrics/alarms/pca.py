"""Principal components of good images, whose residual contains what is new in an image. `pca` is the mean of
the squared residual over an image. `pca_local` compares the residual at each place with that of good images
(see `local`) and takes the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics.alarms.fitted import Fitted, Mapped, enlarged, once, reduced, reductions
from gzcli.metrics.alarms.local import LOCAL_SIDES, fit_local
from gzcli.metrics.alarms.state import ModuleState, tensor

COMPONENTS = 60  # of `pca`
MAX_COMPONENTS = 300  # components of `pca_local`, if there are that many images
COMPONENT_SHARES = (1.0, 0.4)  # shares of these components that the search tries
EVEN = 1e-4  # rows need no second pass if the least variance is at least this share of the largest
FEW_OF = 4  # a solver of a share of the eigenvectors is faster for less than 1 / `FEW_OF` of them
CROSS_FIT_PARTS = 4  # parts of the good images; each is reduced by the components of the others
MOVED_COPIES, MAX_IMAGES_TO_MOVE = (
    400,
    1000,
)  # approximate number of moved copies; more images than `MANY` have none
PIXEL_STEP_SIDE = 96  # copies of an image with this side are moved by one pixel
AROUND = tuple(step for step in product((-1, 0, 1), repeat=2) if any(step))


@dataclass(eq=False)
class Components(ModuleState):
    mean: Tensor  # float32 [D]
    rows: Tensor  # float32 [components, D], orthonormal, in descending order of variance

    def first(self, k: int) -> Components:
        return replace(self, rows=self.rows[:k])

    def residual(self, x: Tensor) -> Tensor:
        """The residual of images float32 [N, C, h, w] without their components, in the same shape."""
        flat = x.flatten(1) - self.mean
        return (flat - self.combined(self.within(flat))).unflatten(1, x.shape[1:])

    def coordinates(self, x: Tensor) -> Tensor:
        """Images float32 [N, C, h, w] in these components, [N, components]."""
        return self.within(x.flatten(1) - self.mean)

    def within(self, centred: Tensor) -> Tensor:
        """The coordinates [N, components] of centred images [N, D]."""
        return centred @ self.rows.mT

    def combined(self, coordinates: Tensor) -> Tensor:
        """The centred images [N, D] with these coordinates."""
        return coordinates @ self.rows


@dataclass(eq=False)
class Combinations(Components):
    """Components whose rows [components, k] are in the coordinates of a basis that several models share."""

    basis: Tensor  # float32 [k, D], orthonormal

    def within(self, centred: Tensor) -> Tensor:
        return (centred @ self.basis.mT) @ self.rows.mT

    def combined(self, coordinates: Tensor) -> Tensor:
        return (coordinates @ self.rows) @ self.basis


def moved(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, C, H, W] and their copies, [copies + 1, N, C, H, W], each moved by about 1 % of the
    side in one of eight directions. A few images do not show every position of a part or every phase of a
    texture. So each of a few images has up to eight copies, and more than `MANY` images have none."""
    n, _, height, width = images.shape
    copies = min(len(AROUND), max(1, MOVED_COPIES // n)) if n <= MAX_IMAGES_TO_MOVE else 0
    step = max(1, round(min(height, width) / PIXEL_STEP_SIDE))
    rng, edge = np.random.default_rng(0), ((0, 0), (step, step), (step, step))
    ways = rng.permuted(np.tile(np.arange(len(AROUND)), (n, 1)), axis=1)
    out = np.repeat(images[None], copies + 1, 0)
    every = np.pad(images, ((0, 0), *edge), mode="edge") if copies else ()
    for i, wide in enumerate(every):
        for copy, way in enumerate(ways[i, :copies], 1):
            top, left = (step + step * each for each in AROUND[way])
            out[copy, i] = wide[:, top : top + height, left : left + width]
    return out


def components(x: np.ndarray, most: int, products: np.ndarray | None = None) -> Components:
    """The first principal components of float32 [N, ...], at most N − 1. products: `products_of` the centred
    images."""
    flat = x.reshape(len(x), -1)
    mean = flat.mean(0)
    flat = flat - mean
    most = min(most, max(1, len(flat) - 1), flat.shape[1])
    if len(flat) <= flat.shape[1]:
        values, vectors = largest(products_of(flat) if products is None else products, most)
        if values[-1] > EVEN * values[0]:
            # u_i X / √λ_i, orthonormal up to the rounding of X Xᵀ, which is at most about 1e-7 λ_1 / λ_k
            rows = (vectors / np.sqrt(values)).astype(np.float32).T @ flat
            return Components(tensor(mean), tensor(rows))
        rows = np.linalg.qr((vectors.astype(np.float32).T @ flat).T)[0].T
        keep = values > 1e-9 * max(values[0], 1e-30)
        return Components(tensor(mean), tensor(rows[keep]))
    exact = flat.astype(np.float64)
    vectors = largest(exact.T @ exact, most)[1]
    return Components(tensor(mean), tensor(vectors.T.astype(np.float32)))


def products_of(centred: np.ndarray) -> np.ndarray:
    """The inner products of centred images, float64 [N, N]."""
    flat = centred.reshape(len(centred), -1)
    return (flat @ flat.T).astype(np.float64)


def largest(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of a symmetric matrix, in descending order, and their vectors as columns."""
    from scipy.linalg import eigh

    n = len(matrix)
    if FEW_OF * most < n:
        values, vectors = eigh(matrix, subset_by_index=(n - most, n - 1), check_finite=False)
    else:
        values, vectors = (each[..., n - most :] for each in np.linalg.eigh(matrix))
    return values[::-1], vectors[:, ::-1]


def count_of(share: float, x: np.ndarray) -> int:
    """The number of components that a share of those of images [N, …] amounts to, at most `MOST`."""
    return max(1, round(share * min(MAX_COMPONENTS, len(x) - 1, x[0].size)))


def strength(residual: Tensor) -> Tensor:
    """The root mean square over the channels, [N, h, w]."""
    channels = residual.shape[1]
    return (
        residual[:, 0].abs() if channels == 1 else torch.linalg.vector_norm(residual, dim=1) / channels**0.5
    )


def strengths(residual: np.ndarray) -> np.ndarray:
    """`strength` of an array."""
    return strength(torch.from_numpy(residual)).numpy()


@dataclass(eq=False)
class Pca(Fitted):
    factor: int
    components: Components

    def residual(self, images: Tensor) -> Tensor:
        return once(
            images, (self, "residual"), lambda: self.components.residual(reduced(images, self.factor))
        )

    def scores(self, images: Tensor) -> Tensor:
        return self.residual(images).square().mean((1, 2, 3))

    def maps(self, images: Tensor) -> Tensor:
        return enlarged(strength(self.residual(images)), self.factor, images.shape[2:])


@dataclass(eq=False)
class PcaLocal(Mapped):
    components: Components

    def raw(self, images: Tensor) -> Tensor:
        return strength(self.residual(images))

    def residual(self, images: Tensor) -> Tensor:
        """The residual of reduced images, which methods with the same components share."""
        key = id(self.components.rows), self.factor
        return once(images, key, lambda: self.components.residual(reduced(images, self.factor)))


def fit_pca(images: np.ndarray, *, factor: int = 1, k: int = COMPONENTS) -> Pca:
    """Fits `pca` to good images uint8 [N, C, H, W]. k: number of components."""
    basis = components(reductions(images, factor), k)
    return Pca({"factor": factor, "components": len(basis.rows)}, factor, basis)


def fit_pca_local(
    images: np.ndarray,
    *,
    factor: int = 1,
    share: float = 1.0,
    scales: Sequence[int] = LOCAL_SIDES,
    relate: bool = False,
    even: bool = False,
) -> PcaLocal:
    """Fits `pca_local`. share: share of all components to use, at most `MOST`.

    The usual residual at each place is that of images to which the components were not fitted: each of
    `PARTS` parts is reduced by the components of the others."""
    basis, left = with_moved(moved(images), factor, share)
    residuals = strengths(left)
    settings = {"factor": factor, "components": len(basis.rows), "scales": tuple(scales)}
    settings |= {"relative": relate, "even": even}
    return PcaLocal(settings, factor, fit_local(residuals, scales, relate=relate, even=even), basis)


def with_moved(every: np.ndarray, factor: int, share: float) -> tuple[Components, np.ndarray]:
    """A share of the components of reduced images, from images and their copies as `moved` returns them. Also
    the residual of each image without as many components of the other parts."""
    x = reductions(every.reshape(-1, *every.shape[2:]), factor)
    k = count_of(share, x)
    products = products_of(x - x.mean(0)) if len(x) <= x[0].size else None
    left = left_out(x.reshape(*every.shape[:2], *x.shape[1:]), k, products)
    return components(x, k, products), left


def left_out(every: np.ndarray, k: int, products: np.ndarray | None = None) -> np.ndarray:
    """The residual [N, …] of each image without its first k components of the other parts' images and their
    copies. `every` is [copies + 1, N, …], and its first N are the images.

    Images R have the components u_i Xᵣ / √λ_i, where Xᵣ is centred. The residual of an image is x − m − aᵀ
    Xᵣ, where m is their mean and a = U Λ⁻¹ Uᵀ Xᵣ (x − m). All of these follow from the products of the
    images."""
    n = every.shape[1]
    flat = every.reshape(len(every) * n, -1)
    if (
        flat.shape[1] < len(flat) - len(flat) // CROSS_FIT_PARTS
    ):  # then `components` decomposes a smaller matrix
        return left_by_components(every, k)
    flat = flat - flat.mean(0)
    products, residual = products_of(flat) if products is None else products, np.empty_like(flat[:n])
    for part in parts_of(n):
        rest = np.flatnonzero(np.tile(~part, len(every)))
        within, across = products[np.ix_(rest, rest)], products[np.ix_(rest, np.flatnonzero(part))]
        means = within.mean(0)
        across = across - means[:, None]
        across -= across.mean(0)
        centred = within - means - means[:, None] + means.mean()
        values, vectors = largest(centred, max(1, min(k, len(rest) - 1)))
        if values[-1] <= EVEN * values[0]:
            return left_by_components(every, k)
        # the rows of components and mean, and the coordinates of the part's images in them
        rows, inside = np.zeros((len(values) + 1, len(flat)), np.float32), vectors.T @ across
        rows[:, rest] = np.concatenate([(vectors / values).T, np.full((1, len(rest)), 1 / len(rest))])
        inside = np.concatenate([inside, np.ones_like(inside[:1])]).astype(np.float32)
        residual[part] = flat[:n][part] - np.linalg.multi_dot([inside.T, rows, flat])  # in the cheaper order
    return residual.reshape(every.shape[1:])


def left_by_components(every: np.ndarray, k: int) -> np.ndarray:
    residuals = np.empty_like(every[0])
    for part in parts_of(len(residuals)):
        rest = every[:, ~part]
        basis = components(rest.reshape(-1, *rest.shape[2:]), k)
        residuals[part] = basis.residual(torch.from_numpy(every[0, part])).numpy()
    return residuals


def parts_of(n: int) -> Iterator[np.ndarray]:
    """For each of `PARTS` parts, the images that it contains, of n."""
    for part in range(min(CROSS_FIT_PARTS, n)):
        yield np.arange(n) % CROSS_FIT_PARTS == part
