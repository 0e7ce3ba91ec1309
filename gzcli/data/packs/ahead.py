"""Reading ahead for a GPU: a thread gathers the rows of the next batch and copies them on a stream of their
own, while the steps before it compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gzcli.core import devices

T = TypeVar("T")


def reader(device: torch.device, *, kept: bool, streamed: bool) -> Callable[[Callable[[int], Any], int], Any]:
    """A function of (read, step) that returns `read(step)`, read ahead where that pays: not on a CPU, which
    has nothing left to do it with. It does not keep `read`.

    device: the device that is read for.
    kept: whether what is read lies on the device.
    streamed: whether processes have read it before; then only its copy is beside the computation.
    """
    if kept or not devices.kind_of(device).streams:
        return lambda read, step: read(step)
    if streamed:
        side = SideStream(device)
        return lambda read, step: side.ended(*side.started(lambda: read(step)))
    return Ahead(device).at


class SideStream:
    """A stream of a GPU beside the one that computes; on other devices work is done as it comes."""

    def __init__(self, device: torch.device):
        self.stream = devices.side_stream(device)

    def started(self, work: Callable[[], T]) -> tuple[T, Any]:
        """What `work` returns, whose copies may not have ended yet, and the event of their end."""
        if self.stream is None:
            return work(), None
        with torch.cuda.stream(self.stream):
            return work(), self.stream.record_event()

    def ended(self, found: T, event: Any) -> T:
        """What was started, for use on the stream that computes, which waits for it; the host does not."""
        if event is not None:
            current = torch.cuda.current_stream(event.device)
            current.wait_event(event)
            for t in tree_leaves(found):
                if isinstance(t, Tensor) and t.is_cuda:
                    t.record_stream(current)  # its memory is not used anew before this stream is done with it
        return found


class Ahead:
    """What is read for each step, one step ahead. Any other step than the next one is read when asked for.

    device: the device that is read for.
    """

    def __init__(self, device: torch.device):
        self.side, self.pool = SideStream(device), ThreadPoolExecutor(1, "ahead")
        self.next: tuple[int, Future[Any]] | None = None

    def at(self, read: Callable[[int], T], step: int) -> T:
        """`read(step)`; a thread then calls `read(step + 1)`. Raises what `read` raises of the step."""
        ready = self.next[1] if self.next and self.next[0] == step else self._start(read, step)
        found, event = ready.result()
        self.next = step + 1, self._start(read, step + 1)
        return self.side.ended(found, event)

    def _start(self, read: Callable[[int], T], step: int) -> Future[tuple[T, Any]]:
        return self.pool.submit(lambda: self.side.started(lambda: read(step)))
