"""Fitted methods without training. Each has a score of an image and, in most cases, a map. Both are
computed by torch, so that a method can be exported as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.metrics.alarms.local import Local
from gzcli.metrics.alarms.state import ModuleState, tensor

T = TypeVar("T")
# images whose intermediate values are shared, and these values by key
SHARED: ContextVar[list[tuple[Tensor, dict[Any, Any]]]] = ContextVar("SHARED")
REDUCED_VALUES = 4_000_000  # approximate number of pixels reduced together


@dataclass(eq=False)
class Fitted(ModuleState):
    """A fitted method, and the settings with which it was fitted. Images are uint8 [N, C, H, W] of one
    shape."""

    exports: ClassVar[bool] = True  # whether a graph can compute it
    settings: Mapping[str, Any]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores and the maps."""
        return self.scores(images), self.maps(images)

    def scores(self, images: Tensor) -> Tensor:
        """The scores, float [N]; higher means more unusual. torch can trace them."""
        raise NotImplementedError

    def maps(self, images: Tensor) -> Tensor | None:
        """The maps, float32 [N, H, W], at the size of the images, higher at more unusual places; None without
        a map."""
        return None

    def score(self, images: np.ndarray) -> np.ndarray:
        """`scores` of an array, float64 [N]."""
        with torch.inference_mode():
            return self.scores(tensor(images)).double().numpy()

    def map(self, images: np.ndarray) -> np.ndarray | None:
        """`maps` of an array."""
        with torch.inference_mode():
            maps = self.maps(tensor(images))
        return None if maps is None else maps.numpy()


@dataclass(eq=False)
class Mapped(Fitted):
    """A fitted method whose score is the maximum of a local map. The map has a cell for every `factor` ×
    `factor` pixels of the image."""

    factor: int
    local: Local

    def raw(self, images: Tensor) -> Tensor:
        """The values float32 [N, h, w] from which the local map is computed."""
        raise NotImplementedError

    def scores(self, images: Tensor) -> Tensor:
        return self.local.cells(once(images, self, lambda: self.raw(images))).amax((1, 2))

    def maps(self, images: Tensor) -> Tensor:
        raw = once(images, self, lambda: self.raw(images))
        return enlarged(self.local.shown(raw), self.factor, images.shape[2:])


def sides(shape: Sequence[int]) -> list[int]:
    """The factors by which images [C, H, W] are reduced, to about 32, 48 and 96 pixels if the images are
    large enough."""
    side = min(shape[1:])
    return sorted({max(1, round(side / size)) for size in (32, 48, 96)}, reverse=True)


@contextmanager
def sharing(images: Tensor) -> Iterator[None]:
    """Within this context, `once` computes each value of these images once, for all models."""
    token = SHARED.set([(images, {})])
    try:
        yield
    finally:
        SHARED.reset(token)


def once(images: Tensor, key: Any, make: Callable[[], T]) -> T:
    """A value that several methods compute from the same images."""
    values = next((values for of, values in SHARED.get([]) if of is images), None)
    if values is None:
        return make()
    if key not in values:
        values[key] = make()
    return values[key]


def shared(images: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """Images that several methods make of the same images, whose values are computed once too."""
    made = once(images, ("shared", key), make)
    tables = SHARED.get([])
    if any(of is images for of, _ in tables) and all(of is not made for of, _ in tables):
        tables.append((made, {}))
    return made


def reduced(images: Tensor, factor: int) -> Tensor:
    """Reduces images [N, C, H, W] of 0 … 255 to float32 [N, C, ⌈H / f⌉, ⌈W / f⌉] in [0, 1], by means of f × f
    pixels. At the right and lower edge, the means cover the remaining pixels."""

    def means() -> Tensor:
        x = images.float() / 255
        how: dict[str, Any] = {"ceil_mode": True, "count_include_pad": False}
        return F.avg_pool2d(x, factor, **how) if factor > 1 else x

    return once(images, ("reduced", factor), means)


def reductions(images: np.ndarray, factor: int) -> np.ndarray:
    """`reduced` for an array of many images."""
    size = max(1, REDUCED_VALUES // images[0].size)
    starts = range(0, len(images), size)
    return np.concatenate([reduced(tensor(images[i : i + size]), factor).numpy() for i in starts])


def enlarged(cells: Tensor, factor: int, sides: Sequence[int]) -> Tensor:
    """A map [N, h, w] at the size of the images, with each cell repeated."""
    height, width = sides
    if factor > 1:
        cells = F.interpolate(cells[:, None], scale_factor=float(factor), mode="nearest")[:, 0]
    return cells[:, :height, :width]
