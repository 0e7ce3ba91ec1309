"""Fitted methods without training. Each has a score of an image and, in most cases, a map."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from gzcli.metrics.alarms.local import Local

# the images whose reductions are shared, and these reductions by factor
SHARED: ContextVar[tuple[Any, dict[int, np.ndarray]]] = ContextVar("SHARED", default=(None, {}))


@dataclass(frozen=True)
class Fitted:
    """A fitted method. Its fields are its whole state: numbers, arrays, and groups of these. `parameters` are
    the settings with which it was fitted. Images are uint8 [N, C, H, W] of one shape.
    """

    parameters: Mapping[str, Any]

    def score(self, images: np.ndarray) -> np.ndarray:
        """The scores, float64 [N]; higher means more unusual."""
        raise NotImplementedError

    def map(self, images: np.ndarray) -> np.ndarray | None:
        """The maps, float32 [N, H, W], at the size of the images, higher at more unusual places; None without
        a map."""
        return None

    @cached_property
    def hash(self) -> str:
        """A hash of the settings and all arrays."""
        digest = hashlib.sha256(repr(sorted(self.parameters.items())).encode())
        for field in fields(self):
            if field.name != "parameters":
                _feed(digest, getattr(self, field.name))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Mapped(Fitted):
    """A fitted method whose score is the maximum of a local map. The map has a cell for every `factor` ×
    `factor` pixels of the image."""

    factor: int
    local: Local

    def raw(self, images: np.ndarray) -> np.ndarray:
        """The values float32 [N, h, w] from which the local map is computed."""
        raise NotImplementedError

    def score(self, images: np.ndarray) -> np.ndarray:
        return self.local(self.raw(images)).max((1, 2)).astype(np.float64)

    def map(self, images: np.ndarray) -> np.ndarray:
        return enlarged(self.local.shown(self.raw(images)), self.factor, images.shape[2:])


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif hasattr(value, "__dataclass_fields__"):
        for field in fields(value):
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, tuple):
        for each in value:
            _feed(digest, each)
    else:
        digest.update(repr(value).encode())


def sides(shape: Sequence[int]) -> list[int]:
    """The factors by which images [C, H, W] are reduced, to about 32, 48 and 96 pixels if the images are
    large enough."""
    side = min(shape[1:])
    return sorted({max(1, round(side / size)) for size in (32, 48, 96)}, reverse=True)


@contextmanager
def shared_reductions(images: np.ndarray) -> Iterator[None]:
    """Within this context, `reduced` computes each reduction of these images once, for all models."""
    token = SHARED.set((images, {}))
    try:
        yield
    finally:
        SHARED.reset(token)


def reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """The means of `factor` × `factor` pixels, as by `means`. They are read-only if they are shared."""
    of, every = SHARED.get()
    if images is not of:
        return means(images, factor)
    if factor not in every:
        every[factor] = means(images, factor)
        every[factor].flags.writeable = False
    return every[factor]


def means(images: np.ndarray, factor: int) -> np.ndarray:
    """Reduces images uint8 [N, C, H, W] to float32 [N, C, ⌈H / f⌉, ⌈W / f⌉] in [0, 1], by means of f × f
    pixels. At the right and lower edge, the means cover the remaining pixels."""
    x = np.asarray(images)
    n, c, height, width = x.shape
    if factor == 1:
        return x.astype(np.float32) / 255
    if height % factor == 0 and width % factor == 0:
        kind = np.uint16 if factor <= 16 else np.int32
        rows, cells = (np.zeros((n, c, height // factor, w), kind) for w in (width, width // factor))
        for i in range(factor):
            rows += x[:, :, i::factor]
        for j in range(factor):
            cells += rows[..., j::factor]
        return cells.astype(np.float32) / (255 * factor * factor)
    for axis, side in ((2, height), (3, width)):
        x = np.add.reduceat(x.astype(np.int32), np.arange(0, side, factor), axis=axis)
    rows, columns = (np.minimum(factor, side - np.arange(0, side, factor)) for side in (height, width))
    return (x / (255.0 * np.outer(rows, columns))).astype(np.float32)


def enlarged(cells: np.ndarray, factor: int, sides: tuple[int, ...]) -> np.ndarray:
    """A map [N, h, w] at the size of the images, with each cell repeated."""
    height, width = sides
    return cells.repeat(factor, 1).repeat(factor, 2)[:, :height, :width]
