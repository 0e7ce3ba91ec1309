"""Features from EfficientNet-Lite0: of each place, for `patchcore`, and of the whole image, for
`knn_features`. They are activations from the middle of the network, which represent shapes and materials
rather than the classes of ImageNet (Roth et al. 2022, arXiv:2106.08265, §3.1). The shorter side of the image
is resized to the 224 pixels of the network's training. Activations at stride 8 are averaged over 2 × 2 places
and concatenated with those at stride 16; each is first averaged over 3 × 3 places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.copies import hashes
from gzcli.metrics.alarms.fitted import once

TRAINED_SIDE = 224  # side of the images on which the network was trained
COARSE_STRIDE = 16  # stride of the coarser activations, in pixels of the resized image
IMAGES_AT_ONCE = 16  # images in a forward pass
MAX_FEATURE_BYTES = 400_000_000  # bytes of features in memory, because folds reuse the same images

Pair = tuple[Tensor, Tensor]  # features of places [N, D, h, w], and of images [N, E]
_computed: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}


def cells_of(shape: Sequence[int]) -> tuple[int, int]:
    """The sides of the map of images [C, H, W], in cells."""
    cell = min(shape[1:]) * COARSE_STRIDE / TRAINED_SIDE
    height, width = (max(1, round(side / cell)) for side in shape[1:])
    return height, width


def features(images: Tensor) -> Pair:
    """The features of images uint8 [N, C, H, W]. Raises MissingError if the weights are missing."""
    if torch.compiler.is_exporting():
        return computed(images)
    return once(images, "features", lambda: remembered_features(images.numpy()))


def remembered_features(images: np.ndarray) -> Pair:
    """The features of an array, each image computed once while there is room."""
    keys = hashes(images)
    lacking = {key: i for i, key in enumerate(keys) if key not in _computed}
    fresh: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    order = list(lacking.items())
    for start in range(0, len(order), IMAGES_AT_ONCE):
        some = order[start : start + IMAGES_AT_ONCE]
        with torch.inference_mode():
            pair = computed(torch.from_numpy(np.ascontiguousarray(images[[i for _, i in some]])))
        every = zip(*(each.numpy() for each in pair), strict=True)
        fresh |= {key: row for (key, _), row in zip(some, every, strict=True)}
    rows = [fresh[key] if key in fresh else _computed[key] for key in keys]
    if (len(_computed) + len(fresh)) * rows[0][0].nbytes > MAX_FEATURE_BYTES:
        _computed.clear()
    _computed.update(fresh)
    places, whole = (torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
    return places, whole


def computed(images: Tensor) -> Pair:
    from gzcli.metrics.pretrained import MEAN, STD

    finer, coarser = network()
    h, w = cells_of(images.shape[1:])
    height, width = images.shape[2:]
    x = images.float() / 255
    x = resized(x, enlargement(height, h * COARSE_STRIDE), enlargement(width, w * COARSE_STRIDE))
    x = ((x - MEAN) / STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    near = finer(x)
    far = coarser(near)
    around: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}
    places = torch.cat([F.avg_pool2d(F.avg_pool2d(near, **around), 2), F.avg_pool2d(far, **around)], 1)
    whole = torch.cat([near.mean((2, 3)), far.mean((2, 3)), far.std((2, 3), correction=0)], 1)
    return places.contiguous(), whole


def resized(x: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Images [N, C, H, W], resized by a matrix for each axis."""
    return torch.from_numpy(rows) @ x @ torch.from_numpy(columns).mT


@lru_cache(maxsize=16)
def enlargement(before: int, after: int) -> np.ndarray:
    """The matrix [after, before] of a bilinear resize with antialiasing."""
    unit = torch.eye(before)[None, None]
    return F.interpolate(unit, (after, before), mode="bilinear", antialias=True)[0, 0].numpy()


@lru_cache(maxsize=1)
def network() -> tuple[Any, ...]:
    """The network's layers up to the finer activations, and the layers from there to the coarser ones."""
    from gzcli.metrics.pretrained import lite_net, lite_weights

    return tuple(lite_net(lite_weights()[0]).tapped())
