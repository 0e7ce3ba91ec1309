"""A job of the engine: its folder, its processes and its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import GzError, UsageError, choose
from gzcli.core.sections import PRECISIONS
from gzcli.core.types import Say, silent
from gzcli.launch import cost, launcher
from gzcli.store import claims, jobs
from gzcli.store.jobs import AlarmJob, BenchJob, Job, RunJob
from gzcli.store.paths import user_dir

# fields of jobs that are numbers → the least value; the shell refuses smaller ones as it reads them
LEAST = {"n": 1, "seeds": 1, "seed": 0}


def check(job: Job) -> None:
    """Raises UsageError for a setting that no job can have."""
    numbers = [(name, getattr(job, name, None), least) for name, least in LEAST.items()]
    numbers.append(("processes", job.launch.processes, 1))
    for name, value, least in numbers:
        if value is not None and value < least:
            flag = f"-{name}" if len(name) == 1 else f"--{name}"
            raise UsageError(f"`{flag} {value}` must be {least} or more")
    if job.launch.gpus != "all" and not isinstance(job.launch.gpus, int | None):
        raise UsageError(f"`--gpus {job.launch.gpus}` is neither a number nor `all`")
    if not isinstance(job, RunJob):
        return
    if job.checkpoint not in ("last", "best", "finished") and not job.checkpoint.isdigit():
        raise UsageError(f"`--checkpoint {job.checkpoint}` is neither `last`, `best` nor a step")
    if job.precision is not None:
        choose("precision", job.precision, PRECISIONS)


def do_job(folder: Path, job: Job, *, mode: str = "quiet", warn: Say = silent) -> dict[str, Any]:
    """The engine's `result.json` for a job. If an error leaves a new folder without output, the folder is
    removed."""
    for_this_job = user_dir() in folder.parents
    try:
        check(job)
        plan = launcher.plan(job.launch, every_gpu=False)
    except GzError:
        if for_this_job:
            folder.rmdir()
        raise
    if plan.note:
        warn(plan.note)
    new = for_this_job or not folder.exists()
    try:
        with claims.claimed_folder(folder):
            jobs.write(folder, replace(job, launch=replace(job.launch, threads=plan.threads)))
            launcher.run(folder, plan, launcher=False, mode=mode)
    except GzError as error:
        if new and error.kind != "bug":  # whose log may contain the cause
            claims.discard(folder)
        raise
    result = jobs.result_of(folder, job.verb)
    if isinstance(job, BenchJob):
        cost.note_evaluation(result, plan.gpus)
    if isinstance(job, AlarmJob) and job.method and job.verb == "alarm":
        cost.note_checking(result)
    return result
