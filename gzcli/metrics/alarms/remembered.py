"""Values that are computed once for each image, because the folds of a calibration fit to the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gzcli.metrics.alarms.copies import hashes

MAX_BYTES = 400_000_000  # bytes of the values in memory
BATCH_BYTES = 8_000_000  # approximate bytes of the images that are computed together
MAX_BATCH_IMAGES = 16


@dataclass
class Remembered:
    """compute: function from images uint8 [N, C, H, W] to tensors whose first axis is N."""

    compute: Callable[[Tensor], tuple[Tensor, ...]]
    rows: dict[bytes, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def of(self, images: Tensor) -> tuple[Tensor, ...]:
        """The values of a tensor, which a graph computes each time."""
        return self.compute(images) if torch.compiler.is_exporting() else self(images.numpy())

    def __call__(self, images: np.ndarray) -> tuple[Tensor, ...]:
        keys = hashes(images)
        lacking = list({key: i for i, key in enumerate(keys) if key not in self.rows}.items())
        size = max(1, min(MAX_BATCH_IMAGES, BATCH_BYTES // max(1, images[0].nbytes)))
        fresh: dict[bytes, tuple[np.ndarray, ...]] = {}
        for start in range(0, len(lacking), size):
            some = lacking[start : start + size]
            with torch.inference_mode():
                values = self.compute(torch.from_numpy(images[[i for _, i in some]]))
            every = zip(*(each.numpy() for each in values), strict=True)
            fresh |= {key: row for (key, _), row in zip(some, every, strict=True)}
        rows = [fresh[key] if key in fresh else self.rows[key] for key in keys]
        if (len(self.rows) + len(fresh)) * sum(each.nbytes for each in rows[0]) > MAX_BYTES:
            self.rows.clear()
        self.rows.update(fresh)
        return tuple(torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
