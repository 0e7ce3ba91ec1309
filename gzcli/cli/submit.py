"""`gz train … --submit slurm`, and other verbs alike: the same command as a job that `sbatch` takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from gzcli.cli import out
from gzcli.core import start
from gzcli.core.errors import GzError, MissingError, UsageError
from gzcli.data.sets.names import slug
from gzcli.launch import slurm
from gzcli.store import files, runs
from gzcli.store.paths import user_dir

if TYPE_CHECKING:
    from gzcli.core.sections import LaunchSection
    from gzcli.launch.plan import Request

# Options that are about the submission, or that the script writes itself → whether a value follows.
OURS = dict.fromkeys(("--submit", "--slurm", "--name", "--seed"), True)
OURS |= dict.fromkeys(("--dry-run", "--json", "--resume", "--requeue"), False)


def submit_training(
    request: Request, name: str | None, *, resume: bool, options: Iterable[str], dry_run: bool
) -> None:
    """Submits a training, or prints its script where `dry_run` is set. A name gets the job's number behind
    it."""
    if name is not None:
        runs.check_alias(f"{name}-1")  # a job's number follows
    recipe, name = request.recipe, name or request.recipe.card.name
    job = _job("train", name, recipe.seed, recipe.launch, "resumed" if resume else "named")
    _submit(job, options, dry_run=dry_run)


def submit_verb(
    verb: str, what: str, seed: int, launch: LaunchSection, options: Iterable[str], *, goes_on: bool = False
) -> None:
    """Submits the command line of another verb, about `what`; `goes_on`: it is run again if it is out of
    time."""
    _submit(_job(verb, f"{verb}-{slug(what)}", seed, launch, "same" if goes_on else None), options)


def _job(
    verb: str,
    name: str,
    seed: int,
    launch: LaunchSection,
    goes_on: Literal["named", "resumed", "same"] | None,
) -> slurm.Job:
    """The command line of this process as a job. Raises UsageError for all GPUs, as SLURM wants a number."""
    if launch.gpus == "all":
        raise UsageError("`--gpus all`: SLURM wants a number", hint="--gpus 4")
    gpus = launch.gpus or 0
    cores = (launch.threads or slurm.CORES_OF_A_PROCESS) * (gpus or launch.processes or 1)
    words = words_of(sys.argv, verb)
    return slurm.Job(words, name, seed, gpus, cores, machines=launch.machines or 1, goes_on=goes_on)


def words_of(argv: list[str], verb: str) -> list[str]:
    """The command line of a verb as a job runs it: without the options of OURS, all after `--` as it is."""
    words: list[str] = []
    rest = iter(argv[argv.index(verb) :] if verb in argv else argv)
    for word in rest:
        if word == "--":
            return [*words, word, *rest]
        option, equals, _ = word.partition("=")
        if option not in OURS:
            words.append(word)
        elif OURS[option] and not equals:
            next(rest, None)
    return words


def _submit(job: slurm.Job, options: Iterable[str], *, dry_run: bool = False) -> None:
    """Writes a job script into the folder of runs and submits it."""
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
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"code {done.returncode}"
        hint = f"correct it by `--slurm KEY=VALUE`, or in `{path}`"
        raise MissingError(f"`sbatch` refuses the job: {words}", hint=hint)
    number = done.stdout.strip().partition(";")[0]
    if not number:
        raise GzError("`sbatch` has told no number of a job")
    out.info(f"script: {path}")
    out.text(f"job {number}")
    out.data({"job": number, "script": text, "path": path})
