"""Batches from a pack: gathered and moved as bytes, then augmented, binarised and normalised on the
device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gzcli.core.devices import SideStream, device_kind
from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.types import Batch, BatchNoise, ImageNoise, Noise, from_rows, mix, moved_to
from gzcli.data.packs.augment import ReplayedNoise, augmenter, patch_of
from gzcli.data.packs.pack import Pack
from gzcli.data.packs.stream import Pictures, Prefetch, worker_count

ON_DEVICE = 2 << 30  # bytes: a split up to this size is kept whole on a GPU
MAX_BATCHES_WITHOUT_WORKERS = (
    4  # up to so many batches of a streamed split, workers take longer to start than decoding takes
)
# seed of the draw that makes a test set binary; models draw with other seeds
BINARY_SEED = mix(0, "binarise")

T = TypeVar("T")
_BatchRows = tuple[dict[str, Tensor], Tensor | None, dict[str, Any]]  # what `_Rows.take` returns


def reader(
    device: torch.device, *, on_device: bool, streamed: bool
) -> Callable[[Callable[[int], Any], int], Any]:
    """A function of (read, step) that returns `read(step)`. For a GPU, it reads ahead."""
    if on_device or not device_kind(device).streams:
        return lambda read, step: read(step)
    if streamed:
        side = SideStream(device)
        return lambda read, step: side.ended(*side.started(lambda: read(step)))
    return Ahead(device).at


class Ahead:
    """Reads the next step ahead in a thread; any other step is read on request."""

    def __init__(self, device: torch.device):
        self.side, self.pool = SideStream(device), ThreadPoolExecutor(1, "ahead")
        self.next: tuple[int, Future[Any]] | None = None

    def at(self, read: Callable[[int], T], step: int) -> T:
        """`read(step)`; a thread then calls `read(step + 1)`."""
        ready = self.next[1] if self.next and self.next[0] == step else self._start(read, step)
        result, event = ready.result()
        self.next = step + 1, self._start(read, step + 1)
        return self.side.ended(result, event)

    def _start(self, read: Callable[[int], T], step: int) -> Future[tuple[T, Any]]:
        return self.pool.submit(lambda: self.side.started(lambda: read(step)))


def domains(pack: Pack) -> list[Tensor]:
    """Positions of the training images of class 0 and of class 1. Raises UsageError if either has none."""
    labels = pack.labels("train")
    if labels is not None and labels.ndim == 1:
        both = [torch.from_numpy(np.flatnonzero(labels == k)) for k in (0, 1)]
        if all(map(len, both)):
            return both
    hint = "put the images of each domain into `trainA` and `trainB`"
    raise UsageError(f"`{pack.meta.reference}` has no training images of two domains", hint=hint)


class Order:
    """The order of training images. This rank gets the rows `part` of each global batch. `among` restricts
    the images to some positions, `n` to a random subset. `key` distinguishes orders with the same seed. With
    `kinds` [N], all images of a batch are of one kind."""

    def __init__(
        self,
        count: int,
        n: int | None,
        seed: int,
        total: int,
        part: slice,
        *,
        among: Tensor | None,
        key: str,
        kinds: np.ndarray | None,
    ):
        self.seed, self.total, self.part, self.key, self.kinds = seed, total, part, key, kinds
        self.subset, count = among, count if among is None else len(among)
        if n is not None and n < count:
            chosen = torch.from_numpy(np.random.RandomState(0).permutation(count)[:n])
            self.subset = chosen if among is None else among[chosen]
        self.n = count if n is None else min(n, count)
        self._orders: dict[int, Tensor] = {}
        self._batches: list[Tensor] = []  # batches of one kind each, from the first step on
        self._collected: dict[int, list[int]] = {}  # waiting positions by kind, fewer than a batch
        self._epochs = 0  # that are collected

    def at(self, step: int) -> Tensor:
        """Positions [B / world] in the split. A batch may end one epoch and begin the next."""
        if self.kinds is not None:
            return self._of_one_kind(step, self.kinds)[self.part]
        first, left = step * self.total + self.part.start, self.part.stop - self.part.start
        parts = []
        while left:
            epoch, row = divmod(first, self.n)
            parts.append(self._epoch(epoch)[row : row + left])
            first, left = first + len(parts[-1]), left - len(parts[-1])
        return self._positions(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _positions(self, index: Tensor) -> Tensor:
        return index if self.subset is None else self.subset[index]

    def _of_one_kind(self, step: int, kinds: np.ndarray) -> Tensor:
        """The positions [B] of a global batch. An image waits until a batch of its kind is full, so that all
        images are used equally often."""
        while len(self._batches) <= step:
            for position in self._positions(self._epoch(self._epochs)).tolist():
                waiting = self._collected.setdefault(int(kinds[position]), [])
                waiting.append(position)
                if len(waiting) == self.total:
                    self._batches.append(torch.tensor(waiting))
                    waiting.clear()
            self._epochs += 1
        return self._batches[step]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, self.key))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(self.n, generator=generator)
        return self._orders[epoch]

    def spots(self, step: int) -> Tensor:
        """Two large random numbers per image, [B / world, 2], which determine the position of its patch."""
        noise = BatchNoise(self.seed, step, f"patch {self.key}", total=self.total, start=self.part.start)
        return noise.randint(1 << 31, self.part.stop - self.part.start, 2)


def kinds_of(shapes: np.ndarray) -> np.ndarray:
    """A number [N] for each of the shapes [N, 2] of images; equal shapes have equal numbers."""
    return np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1)


def rows_of(orders: Sequence[Order], patches: bool, step: int) -> np.ndarray:
    """The rows of all orders as indices for `stream.Pictures`: positions [B], or [B, 3] with patches."""
    positions = torch.cat([order.at(step) for order in orders])
    if not patches:
        return positions.numpy()
    return torch.cat([positions[:, None], torch.cat([order.spots(step) for order in orders])], 1).numpy()


def quantise(u8: Tensor, levels: int | None, noise: Noise | None = None) -> Tensor:
    """Converts bytes to x in [-1, 1], of the same shape and the default dtype. With L levels, x = 2k / (L −
    1) − 1, where k = ⌊u8 · L / 256⌋. With 2 levels, x is a draw of Bernoulli(u8 / 255) and never thresholded,
    because likelihoods of binary images are defined for such draws (Salakhutdinov & Murray 2008)."""
    if levels is None or u8.is_floating_point():  # latents, or values in [-1, 1]
        return u8.to(torch.get_default_dtype())
    if levels == 2:
        if noise is None:
            raise ValueError("binary images are drawn from grey levels, which needs `noise`")
        white = noise.rand(*u8.shape) < u8.to(torch.get_default_dtype()) / 255
        return white.to(torch.get_default_dtype()).mul_(2).sub_(1)
    k = u8 if levels == 256 else (u8.int() * levels) >> 8
    return k.to(torch.get_default_dtype()).mul_(2 / (levels - 1)).sub_(1)


def levelled(
    pictures: dict[str, Tensor], levels: int | None, noise: Noise | None = None
) -> dict[str, Tensor]:
    """Bytes of images and their further images, converted to [-1, 1]. Binary images share one draw of
    `noise`."""
    draws = None if noise is None else ReplayedNoise(noise)
    return {kind: quantise(u8, levels, draws and draws.replay()) for kind, u8 in pictures.items()}


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded, on the same device."""
    return ((x.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class TrainImages:
    """The training images of a run, in the form that its model reads."""

    pack: Pack  # the images, or their latents
    levels: int | None  # number of grey levels; None: latents
    device: torch.device  # of the batches
    seed: int  # of the run
    augment: tuple[str, ...] = ()  # names of the augmentations

    def scan(
        self, index: Sequence[int] | np.ndarray, *, purpose: str, batch_size: int, split: str = "train"
    ) -> Iterator[Batch]:
        """Batches with each image once. Training images are augmented by one draw. `purpose` and the seed of
        the run determine the noise, which differs from that of samples and other scans."""
        augment = self.augment if split == "train" else ()
        how: dict[str, Any] = {"levels": self.levels, "device": self.device, "augment": augment}
        seed = mix(self.seed, purpose)
        return scan(self.pack, split, batch_size=batch_size, index=index, seed=seed, **how)


class TrainBatches:
    """The training batches of one rank. Batch `step` is a function of (seed, step). The images are reshuffled
    in each epoch. The global batch is the same for any number of processes, and this rank gets its rows from
    rank · B / world on. The noise of a batch is drawn on the device.

    n: number of images of a fixed random subset, of each class if there are two domains; None: all.
    needs: what the model needs. With `second_domain`, the images are those of class 0. Equally many of class
      1, shuffled separately, are `extra["second_domain"]`.
    """

    def __init__(
        self,
        images: TrainImages,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        n: int | None = None,
        needs: Sequence[str] = (),
    ):
        if batch_size < world or batch_size % world:
            hint = advice("use {}", setting("train.batch_size", max(1, batch_size // world) * world))
            raise UsageError(f"a batch of {batch_size} cannot be divided among {world} processes", hint=hint)
        self.seed, self.levels, self.device = images.seed, images.levels, images.device
        self.total, pack = batch_size, images.pack
        size = batch_size // world
        self.start = rank * size
        self.augment = augmenter(images.augment)
        self.rows = _Rows(pack, "train", self.device, uncut=True)
        self.prepared: Mapping[str, np.ndarray] = {}  # [N, …] by name; a batch's rows are its `extra`
        part = slice(self.start, self.start + size)
        among = domains(pack) if "second_domain" in needs else [None]
        count, kinds = pack.meta.counts["train"], self.rows.shapes
        kinds = None if kinds is None else kinds_of(kinds)
        self.orders = orders = [
            Order(count, n, self.seed, batch_size, part, among=rows, key=key, kinds=kinds)
            for rows, key in zip(among, ("order", "order of b"), strict=False)
        ]
        self.ahead = None
        if self.rows.streamed is not None:
            # The function does not refer to `self`, so that the workers end as soon as it is dropped.
            read = partial(rows_of, orders, patch_of(images.augment) is not None)
            self.ahead = Prefetch(self.rows.streamed, read, worker_count())
        streamed = self.ahead is not None
        self.reader = reader(self.device, on_device=self.rows.whole, streamed=streamed)

    def at(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`: x [B / world, C, H, W].

        A streamed set is read ahead, so steps should follow one another.
        """
        index, rows, prepared = self.reader(self._read, step)
        (pictures, y, extra), *rest = rows
        pictures = self._pixels(pictures, step, "data")
        for further, _, _ in rest:
            extra["second_domain"] = self._pixels(further, step, "data of b")["x"]
        return Batch(pictures.pop("x"), y, index, self._noise(step, "main"), pictures | extra | prepared)

    def _read(self, step: int) -> tuple[Tensor, list[_BatchRows], dict[str, Tensor]]:
        """The inputs of a step on the device: positions, rows of each domain, prepared arrays."""
        index = [order.at(step) for order in self.orders]
        read = self.ahead.at(step).split(len(index[0])) if self.ahead else [None] * len(index)
        rows = [self.rows.take(rows, u8) for rows, u8 in zip(index, read, strict=True)]
        prepared = {
            key: moved_to(torch.from_numpy(values[index[0].numpy()]), self.device)
            for key, values in self.prepared.items()
        }
        return moved_to(index[0], self.device), rows, prepared

    def positions(self) -> np.ndarray:
        """Positions [n] in the split of the training images in use; with two domains, of the first one."""
        order = self.orders[0]
        return np.arange(order.n) if order.subset is None else order.subset.numpy()

    def _pixels(self, pictures: dict[str, Tensor], step: int, phase: str) -> dict[str, Tensor]:
        """Bytes, augmented and converted to [-1, 1] with the noise of `phase`."""
        if not self.augment and self.levels != 2:
            return levelled(pictures, self.levels)
        noise = self._noise(step, phase)
        return levelled(self.augment(pictures, noise) if self.augment else pictures, self.levels, noise)

    def _noise(self, step: int, phase: str) -> BatchNoise:
        return BatchNoise(self.seed, step, phase, total=self.total, start=self.start, device=self.device)


def scan(
    pack: Pack,
    split: str,
    *,
    batch_size: int,
    levels: int | None,
    device: torch.device | str,
    index: Sequence[int] | np.ndarray | Tensor | None = None,
    seed: int = 0,
    augment: Sequence[str] = (),
) -> Iterator[Batch]:
    """Batches of the images of a split, or of some positions in it, in order. The last batch may be smaller.
    Images of several shapes are grouped by shape.

    The noise and the augmentation of image i depend only on (seed, i). The noise is drawn on the CPU, so that
    its bits do not depend on the device, and then moved. Binary images are the same draw for every seed.
    """
    device, change = torch.device(device), augmenter(augment)
    rows = np.arange(pack.meta.counts[split]) if index is None else np.asarray(index)
    order = torch.as_tensor(rows, dtype=torch.int64)
    parts, uncut = _parts(pack, split, order, batch_size), patch_of(augment) is not None
    for part, (pictures, y, extra) in zip(parts, _rows_of(pack, split, parts, device, uncut), strict=True):
        ids = part.tolist()
        pictures = change(pictures, ImageNoise(mix(seed, "data"), ids, device)) if change else pictures
        yield _noised(pictures, y, extra, ids, levels=levels, seed=seed, device=device)


def _parts(pack: Pack, split: str, order: Tensor, batch_size: int) -> list[Tensor]:
    """Positions [N] in batches of images of one shape."""
    if (aspects := pack.aspects(split)) is None:
        return list(order.split(batch_size))
    kinds = torch.from_numpy(kinds_of(aspects[1][order.numpy()]))
    return [part for kind in kinds.unique() for part in order[kinds == kind].split(batch_size)]


def scan_by_content(
    pack: Pack,
    split: str,
    *,
    batch_size: int,
    levels: int | None,
    device: torch.device | str,
    index: Sequence[int] | np.ndarray,
    seed: int = 0,
    drawn: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Like `scan`, but the noise depends only on (seed, pixels); the batch's `index` is a hash of the pixels.
    drawn: images, uint8, that replace those at these positions."""
    device = torch.device(device)
    parts = torch.as_tensor(np.asarray(index), dtype=torch.int64).split(batch_size)
    replacements = [None] * len(parts) if drawn is None else torch.from_numpy(drawn).split(batch_size)
    rows = _rows_of(pack, split, parts, device, uncut=False, shaped=False)
    for (pictures, y, extra), replaced in zip(rows, replacements, strict=True):
        if replaced is not None:
            pictures = pictures | {"x": moved_to(replaced, device)}
        images = pictures["x"].cpu().numpy()
        hashes = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
        ids = [int.from_bytes(digest, "little") >> 1 for digest in hashes]  # 63 bits
        yield _noised(pictures, y, extra, ids, levels=levels, seed=seed, device=device)


def _noised(
    pictures: dict[str, Tensor],
    y: Tensor | None,
    extra: dict[str, Any],
    ids: list[int],
    *,
    levels: int | None,
    seed: int,
    device: torch.device,
) -> Batch:
    """A batch of images, uint8 [B, C, H, W] per kind, whose noise is seeded by `ids`."""
    pictures = levelled(pictures, levels, ImageNoise(BINARY_SEED, ids, device) if levels == 2 else None)
    where = moved_to(torch.tensor(ids, dtype=torch.int64), device)
    return Batch(pictures.pop("x"), y, where, ImageNoise(seed, ids, device), pictures | extra)


def _rows_of(
    pack: Pack, split: str, parts: Sequence[Tensor], device: torch.device, uncut: bool, shaped: bool = True
) -> Iterator[_BatchRows]:
    """The rows of a split at some positions [B], one batch after the other."""
    rows = _Rows(pack, split, device, whole=False, uncut=uncut, shaped=shaped)
    ahead = None
    if rows.streamed is not None:
        workers = worker_count() if len(parts) > MAX_BATCHES_WITHOUT_WORKERS else 0
        ahead = Prefetch(rows.streamed, lambda i: parts[i].numpy(), workers, len(parts))
    for i, part in enumerate(parts):
        yield rows.take(part, ahead.at(i) if ahead else None)


class _Rows:
    """The rows of a split as bytes, kept on the GPU if they fit. Rows of a streamed split are passed in.

    shaped: whether images of a pack of several shapes keep their own shape.
    """

    def __init__(
        self,
        pack: Pack,
        split: str,
        device: torch.device,
        *,
        whole: bool = True,
        uncut: bool,
        shaped: bool = True,
    ):
        self.device = device
        aspects = pack.aspects(split) if shaped else None
        self.shapes = aspects and aspects[1]
        images = pack.images(split, uncut=uncut) if aspects is None else aspects[0]
        self.streamed = images if isinstance(images, Pictures) else None
        self.images = torch.empty(0) if isinstance(images, Pictures) else torch.from_numpy(np.asarray(images))
        labels = pack.labels(split)
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels))
        self.captions = pack.captions(split)
        further = pack.further(split, uncut=uncut)
        self.further = {kind: torch.from_numpy(np.asarray(array)) for kind, array in further.items()}
        size = self.images.nbytes * (1 + len(self.further))
        self.whole = whole and not device_kind(device).shared and self.streamed is None and size <= ON_DEVICE
        if self.whole:
            self.images = self.images.to(device)
            self.further = {kind: t.to(device) for kind, t in self.further.items()}
            self.labels = None if self.labels is None else self.labels.to(device)

    def take(self, index: Tensor, u8: Tensor | None = None) -> _BatchRows:
        """The images `x` and further images by kind, uint8 [B, C, H, W]; the labels; the captions."""
        extra = {} if self.captions is None else {"caption": [self.captions[i] for i in index.tolist()]}
        shape = None if self.shapes is None else self.shapes[index[0]].tolist()[::-1]
        if self.whole:
            index = moved_to(index, self.device)
        y = None if self.labels is None else moved_to(self.labels.index_select(0, index), self.device)
        images = self.images.index_select(0, index) if u8 is None else u8
        images = images if shape is None else from_rows(images, (images.shape[1], *shape))
        further = {kind: t.index_select(0, index) for kind, t in self.further.items()}
        return {kind: moved_to(t, self.device) for kind, t in {"x": images, **further}.items()}, y, extra
