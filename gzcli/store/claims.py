"""Who may write into a folder, and what may be removed. A run has two locks. `gz` keeps the claim while it
starts a training and waits for it. The engine keeps `.lock` while it trains, even if `gz` is killed. To
train, change or remove a run, a process takes the claim and then checks the other lock. Every folder that gz
makes has a mark; gz never removes an unmarked folder or writes into one. A run is marked when it is created
in the store. A job claims a new folder below its run, or the empty one of `--out`."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.formats import ARCHIVE, ARRAY, IMAGE, SET, endings_of
from gzcli.core.hints import gz
from gzcli.store import files
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import RUN_ID, Run

PID_SECONDS = 1.0  # seconds to wait for the process number of a new claim
CLAIM = Run.claim_file.name
# of files that a user may expect of `--out`, `--report` or `--export`, all of which name a folder
OUTPUT_ENDINGS = endings_of(IMAGE, ARRAY, SET, ARCHIVE)
OUTPUT_ENDINGS += (".html", ".pdf", ".md", ".tex", ".json", ".csv", ".onnx")
# Files that a job writes about itself. A folder that contains no others is left over from a failed attempt.
_MARKS = Run.mark_file, Run.claim_file, Run.lock_file, Run.status_file
_RECORDS = {place.name for place in (*_MARKS, Run.stop_file, Run.job_file, Run.log_file, Run.launch_file)}


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Keeps other processes from training, changing or removing a run and its stages within the block. Raises
    UsageError if another process has claimed it, MissingError if it no longer exists."""
    owner = run.owner
    gone = MissingError(f"the run `{owner.id}` no longer exists", hint=gz("runs list"))
    if not owner.path.is_dir():
        raise gone
    with files.lock(owner.claim_file, wait=False) as acquired:
        if not acquired or files.is_locked(owner.lock):
            raise in_use(owner)
        if not any(file.name != CLAIM for file in owner.path.glob("*")):  # the run was removed meanwhile
            with contextlib.suppress(OSError):
                owner.claim_file.unlink()
                owner.path.rmdir()
            raise gone
        yield


def sign(run: Run) -> None:
    """Writes the id of this process into the status of a run that it has claimed."""
    run.owner.update(pid=os.getpid())


def in_use(run: Run) -> UsageError:
    """The error for a run that another process has claimed, with the id of that process."""
    import psutil

    deadline = time.monotonic() + PID_SECONDS
    while True:
        pid = run.status().get("pid")
        lives = pid and psutil.pid_exists(pid)
        if lives or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    by = f"process {pid}" if lives else "another process"
    return UsageError(f"`{run.id}` is being trained by {by}", hint="stop it first, or wait for it")


def tidy(run: Run) -> None:
    """Removes the leftovers of killed processes in a run and its stages; the caller must have its lock."""
    for part in (run, *run.stages):
        files.remove_leftovers(part.path, part.checkpoints_folder, part.samples_folder)


def is_removable(folder: Path) -> bool:
    """Whether the folder is a run of the store: in `runs`, not a link, and marked. Runs from before the mark
    are recognised by their id and the keys of `status.json`."""
    if folder.is_symlink() or folder.resolve().parent != user_dir("runs").resolve():
        return False
    old = {"model", "data", "created"} <= set(files.whole_object(Run(folder).status_file))
    return Run(folder).is_marked("run") or (old and RUN_ID.fullmatch(folder.name) is not None)


def check_removable(run: Run) -> None:
    """Raises UsageError for a stage, for a run that a process trains or reads, and for anything outside the
    store."""
    if run.owner is not run:
        raise UsageError(f"`{run.id}` is a stage of a run", hint=gz("runs remove", run.owner.id))
    _check_in_store(run.path)
    if run.is_held:
        raise in_use(run)
    locks = (lock for name in (Run.lock_file.name, CLAIM) for lock in run.path.glob(f"*/*/{name}"))
    if busy := next(filter(files.is_locked, locks), None):
        message = f"`{run.id}` is in use by a job that writes to `{busy.parent}`"
        raise UsageError(message, hint="stop it first, or wait for it")


def remove_folder(folder: Path) -> None:
    """Deletes a run of the store. Raises UsageError for anything else."""
    _check_in_store(folder)
    files.remove_tree(folder)


def _check_in_store(folder: Path) -> None:
    if not is_removable(folder):
        hint = f"gz removes only what it created in `{user_dir('runs')}`"
        raise UsageError(f"`{folder}` is not a run in gz's store, so gz does not remove it", hint=hint)


def check_empty(folder: Path) -> None:
    """Raises UsageError if there is a file at `folder`, a folder that contains anything, or nothing and the
    name is that of a file."""
    if folder.is_dir() and any(file.name != CLAIM for file in folder.iterdir()):
        hint = "use a new or an empty folder"
        raise UsageError(f"the folder `{folder}` is not empty", hint=hint)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UsageError(f"`{folder}` is not a folder", hint="use a new or an empty folder")
    if not folder.exists() and folder.suffix.lower() in OUTPUT_ENDINGS:
        message = f"`{folder.name}` is the name of a file, but gz writes a folder"
        raise UsageError(message, hint=f"use a name without `{folder.suffix}`, such as `{folder.stem}`")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be written into a folder that exists or will be made."""
    place = files.nearest_place(folder)
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def new_folder(parent: Path, name: str = "") -> Path:
    """A new folder NAME-TIME-xxxx for a job. Removes incomplete files of killed jobs beside it."""
    files.remove_leftovers(*parent.glob("*"), *parent.glob("*/*"))
    while True:
        words = filter(None, [name, time.strftime("%Y%m%d-%H%M%S"), os.urandom(2).hex()])
        folder = parent / "-".join(words)
        try:
            files.make_folder(folder, exist_ok=False)
            return folder.absolute()
        except FileExistsError:
            continue


def check_free(folder: Path) -> None:
    """Raises UsageError unless a job can have the folder: it must be new, empty, or left by an attempt that
    failed without output."""
    if not _is_left_over(folder):
        check_empty(folder)


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Marks a folder for a job and keeps other processes out of it within the block. Raises UsageError if the
    folder is not free, or if another process has claimed it."""
    check_free(folder)
    with files.lock(folder / CLAIM, wait=False) as acquired:
        if not acquired or files.is_locked(Run(folder).lock_file):
            message = f"the folder `{folder}` is in use by another `gz`"
            raise UsageError(message, hint="use another folder")
        if _is_left_over(folder):
            for file in folder.iterdir():
                if file.name != CLAIM:
                    file.unlink()
        check_empty(folder)
        Run(folder).mark("job")
        yield


def discard(folder: Path) -> None:
    """Removes a job's folder after an attempt that failed without output."""
    if _is_left_over(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_left_over(folder: Path) -> bool:
    """Whether a job's folder was left by an attempt that failed without output."""
    job = Run(folder)
    if not folder.is_dir() or not job.is_marked("job"):
        return False
    failed = files.whole_object(job.status_file).get("state") in ("failed", "interrupted", "diverged")
    return failed and {file.name for file in folder.iterdir()} <= _RECORDS
