"""Applies a function to many blocks in worker processes, in order. Threads would be no faster: decoding small
pictures holds the interpreter's lock."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from gzcli.core import start
from gzcli.core.errors import DeviceError
from gzcli.data.readers.raw_images import Block

T = TypeVar("T")

FEW = 4000  # images up to which starting processes would take longer than packing here
CHUNK = 64  # blocks that are sent to a worker at a time
CHUNK_BYTES = 1 << 22  # bytes from which fewer blocks are sent
CHUNKS_AHEAD = 3  # chunks in flight for each worker
_hiding = threading.Lock()


def mapped(f: Callable[[Block], T], blocks: Iterable[Block], work: int) -> Iterator[T]:
    """f(block) of each block, in their order; at most a few chunks are in memory.

    f: a function that can be pickled.
    work: images in all that `f` must work on; few are done in this process.

    Raises DeviceError where a worker dies.
    """
    count = cores() if work > FEW else 1
    if count == 1:
        yield from map(f, blocks)
        return
    import multiprocessing

    start.safe_children()
    # Spawned: the parent may have threads and a GPU. Each holds a few imports and no torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=follow_parent)
    flying: deque[Future[list[T]]] = deque()
    try:
        for chunk in _chunks(blocks):
            with without_main():  # which may start a process
                flying.append(pool.submit(_apply, f, chunk))
            if len(flying) >= CHUNKS_AHEAD * count:
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
    """Worker processes that packing starts: the cores that this process may use, at most 8."""
    return min(8, start.cores())


@contextmanager
def without_main() -> Iterator[None]:
    """Hides the main module from processes that start meanwhile, which would import it anew. A user's script
    without `if __name__ == "__main__"` would run again in each of them, and wait there for the very set that
    this process packs; a notebook's cannot be imported at all."""
    with _hiding:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _chunks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    chunk: list[Block] = []
    size = 0
    for block in blocks:
        chunk.append(block)
        size += len(block.data) if isinstance(block.data, bytes) else block.data.nbytes
        if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _apply(f: Callable[[Block], T], chunk: list[Block]) -> list[T]:
    return [f(block) for block in chunk]


def follow_parent() -> None:
    """Makes a worker process leave Ctrl-C to its parent, and end when its parent does."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
