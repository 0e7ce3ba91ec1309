"""Features of patches from EfficientNet-Lite0, for `patchcore`. They are activations from the middle of the
network, which represent shapes and materials rather than the classes of ImageNet (Roth et al. 2022,
arXiv:2106.08265, §3.1). The image is enlarged so that a cell of the map covers `cell` of its pixels.
Activations at strides 8 and 16 are averaged over 3 × 3 places; those at stride 16 are then enlarged, and both
are concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gzcli.metrics.alarms.copies import hashes

if TYPE_CHECKING:
    from torch import Tensor

MAP_CELLS = 24  # approximate number of cells along a side of the map
FINE_STRIDE = 8  # stride of the finer activations, in pixels of the enlarged image
AT_ONCE = 16  # images in a forward pass
MAX_FEATURE_BYTES = 400_000_000  # bytes of features kept in memory, because folds reuse the same images

_seen: dict[tuple[int, bytes], np.ndarray] = {}


def cell_of(shape: Sequence[int]) -> int:
    """The side, in pixels, of a cell of images [C, H, W]."""
    return max(1, round(min(shape[1:]) / MAP_CELLS))


def cells_of(shape: Sequence[int], cell: int) -> tuple[int, int]:
    """The sides of the map. They are even, because the coarser activations have half as many places."""
    height, width = (2 * -(-side // (2 * cell)) for side in shape[1:])
    return height, width


def features(images: np.ndarray, cell: int) -> np.ndarray:
    """float32 [N, D, h, w] of images uint8 [N, C, H, W]. Raises MissingError if the weights are missing."""
    keys = [(cell, key) for key in hashes(images)]
    lacking = {key: i for i, key in enumerate(keys) if key not in _seen}
    fresh: dict[tuple[int, bytes], np.ndarray] = {}
    order = list(lacking.items())
    for start in range(0, len(order), AT_ONCE):
        some = order[start : start + AT_ONCE]
        values = computed(images[[i for _, i in some]], cell)
        fresh |= {key: each for (key, _), each in zip(some, values, strict=True)}
    out = np.stack([fresh[key] if key in fresh else _seen[key] for key in keys])
    if (len(_seen) + len(fresh)) * out[0].nbytes > MAX_FEATURE_BYTES:
        _seen.clear()
    _seen.update(fresh)
    return out


def computed(images: np.ndarray, cell: int) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    from gzcli.metrics.pretrained import MEAN, STD

    finer, coarser = network()
    h, w = cells_of(images.shape[1:], cell)
    height, width = images.shape[2:]
    with torch.inference_mode():
        x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
        x = F.pad(x, (0, w * cell - width, 0, h * cell - height), mode="replicate")
        x = resized(x, enlargement(h * cell, h * FINE_STRIDE), enlargement(w * cell, w * FINE_STRIDE))
        x = ((x - MEAN) / STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        near = finer(x)
        far = coarser(near)
        near, far = (F.avg_pool2d(each, 3, 1, 1, count_include_pad=False) for each in (near, far))
        far = resized(far, enlargement(h // 2, h), enlargement(w // 2, w))
        return torch.cat([near, far], 1).contiguous().numpy()


def resized(x: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Images [N, C, H, W], resized by a matrix for each axis."""
    import torch

    return torch.from_numpy(rows) @ x @ torch.from_numpy(columns).mT


@lru_cache(maxsize=16)
def enlargement(before: int, after: int) -> np.ndarray:
    """The matrix [after, before] of a bilinear resize with antialiasing."""
    import torch
    import torch.nn.functional as F

    unit = torch.eye(before)[None, None]
    return F.interpolate(unit, (after, before), mode="bilinear", antialias=True)[0, 0].numpy()


@lru_cache(maxsize=1)
def network() -> tuple[Any, ...]:
    """The network's layers up to the finer activations, and the layers from there to the coarser ones."""
    from gzcli.metrics.pretrained import lite_net, lite_weights

    return tuple(lite_net(lite_weights()[0]).tapped())
