"""`gz train … --submit slurm`, and other verbs alike: the same command as a job that `sbatch` takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from gzcli.cli import out
from gzcli.core import start
from gzcli.core.errors import GzError, MissingError, UsageError
from gzcli.data.sets.names import slug
from gzcli.launch import slurm
from gzcli.store import files, runs
from gzcli.store.paths import user_dir

if TYPE_CHECKING:
    from gzcli.core.sections import LaunchSection
    from gzcli.launch.plan import Asked

# Options that are about the submission, or that the script writes itself → whether a value follows.
OURS: Mapping[str, bool] = {
    "--submit": True,
    "--slurm": True,
    "--dry-run": False,
    "--json": False,
    "--name": True,
    "--seed": True,
    "--resume": False,
    "--requeue": False,
}


def submit_training(
    asked: Asked, name: str | None, *, resume: bool, options: Iterable[str], dry_run: bool
) -> None:
    """Submits a training.

    asked: what the job is to train.
    name: value of `--name`, to which the job adds its number; None: the model's name.
    resume: value of `--resume`.
    options, dry_run: as `submit_job` has them.
    """
    launch = asked.recipe.launch
    if name is not None:
        runs.check_alias(f"{name}-1")  # a job's number follows
    job = slurm.Job(
        words=words_of(sys.argv, "train"),
        name=name or asked.recipe.card.name,
        seed=asked.recipe.seed,
        machines=launch.machines or 1,
        gpus=gpus_of(launch),
        cores=cores_of(launch),
        goes_on="resumed" if resume else "named",
    )
    submit_job(job, options, dry_run=dry_run)


def submit_verb(
    verb: str, what: str, seed: int, launch: LaunchSection, options: Iterable[str], *, goes_on: bool = False
) -> None:
    """Submits the command line of another verb.

    what: what it is about, for the job's name.
    seed: value of `--seed`.
    launch: its processes.
    options: as `submit_job` has them.
    goes_on: whether the same words go on where a job was out of time.
    """
    job = slurm.Job(
        words=words_of(sys.argv, verb),
        name=f"{verb}-{slug(what)}",
        seed=seed,
        gpus=gpus_of(launch),
        cores=cores_of(launch),
        goes_on="same" if goes_on else None,
    )
    submit_job(job, options)


def submit_job(job: slurm.Job, options: Iterable[str], *, dry_run: bool = False) -> None:
    """Writes a job script into the folder of runs and submits it; with `dry_run` it is only printed.

    options: options of `sbatch`, as `key=value`.
    dry_run: value of `--dry-run`.

    Raises UsageError, and MissingError where there is no `sbatch` or it refuses the job.
    """
    folder = user_dir("runs", "slurm")
    program = [sys.executable, start.SCRIPT, "gzcli"]
    text = slurm.script(job, slurm.options(options), program=program, folder=folder)
    if dry_run:
        out.text(text.rstrip())
        out.data({"script": text})
        return
    path = folder / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03d}.sh"
    files.write_atomic(path, text)
    if shutil.which("sbatch") is None:
        raise MissingError(
            f"there is no `sbatch` here; the script is written: `{path}`",
            hint=f"sbatch {path}, where SLURM is",
        )
    number = submit(str(path))
    out.info(f"script: {path}")
    out.text(f"job {number}")
    out.data({"job": number, "script": text, "path": path})


def words_of(argv: list[str], verb: str) -> list[str]:
    """The command line of a verb as a job runs it: without the options of OURS, all after `--` as it is."""
    found: list[str] = []
    rest = iter(argv[argv.index(verb) :] if verb in argv else argv)
    for word in rest:
        if word == "--":
            return [*found, word, *rest]
        option, equals, _ = word.partition("=")
        if option not in OURS:
            found.append(word)
        elif OURS[option] and not equals:
            next(rest, None)
    return found


def gpus_of(launch: LaunchSection) -> int:
    """The GPUs of each node that a job asks for. Raises UsageError for `all`, which SLURM cannot be told."""
    if launch.gpus == "all":
        raise UsageError("`--gpus all`: SLURM wants a number", hint="--gpus 4")
    return launch.gpus or 0


def cores_of(launch: LaunchSection) -> int:
    """The cores of each node that a job asks for."""
    return (launch.threads or slurm.CORES_OF_A_PROCESS) * (gpus_of(launch) or launch.processes or 1)


def submit(path: str) -> str:
    """Submits a script; returns the job's number. Raises MissingError with the words of `sbatch`."""
    done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"code {done.returncode}"
        hint = f"correct it by `--slurm KEY=VALUE`, or in `{path}`"
        raise MissingError(f"`sbatch` refuses the job: {words}", hint=hint)
    number = done.stdout.strip().partition(";")[0]
    if not number:
        raise GzError("`sbatch` has told no number of a job")
    return number
