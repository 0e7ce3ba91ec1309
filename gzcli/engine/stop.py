"""When to stop early: a signal to this process, the stop file that `gz` writes, or the death of the `gz` that started us."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

AGREE_EVERY = 10  # steps between the ranks' agreement, which costs a collective


class Stop:
    """Asked once a step; every rank gets the same answer at the same step."""

    def __init__(self, folder: Path, *, world: int, device: torch.device):
        self.file, self.world, self.device = folder / "stop", world, device
        self.parent = int(os.environ.get("GZ_PARENT", "0"))
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, frame: setattr(self, "signum", number))

    def asked(self, step: int) -> int:
        """The number of the signal to stop for, or 0."""
        if self.world == 1:
            return self._here()
        if step % AGREE_EVERY:
            return 0
        flag = torch.tensor(self._here(), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def _here(self) -> int:
        if self.signum:
            return self.signum
        if self.file.exists():
            return int(self.file.read_text() or signal.SIGTERM)
        if self.parent and not _alive(self.parent):
            return signal.SIGTERM
        return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
