"""How an engine's processes end: with nothing left behind, and with what they wrote down, or what is known of
those that could not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

from gzcli import signals
from gzcli.errors import DeviceError, DivergedError, GzError, Interrupted, MissingError, UsageError
from gzcli.store import files
from gzcli.store.runs import Run

PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
KILLED = 128 + 9  # the exit code of a process that SIGKILL has ended
ERRORS = {cls.kind: cls for cls in (UsageError, MissingError, DeviceError, DivergedError)}


def left_behind(target: Run) -> bool:
    """Whether an engine that this process has started still runs, its launcher gone or not."""
    status = target.status()
    return (
        status.get("parent") == os.getpid()
        and status.get("state") == "running"
        and files.is_locked(target.lock)
    )


def end_all(child: subprocess.Popen) -> None:
    """No process that the child has started, or that is in its group, outlives it: SIGTERM, then SIGKILL."""
    import psutil

    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    for end in ("terminate", "kill"):
        for process in (*left, *([child] if child.poll() is None else [])):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                getattr(process, end)()
        _, left = psutil.wait_procs(left, timeout=PATIENCE)
        with contextlib.suppress(subprocess.TimeoutExpired):  # not by psutil, which would take its exit code
            child.wait(PATIENCE)
    if hasattr(os, "killpg"):  # what the child has left in its group as it ended
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def outcome(target: Run, returncode: int, got: list[int]) -> dict[str, Any]:
    """The status that the engine left behind; raises the error that it tells of."""
    status = target.status()
    if status.get("state") == "finished":
        return status
    # of two processes the one that is left has lost its partner, which it takes for a fault
    orphaned = (
        returncode in (KILLED, 128 - KILLED) and (status.get("error") or {}).get("kind") == GzError.kind
    )
    if status.get("error") and not orphaned:
        raise told(status, got)
    error = silent_end(target, returncode, got)
    target.update(
        state="interrupted" if got else "failed",
        code=error.code,
        error={"kind": error.kind, "message": error.message, "hint": error.hint},
    )
    raise error


def told(status: dict[str, Any], got: list[int]) -> GzError:
    """The error that an engine wrote down; of an interruption with the signal that this process got."""
    error: dict[str, Any] = status["error"]
    if error["kind"] == Interrupted.kind:
        return Interrupted(
            error["message"], signum=got[0] if got else status["code"] - 128, hint=error["hint"]
        )
    return ERRORS.get(error["kind"], GzError)(error["message"], hint=error["hint"])


def silent_end(target: Run, returncode: int, got: list[int]) -> GzError:
    """Why an engine ended without a word: nothing in it can catch SIGKILL, or a fault in a library."""
    trains = (target.path / "run.yaml").exists()
    saved = [
        (part, max(steps)) for part in (target.stages or [target]) if trains and (steps := checkpoints(part))
    ]
    state = (
        "; " + (f"the last checkpoint is of step {saved[-1][1]}" if saved else "there is no checkpoint yet")
    ) * trains
    if saved and target.stages:
        state += f" of stage `{saved[-1][0].path.name}`"
    resume = [f"gz train {target.id} --resume"] if saved else []
    code = 128 - returncode if returncode < 0 else returncode
    signum = got[0] if got else code - 128
    if signum in signals.ENDING:
        return Interrupted(
            f"stopped by {signals.name_of(signum)}{state}", signum=signum, hint="".join(resume) or None
        )
    if code == KILLED:
        less = (
            "`train.batch_size`, or a larger `train.accumulate`, takes less" if trains else "`-n` takes less"
        )
        hint = "; ".join([*resume, f"a smaller {less}"])
        return DeviceError(
            f"the process was killed (SIGKILL), most likely for want of memory{state}", hint=hint
        )
    how = (
        f"was ended by {signals.name_of(signum)}"
        if signum > 0
        else f"ended with code {returncode} and no word"
    )
    return GzError(f"the process {how}{state}", hint="; ".join([*resume, f"see `{target.path / 'log.txt'}`"]))


def checkpoints(run: Run) -> list[int]:
    """The steps of a run's whole checkpoints."""
    return [
        int(path.parent.name)
        for path in (run.path / "checkpoints").glob("*/meta.json")
        if path.parent.name.isdigit()
    ]
