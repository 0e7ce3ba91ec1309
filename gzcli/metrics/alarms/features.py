"""Features from EfficientNet-Lite0: of each place, for `patchcore`, and of the whole image, for
`knn_features`. They are activations from the middle of the network, which represent shapes and materials
rather than the classes of ImageNet (Roth et al. 2022, arXiv:2106.08265, §3.1). The shorter side of the image
is resized to the 224 pixels of the network's training. Activations at stride 8 are averaged over 2 × 2 places
and concatenated with those at stride 16. They are not averaged over the places around them, as in the paper,
because that hides small defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.fitted import once
from gzcli.metrics.alarms.remembered import Remembered
from gzcli.metrics.pretrained import MEAN, STD, lite_net, lite_weights

TRAINED_SIDE = 224  # side of the images on which the network was trained
COARSE_STRIDE = 16  # stride of the coarser activations, in pixels of the resized image

FeaturePair = tuple[Tensor, ...]  # features of places [N, D, h, w], and of images [N, E]


def cells_of(shape: Sequence[int]) -> tuple[int, int]:
    """The sides of the map of images [C, H, W], in cells."""
    cell = min(shape[1:]) * COARSE_STRIDE / TRAINED_SIDE
    height, width = (max(1, round(side / cell)) for side in shape[1:])
    return height, width


def features(images: Tensor) -> FeaturePair:
    """The features of images uint8 [N, C, H, W]. Raises MissingError if the weights are missing."""
    return once(images, "features", lambda: remembered_features.of(images))


def computed(images: Tensor) -> FeaturePair:
    finer, coarser = network()
    h, w = cells_of(images.shape[1:])
    height, width = images.shape[2:]
    x = images.float() / 255
    x = resized(x, enlargement(height, h * COARSE_STRIDE), enlargement(width, w * COARSE_STRIDE))
    x = ((x - MEAN) / STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    near = finer(x)
    far = coarser(near)
    whole = torch.cat([near.mean((2, 3)), far.mean((2, 3)), far.std((2, 3), correction=0)], 1)
    return torch.cat([F.avg_pool2d(near, 2), far], 1).contiguous(), whole


remembered_features = Remembered(computed)


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
    return tuple(lite_net(lite_weights()[0]).tapped())
