"""Job scripts for SLURM's `sbatch`.

A job starts one `gz` per node; they find each other by SLURM's variables (see `launcher.py`). Three minutes
before its time limit, the script asks the training to stop. The training saves a checkpoint, and the job is
requeued and resumes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gzcli.core.errors import UsageError
from gzcli.core.hints import Option

WARNING_SECONDS = 180  # seconds between the signal and the time limit, enough for a checkpoint
CORES_OF_A_PROCESS = 2  # CPU cores per process that a job asks for by default
_KEY = re.compile(r"[a-z][a-z0-9-]*")
_UNQUOTED = {'"', "\\"}  # characters that `sbatch` interprets even within quotes


@dataclass(frozen=True)
class Job:
    """A command to submit."""

    words: Sequence[str]  # the command line without `--name`, `--seed` and the options of the submission
    name: str  # name of the job, and prefix of a run's second name
    seed: int  # the seed to which a task of an array adds its number
    gpus: int  # of each node
    cores: int  # of each node
    machines: int = 1
    # after the time limit, the requeued job continues the run of its name, resumes the run in `words`, or
    # repeats the command; None: it would start from scratch, so it is not requeued
    goes_on: Literal["named", "resumed", "same"] | None = None
    tasks: Sequence[str] = ()  # entries of a league, one for each task of an array


def options(words: Iterable[str]) -> dict[str, str | None]:
    """Options of `sbatch` by name, from words such as `partition=gpu` or `exclusive`. Raises UsageError."""
    chosen: dict[str, str | None] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not _KEY.fullmatch(key) or not value.isprintable() or _UNQUOTED & set(value):
            message = f"`--slurm {word}` is not an option of `sbatch`"
            raise UsageError(message, hint=Option("slurm", "partition=gpu"))
        chosen[key] = value if equals else None
    return chosen


def check_printable(**values: str) -> None:
    """Raises UsageError for a value that is unsafe in a script; the keyword names it in the message. A line
    break would begin another command, and a reader does not see other control characters."""
    for what, value in values.items():
        if not value.isprintable():
            message = f"the {what} {value!a} contains unprintable characters"
            raise UsageError(f"{message}, so no script is written", hint="use another name")


def batch_script(job: Job, chosen: Mapping[str, str | None], *, program: Sequence[str], folder: Path) -> str:
    """The text of a job script. Options of `sbatch` replace the defaults."""
    array = "array" in chosen
    output = str(folder / ("%x-%A_%a.out" if array else "%x-%j.out"))
    output = output.replace("%", "%%", str(folder).count("%"))
    for word in (*job.words, *program, *job.tasks):
        check_printable(word=word)
    for path in (str(folder), str(Path.cwd())):
        check_printable(folder=path)
        if _UNQUOTED & set(path):
            raise UsageError(f"`sbatch` does not accept the folder name `{path}`", hint="rename the folder")
    values: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.machines),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cores),
        **({"gres": f"gpu:{job.gpus}"} if job.gpus else {}),
        "output": output,
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "requeue": None,
        **({"signal": f"B:USR1@{WARNING_SECONDS}"} if job.goes_on else {}),
        **chosen,
    }
    lines = []
    for key, value in values.items():
        quoted = value if value is None or re.fullmatch(r"[^\s'#]*", value) else f'"{value}"'
        lines.append(f"#SBATCH --{key}" + ("" if quoted is None else f"={quoted}"))
    text, command = "\n".join(lines), _command(job, program, array)
    tasks = f"\ntasks=({shlex.join(job.tasks)})" if job.tasks else ""
    name = shlex.quote(job.name)
    return _SCRIPT.format(directives=text, command=command, name=name, cores=job.cores, tasks=tasks)


def _command(job: Job, program: Sequence[str], array: bool) -> str:
    """The command line of a node. `--requeue` continues the run that has the job's name. A resumed run
    already has a seed."""
    at = list(job.words).index("--") if "--" in job.words else len(job.words)
    before, extra = job.words[:at], job.words[at:]
    words = [shlex.quote(word) for word in (*program, *before)]
    if job.goes_on == "named":
        words += ["--requeue", "--name", '"$name"']
    if job.goes_on == "resumed":
        words.append("--resume")
    elif job.tasks:
        words += ["--seed", str(job.seed), "--entry", '"${tasks[SLURM_ARRAY_TASK_ID]}"']
    else:
        words += ["--seed", f"$(({job.seed} + SLURM_ARRAY_TASK_ID))" if array else str(job.seed)]
    return " ".join([*words, *map(shlex.quote, extra)])


_SCRIPT = """\
#!/bin/bash
{directives}

# The run has the job's number in its name, so that a requeued job resumes it.
name={name}-"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}"{tasks}

# SLURM sends USR1 to this script alone before the time limit, and TERM to all processes at the end.
again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap ':' TERM

# `srun` does not inherit the cores of a task by itself.
srun --kill-on-bad-exit=0 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-{cores}}}" {command} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal has ended the first `wait`

if [ "$again" ] && [ "$code" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""
