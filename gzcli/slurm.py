"""SLURM: what its variables say of this machine, and job scripts for `sbatch`.

A job starts one `gz train` a node, which find each other by SLURM's variables. Three minutes before its time
is up the script asks them to stop: they save a checkpoint, and the job is queued again and goes on.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gzcli.errors import UsageError
from gzcli.variables import number

WARNING = 180  # seconds between the signal and the end of the time, for a checkpoint
CORES_OF_A_PROCESS = 2  # that a job asks for, where nothing else is said
_KEY = re.compile(r"[a-z][a-z0-9-]*")


def machines() -> int:
    """The nodes of this job step; 1 outside SLURM.

    Raises UsageError in the second and later tasks of a node: one `gz` starts all its processes.
    """
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        raise UsageError(
            "SLURM has started several tasks on this node; one `gz` starts the processes of a machine",
            hint="srun --ntasks-per-node=1 gz train …",
        )
    return number("SLURM_STEP_NUM_NODES", "nodes") or number("SLURM_NNODES", "nodes") or 1


def machine_rank() -> int:
    """The index of this node in the job step; 0 outside SLURM."""
    return number("SLURM_NODEID", "nodes") or 0


def job() -> str | None:
    """The number of the job, which every task of an array has for itself; None outside SLURM."""
    return os.environ.get("SLURM_JOB_ID") or None


def first_host() -> str | None:
    """The first node of the job step, as `scontrol` expands the list; None outside SLURM."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


@dataclass(frozen=True)
class Job:
    """A training that is submitted.

    words: the command line of `gz train` without the options about the submission, `--name` and `--seed`.
    name: of the job, and the beginning of the run's second name.
    seed: seed of the training; of an array's task its number is added.
    machines: number of nodes.
    gpus: GPUs of each node.
    cores: CPU cores of each node.
    resumes: whether a run that was named goes on, so that no new one is named.
    """

    words: Sequence[str]
    name: str
    seed: int
    machines: int
    gpus: int
    cores: int
    resumes: bool = False


def options(given: Iterable[str]) -> dict[str, str | None]:
    """Options of `sbatch` by name, from words such as `partition=gpu` or `exclusive`. Raises UsageError."""
    found: dict[str, str | None] = {}
    for word in given:
        key, equals, value = word.removeprefix("--").partition("=")
        if not _KEY.fullmatch(key) or not value.isprintable() or '"' in value:
            message = f"`--slurm {word}` is no option of `sbatch`"
            raise UsageError(message, hint="--slurm partition=gpu --slurm time=2:00:00")
        found[key] = value if equals else None
    return found


def script(job: Job, given: Mapping[str, str | None], *, program: Sequence[str], folder: Path) -> str:
    """The text of a job script.

    job: the training.
    given: options of `sbatch` that replace those chosen here.
    program: the command line that `gz` is started by.
    folder: of the output of jobs.
    """
    array = "array" in given
    chosen: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.machines),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cores),
        **({"gres": f"gpu:{job.gpus}"} if job.gpus else {}),
        "output": str(folder / ("%x-%A_%a.out" if array else "%x-%j.out")),
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "requeue": None,
        "signal": f"B:USR1@{WARNING}",
    }
    lines = [_directive(key, value) for key, value in (chosen | dict(given)).items()]
    return _SCRIPT.format(
        directives="\n".join(lines), command=_command(job, program, array), name=shlex.quote(job.name)
    )


def _directive(key: str, value: str | None) -> str:
    quoted = value if value is None or re.fullmatch(r"\S*", value) else f'"{value}"'
    return f"#SBATCH --{key}" + ("" if quoted is None else f"={quoted}")


def _command(job: Job, program: Sequence[str], array: bool) -> str:
    """The command line of a node. `--requeue` goes on with the run that has the job's name."""
    at = list(job.words).index("--") if "--" in job.words else len(job.words)
    own, extra = job.words[:at], job.words[at:]
    words = [shlex.quote(word) for word in (*program, *own)]
    if job.resumes:
        words.append("--resume")
    else:
        words += ["--requeue", "--name", '"$name"']
        if array:
            words += ["--seed", f"$(({job.seed} + SLURM_ARRAY_TASK_ID))"]
        else:
            words += ["--seed", str(job.seed)]
    return " ".join([*words, *map(shlex.quote, extra)])


_SCRIPT = """\
#!/bin/bash
{directives}

# The run of this job has its number in its name, so that the job goes on with it when it is queued again.
name={name}-"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}}"

# SLURM sends USR1 to this script alone before the time is up, and TERM to all when the job is to end.
again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap ':' TERM

srun --kill-on-bad-exit=0 {command} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal has ended the first `wait`

if [ "$again" ] && [ "$code" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""
