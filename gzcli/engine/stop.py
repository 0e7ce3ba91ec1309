"""When to stop early: after a signal, by the stop file that `gz` writes, or when `gz` itself has died."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from gzcli.core import ranks, signals
from gzcli.store.run_folder import Run

AGREE_EVERY = 10  # steps between two agreements of the ranks, which cost a collective; 1 where steps are slow
SLOW = 0.1  # seconds
LOOK_EVERY = 1.0  # seconds between looks at the parent
_heard: list[int] = []  # signals that this process has received


@contextlib.contextmanager
def listening(run: Run) -> Iterator[None]:
    """While the block runs, a signal does not end the process, but is kept until the next step. The status of
    the run says so: `gz` then waits for a checkpoint, and else ends the process at once."""
    owner, main = run.owner, ranks.rank() == 0
    if main:
        owner.update(stepping=True)
    heard = signals.hear(lambda number, frame: _heard.append(number))
    try:
        yield
    finally:
        signals.restore(heard)
        if main:
            owner.update(stepping=False)


class Stop:
    """Asked once a step; every rank gets the same answer at the same step.

    folder: of the run, where the stop file appears.
    world: number of ranks.
    device: on which the ranks agree.
    """

    def __init__(self, folder: Path, *, world: int, device: torch.device):
        self.file, self.world, self.device = Run(folder).stop_file, world, device
        # the step of the ranks' next agreement; step and time of the last one
        self.next, self.last = 0, (0, time.monotonic())
        self.looked = 0.0  # when the parent was looked at last
        self.parent: psutil.Process | None = None
        if pid := int(os.environ.get("GZ_PARENT", "0")):
            with contextlib.suppress(psutil.NoSuchProcess):  # it is dead already
                self.parent = psutil.Process(pid)

    def asked(self, step: int) -> int:
        """The number of the signal to stop for, or 0."""
        if self.world == 1:
            return self._here()
        if step < self.next:
            return 0
        since, now = self.last, time.monotonic()
        slow = now - since[1] > SLOW * (step - since[0])
        flags = torch.tensor([self._here(), int(slow)], device=self.device)
        signum, slow = ranks.maximum(flags).tolist()
        self.next, self.last = step + (1 if slow else AGREE_EVERY), (step, now)
        return signum

    def _here(self) -> int:
        if _heard:
            return _heard[0]
        if self.file.exists():
            return int(self.file.read_text() or signal.SIGTERM)
        return int(signal.SIGTERM) if self._orphaned() else 0

    def _orphaned(self) -> bool:
        """Whether the `gz` that started us is dead, or a zombie that its own parent has not waited for."""
        if "GZ_PARENT" not in os.environ or time.monotonic() - self.looked < LOOK_EVERY:
            return False
        self.looked = time.monotonic()
        try:
            return (
                self.parent is None
                or not self.parent.is_running()
                or self.parent.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True
