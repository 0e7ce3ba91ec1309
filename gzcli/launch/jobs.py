"""A job of the engine: its folder, its processes and its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import GzError
from gzcli.core.types import Say, silent
from gzcli.launch import cost, launcher
from gzcli.store import claims, jobs
from gzcli.store.jobs import AlarmJob, BenchJob, Job
from gzcli.store.paths import user_dir


def do_job(folder: Path, job: Job, *, mode: str = "quiet", warn: Say = silent) -> dict[str, Any]:
    """The engine's `result.json` for a job. If an error leaves a new folder without output, the folder is
    removed."""
    for_this_job = user_dir() in folder.parents
    try:
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
