"""The end of an engine: no process is left, and its status or exit code becomes an error.

An engine records its own errors in `status.json`. One that was killed could not, and its exit code and its
checkpoints tell what happened.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core import signals, start
from gzcli.core.errors import DeviceError, DivergedError, GzError, Interrupted, MissingError, UsageError
from gzcli.store import claims, files
from gzcli.store.runs import Run

if TYPE_CHECKING:
    import psutil

SETTLING = 60.0  # seconds for the last words of the main process, which saves and draws after the others
PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
SAVING = 30.0  # seconds after the last byte of a checkpoint, in which its engine is not killed
FOLDER = "GZ_FOLDER"  # the variable of an engine, and of all that it starts, that names its folder
KILLED = 128 + 9  # the exit code of a process that SIGKILL has ended
ERRORS = {cls.kind: cls for cls in (UsageError, MissingError, DeviceError, DivergedError)}


def left_behind(target: Run) -> bool:
    """Whether an engine that this process started still runs, even where its launcher has ended."""
    status = target.status()
    return (
        status.get("parent") == os.getpid()
        and status.get("state") == "running"
        and files.is_locked(target.lock)
    )


def is_saving(target: Run) -> bool:
    """Whether a checkpoint of a run is being written, or has just been: its engine then still records how it
    ended."""
    latest = 0.0
    for run in (target, *target.stages):
        for folder in run.checkpoints_folder.glob("*"):
            try:
                latest = max(latest, *(path.stat().st_mtime for path in (folder, *folder.glob("*"))))
            except FileNotFoundError:  # renamed meanwhile: it is whole
                return True
    return time.time() - latest < SAVING


def settle(target: Run) -> None:
    """Waits until another machine has recorded how a run ended."""
    deadline = time.monotonic() + SETTLING
    while target.status().get("state") == "running" and time.monotonic() < deadline:
        time.sleep(0.2)


def end_all(child: subprocess.Popen[bytes], folder: Path | None = None) -> None:
    """Ends the child, its descendants and its process group: by SIGTERM, then by SIGKILL.

    folder: that the child works on. By it those are found too that have outlived the process that started
      them, as ranks do, to which torch's launcher gives sessions of their own; None: there are none.
    """
    import psutil

    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    for end in ("terminate", "kill"):
        left = list({*left, *(_working_on(folder, child.pid) if folder else ())})
        for process in (*left, *([child] if child.poll() is None else [])):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                getattr(process, end)()
        _, left = psutil.wait_procs(left, timeout=PATIENCE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)  # psutil would collect its exit code, which is still needed
    if hasattr(os, "killpg"):  # processes that have left the tree but not the group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _working_on(folder: Path, child: int) -> list[psutil.Process]:
    """The processes, besides the child, that this one has had started on a folder, and their children."""
    import psutil

    mine = {"GZ_PARENT": str(os.getpid()), FOLDER: str(folder)}
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            if start.SCRIPT in process.cmdline() and mine.items() <= process.environ().items():
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.pid != child]


def outcome(target: Run, returncode: int, got: list[int]) -> dict[str, Any]:
    """The status of a finished run or job.

    target: the run or job.
    returncode: of the engine or its launcher; −N where signal N ended it.
    got: the signals that this process received meanwhile.

    Raises the error that the engine recorded, else one that is deduced from the exit code.
    """
    if returncode == UsageError.code and files.is_locked(target.lock):
        raise claims.in_use(target)  # by a process that another `gz` has left behind
    status = target.status()
    if status.get("state") == "finished":
        return status
    # where one rank was killed, the others record the lost connection as an error of their own
    killed = returncode in (KILLED, 128 - KILLED) or status.get("lost")
    consequence = killed and (status.get("error") or {}).get("kind") == GzError.kind
    if status.get("error") and not consequence:
        raise recorded_error(status, got)
    error = deduced_error(target, returncode, got)
    target.update(
        state="interrupted" if got else "failed",
        code=error.code,
        error={"kind": error.kind, "message": error.message, "hint": error.hint},
    )
    raise error


def recorded_error(status: dict[str, Any], got: list[int]) -> GzError:
    """The error in a status; an interruption carries the signal that this process received."""
    error: dict[str, Any] = status["error"]
    if error["kind"] == Interrupted.kind:
        signum = got[0] if got else status["code"] - 128
        return Interrupted(error["message"], signum=signum, hint=error["hint"])
    return ERRORS.get(error["kind"], GzError)(error["message"], hint=error["hint"])


def deduced_error(target: Run, returncode: int, got: list[int]) -> GzError:
    """The error of an engine that ended without a record, as after SIGKILL or a crash in a library."""
    trains = target.recipe_file.exists()
    saved = saved_state(target) if trains else None
    state = "" if not trains else f"; {saved or 'there is no checkpoint yet'}"
    resume = [f"gz train {target.id} --resume"] if saved else []
    code = 128 - returncode if returncode < 0 else returncode
    signum = got[0] if got else code - 128
    if signum in signals.ENDING:
        message = f"stopped by {signals.name_of(signum)}{state}"
        return Interrupted(message, signum=signum, hint="".join(resume) or None)
    lost = target.status().get("lost")
    who = f"rank {lost['rank']} (process {lost['pid']})" if lost else "the process"
    if code == KILLED:
        smaller = "`train.batch_size`, or a larger `train.accumulate`," if trains else "`-n`"
        message = f"{who} was killed (SIGKILL), most likely for want of memory{state}"
        return DeviceError(message, hint="; ".join([*resume, f"a smaller {smaller} takes less"]))
    if signum > 0:
        message = f"{who} was ended by {signals.name_of(signum)}{state}"
        crash = "most likely a library or a driver has crashed: `gz doctor` shows which are here"
        return DeviceError(message, hint="; ".join([*resume, crash]))
    message = f"{who} ended with code {returncode} and no word{state}"
    return GzError(message, hint="; ".join([*resume, f"see `{target.log_file}`"]))


def saved_state(target: Run) -> str | None:
    """Which checkpoint of a run is the last, in words; None where there is none."""
    saved = [(part, max(steps)) for part in target.stages or [target] if (steps := checkpoints(part))]
    if not saved:
        return None
    part, step = saved[-1]
    of_stage = f" of stage `{part.path.name}`" if target.stages else ""
    return f"the last checkpoint is of step {step}{of_stage}"


def checkpoints(run: Run) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return [step for step in run.saved_steps if run.checkpoint(step).meta.exists()]
