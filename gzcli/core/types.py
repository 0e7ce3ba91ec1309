"""What passes between data, models and engine: `DataInfo`, `Batch`, `Applied` and `Noise`.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gzcli.core.devices import device_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Say = Callable[[str], None]  # say(text): a line for the user
Report = Callable[[int, int], None]  # report(done, in all), of images or bytes
Progress = Callable[..., None]  # progress(i, n, x=None): step i of n is done, x [B, C, H, W] is its state


def silent(text: str) -> None:
    """A `Say` that shows nothing."""


def unreported(done: int, total: int) -> None:
    """A `Report` that shows nothing."""


def no_progress(i: float, n: float, x: Tensor | None = None) -> None:
    """A progress callback that shows nothing."""


@dataclass
class DataInfo:
    """The description of the data that a model is built for.

    shape: (C, H, W) of an image or of a latent.
    levels: number of grey levels, 2 … 256; None for latents.
    classes: names of the classes; empty for a set without labels.
    multilabel: whether an image may belong to several classes at once.
    n: number of training images.
    steps: length of the training in steps, for schedules.
    """

    shape: tuple[int, ...]
    levels: int | None = 256
    classes: tuple[str, ...] = ()
    multilabel: bool = False
    n: int = 0
    steps: int = 0

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> DataInfo:
        """The description from its `asdict` tree. Raises ValueError or TypeError for an invalid tree, such as
        one whose images have no pixels."""
        info = cls(**{**tree, "shape": tuple(tree["shape"]), "classes": tuple(tree.get("classes", ()))})
        numbers = (*info.shape, *([] if info.levels is None else [info.levels]))
        if len(info.shape) != 3 or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"images cannot have the shape {info.shape} and {info.levels} levels")
        if not all(isinstance(name, str) for name in info.classes):
            raise ValueError("its class names are not strings")
        return info


@dataclass
class Batch:
    """One batch of images, with all tensors on one device.

    x: images [B, C, H, W] in [-1, 1].
    y: labels, [B] int64 or, of a multi-label set, [B, K] of 0 and 1; None without labels.
    index: position of each image in the data set, [B] int64; or a hash of its pixels if the noise depends on
      them.
    noise: the random numbers of this batch, on the same device.
    extra: tensors [B, …] that the model `needs` or that its `prepare` made, by name.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor
    noise: Noise
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x.shape[0]

    def rows(self, rows: slice, noise: Noise) -> Batch:
        """A micro-batch: the images in `rows`, with their own `noise`."""
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
    """What an application returns for the input images x [B, C, H, W].

    There are two forms. Without `columns`, there is one output per input image. With `columns`, the outputs
    are rows of that many images, as in an interpolation.

    images: the outputs [n, C, H, W] in order, in [-1, 1]; latents if the model is trained on latents.
    rows: name of each row; without `columns` one name for all outputs.
    columns: number of outputs in a row; None if the outputs are not laid out in rows.
    marks: headings of the columns.
    of: for each output, or with `columns` for each row, the indices of its input images in x; empty if output
      i is made from image i.
    condition: images [n, C, h, w] that the model was conditioned on instead of its input images.
    how: name of `condition`, shown beside it.
    visible: mask [n, 1, H, W]: 1 where the model saw the pixel, 0 if it did not.
    labels: [n] or [n, K], the labels that the outputs were conditioned on, or that the model predicted.
    metrics: metrics of the inputs, by name.

    Raises ValueError if the numbers of images, rows and columns do not match.
    """

    images: Tensor
    rows: tuple[str, ...] = ("result",)
    columns: int | None = None
    marks: tuple[str, ...] = ()
    of: tuple[tuple[int, ...], ...] = ()
    condition: Tensor | None = None
    how: str = "given"
    visible: Tensor | None = None
    labels: Tensor | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, rows = len(self.images), len(self.rows)
        if n != self.columns * rows if self.columns is not None else rows != 1:
            raise ValueError(f"{n} images are not {rows} rows of {self.columns}")
        if len(self.of) != (n if self.columns is None else rows) and (self.of or self.columns is not None):
            raise ValueError(f"`of` has {len(self.of)} entries for {n} images in {rows} rows")


class Noise:
    """Reproducible random numbers for one batch: the first dimension of every draw is its number of images.

    A draw is made for the device of the batch, so a model calls no `.to(device)` on it.

    device: device of the draws.
    """

    device: torch.device

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers, in torch's default dtype."""
        return self._draw("normal_", shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), in torch's default dtype."""
        return self._draw("uniform_", shape)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in 0 … high − 1, int64."""
        return self._draw("random_", shape, high)

    def spread(self, n: int) -> Tensor:
        """Uniform numbers in [0, 1), [n]. For samples they are spread evenly over the images, see
        `philox.spread`."""
        return self.rand(n)

    def first(self, n: int) -> Noise:
        """The noise of the first n images of the batch."""
        return self

    def again(self) -> Noise:
        """A copy that draws the numbers that this noise will draw from now on."""
        return copy(self)

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        raise NotImplementedError


class BatchNoise(Noise):
    """Noise of training: the rows of this process and micro-batch out of a draw for the global batch.

    The draw depends only on the key and on the number of earlier calls. Accumulation and several processes
    therefore get the same numbers as one process with the whole batch.

    key: seed, step and phase.
    total: number of images in the global batch.
    start: position of this batch's first image in the global batch.
    device: device of the generator. A GPU's generator draws other numbers than the CPU's.
    """

    def __init__(self, *key: int | str, total: int, start: int = 0, device: torch.device | str = "cpu"):
        import torch

        self.key, self.total, self.start = key, total, start
        self.generator = torch.Generator(device)
        self.device = self.generator.device
        self.calls = 0

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        import torch

        self.generator.manual_seed(mix(*self.key, self.calls))
        self.calls += 1
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        draw = torch.empty(self.total, *shape[1:], dtype=dtype, device=self.device)
        getattr(draw, method)(*(() if high is None else (0, high)), generator=self.generator)
        return draw[self.start : self.start + shape[0]]


class ImageNoise(Noise):
    """Noise of sampling and scoring: the noise of an image depends only on (seed, index of the image, call).

    An image therefore gets the same numbers alone and in any batch. They are computed on the device, with the
    same bits on every device (normal numbers up to the rounding of its log, sine and cosine).

    seed: the seed of the whole call.
    index: the index of each image, int64 [n]. If it is on the device already, the host does not wait for it.
    device: device of the draws.
    """

    def __init__(self, seed: int, index: Sequence[int] | Tensor, device: torch.device | str = "cpu"):
        import torch

        self.device, self.seed = torch.device(device), seed
        if isinstance(index, range):
            self.index = torch.arange(index.start, index.stop, index.step, device=self.device)
        else:
            self.index = moved_to(torch.as_tensor(index, dtype=torch.int64), self.device)
        self.calls = [0]  # shared with copies by `first`, so that none repeats another's draw

    def first(self, n: int) -> ImageNoise:
        part = copy(self)
        part.index = self.index[:n]
        return part

    def again(self) -> ImageNoise:
        part = copy(self)
        part.calls = [*self.calls]
        return part

    def _next(self) -> int:
        """The index of this call."""
        self.calls[0] += 1
        return self.calls[0] - 1

    def spread(self, n: int) -> Tensor:
        from gzcli.core import philox

        self._check(n)
        return philox.spread(self.seed, self._next(), self.index)

    def _check(self, n: int) -> None:
        if n != len(self.index):
            raise ValueError(f"there is noise for {len(self.index)} images, not for {n}")

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        import torch

        from gzcli.core import philox

        self._check(shape[0])
        numbers = {"normal_": philox.normal, "uniform_": philox.uniform}
        make = numbers[method] if high is None else philox.below(high)
        dtype = torch.int64 if high is not None else torch.get_default_dtype()
        each = torch.Size(shape[1:]).numel()
        return philox.draw(self.seed, self._next(), self.index, each, make, dtype).reshape(shape)


def moved_to(t: Tensor, device: torch.device | str) -> Tensor:
    """`t` on `device`.

    A copy to a GPU starts from pinned memory and is asynchronous. From pageable memory it would make the host
    wait until the GPU has finished all work queued before it.
    """
    if t.device.type == "cpu" and not device_kind(device).shared:
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def to_rows(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows [B, *shape] that begin with the values of the images [B, C, h, w]; a row has at least as many
    values as an image."""
    rows = images.new_zeros(len(images), math.prod(shape))
    rows[:, : images[0].numel()] = images.flatten(1)
    return rows.unflatten(1, shape)


def from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The images [B, *shape] from the beginnings of rows; the inverse of `to_rows`."""
    return rows.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


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
