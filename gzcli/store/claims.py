"""Who may change a run: one process at a time, from before its recipe is written until its engine has ended.

A run has two locks. `gz` holds the claim for as long as it starts a training and waits for it; the engine
holds `.lock` while it trains, and keeps it where `gz` is killed. Whoever wants to train, change or remove the
run takes the claim first, and looks at the other lock then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from gzcli.core.errors import MissingError, UsageError
from gzcli.store import files
from gzcli.store.leftovers import sweep
from gzcli.store.owned import CLAIM
from gzcli.store.run import Run

TOLD = 1.0  # seconds for a process that has just got the claim to write down who it is


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Keeps all others from training, changing or removing a run until the block ends.

    run: the run; of a stage its owner is claimed.

    Raises UsageError where another process has it, MissingError where it is gone.
    """
    owner = run.owner
    gone = MissingError(f"the run `{owner.id}` is gone", hint="gz runs list")
    if not owner.path.is_dir():
        raise gone
    with files.lock(owner.path / CLAIM, wait=False) as got:
        if not got or files.is_locked(owner.lock):
            raise in_use(owner)
        if not any(file.name != CLAIM for file in owner.path.glob("*")):  # it was removed meanwhile
            with contextlib.suppress(OSError):
                (owner.path / CLAIM).unlink()
                owner.path.rmdir()
            raise gone
        yield


def mark(run: Run) -> None:
    """Writes into the status of a run that this process has claimed which one that is."""
    run.owner.update(pid=os.getpid())


def in_use(run: Run) -> UsageError:
    """The error for a run that another process has, which it names."""
    deadline = time.monotonic() + TOLD
    while (who := _living(run.status().get("pid"))) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    by = f"process {who}" if who else "another process"
    return UsageError(f"`{run.id}` is being trained by {by}", hint="stop it first, or wait for it")


def check_idle(run: Run) -> None:
    """Raises UsageError where a process trains a run, is about to, or does a job in its folder."""
    if run.is_held:
        raise in_use(run)
    locks = (lock for name in (".lock", CLAIM) for lock in run.path.glob(f"*/*/{name}"))
    if busy := next(filter(files.is_locked, locks), None):
        message = f"`{run.id}` is read by a job that writes `{busy.parent}`"
        raise UsageError(message, hint="stop it first, or wait for it")


def tidy(run: Run) -> None:
    """Removes what killed processes left half written in a run and its stages. For who holds its lock."""
    for part in (run, *run.stages):
        sweep(part.path, part.path / "checkpoints", part.path / "samples")


def _living(pid: int | None) -> int | None:
    """The number of a process, if it is alive."""
    import psutil

    return pid if pid and psutil.pid_exists(pid) else None
