"""The distance of each patch of an image to the nearest one in a memory of patches of good images (PatchCore:
Roth et al. 2022, arXiv:2106.08265). The memory is a greedy coreset: the next patch is always the one that is
farthest from those chosen before.

`knn_patch` uses p × p cells of all channels, reduced to their first principal components, with the place
times a weight. With a weight, a patch is compared with patches of its neighbourhood; without one, with those
of all places, as suits a texture. `patchcore` uses the features of a network without their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.features import features, remembered_features
from gzcli.metrics.alarms.fitted import Fitted, Mapped, once, reduced, reductions
from gzcli.metrics.alarms.local import LOCAL_SIDES, fit_local
from gzcli.metrics.alarms.pca import parts_of
from gzcli.metrics.alarms.state import ModuleState

PATCH_COMPONENTS = 16  # principal components of a patch
PATCH_STRIDE = 2  # cells from one patch to the next
MEMORY_PATCHES, FEATURE_PATCHES = 1200, 1000  # patches in the memory, raw or of features
CANDIDATES, FEATURE_CANDIDATES = 4000, 8000  # patches from which the memory is chosen
PROJECTED_DIMENSIONS = 32  # dimensions in which a coreset is chosen
PATCHES_AT_ONCE = 512  # patches compared together


@dataclass(eq=False)
class Embedding(ModuleState):
    """The embedding of a patch: its projection by a convolution, and its position."""

    side: int  # side of a patch, in cells
    mean: Tensor  # float32 [C · p · p]
    rows: Tensor  # float32 [dimensions, C · p · p], orthonormal
    weight: float  # weight of the place, whose coordinates are shares of the sides
    stride: int = PATCH_STRIDE

    def of(self, x: Tensor) -> Tensor:
        """The embedding float32 [N, h, w, dimensions + 2] of images float32 [N, C, H, W]."""
        shift = (self.rows @ self.mean)[:, None, None]
        projected = projected_on(self.rows, x, self.side, self.stride) - shift
        h, w = projected.shape[2:]
        places = np.stack(np.meshgrid(np.arange(h) / h, np.arange(w) / w, indexing="ij")) * self.weight
        far = torch.from_numpy(places.astype(np.float32)).expand(projected.shape[0], -1, -1, -1)
        return torch.cat([projected, far], 1).permute(0, 2, 3, 1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """`of` an array."""
        return np.ascontiguousarray(self.of(torch.from_numpy(x)).numpy())


def beyond_edge(x: Tensor, side: int) -> Tensor:
    """[N, C, H, W] with edge cells repeated, so that a patch of this side exists around each cell."""
    before, after = side // 2, side - 1 - side // 2
    return F.pad(x, (before, after, before, after), mode="replicate")


def patches_of(x: Tensor, side: int, stride: int = PATCH_STRIDE) -> Tensor:
    """The patches of float32 [N, C, H, W] around every `stride`-th cell, [N, C · p · p, h, w]."""
    h, w = (-(-length // stride) for length in x.shape[2:])
    return F.unfold(beyond_edge(x, side), side, stride=stride).unflatten(2, (h, w))


def projected_on(rows: Tensor, x: Tensor, side: int, stride: int = 1) -> Tensor:
    """The products [N, K, h, w] of rows [K, C · p · p] with `patches_of` x."""
    return F.conv2d(beyond_edge(x, side), rows.unflatten(1, (x.shape[1], side, side)), stride=stride)


@dataclass(eq=False)
class KnnPatch(Mapped):
    cell: int  # side of an embedded cell in pixels of the image
    embedding: Embedding
    memory: Tensor  # float32 [M, dimensions + 2]

    def raw(self, images: Tensor) -> Tensor:
        return distance(self.embedding.of(reduced(images, self.cell)), self.memory)


@dataclass(eq=False)
class PatchCore(Fitted):
    """Places are compared by all their features, so that what turns or moves is compared with itself. The
    score is the largest distance (Roth et al. 2022, eq. 6)."""

    memory: Tensor  # float32 [M, D]

    def cells(self, images: Tensor) -> Tensor:
        """The distance of each place, float32 [N, h, w]."""

        def make() -> Tensor:
            return distance(features(images)[0].permute(0, 2, 3, 1), self.memory)

        return once(images, self, make)

    def scores(self, images: Tensor) -> Tensor:
        return self.cells(images).amax((1, 2))

    def maps(self, images: Tensor) -> Tensor:
        sides = list(images.shape[2:])
        return F.interpolate(self.cells(images)[:, None], sides, mode="bilinear", align_corners=False)[:, 0]


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
    x = reductions(images, factor)
    embedding = embed(x, side, weight)
    memory, usual = remembered(embedding(x))
    settings = {"factor": factor, "side": side, "weight": weight, "scales": tuple(scales)}
    settings |= {"relative": relate, "even": even}
    local = fit_local(usual, scales, relate=relate, even=even)
    return KnnPatch(settings, factor * PATCH_STRIDE, local, factor, embedding, torch.from_numpy(memory))


def fit_patchcore(images: np.ndarray) -> PatchCore:
    """Fits `patchcore`. Raises MissingError if the weights of the network are missing."""
    return patchcore(images)[0]


def patchcore(images: np.ndarray) -> tuple[PatchCore, np.ndarray, np.ndarray]:
    """`patchcore`, and the score and the largest value of the map of each of these images, by others."""
    embedded = remembered_features(images)[0].permute(0, 2, 3, 1).contiguous()
    memory, held_out = feature_memory(embedded), torch.empty(len(embedded))
    for part in map(torch.from_numpy, parts_of(len(embedded))):
        rest = feature_memory(embedded[~part]) if len(embedded) > 1 else memory
        held_out[part] = distance(embedded[part], rest).amax((1, 2))
    tops = held_out.numpy()
    return PatchCore({"memory": len(memory)}, memory), tops, tops


def feature_memory(embedded: Tensor) -> Tensor:
    """The memory [M, D] of features [n, h, w, D]."""
    return torch.from_numpy(coreset(embedded.numpy(), FEATURE_PATCHES, FEATURE_CANDIDATES))


def remembered(embedded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The memory of good patches [n, h, w, D], and the usual distances: those of each part of the images to
    the memories of the others."""
    parts = list(parts_of(len(embedded)))
    usual = np.empty(embedded.shape[:3], np.float32)
    memories = [coreset(embedded[part], MEMORY_PATCHES // len(parts)) for part in parts]
    for i, part in enumerate(parts):
        rest = [memory for j, memory in enumerate(memories) if j != i] or memories
        usual[part] = distances(embedded[part], np.concatenate(rest))
    return np.concatenate(memories), usual


def embed(x: np.ndarray, side: int, weight: float) -> Embedding:
    """The embedding of patches of good images. With a weight of 1, the side of the image is as long as ten
    standard deviations of the patches' largest component."""
    some = patches_of(torch.from_numpy(x[:: max(1, len(x) // 64)]), side)
    flat = np.moveaxis(some.numpy(), 1, -1).reshape(-1, some.shape[1])
    flat = flat[:: max(1, len(flat) // 8000)]
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(((flat - mean).T @ (flat - mean) / len(flat)).astype(np.float64))
    rows = np.ascontiguousarray(vectors[:, ::-1][:, :PATCH_COMPONENTS].T.astype(np.float32))
    return Embedding(
        side,
        torch.from_numpy(mean),
        torch.from_numpy(rows),
        float(weight * 10 * np.sqrt(max(values[-1], 1e-12))),
    )


def coreset(embedded: np.ndarray, size: int, candidates: int = CANDIDATES) -> np.ndarray:
    """A greedy coreset [M, D] of at most `size` of the patches [n, h, w, D], chosen from so many of them."""
    whole, rng = embedded.reshape(-1, embedded.shape[-1]), np.random.default_rng(0)
    if len(whole) > candidates:
        whole = whole[np.sort(rng.choice(len(whole), candidates, replace=False))]
    if len(whole) <= size:
        return whole
    patches = whole
    if patches.shape[1] > PROJECTED_DIMENSIONS:  # in which the farthest patches are about the same
        patches = whole @ rng.normal(size=(patches.shape[1], PROJECTED_DIMENSIONS)).astype(np.float32)
    squares = np.square(patches).sum(1)
    chosen, least = np.empty(size, np.int64), np.full(len(patches), np.inf, np.float32)
    at = int(np.square(patches - patches.mean(0)).sum(1).argmin())
    for i in range(size):
        chosen[i] = at
        np.minimum(least, squares - 2 * (patches @ patches[at]) + squares[at], out=least)
        at = int(least.argmax())
    return whole[chosen]


def distances(embedded: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """`distance` of an array."""
    return distance(torch.from_numpy(embedded), torch.from_numpy(memory)).numpy()


def distance(embedded: Tensor, memory: Tensor) -> Tensor:
    """The distance of each patch [N, h, w, D] to the nearest one of the memory [M, D], float32 [N, h, w]."""
    n, h, w, d = embedded.shape
    flat = embedded.reshape(-1, d)
    # the distances of some patches fit in the CPU's cache; a graph does not know the number of its patches
    parts = (flat,) if torch.compiler.is_exporting() else flat.split(PATCHES_AT_ONCE)
    factors, squares = -2 * memory.mT, memory.square().sum(1)
    # |m|² − 2 x · m is least at the nearest m; its sum with |x|² would have too few digits
    nearest = (memory[(part @ factors + squares).argmin(1)] for part in parts)
    least = [(part - of).square().sum(1) for part, of in zip(parts, nearest, strict=True)]
    return torch.cat(least).sqrt().view(n, h, w)
