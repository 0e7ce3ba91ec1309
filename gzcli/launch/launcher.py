"""From a folder to processes and back: accelerate's configuration, the child, signals, `status.json`, the
exit code.

What is launched is always `python -m gzcli.engine FOLDER`; all that the engine needs is in the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core import devices, signals, start, streams
from gzcli.core.devices import INSTALL, VISIBLE, Gpus, count_gpus, trains_on_cpu
from gzcli.core.errors import DeviceError, GzError, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.units import threads_wanted
from gzcli.launch import slurm
from gzcli.launch.ending import FOLDER, end_all, is_saving, left_behind, outcome, settle
from gzcli.store import files
from gzcli.store.paths import cache_dir, kernels_dir
from gzcli.store.runs import Run

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that systems give to outgoing connections
RESTARTS = 2  # of the processes of several machines, where the recipe does not say
# beginnings of the variables by which launchers tell a process its rank
LAUNCHERS = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "PMI_", "OMPI_", "MV2_", "MPI_")
DRIVER = Path("/proc/driver/nvidia/version")
TRYING = 120.0  # seconds in which torch says which GPUs it can use
_GPUS = {0: "are no GPUs", 1: "is 1 GPU"}
GRACE = 120.0  # seconds for a checkpoint after a signal, before the processes are killed
# Environment variables that make a step on a CPU faster; those that the user has set stay. glibc returns
# large blocks to the system at every free and faults them in again at the next step: keeping them saves
# 13–23 % of the step of a convolutional net. OpenMP's threads wait for each other by spinning: on a busy
# machine that made a step of 16 ms one of 700 ms.
TUNING = {
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_MMAP_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Plan:
    """The processes that are started.

    processes: number of processes on all machines.
    gpus: GPUs of this machine; 0: the processes run on the CPU.
    threads: threads of each process.
    machines: number of machines.
    machine_rank: index of this machine, from 0.
    main_ip: address of machine 0; None: this machine.
    main_port: port of machine 0; None on one machine, where one is chosen.
    job: by which the other machines find the run that machine 0 makes; None on one machine.
    restarts: how often all processes are started again after one of them has died.
    extra: options that are passed on to `accelerate launch`.
    note: why GPUs that are here are not used, though nobody said so; None: all that are wanted are.
    """

    processes: int = 1
    gpus: int = 0
    threads: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_ip: str | None = None
    main_port: int | None = None
    job: str | None = None
    restarts: int = 0
    extra: tuple[str, ...] = ()
    note: str | None = None

    @property
    def distributed(self) -> bool:
        return self.processes > 1

    @property
    def launched(self) -> bool:
        """Whether accelerate's launcher starts the engine of a training. For one process on the CPU it would
        do nothing but load torch, which takes a second."""
        return self.distributed or self.gpus > 0 or bool(self.extra)


def plan(
    section: LaunchSection,
    *,
    every_gpu: bool,
    check: bool = True,
    job: Sequence[object] = (),
    extra: Sequence[str] = (),
) -> Plan:
    """The processes that a recipe's `launch` section asks for. SLURM's variables fill in what it leaves open
    for a training; other verbs run on one machine.

    section: the section.
    every_gpu: whether it is a training: all GPUs are used where no number is asked for; else one is.
    check: whether GPUs that are asked for must be there.
    job: what was asked for; the port follows from it.
    extra: the words after `--` on the command line, checked by `cli/accelerate.py`. They never come from a
      recipe or a run, which may be a stranger's.

    Raises DeviceError where a GPU is asked for that is not there, UsageError for a contradiction.
    """
    asked, fewer = section.gpus, "leave `--gpus` out, or `--cpu --processes 2`"
    if section.cpu and asked:
        raise UsageError("`--gpus` and `--cpu` exclude each other")
    found = Gpus() if section.cpu or asked == 0 else usable_gpus()
    there, note = found.usable, None
    if asked is None:
        gpus = there if every_gpu else min(there, 1)
        note = found.lack if every_gpu or not gpus else None
    else:
        gpus = there if asked == "all" else asked
    if check and (gpus > there or (asked == "all" and not there)):
        have = "is no GPU" if asked == "all" else _GPUS.get(there, f"are {there} GPUs")
        raise DeviceError(
            f"`--gpus {asked}`: {found.lack or f'there {have} here'}",
            hint=f"{INSTALL}; or {fewer}" if found.lack else fewer,
        )
    machines = section.machines or (slurm.machines() if every_gpu else 1)
    here = gpus or section.processes or 1
    threads = section.threads or threads_wanted() or max(1, start.cores() // here)
    several = _meet(section, machines, job) if machines > 1 or section.machine_rank else {}
    restarts = RESTARTS if machines > 1 else 0
    return Plan(
        processes=here * machines,
        gpus=gpus,
        threads=threads,
        restarts=restarts if section.restarts is None else section.restarts,
        extra=tuple(extra),
        note=f"{note}; {'the CPU is used' if not gpus else f'{gpus} are used'}" if note else None,
        **several,
    )


def usable_gpus() -> Gpus:
    """The GPUs of this machine, and how many of them torch can use: that is tried in a process of its own.
    That all can be used is remembered for the driver and the torch that are here."""
    return _usable(count_gpus(), os.environ.get(VISIBLE), os.environ.get("PATH"))


@cache
def _usable(there: int, visible: str | None, path: str | None) -> Gpus:
    """The GPUs, of which so many are `there`; the answer depends on the variables, too."""
    if not there:
        return Gpus()
    from importlib.metadata import distributions

    remembered, asked = cache_dir("gpus.json"), None
    with contextlib.suppress(GzError):
        if driver := files.read_text(DRIVER):
            torch = [found.version for found in distributions(name="torch")]
            asked = [driver, sys.executable, torch, there, visible]
            if files.read_json(remembered) == asked:
                return Gpus(there, there)
    with streams.spinner("trying the GPU" + "s" * (there > 1)):
        found = _tried_apart(there)
    if asked and found.lack is None:
        with contextlib.suppress(OSError):  # a home that nobody may write
            files.write_json(remembered, asked)
    return found


def _tried_apart(there: int) -> Gpus:
    """What `gzcli.core.devices` says of so many GPUs in a process of its own."""
    words = [sys.executable, start.SCRIPT, "gzcli.core.devices"]
    env = environment(Plan(gpus=there), "quiet")
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=TRYING)
    except subprocess.TimeoutExpired:
        return Gpus(there, 0, f"it does not answer in {TRYING:.0f} s")
    try:
        return Gpus(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):  # no torch, or one that does not load
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        return Gpus(there, 0, said[-1])


def _meet(section: LaunchSection, machines: int, job: Sequence[object]) -> dict[str, Any]:
    """Which machine this is of several, and where they meet: the keys of a Plan.

    Raises UsageError where that is not known, or this is none of the machines.
    """
    rank = slurm.machine_rank() if section.machine_rank is None else section.machine_rank
    if not 0 <= rank < machines:
        message = (
            f"`--machine-rank {rank}`: {machines} machine{'s' if machines > 1 else ''} are numbered from 0"
        )
        raise UsageError(message, hint=f"gz train … --num-machines {max(machines, rank + 1)}")
    ip = section.main_ip or slurm.first_host()
    if ip is None:
        raise UsageError(
            "several machines need `--main-process-ip`",
            hint="gz train … --num-machines 2 --machine-rank 0 --main-process-ip HOST",
        )
    # SLURM's number is that of one start; typed words are the same each time
    words = [slurm.job()] if slurm.job() else [ip, machines, *job]
    digest = hashlib.sha256(json.dumps([str(word) for word in words]).encode()).digest()
    # of two trainings with one first machine each needs its own port
    port = section.main_port or FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS
    return {
        "machines": machines,
        "machine_rank": rank,
        "main_ip": ip,
        "main_port": port,
        "job": digest.hex()[:16],
    }


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host; None where that is unknown, or only because
    the host's name means this machine's own loopback."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            source = probe.getsockname()[0]
    except OSError:
        return None
    if source.startswith("127.") and not host.startswith("127."):
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if source in (a.address for a in addresses)), None)


def config(p: Plan) -> str:
    """accelerate's configuration file, given in full: the user's own default must have no effect."""
    # MULTI_GPU without GPUs is how accelerate runs several gloo processes
    kind = "MULTI_GPU" if p.distributed else "'NO'"
    lines = [
        "compute_environment: LOCAL_MACHINE",
        f"distributed_type: {kind}",
        "mixed_precision: 'no'",  # the engine's own choice, from run.yaml
        f"num_processes: {p.processes}",
        f"num_machines: {p.machines}",
        f"machine_rank: {p.machine_rank}",
        f"main_process_ip: {p.main_ip or 'null'}",
        f"main_process_port: {p.main_port or 0}",
        f"use_cpu: {'true' if not p.distributed and trains_on_cpu(p.gpus, p.processes) else 'false'}",
        "rdzv_backend: static",  # rank 0 is of machine 0, and no other port is needed
        "same_network: true",
    ]
    return "\n".join(lines) + "\n"


def configuration(folder: Path, p: Plan) -> Path:
    """The path of accelerate's configuration; machines that share a folder have one each."""
    return folder / (f"accelerate.{p.machine_rank}.yaml" if p.machine_rank else Run.launch_file)


def command(folder: Path, p: Plan, *, launcher: bool) -> list[str]:
    """The command line of the engine; any run can be started again by hand with it.

    launcher: whether accelerate's launcher starts the engine.
    """
    engine = [start.SCRIPT, "gzcli.engine", str(folder)]
    if not launcher:
        return [sys.executable, *engine]
    options = [
        "--config_file",
        str(configuration(folder, p)),
        "--num_cpu_threads_per_process",
        str(p.threads),
        *(("--max_restarts", str(p.restarts)) if p.restarts and p.distributed else ()),
    ]
    return [sys.executable, start.SCRIPT, start.LAUNCHER, *options, *p.extra, *engine]


def show(folder: Path, p: Plan) -> str:
    """The command line of a training's processes, as it could be typed."""
    words = command(folder, p, launcher=p.launched)
    return shlex.join(["accelerate", "launch", *words[3:]] if p.launched else words)


def environment(p: Plan, mode: str) -> dict[str, str]:
    """The child's environment variables. Those of launchers are removed: only accelerate's configuration file
    counts.

    mode: what the engine prints, "human", "quiet" or "json".
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    env |= {
        "GZ_OUTPUT": mode,
        "GZ_PARENT": str(os.getpid()),
        "GZ_GPUS": str(p.gpus),
        "OMP_NUM_THREADS": str(p.threads),
        "PYTHONUNBUFFERED": "1",
    }
    # the working folder is left out of the path; an empty entry, as in `:/opt/lib`, means it too
    here, package = os.path.realpath(os.curdir), str(Path(__file__).resolve().parents[2])
    entries = env.get("PYTHONPATH", "").split(os.pathsep)
    others = [entry for entry in entries if entry and os.path.realpath(entry) != here]
    env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([package, *others])}
    # what torch compiles would else lie in the system's folder for temporary files, which others write too
    kernels = {"TORCHINDUCTOR_CACHE_DIR": kernels_dir(), "TRITON_CACHE_DIR": kernels_dir() / "triton"}
    for key, value in {**TUNING, **kernels}.items():
        env.setdefault(key, str(value))
    if p.main_ip and (interface := interface_to(p.main_ip)):
        env.setdefault("GLOO_SOCKET_IFNAME", interface)  # gloo's own guess is often the loopback
    return env | devices.environment(p.gpus, trains_on_cpu(p.gpus, p.processes))


def run(folder: Path, p: Plan, *, launcher: bool, mode: str = "human") -> dict[str, Any]:
    """Starts the engine on `folder`, passes signals on and waits for its end. Returns its status.

    A signal becomes a stop file, and an engine that trains gets time for a checkpoint, even where the signal
    has ended the launcher between. A job, and a training before its first step, have nothing to save. The
    processes are killed only after a second Ctrl-C, or where they do not end in time; one that is writing a
    checkpoint has what it needs.

    launcher: whether accelerate's launcher starts the engine, as it must for several processes.
    mode: what the engine prints, "human", "quiet" or "json".

    Raises the engine's own error.
    """
    target, launcher = Run(folder), launcher or p.distributed
    if launcher:
        files.write_atomic(configuration(folder, p), config(p))
    first = p.machine_rank == 0  # the engine's main process is on this machine
    if first:
        Run(folder).stop_file.unlink(missing_ok=True)
    got: list[int] = []

    def on_signal(signum: int, frame: Any) -> None:
        got.append(signum)
        if len(got) == 1:
            files.write_atomic(Run(folder).stop_file, str(signum))
        signals.note(signum)  # for a caller that would go on where this engine had finished by then

    heard = signals.hear(on_signal)
    # a group of its own: Ctrl-C in a terminal reaches every process of the group
    child = subprocess.Popen(
        command(folder, p, launcher=launcher),
        env=environment(p, mode) | {FOLDER: str(folder)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    try:
        deadline = None
        while child.poll() is None or (first and left_behind(target)):
            ended = child.poll() is not None
            if ended and not Run(folder).stop_file.exists():
                files.write_atomic(Run(folder).stop_file, str(int(signal.SIGTERM)))
            if (got or ended) and deadline is None:
                trains = target.status().get("stepping")
                if got and trains and mode == "human":
                    print("stopping: a checkpoint is saved; Ctrl-C again ends it at once", file=sys.stderr)
                deadline = time.monotonic() + (GRACE if trains else 0.0)
            late = deadline is not None and time.monotonic() > deadline
            if len(got) > 1 or (late and not is_saving(target)):
                break
            time.sleep(0.05)
    finally:
        end_all(child, folder)
        signals.restore(heard)
    if not first:
        settle(target)
    return outcome(target, child.returncode, got)
