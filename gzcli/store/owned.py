"""Folders that gz made. Each holds a mark; gz removes no other folder and writes into no other.

A run lies in the store's `runs` and is marked when it is created. A job of `gz sample`, `gz ood`, `gz bench`
or `gz runs export` claims an empty folder: a new one below its run, or the one that `--out` names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gzcli.core.errors import DamagedError, UsageError
from gzcli.store import files
from gzcli.store.paths import inside, user_dir

MARK = ".gz"
CLAIM = ".claim"  # file of the lock that `gz` holds from before an engine is started until it has ended
# Files that a job writes about itself. A folder that holds no others is left over from a failed attempt.
RECORDS = {MARK, "job.json", "status.json", "log.txt", "accelerate.yaml", "stop", ".lock", CLAIM}
_RUN_ID = re.compile(r".+-\d{8}-\d{6}-[0-9a-f]{4}")


def mark(folder: Path, kind: str) -> None:
    """Marks a new folder as made by gz. Raises FileExistsError for a marked one.

    kind: "run", "job" or "report".
    """
    with open(folder / MARK, "x") as f:
        f.write(json.dumps({"kind": kind}) + "\n")


def is_marked(folder: Path, kind: str) -> bool:
    """Whether gz made the folder as a "run", "job" or "report"."""
    try:
        return files.read_object(folder / MARK).get("kind") == kind
    except DamagedError:  # `.gz` is a folder or another program's file
        return False


def is_removable(folder: Path) -> bool:
    """Whether the folder is a run of the store: it lies in `runs`, is no link and is marked.

    Runs that were made before there was a mark are recognised by their id and the keys of `status.json`.
    """
    if folder.is_symlink() or folder.resolve().parent != user_dir("runs").resolve():
        return False
    if is_marked(folder, "run"):
        return True
    try:
        status = files.read_object(folder / "status.json")
    except DamagedError:
        return False
    return _RUN_ID.fullmatch(folder.name) is not None and {"model", "data", "created"} <= set(status)


def check_removable(folder: Path) -> None:
    """Raises UsageError for what is no run of the store."""
    if not is_removable(folder):
        raise UsageError(
            f"`{folder}` is no run in gz's store, and stays",
            hint=f"gz removes what it made in `{user_dir('runs')}` only",
        )


def remove_run(folder: Path) -> None:
    """Deletes a run of the store. Raises UsageError for anything else."""
    check_removable(folder)
    files.remove_tree(inside(folder, user_dir("runs")))


def check_empty(folder: Path) -> None:
    """Raises UsageError where there is a file at `folder`, or a folder that holds anything."""
    if folder.is_dir() and any(file.name != CLAIM for file in folder.iterdir()):
        hint = "name a new or an empty one, so that nothing is mixed up"
        raise UsageError(f"the folder `{folder}` is not empty", hint=hint)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UsageError(f"`{folder}` is not a folder", hint="name a new or an empty one")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Takes `folder` for a job, marks it, and keeps it from other processes until the block ends.

    It may be new, empty, or left over from an attempt that failed before it wrote any output. Raises
    UsageError where it holds anything else, or where another process has it.
    """
    if not _is_left_over(folder):
        check_empty(folder)
    with files.lock(folder / CLAIM, wait=False) as got:
        if not got or files.is_locked(folder / ".lock"):
            message = f"the folder `{folder}` is in use by another `gz`"
            raise UsageError(message, hint="name another one")
        if _is_left_over(folder):
            for file in folder.iterdir():
                if file.name != CLAIM:
                    file.unlink()
        check_empty(folder)
        mark(folder, "job")
        yield


def discard(folder: Path) -> None:
    """Removes the folder of a job that failed before it wrote any output."""
    if _is_left_over(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_left_over(folder: Path) -> bool:
    """Whether a job's folder is one of a failed attempt without output."""
    if not folder.is_dir() or not is_marked(folder, "job"):
        return False
    try:
        state = files.read_object(folder / "status.json").get("state")
    except DamagedError:
        return False
    failed = state in ("failed", "interrupted", "diverged")
    return failed and {file.name for file in folder.iterdir()} <= RECORDS
