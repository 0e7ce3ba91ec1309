"""Sets too large to pack: an index of where the pictures lie, and worker processes that decode them ahead of
need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gzcli.data import workers as processes
from gzcli.data.archives import Span, read_span
from gzcli.data.pictures import decode
from gzcli.errors import DeviceError, GzError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Rows = Sequence[int] | np.ndarray

MOST = 8  # workers of one process
AHEAD = 2  # batches that each worker may be ahead
PRELOADED = [
    "torch",
    "torch.utils.data",
    "PIL.Image",
    "gzcli.data.stream",
]  # what workers need, imported once for all


def write_index(folder: Path, split: str, spans: Sequence[Span]) -> None:
    """Writes SPLIT_spans.npy, int64 [N, 4]: container, offset, length, deflated?; and SPLIT_containers.npy:
    their paths."""
    numbers: dict[str, int] = {}
    rows = np.empty((len(spans), 4), np.int64)
    for i, span in enumerate(spans):
        rows[i] = numbers.setdefault(span.path, len(numbers)), *span[1:]
    np.save(folder / f"{split}_spans.npy", rows)
    np.save(folder / f"{split}_containers.npy", np.array([os.fsencode(path) for path in numbers], np.bytes_))


class Pictures:
    """The images of a split as an array uint8 [N, C, H, W], each read and decoded when it is asked for.

    how: the keywords of `pictures.decode`. A row raises MissingError where its picture cannot be read or
    decoded, UsageError where it has another size than `shape` and none was asked for.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, split: str, shape: tuple[int, int, int], how: dict[str, Any]):
        self.folder, self.split, self.how = folder, split, how
        self.shape = (len(self._spans), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, rows: int | slice | Rows) -> np.ndarray:
        spans = self._spans[rows]
        if spans.ndim == 1:
            return self._decoded(spans)
        out = np.empty((len(spans), *self.shape[1:]), np.uint8)
        for image, span in zip(out, spans, strict=True):
            image[:] = self._decoded(span)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Maps are opened anew by whoever gets it: a copy of them would be as large as the index."""
        return {key: value for key, value in vars(self).items() if key not in ("_spans", "_containers")}

    @cached_property
    def _spans(self) -> np.ndarray:
        return np.load(self.folder / f"{self.split}_spans.npy", mmap_mode="r")

    @cached_property
    def _containers(self) -> np.ndarray:
        return np.load(self.folder / f"{self.split}_containers.npy", mmap_mode="r")

    def _decoded(self, where: np.ndarray) -> np.ndarray:
        container, offset, length, deflated = where.tolist()
        path = os.fsdecode(self._containers[container].item())
        name = (
            f"{path} at byte {offset:,}" if offset else path
        )  # a member of an archive lies behind its header
        image, _ = decode(read_span(Span(path, offset, length, bool(deflated))), name, **self.how)
        if image.shape != self.shape[1:]:
            (_, h, w), (_, h0, w0) = image.shape, self.shape[1:]
            hint = "`--set data.size=64` crops them to squares and resizes them"
            raise UsageError(
                f"the pictures have mixed sizes: `{name}` is {w}×{h}, others are {w0}×{h0}", hint=hint
            )
        return image


def worker_count() -> int:
    """Worker processes for this one: its share of the cores, from 1 to 8, or what `GZ_WORKERS` says (0:
    none). Raises UsageError."""
    text = os.environ.get("GZ_WORKERS", "")
    if text and not text.isdigit():
        raise UsageError(f"`GZ_WORKERS` is a number of processes, not `{text}`")
    if text:
        return int(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # training processes on this machine
    return max(1, min(MOST, cores // ranks))


class Prefetch:
    """Batches of pictures, decoded ahead by worker processes that end with this object, or with the process.

    index_of(step) are the rows of a batch, and is asked in this process; without workers all is done in this
    process.
    `steps` is the number of batches, where they have an end.

    The workers come from a fork server: like spawned ones they are safe beside threads and a GPU, but torch
    is imported once and not by each of them (first batch from 8 workers on 2 cores: 3 s, spawned 15 s), and
    those abort as they end. Batches come through shared memory: through pipes, pictures of 256×256 came at 60
    % of the rate.
    """

    def __init__(
        self, pictures: Pictures, index_of: Callable[[int], Rows], workers: int, steps: int = sys.maxsize
    ):
        import torch
        from torch.utils.data import DataLoader

        self._steps = _Steps(index_of, steps)
        options: dict[str, Any] = {}
        if workers and processes.can_start():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            options = {
                "num_workers": workers,
                "prefetch_factor": AHEAD,
                "persistent_workers": True,
                "multiprocessing_context": context,
                "worker_init_fn": _begin,
            }
        # Its own generator: a loader draws a seed, which would shift the global stream that dropout draws
        # from.
        loader = DataLoader(
            _Batches(pictures),
            batch_sampler=self._steps,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            **options,
        )
        # Loader and iterator hang on this alone: were they garbage together with `self`, in a cycle, their
        # queues could go first, and the workers be waited for in vain (5 s each).
        self._open: dict[str, Any] = {"loader": loader}
        weakref.finalize(self, self._open.clear)
        self._held: tuple[int, Tensor | GzError | None] = (-1, None)

    def at(self, step: int) -> Tensor:
        """uint8 [B, C, H, W] on the CPU, not to be written to. A step that is neither the last one nor the
        next starts anew from there. Raises what `Pictures` raises, and DeviceError where a worker was
        killed."""
        held, batch = self._held
        if step != held:
            if "batches" not in self._open or step != held + 1:
                self._steps.first = step
                self._open["batches"] = iter(self._open["loader"])
            try:
                batch = next(self._open["batches"])
            except (
                RuntimeError,
                OSError,
                EOFError,
            ) as e:  # the latter two: it fell silent in the middle of a batch
                if isinstance(e, RuntimeError) and "DataLoader worker (pid" not in str(e):
                    raise
                hint = (
                    "is the memory full, or the shared memory (`docker run --ipc=host`)? `GZ_WORKERS` "
                    "lowers their number"
                )
                raise DeviceError("a worker process that decodes pictures was killed", hint=hint) from e
            self._held = step, batch
        if isinstance(batch, GzError):
            raise batch
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._open.clear()


class _Steps:
    """A loader's batch sampler: the rows of one batch after another, from `first` on."""

    def __init__(self, index_of: Callable[[int], Rows], steps: int):
        self.index_of, self.steps, self.first = index_of, steps, 0

    def __iter__(self) -> Iterator[Rows]:
        return map(self.index_of, range(self.first, self.steps))


class _Batches:
    """A loader's data set. What is wrong with a picture comes as a value: a loader would wrap what is
    raised."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitems__(self, rows: Rows) -> Tensor | GzError:
        import torch

        try:
            return torch.from_numpy(self.pictures[rows])
        except GzError as e:
            return e


def _as_it_is(batch: Tensor | GzError) -> Tensor | GzError:
    return batch


def _begin(worker: int) -> None:
    processes.follow_parent()
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # a scheduler sends it to all; the trainer still needs a batch to save after
