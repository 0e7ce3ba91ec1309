"""Out-of-distribution scores without a model, float64 [N] of images uint8 [N, C, H, W]. The score of a
model must beat these baselines to be evidence for the model."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gzcli.metrics.quality.neighbours import nearest_rows
from gzcli.store.png import picture_of


def png_size(images: np.ndarray) -> np.ndarray:
    """The size in bytes of each image as an optimised PNG, with one bit per pixel if all pixels are black or
    white."""
    return np.array([_png(image) for image in images], np.float64)


def code_length(images: np.ndarray) -> np.ndarray:
    """The bits of each image with the best of the lossless coders PNG, JPEG 2000 and deflate.

    The L(x) of Serrà et al. 2020, arXiv:1909.11480, eq. 3 and the minimum over coders of its §3.
    """
    sizes = coders().values()
    return 8 * np.array([min(size(image) for size in sizes) for image in images], np.float64)


def coders() -> dict[str, Callable[[np.ndarray], int]]:
    """The lossless coders available here, by name. Each returns the size in bytes of one image [C, H, W]."""
    from PIL import features

    sizes = {"png": _png, "deflate": lambda image: len(zlib.compress(image.tobytes(), 9))}
    if features.check("jpg_2000"):
        sizes["jpeg2000"] = lambda image: _encoded(image, format="JPEG2000", irreversible=False)
    return sizes


def pixel_mean(images: np.ndarray) -> np.ndarray:
    return np.asarray(images).reshape(len(images), -1).mean(1, dtype=np.float64)


def knn_features(train: np.ndarray, features: list[np.ndarray], *, k: int = 1) -> list[np.ndarray]:
    """For each array of `features`, the distances to the k-th neighbour in `train`, with all features
    normalised to length 1 (Sun et al. 2022, arXiv:2204.06507, §3)."""
    bank, *queries = (f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12) for f in (train, *features))
    return [nearest_rows(f, bank, k=min(k, len(bank)))[0][:, -1] for f in queries]


def _png(image: np.ndarray) -> int:
    black_or_white = len(image) == 1 and set(np.unique(image)) <= {0, 255}
    return _encoded(image, one_bit=black_or_white, format="PNG", optimize=True)


def _encoded(image: np.ndarray, *, one_bit: bool = False, **options: Any) -> int:
    from PIL import Image

    buffer = io.BytesIO()
    picture = picture_of(image.transpose(1, 2, 0))
    picture = picture.convert("1", dither=Image.Dither.NONE) if one_bit else picture
    picture.save(buffer, **options)
    return buffer.tell()
