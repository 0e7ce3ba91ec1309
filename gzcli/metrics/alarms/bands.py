"""Where an image of any size has more of a scale than good images have in that place: the largest response of
a band-pass in each cell, compared with that of good images (see `local`). It sees what is lost if an image is
reduced: a pit of five pixels, or a scratch of two, in an image of 2,048.

  d_k   g_k ∗ x − g_{k+1} ∗ x, by Gaussians g of the deviations `BLUR_DEVIATIONS`, in pixels
  m_k   the maximum of |d_k| over channels and over the pixels of a cell
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.fitted import Fitted, enlarged, once
from gzcli.metrics.alarms.local import Local, fit_local
from gzcli.metrics.alarms.pca import parts_of
from gzcli.metrics.alarms.remembered import Remembered

BLUR_DEVIATIONS = (0.7, 1.4, 2.8, 5.6)  # of the Gaussians, in pixels
SHORT_SIDE_CELLS = 128  # approximate number of cells of the shorter side of a large image


@dataclass(eq=False)
class Bands(Fitted):
    locals: tuple[Local, ...]  # of each band

    def cells(self, images: Tensor) -> Tensor:
        """The standardised map, float32 [N, h, w]."""
        return once(images, self, lambda: self.of_responses(responses(images)))

    def of_responses(self, x: Tensor) -> Tensor:
        return torch.stack([local.cells(x[:, k]) for k, local in enumerate(self.locals)]).amax(0)

    def scores(self, images: Tensor) -> Tensor:
        return self.cells(images).amax((1, 2))

    def maps(self, images: Tensor) -> Tensor:
        x = responses(images)
        shown = torch.stack([local.shown(x[:, k]) for k, local in enumerate(self.locals)]).amax(0)
        return enlarged(shown, cell_side(images.shape[1:]), images.shape[2:])


def cell_side(shape: Sequence[int]) -> int:
    """The side of a cell of images [C, H, W], in pixels."""
    return max(1, min(shape[1:]) // SHORT_SIDE_CELLS)


def responses(images: Tensor) -> Tensor:
    """m_k of images uint8 [N, C, H, W], float32 [N, bands, h, w]."""
    return once(images, "bands", lambda: remembered_responses.of(images)[0])


def computed(images: Tensor) -> tuple[Tensor]:
    side = cell_side(images.shape[1:])
    x = images.flatten(0, 1)[:, None].float()  # every channel by itself
    blurred = [blurred_by(x, deviation) for deviation in BLUR_DEVIATIONS]
    bands = []
    for finer, coarser in pairwise(blurred):
        response = (finer - coarser).abs().unflatten(0, (-1, images.shape[1]))[:, :, 0].amax(1)
        bands.append(F.max_pool2d(response[:, None], side, ceil_mode=True)[:, 0])
    return (torch.stack(bands, 1),)


def blurred_by(x: Tensor, deviation: float) -> Tensor:
    """Images [N, 1, H, W] blurred by a Gaussian, whose edges are repeated."""
    reach = int(np.ceil(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = torch.from_numpy((weights / weights.sum()).astype(np.float32))
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))


remembered_responses = Remembered(computed)


def fit_bands(images: np.ndarray) -> Bands:
    """Fits `bands`."""
    return bands(images)[0]


def bands(images: np.ndarray) -> tuple[Bands, np.ndarray, np.ndarray]:
    """`bands`, and the score, which is the largest value of the map, of each of these images by others."""
    x = remembered_responses(images)[0].numpy()
    held_out = np.empty(len(x))
    for part in parts_of(len(x)):
        rest = bands_of(x[~part]) if len(x) > 1 else bands_of(x)
        held_out[part] = rest.of_responses(torch.from_numpy(x[part])).amax((1, 2)).numpy()
    return bands_of(x), held_out, held_out


def bands_of(x: np.ndarray) -> Bands:
    """`bands`, from the responses of good images."""
    return Bands({"scales": BLUR_DEVIATIONS}, tuple(fit_local(x[:, k], (1,)) for k in range(x.shape[1])))
