"""The distance of each patch of an image to the nearest one in a memory of patches of good images (PatchCore:
Roth et al. 2022, arXiv:2106.08265). `patchcore` uses features of a network, `knn_patch` raw patches. A patch
is p × p cells of all channels, or the features of a place. It is reduced to its first principal components,
and its place times a weight is appended. With a weight, a patch is compared with patches of its
neighbourhood; without one, with those of all places, as suits a texture. The memory is a greedy coreset: the
next patch is always the one that is farthest from those chosen before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gzcli.metrics.alarms.features import cell_of, features
from gzcli.metrics.alarms.fitted import Mapped, reduced
from gzcli.metrics.alarms.local import LOCAL_SIDES, fit_local
from gzcli.metrics.alarms.pca import parts_of

PATCH_COMPONENTS, OF_FEATURES = 16, 64  # principal components of a patch, and of the features at a place
PATCH_STRIDE = 2  # cells from one patch to the next
MEMORY_PATCHES = 1200  # patches in the memory
CANDIDATES = 16_000  # patches from which the memory is chosen
AT_ONCE = 512  # patches compared together; their distances fit in the CPU's cache
MAX_USUAL_IMAGES = 120  # most good images whose maps define the usual value


@dataclass(frozen=True)
class Embedding:
    """The embedding of a patch: its projection by a convolution, and its position."""

    side: int  # side of a patch, in cells
    mean: np.ndarray  # float32 [C · p · p]
    rows: np.ndarray  # float32 [dimensions, C · p · p], orthonormal
    weight: float  # weight of the place, whose coordinates are shares of the sides
    stride: int = PATCH_STRIDE

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The embedding float32 [N, h, w, dimensions + 2] of images float32 [N, C, H, W]."""
        patches = patches_of(x, self.side, self.stride)
        n, _, h, w = patches.shape
        projected = projected_on(self.rows, patches) - (self.rows @ self.mean)[:, None, None]
        y, x = np.meshgrid(np.arange(h) / h, np.arange(w) / w, indexing="ij")
        places = np.broadcast_to(np.stack([y, x], -1).astype(np.float32) * self.weight, (n, h, w, 2))
        return np.concatenate([np.moveaxis(projected, 1, -1), places], -1, dtype=np.float32)


def patches_of(x: np.ndarray, side: int, stride: int = PATCH_STRIDE) -> np.ndarray:
    """The patches of float32 [N, C, H, W] around every `stride`-th cell, [N, C · p · p, h, w]. Edge cells are
    repeated beyond the edge."""
    before, after = side // 2, side - 1 - side // 2
    x = np.pad(x, ((0, 0), (0, 0), (before, after), (before, after)), mode="edge")
    view = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))[:, :, ::stride, ::stride]
    n, c, h, w, _, _ = view.shape
    # rows of a plane are copied whole, which is several times faster than patch by patch
    return view.transpose(0, 1, 4, 5, 2, 3).reshape(n, c * side * side, h, w)


def projected_on(rows: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The products of rows [K, D] with patches [N, D, h, w], [N, K, h, w]."""
    n, d, h, w = patches.shape
    return (rows @ patches.reshape(n, d, h * w)).reshape(n, len(rows), h, w)


@dataclass(frozen=True)
class KnnPatch(Mapped):
    cell: int  # side of an embedded cell in pixels of the image
    embedding: Embedding
    memory: np.ndarray  # float32 [M, dimensions + 2]

    def seen(self, images: np.ndarray) -> np.ndarray:
        """The values to embed, float32 [N, C, h, w]."""
        return reduced(images, self.cell)

    def raw(self, images: np.ndarray) -> np.ndarray:
        return distances(self.embedding(self.seen(images)), self.memory)


@dataclass(frozen=True)
class PatchCore(KnnPatch):
    def seen(self, images: np.ndarray) -> np.ndarray:
        return features(images, self.cell)


def fit_knn_patch(
    images: np.ndarray,
    *,
    factor: int = 1,
    side: int = 5,
    weight: float = 1.0,
    scales: Sequence[int] = LOCAL_SIDES,
    relate: bool = False,
    even: bool = False,
) -> KnnPatch:
    """Fits `knn_patch`. Each of a few parts of the images has its own memory. The usual distances are those
    of each part to the memories of the others."""
    x = reduced(images, factor)
    embedding = embed(x, side, weight)
    memory, usual = remembered(embedding(x))
    parameters = {"factor": factor, "side": side, "weight": weight, "scales": tuple(scales)}
    parameters |= {"relative": relate, "even": even}
    local = fit_local(usual, scales, relate=relate, even=even)
    return KnnPatch(parameters, factor * PATCH_STRIDE, local, factor, embedding, memory)


def fit_patchcore(
    images: np.ndarray,
    *,
    weight: float = 0.0,
    scales: Sequence[int] = LOCAL_SIDES,
    relate: bool = False,
    even: bool = False,
) -> PatchCore:
    """Fits `patchcore`. Raises MissingError if the weights of the network are missing."""
    cell = cell_of(images.shape[1:])
    x = features(images, cell)
    embedding = embed(x, 1, weight, stride=1, dimensions=OF_FEATURES)
    memory, usual = remembered(embedding(x))
    parameters = {"cell": cell, "weight": weight, "scales": tuple(scales)}
    parameters |= {"relative": relate, "even": even}
    local = fit_local(usual, scales, relate=relate, even=even)
    return PatchCore(parameters, cell, local, cell, embedding, memory)


def remembered(embedded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The memory of good patches [n, h, w, D], and the usual distances: those of each part of the images to
    the memories of the others."""
    usual, parts = [], list(parts_of(len(embedded)))
    memories = [coreset(embedded[part], MEMORY_PATCHES // len(parts)) for part in parts]
    for i, part in enumerate(parts):
        rest = [memory for j, memory in enumerate(memories) if j != i] or memories
        usual.append(distances(embedded[part][: MAX_USUAL_IMAGES // len(parts)], np.concatenate(rest)))
    return np.concatenate(memories), np.concatenate(usual)


def embed(
    x: np.ndarray, side: int, weight: float, *, stride: int = PATCH_STRIDE, dimensions: int = PATCH_COMPONENTS
) -> Embedding:
    """The embedding of patches of good images. With a weight of 1, the side of the image is as long as ten
    standard deviations of the patches' largest component."""
    some = patches_of(x[:: max(1, len(x) // 64)], side, stride)
    flat = np.moveaxis(some, 1, -1).reshape(-1, some.shape[1])
    flat = flat[:: max(1, len(flat) // 8000)]
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(((flat - mean).T @ (flat - mean) / len(flat)).astype(np.float64))
    rows = np.ascontiguousarray(vectors[:, ::-1][:, :dimensions].T.astype(np.float32))
    return Embedding(side, mean, rows, float(weight * 10 * np.sqrt(max(values[-1], 1e-12))), stride)


def coreset(embedded: np.ndarray, size: int) -> np.ndarray:
    """A greedy coreset [M, D] of at most `size` of the patches [n, h, w, D]."""
    patches = embedded.reshape(-1, embedded.shape[-1])
    rng = np.random.default_rng(0)
    if len(patches) > CANDIDATES // 4:
        patches = patches[np.sort(rng.choice(len(patches), CANDIDATES // 4, replace=False))]
    if len(patches) <= size:
        return patches
    squares = np.square(patches).sum(1)
    chosen, least = np.empty(size, np.int64), np.full(len(patches), np.inf, np.float32)
    at = int(np.square(patches - patches.mean(0)).sum(1).argmin())
    for i in range(size):
        chosen[i] = at
        np.minimum(least, squares - 2 * (patches @ patches[at]) + squares[at], out=least)
        at = int(least.argmax())
    return patches[chosen]


def distances(embedded: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """The distance of each patch [N, h, w, D] to the nearest one of the memory [M, D], float32 [N, h, w]."""
    n, h, w, d = embedded.shape
    flat, out = embedded.reshape(-1, d), np.empty(n * h * w, np.float32)
    longer = np.concatenate([flat, np.ones((len(flat), 1), np.float32)], 1)
    # |m|² − 2 x · m as one product, of (x, 1) and (−2 m, |m|²)
    factors = np.concatenate([-2 * memory, np.square(memory).sum(1, keepdims=True)], 1).T
    for i in range(0, len(flat), AT_ONCE):
        some = flat[i : i + AT_ONCE]
        nearest = (longer[i : i + AT_ONCE] @ factors).min(1)
        out[i : i + AT_ONCE] = np.sqrt((np.square(some).sum(1) + nearest).clip(0))
    return out.reshape(n, h, w)
