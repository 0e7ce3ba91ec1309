"""A function over many blocks by worker processes, in order; decoding small pictures holds the interpreter's
lock."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gzcli import start
from gzcli.errors import DeviceError

FEW = 4000  # images that one process packs sooner than others start
CHUNK = 64  # blocks that travel together, or so many bytes
CHUNK_BYTES = 1 << 22
AHEAD = 3  # chunks in flight for each worker


def mapped(f: Callable[[Any], Any], blocks: Iterable[Any], work: int) -> Iterator[Any]:
    """f(block) of each block, in their order. `f` must be picklable; at most a few chunks are in memory.

    `work` is how many images there are to be worked on. Blocks are tuples whose third part is bytes or an
    array. Raises DeviceError where a worker dies.
    """
    count = cores() if work > FEW and can_start() else 1
    if count == 1:
        yield from map(f, blocks)
        return
    import multiprocessing

    start.safe_children()
    # Spawned: the parent may have threads and a GPU. Each holds a few imports and no torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=follow_parent)
    flying: deque[Future] = deque()
    try:
        for chunk in _chunks(blocks):
            flying.append(pool.submit(_apply, f, chunk))
            if len(flying) >= AHEAD * count:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    except BrokenProcessPool as e:
        raise DeviceError(
            "a worker process was killed while packing",
            hint="is the memory full? close other programs, try again",
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def can_start() -> bool:
    """Whether the main module can be imported anew by a child: not that of `python -` or a notebook."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or path is None or os.path.exists(path)


def _chunks(blocks: Iterable[Any]) -> Iterator[list[Any]]:
    chunk, size = [], 0
    for block in blocks:
        data = block[2]
        chunk.append(block)
        size += len(data) if isinstance(data, bytes) else data.nbytes
        if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _apply(f: Callable[[Any], Any], chunk: list[Any]) -> list[Any]:
    return [f(block) for block in chunk]


def follow_parent() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and the parent's death is its own."""
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
