"""A sample as it becomes: the states of a sampler that runs in a thread of its own, one after the other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from gzcli.core.types import Progress

MOST = 48  # states that are shown of one sampling
PAUSE = 0.05  # seconds from one state to the next, at least: a fast sampler would be over before one sees it


def watched(
    work: Callable[[Progress], np.ndarray], shown: Callable[[Tensor], np.ndarray]
) -> Iterator[np.ndarray]:
    """The states of what `work` makes, at most MOST, then what it returns.

    work: takes a progress(i, n, x), which it calls at every step with its state x.
    shown: a state as images uint8 [n, C, H, W].

    Raises what `work` raises.
    """
    states: queue.Queue[np.ndarray | BaseException | None] = queue.Queue()
    done: list[np.ndarray] = []
    seen = -1

    def progress(i: float, n: float, x: Tensor | None = None) -> None:
        nonlocal seen
        if x is not None and int(MOST * i / n) > seen:
            seen = int(MOST * i / n)
            states.put(shown(x))

    def run() -> None:
        try:
            done.append(work(progress))
            states.put(None)
        except BaseException as e:
            states.put(e)

    threading.Thread(target=run, daemon=True).start()
    while (state := states.get()) is not None:
        if isinstance(state, BaseException):
            raise state
        yield state
        time.sleep(PAUSE)
    yield done[0]
