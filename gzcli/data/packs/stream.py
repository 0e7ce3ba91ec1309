"""Worker processes that decode images. They decode blocks of a set while it is packed, and batches of a set
that is too large to pack, whose images an index locates."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gzcli.core.errors import DeviceError, GzError, UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.units import number_in
from gzcli.data.readers.images import Block, Span, read_span, size_of
from gzcli.data.readers.pictures import Decoding, decode
from gzcli.store import start
from gzcli.store.files import write_array

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Index = Sequence[int] | np.ndarray

MAX_IMAGES_IN_PROCESS = 4000  # up to so many images, packing in this process is faster than starting others
MAX_CHUNK_BLOCKS = 64  # maximum number of blocks in a worker's chunk
CHUNK_BYTES = 1 << 22  # bytes at which a chunk is complete earlier
CHUNKS_AHEAD = 3  # chunks in flight for each worker
MOST_WORKERS = 8  # of one process
BATCHES_AHEAD = 2  # batches that each worker decodes ahead
# modules of the workers, which are imported once for all of them
PRELOADED = ["torch", "torch.utils.data", "PIL.Image", "gzcli.data.packs.stream"]
_main_hidden = threading.Lock()


# --- blocks, while a set is packed ---


def map_blocks(f: Callable[[Block], T], blocks: Iterable[Block], work: int) -> Iterator[T]:
    """Yields f(block) for each block in order; `work` is the number of images that f must decode.

    Several threads would be no faster than one, because decoding small images keeps the interpreter's lock.
    """
    count = cores() if work > MAX_IMAGES_IN_PROCESS else 1
    if count == 1:
        yield from map(f, blocks)
        return
    start.safe_children()
    # Spawned: the parent may have threads and a GPU. Each contains a few imports and no torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_follow_parent)
    flying: deque[Future[list[T]]] = deque()
    try:
        for chunk in _chunks(blocks):
            with _without_main():  # this may start a process
                flying.append(pool.submit(_apply, f, chunk))
            if len(flying) >= CHUNKS_AHEAD * count:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    except BrokenProcessPool as e:
        hint = "free some memory, for example by closing other programs, and try again"
        raise DeviceError("a worker process was killed while packing", hint=hint) from e
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The number of worker processes for packing: the cores that this process may use, at most 8."""
    return min(MOST_WORKERS, start.cores())


def _chunks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    chunk: list[Block] = []
    size = 0
    for block in blocks:
        chunk.append(block)
        size += size_of(block.data)
        if len(chunk) >= MAX_CHUNK_BLOCKS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _apply(f: Callable[[Block], T], chunk: list[Block]) -> list[T]:
    return list(map(f, chunk))


@contextmanager
def _without_main() -> Iterator[None]:
    """Hides the main module from processes that are started within the block, because they would import it. A
    user's script without `if __name__ == "__main__"` would then run in each of them, and wait for the set
    being packed."""
    with _main_hidden:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _follow_parent() -> None:
    """Makes a worker process ignore Ctrl-C, and end when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# --- batches of a set that is too large to pack ---


def write_index(folder: Path, split: str, spans: Sequence[Span]) -> None:
    """Writes the index of a split: `spans`, int64 [N, 4] of container, offset, length and whether it is
    deflated; and `containers`, their paths."""
    numbers: dict[str, int] = {}
    rows = np.empty((len(spans), 4), np.int64)
    for i, span in enumerate(spans):
        rows[i] = numbers.setdefault(span.path, len(numbers)), *span[1:]
    write_array(folder / f"{split}_spans.npy", rows)
    containers = np.array([os.fsencode(path) for path in numbers], np.bytes_)
    write_array(folder / f"{split}_containers.npy", containers)


class Pictures:
    """The images of a split as an array uint8 [N, C, H, W], decoded when a row is read.

    An index [B] selects whole images or middle patches. An index [B, 3] selects patches, whose positions
    follow from two large random numbers each. Raises MissingError for an unreadable image, UsageError for one
    of another size than `shape`."""

    dtype = np.dtype(np.uint8)

    def __init__(
        self, folder: Path, split: str, shape: tuple[int, int, int], decoding: Decoding, patch: int | None
    ):
        self.folder, self.split, self.decoding, self.patch = folder, split, decoding, patch
        self.shape = (len(self._spans), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, rows: int | slice | Index) -> np.ndarray:
        places = None
        if isinstance(rows, np.ndarray) and rows.ndim == 2:
            rows, places = rows[:, 0], rows[:, 1:].tolist()
        spans = self._spans[rows]
        if spans.ndim == 1:
            return self._decoded(spans)
        out = np.empty((len(spans), *self.shape[1:]), np.uint8)
        for i, span in enumerate(spans):
            out[i] = self._decoded(span, places[i] if places else None)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """The state without memory maps, which a pickle would copy: the other process opens them itself."""
        return {key: value for key, value in vars(self).items() if key not in ("_spans", "_containers")}

    @cached_property
    def _spans(self) -> np.ndarray:
        return np.load(self.folder / f"{self.split}_spans.npy", mmap_mode="r")

    @cached_property
    def _containers(self) -> np.ndarray:
        return np.load(self.folder / f"{self.split}_containers.npy", mmap_mode="r")

    def _decoded(self, row: np.ndarray, place: Sequence[int] | None = None) -> np.ndarray:
        """The image of a row of the index, or a patch of it; without a `place`, the middle patch."""
        container, offset, length, deflated = row.tolist()
        path = os.fsdecode(self._containers[container].item())
        name = f"{path} at byte {offset:,}" if offset else path  # an archive's member follows its header
        image, _ = decode(read_span(Span(path, offset, length, bool(deflated))), name, self.decoding)
        _, h, w = image.shape
        if self.patch and min(h, w) >= self.patch:
            y, x = ((n - self.patch) // 2 for n in (h, w))
            if place is not None:
                y, x = (k % (n - self.patch + 1) for k, n in zip(place, (h, w), strict=True))
            return image[:, y : y + self.patch, x : x + self.patch]
        if image.shape != self.shape[1:]:
            _, h0, w0 = self.shape[1:]
            message = f"the images have mixed sizes: `{name}` is {w}×{h}, but others are {w0}×{h0}"
            raise UsageError(
                message,
                hint=advice("use {} to crop them to squares and resize them", setting("data.size", 64)),
            )
        return image


def worker_count() -> int:
    """The number of worker processes for this one: `GZ_WORKERS`, or its share of the cores, 1 to 8."""
    if (count := number_in("GZ_WORKERS", "processes")) is not None:
        return count
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # training processes on this machine
    return max(1, min(MOST_WORKERS, start.cores() // ranks))


class Prefetch:
    """Batches of images, decoded ahead by worker processes. The workers end with this object or with this
    process. `index_of` returns the rows of a batch for its step, and is called in this process."""

    def __init__(
        self, pictures: Pictures, index_of: Callable[[int], Index], workers: int, steps: int = sys.maxsize
    ):
        import torch
        from torch.utils.data import DataLoader

        self._steps = _Steps(index_of, steps)
        # Its own generator: the seed that a loader draws would shift the one that dropout draws from.
        options: dict[str, Any] = {"batch_sampler": self._steps, "collate_fn": _as_it_is}
        options |= {"generator": torch.Generator()}
        if workers:
            # Like spawned processes, those of a fork server are safe beside threads and a GPU, but torch is
            # imported once for all (first batch from 8 workers on 2 cores: 3 s, spawned 15 s), and they end
            # cleanly, where spawned ones aborted. Batches come through shared memory: through pipes, images
            # of 256×256 came at 60 % of the rate.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            options |= {
                "num_workers": workers,
                "prefetch_factor": BATCHES_AHEAD,
                "persistent_workers": True,
                "multiprocessing_context": context,
                "worker_init_fn": _begin,
            }
        batches: Any = _Batches(pictures)  # not torch's Dataset: this module is imported without torch
        loader: DataLoader[Any] = DataLoader(batches, **options)
        # The one reference to loader and iterator. In a cycle with `self` they would be collected in any
        # order, queues before workers, and ending those would then wait in vain (5 s each).
        self._open: dict[str, Any] = {"loader": loader}
        weakref.finalize(self, self._open.clear)
        self._last: tuple[int, Tensor | GzError] | None = None  # the last batch, with its step

    def at(self, step: int) -> Tensor:
        """The batch of a step: uint8 [B, C, H, W] on the CPU, read-only. A step other than the previous one
        and the next restarts the workers from there.

        Raises the errors of `Pictures`, and DeviceError if a worker was killed.
        """
        if self._last is None or self._last[0] != step:
            if "batches" not in self._open or self._last is None or step != self._last[0] + 1:
                self._steps.first = step
                with _without_main():  # starts the workers
                    self._open["batches"] = iter(self._open["loader"])
            self._last = step, self._next()
        batch = self._last[1]
        if isinstance(batch, GzError):
            raise batch
        return batch

    def _next(self) -> Tensor | GzError:
        try:
            return next(self._open["batches"])
        except (RuntimeError, OSError, EOFError) as e:  # OSError, EOFError: killed in the middle of a batch
            if isinstance(e, RuntimeError) and "DataLoader worker (pid" not in str(e):
                raise
            shared = "`docker run --ipc=host` provides more shared memory"
            hint = f"set `GZ_WORKERS` to fewer workers if memory is full; {shared}"
            raise DeviceError("a worker process was killed while decoding images", hint=hint) from e

    def close(self) -> None:
        """Ends the workers."""
        self._open.clear()


class _Steps:
    """The batch sampler of a loader: the rows of one batch after another, from `first` on."""

    def __init__(self, index_of: Callable[[int], Index], steps: int):
        self.index_of, self.steps, self.first = index_of, steps, 0

    def __iter__(self) -> Iterator[Index]:
        return map(self.index_of, range(self.first, self.steps))


class _Batches:
    """The data set of a loader. The error of an image is returned rather than raised, because a loader would
    wrap it."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitems__(self, rows: Index) -> Tensor | GzError:
        import torch

        try:
            return torch.from_numpy(self.pictures[rows])
        except GzError as e:
            return e


def _as_it_is(batch: Tensor | GzError) -> Tensor | GzError:
    return batch


def _begin(worker: int) -> None:
    _follow_parent()
    # A scheduler sends it to all processes, but the trainer still needs a batch before it saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
