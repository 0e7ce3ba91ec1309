"""What passes between data, models and engine: `DataInfo`, `Batch`, `Applied` and `Noise`. Importing it
imports no torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[..., None]  # progress(i, n, x=None): step i of n is done, x [B, C, H, W] is its state


SHARED = ("cpu", "mps")  # devices whose memory is the host's


def no_progress(i: int, n: int, x: Tensor | None = None) -> None:
    """The progress that shows nothing."""


@dataclass
class DataInfo:
    """What a model may know of its data when it is built."""

    shape: tuple[int, ...]  # (C, H, W)
    levels: int | None = 256  # 2 … 256 grey levels; None for latents
    classes: tuple[str, ...] = ()  # () where the set has no labels
    multilabel: bool = False
    n: int = 0  # training images
    steps: int = 0  # length of the run, for schedules


@dataclass
class Batch:
    """One batch of images on the device.

    x [B, C, H, W] in [-1, 1]; y [B] int64, [B, K] 0/1 (multi-label) or None; index [B] position in the data
    set;
    noise: the randomness of this batch; extra: what the model `needs` and what `prepare` made.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor
    noise: Noise
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x.shape[0]

    def rows(self, rows: slice, noise: Noise) -> Batch:
        """A micro-batch: the rows of this batch in `rows`, with their own `noise`."""
        return replace(
            self,
            x=self.x[rows],
            y=None if self.y is None else self.y[rows],
            index=self.index[rows],
            noise=noise,
            extra={key: value[rows] for key, value in self.extra.items()},
        )


@dataclass
class Applied:
    """What an application made of images x [B, C, H, W], so that nobody has to guess from numbers of images.

    images [n, C, H, W]: the outputs in order, in [-1, 1] (or latents, where the model lives on them). Either
    each is of one image: then `rows` is the one name of such outputs, `columns` None. Or they lie in rows of
    so many `columns`, each row with its name in `rows`, the places in a row named by `marks`.
    of: the numbers of the images of x that an output, or else a row, is of; () where output i is of image i.
    given [n, C, h, w]: what the model was shown in place of single images, `how` in a word; or known [n, 1,
    H, W]: 1 where it saw them, 0 where it did not.
    labels [n] or [n, K]: those that the outputs were made by.

    Raises ValueError where the numbers do not fit together.
    """

    images: Tensor
    rows: tuple[str, ...] = ("result",)
    columns: int | None = None
    marks: tuple[str, ...] = ()
    of: tuple[tuple[int, ...], ...] = ()
    given: Tensor | None = None
    how: str = "given"
    known: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self):
        n, rows = len(self.images), len(self.rows)
        if n != self.columns * rows if self.columns is not None else rows != 1:
            raise ValueError(f"{n} images are not {rows} rows of {self.columns}")
        if len(self.of) != (n if self.columns is None else rows) and (self.of or self.columns is not None):
            raise ValueError(f"{len(self.of)} are known to be of images, of {n} images in {rows} rows")


class Noise:
    """Reproducible draws: `.randn/.rand(*shape)` and `.randint(high, *shape)`; shape[0] counts this batch's
    rows."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, in the default dtype."""
        return self._draw("normal_", shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), in the default dtype."""
        return self._draw("uniform_", shape)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 … high − 1, int64."""
        return self._draw("random_", shape, high)

    def first(self, n: int) -> Noise:
        """The noise of the first n rows alone."""
        return self

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        raise NotImplementedError


class BatchNoise(Noise):
    """The draw of the GLOBAL batch of `total` rows for (seed, step, phase, call), of which rows `start …` are
    returned.

    So accumulation and any number of processes see what one process with the whole batch sees.
    """

    def __init__(self, *key: int | str, total: int, start: int = 0, device: Any = "cpu"):
        import torch

        self.key, self.total, self.start = key, total, start
        self.generator = torch.Generator(device)
        self.calls = 0

    def _draw(self, method, shape, high=None):
        import torch

        self.generator.manual_seed(mix(*self.key, self.calls))
        self.calls += 1
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        draw = torch.empty(self.total, *shape[1:], dtype=dtype, device=self.generator.device)
        getattr(draw, method)(*(() if high is None else (0, high)), generator=self.generator)
        return draw[self.start : self.start + shape[0]]


class ImageNoise(Noise):
    """Noise of image i depends on (seed, i) alone, whatever batch it is in; drawn on the CPU, then moved to
    `device`."""

    def __init__(self, seed: int, index: Sequence[int], device: Any = "cpu"):
        import torch

        self.device = device
        self.generators = [torch.Generator().manual_seed(mix(seed, int(i))) for i in index]

    def first(self, n):
        part = copy(self)
        part.generators = self.generators[:n]
        return part

    def _draw(self, method, shape, high=None):
        import torch

        if shape[0] != len(self.generators):
            raise ValueError(f"noise for {len(self.generators)} images, asked for {shape[0]}")
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        draw = torch.empty(shape, dtype=dtype)
        bounds = () if high is None else (0, high)
        for row, generator in zip(draw.view(shape[0], -1), self.generators, strict=True):
            getattr(row, method)(*bounds, generator=generator)
        return moved(draw, self.device)


def moved(t: Tensor, device: Any) -> Tensor:
    """`t` on `device`. To a GPU with memory of its own it goes from pinned memory: else the host would wait
    until the GPU has done all that it was told before."""
    import torch

    if t.device.type == "cpu" and torch.device(device).type not in SHARED:
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def mix(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings (splitmix64 over its parts)."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        state ^= zlib.crc32(part.encode()) if isinstance(part, str) else part & 0xFFFFFFFFFFFFFFFF
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
