"""Launches a folder in processes: accelerate's configuration, the child process, signals, and the outcome.

The command is always `python -m gzcli.engine FOLDER`; the folder contains everything that the engine needs.
An engine records its own errors in `status.json`. If it was killed, its exit code and its checkpoints show
what happened. Several engines can run at once, each on its own folder.
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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core import devices, signals, streams
from gzcli.core.devices import INSTALL_HINT, VISIBLE_DEVICES, Gpus, count_gpus, trains_on_cpu
from gzcli.core.errors import DeviceError, DivergedError, GzError, Interrupted, MissingError, UsageError
from gzcli.core.hints import Hint, gz
from gzcli.core.sections import LaunchSection
from gzcli.core.units import counted, number_in, threads_wanted
from gzcli.store import cache_files, claims, files, start
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run

if TYPE_CHECKING:
    import psutil

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that systems give to outgoing connections
DEFAULT_RESTARTS = 2  # restarts of the processes by default, on several machines
# prefixes of the variables in which launchers pass a process its rank
LAUNCHERS = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "PMI_", "OMPI_", "MV2_", "MPI_")
DRIVER = Path("/proc/driver/nvidia/version")
LISTING_SECONDS = 120.0  # most seconds that torch may take to list usable GPUs
_GPUS = {0: "are no GPUs", 1: "is 1 GPU"}
GRACE_SECONDS = 120.0  # seconds for a checkpoint after a signal, before the processes are killed
SETTLING_SECONDS = (
    60.0  # most seconds for a main process on another machine to save and draw after the others
)
KILL_SECONDS = 5.0  # seconds between SIGTERM and SIGKILL
SAVING_SECONDS = 30.0  # seconds after the last byte of a checkpoint before its engine may be killed
FOLDER_VARIABLE = (
    "GZ_FOLDER"  # variable with the folder of an engine, inherited by every process that it starts
)
CHILD_SECONDS = 0.1  # seconds between looks at processes side by side
KILLED_CODE = 128 + 9  # exit code of a process ended by SIGKILL
ERROR_CLASSES = {cls.kind: cls for cls in (UsageError, MissingError, DeviceError, DivergedError)}
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

# Options of `accelerate launch` that may come after `--`, and whether a value follows.
ALLOWED_OPTIONS = {
    **dict.fromkeys(("--debug", "--enable_cpu_affinity"), False),
    **dict.fromkeys(("--gpu_ids", "--log_dir", "--max_restarts", "--monitor_interval"), True),
    **dict.fromkeys(("--rdzv_backend", "--rdzv_conf", "--role"), True),
    "--same_network": False,
    "--tee": True,
}
STRATEGY = "--set launch.strategy=fsdp"
REPLACED_OPTIONS = {  # option of accelerate, or how several begin → the option of gz for the same
    "--cpu": "--cpu",
    "--num_processes": "--gpus N`, `--cpu --processes N",
    "--multi_gpu": "--gpus all",
    "--num_machines": "--num-machines N",
    "--machine_rank": "--machine-rank R",
    "--main_process_ip": "--main-process-ip HOST",
    "--main_process_port": "--main-process-port P",
    "--mixed_precision": "--set train.precision=bf16",
    "--num_cpu_threads_per_process": "--set launch.threads=N",
    "--dynamo_backend": "--set train.compile=true",
    "--gradient_accumulation_steps": "--set train.accumulate=N",
    "--gradient_clipping": "--set train.clip=1.0",
    # these shard the model, but the trainer builds its optimizers before accelerate wraps it
    **dict.fromkeys(("--use_fsdp", "--fsdp_", "--use_deepspeed", "--deepspeed_"), STRATEGY),
    **dict.fromkeys(("--zero", "--use_megatron_lm", "--megatron_lm_"), STRATEGY),
    **dict.fromkeys(("--use_parallelism_config", "--parallelism_config_"), STRATEGY),
}


@dataclass(frozen=True)
class Plan:
    """The processes that are started."""

    processes: int = 1  # on all machines
    gpus: int = 0  # GPUs of this machine; 0: the processes run on the CPU
    threads: int = 1  # of each process
    machines: int = 1
    machine_rank: int = 0
    main_ip: str | None = None  # address of machine 0; None: this machine
    main_port: int | None = None  # port of machine 0; None on one machine: a free port is chosen
    job: str | None = None  # identifies the run that machine 0 makes for the other machines
    restarts: int = 0  # restarts of all processes after one of them has died
    extra: tuple[str, ...] = ()  # options for `accelerate launch`
    note: str | None = None  # why this machine's GPUs are unused although the user did not ask for that

    @property
    def distributed(self) -> bool:
        return self.processes > 1

    @property
    def launched(self) -> bool:
        """Whether accelerate's launcher starts the training: for one process on the CPU it would only load
        torch."""
        return self.distributed or self.gpus > 0 or bool(self.extra)


def plan(
    section: LaunchSection, *, every_gpu: bool, check: bool = True, job: str = "", extra: Sequence[str] = ()
) -> Plan:
    """The processes for a recipe's `launch` section. By default, a training (`every_gpu`) uses all GPUs and
    SLURM's variables; other verbs use one GPU of one machine. The port follows from `job`, a hash of the
    command line. `extra` never comes from a recipe or a run, because these may be someone else's."""
    gpus, note = _gpus(section, every_gpu=every_gpu, check=check)
    machines = section.machines or (slurm_nodes() if every_gpu else 1)
    here = gpus or section.processes or 1
    restarts = DEFAULT_RESTARTS if machines > 1 else 0
    return Plan(
        processes=here * machines,
        gpus=gpus,
        threads=section.threads or threads_wanted() or max(1, start.cores() // here),
        restarts=restarts if section.restarts is None else section.restarts,
        extra=tuple(extra),
        note=f"{note}; using {counted(gpus, 'GPU') if gpus else 'the CPU'}" if note else None,
        **(_meeting(section, machines, job) if machines > 1 or section.machine_rank else {}),
    )


def _gpus(section: LaunchSection, *, every_gpu: bool, check: bool) -> tuple[int, str | None]:
    """The number of this machine's GPUs to use and, if the user set none, the reason why others are not
    used."""
    number, fewer = section.gpus, "omit `--gpus`, or use `--cpu --processes 2`"
    if section.cpu and number:
        raise UsageError("`--gpus` and `--cpu` cannot be used together")
    here = Gpus() if section.cpu or number == 0 else usable_gpus()
    if number is None:
        gpus = here.usable if every_gpu else min(here.usable, 1)
        return gpus, here.lack if every_gpu or not gpus else None
    gpus = here.usable if number == "all" else number
    if check and (gpus > here.usable or (number == "all" and not here.usable)):
        have = "is no GPU" if number == "all" else _GPUS.get(here.usable, f"are {here.usable} GPUs")
        message = f"`--gpus {number}`: {here.lack or f'there {have} here'}"
        raise DeviceError(message, hint=f"{INSTALL_HINT}; or {fewer}" if here.lack else fewer)
    return gpus, None


def usable_gpus() -> Gpus:
    """The GPUs of this machine, and how many of them torch can use, tested in a separate process."""
    return _usable(count_gpus(), os.environ.get(VISIBLE_DEVICES), os.environ.get("PATH"))


@cache
def _usable(there: int, visible: str | None, path: str | None) -> Gpus:
    """`usable_gpus` for `there` visible GPUs. The values of both variables are part of the cache key."""
    if not there:
        return Gpus()
    from importlib.metadata import distributions

    remembered, key = cache_dir("gpus.json"), None
    with contextlib.suppress(GzError):
        if driver := files.read_text(DRIVER):
            torch = [package.version for package in distributions(name="torch")]
            key = [driver, sys.executable, torch, there, visible]
            if cache_files.read(remembered, files.read_json) == key:
                return Gpus(there, there)
    with streams.spinner("testing the GPU" + "s" * (there > 1)):
        gpus = _tried_apart(there)
    if key and gpus.lack is None:
        cache_files.write(remembered, files.write_json, key)
    return gpus


def _tried_apart(there: int) -> Gpus:
    """The result of `gzcli.core.devices` for this number of GPUs, in a separate process."""
    words, env = (
        [sys.executable, start.SCRIPT, "gzcli.core.devices"],
        child_environment(Plan(gpus=there), "quiet"),
    )
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LISTING_SECONDS)
    except subprocess.TimeoutExpired:
        return Gpus(there, 0, f"it did not respond within {LISTING_SECONDS:.0f} s")
    try:
        return Gpus(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):  # torch is missing or does not load
        lines = done.stderr.strip().splitlines() or [f"it exited with code {done.returncode}"]
        return Gpus(there, 0, lines[-1])


def _meeting(section: LaunchSection, machines: int, job: str) -> dict[str, Any]:
    """The index of this machine among several, and their rendezvous address, as keys of a Plan."""
    rank = section.machine_rank
    if rank is None:
        rank = number_in("SLURM_NODEID", "nodes") or 0
    if not 0 <= rank < machines:
        hint = gz("train", "…", num_machines=max(machines, rank + 1))
        raise UsageError(f"`--machine-rank {rank}` must be less than {machines}: ranks start at 0", hint=hint)
    ip = section.main_ip or slurm_host()
    if ip is None:
        message = "several machines need `--main-process-ip`"
        raise UsageError(
            message, hint=gz("train", "…", num_machines=2, machine_rank=0, main_process_ip="HOST")
        )
    # SLURM's number, with how often the job was queued again, is that of one start; every task of an array is
    # a job. Typed words are the same each time.
    if number := os.environ.get("SLURM_JOB_ID"):
        words: list[object] = [f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"]
    else:
        words = [ip, machines, job]
    digest = hashlib.sha256(json.dumps([str(word) for word in words]).encode()).digest()
    # two trainings with the same first machine need different ports
    port = section.main_port or FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS
    meeting = {"machines": machines, "machine_rank": rank, "main_ip": ip, "main_port": port}
    return meeting | {"job": digest.hex()[:16]}


def slurm_nodes() -> int:
    """The number of nodes in this job step; 1 outside SLURM. One `gz` starts all processes of a node."""
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        message = "SLURM started several tasks on this node, but one `gz` starts all processes of a machine"
        raise UsageError(message, hint="srun --ntasks-per-node=1 gz train …")
    return number_in("SLURM_STEP_NUM_NODES", "nodes") or number_in("SLURM_NNODES", "nodes") or 1


def slurm_host() -> str | None:
    """The first node of the job step, as listed by `scontrol`; None outside SLURM."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host; None if unknown, or if the host's name only
    resolves to this machine's loopback."""
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
    """The text of accelerate's configuration file. It is complete, so that the user's own default has no
    effect."""
    # MULTI_GPU without GPUs is how accelerate runs several gloo processes
    values = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if p.distributed else "'NO'",
        "mixed_precision": "'no'",  # the engine's own choice, from run.yaml
        "num_processes": p.processes,
        "num_machines": p.machines,
        "machine_rank": p.machine_rank,
        "main_process_ip": p.main_ip or "null",
        "main_process_port": p.main_port or 0,
        "use_cpu": str(not p.distributed and trains_on_cpu(p.gpus, p.processes)).lower(),
        "rdzv_backend": "static",  # rank 0 runs on machine 0, so no other port is needed
        "same_network": "true",
    }
    return "".join(f"{key}: {value}\n" for key, value in values.items())


def command(folder: Path, p: Plan, *, launcher: bool) -> list[str]:
    """The command line of the engine, with or without accelerate's launcher. It can also be typed by hand."""
    engine = [start.SCRIPT, start.ENGINE, str(folder)]
    if not launcher:
        return [sys.executable, *engine]
    options = ["--config_file", str(Run(folder).launch_file_of(p.machine_rank))]
    options += ["--num_cpu_threads_per_process", str(p.threads)]
    options += ["--max_restarts", str(p.restarts)] if p.restarts and p.distributed else []
    return [sys.executable, start.SCRIPT, start.LAUNCHER, *options, *p.extra, *engine]


def show(folder: Path, p: Plan) -> str:
    """The command line of a training's processes, ready to type."""
    words = command(folder, p, launcher=p.launched)
    return shlex.join(["accelerate", "launch", *words[3:]] if p.launched else words)


def child_environment(p: Plan, mode: str) -> dict[str, str]:
    """The child's environment variables, without those of other launchers, so that accelerate's configuration
    file decides."""
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
    folders = [entry for entry in entries if entry and os.path.realpath(entry) != here]
    env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([package, *folders])}
    # what torch compiles would else are in the system's folder for temporary files, which others write too
    kernels = cache_dir("kernels")
    places = {"TORCHINDUCTOR_CACHE_DIR": kernels, "TRITON_CACHE_DIR": kernels / "triton"}
    for key, value in {**TUNING, **places}.items():
        env.setdefault(key, str(value))
    if p.main_ip and (interface := interface_to(p.main_ip)):
        env.setdefault("GLOO_SOCKET_IFNAME", interface)  # gloo often picks the loopback
    return env | devices.environment(p.gpus, trains_on_cpu(p.gpus, p.processes))


def run(folder: Path, p: Plan, *, launcher: bool, mode: str = "human") -> dict[str, Any]:
    """Starts the engine on `folder`, forwards signals and waits until it ends. Returns its status, or raises
    its error. A signal becomes a stop file, so that a training can save a checkpoint. Processes are killed
    after a second Ctrl-C, or if they do not end in time and write no checkpoint."""
    target, launcher = Run(folder), launcher or p.distributed
    if launcher:
        files.write_atomic(target.launch_file_of(p.machine_rank), config(p))
    first = p.machine_rank == 0  # the engine's main process is on this machine
    if first:
        target.stop_file.unlink(missing_ok=True)
    received: list[int] = []

    def on_signal(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) == 1:
            files.write_atomic(target.stop_file, str(signum))
        signals.note(signum)  # the engine may have finished, and then the caller would continue

    heard = signals.hear(on_signal)
    # its own group: Ctrl-C in a terminal reaches every process of the group
    child = subprocess.Popen(
        command(folder, p, launcher=launcher),
        env=child_environment(p, mode) | {FOLDER_VARIABLE: str(folder)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    try:
        deadline = None
        while child.poll() is None or (first and left_behind(target)):
            ended = child.poll() is not None
            if ended and not target.stop_file.exists():
                files.write_atomic(target.stop_file, str(int(signal.SIGTERM)))
            if (received or ended) and deadline is None:
                trains = target.status().get("stepping")
                if received and trains and mode == "human":
                    print(
                        "stopping: saving a checkpoint; press Ctrl-C again to quit at once", file=sys.stderr
                    )
                deadline = time.monotonic() + (GRACE_SECONDS if trains else 0.0)
            late = deadline is not None and time.monotonic() > deadline
            if len(received) > 1 or (late and not is_saving(target)):
                break
            time.sleep(0.05)
    finally:
        end_all(child, folder)
        signals.restore(heard)
    patient = time.monotonic() + SETTLING_SECONDS  # machine 0 records how the run ended
    while not first and target.status().get("state") == "running" and time.monotonic() < patient:
        time.sleep(0.2)
    return outcome(target, child.returncode, received)


# ---------------------------------------------------------------------------- the end of an engine


def left_behind(target: Run) -> bool:
    """Whether an engine that this process started is still running although its launcher has ended."""
    status = target.status()
    ours = status.get("parent") == os.getpid() and status.get("state") == "running"
    return ours and files.is_locked(target.lock)


def is_saving(target: Run) -> bool:
    """Whether a checkpoint is being written, or was a moment ago, when the engine still has to record how it
    ended."""
    latest = 0.0
    for run in (target, *target.stages):
        for folder in run.checkpoints_folder.glob("*"):
            try:
                latest = max(latest, *(path.stat().st_mtime for path in (folder, *folder.glob("*"))))
            except FileNotFoundError:  # it was renamed meanwhile, so it is complete
                return True
    return time.time() - latest < SAVING_SECONDS


def end_all(child: subprocess.Popen[bytes], folder: Path | None = None) -> None:
    """Ends the child, its descendants, its process group, and the ranks that work on the folder. Torch's
    launcher starts each rank in its own session, so ranks may outlive it."""
    import psutil

    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    for end in ("terminate", "kill"):
        left = list({*left, *(_working_on(folder, child.pid) if folder else ())})
        for process in (*left, *([child] if child.poll() is None else [])):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                getattr(process, end)()
        _, left = psutil.wait_procs(left, timeout=KILL_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(KILL_SECONDS)  # psutil would collect its exit code, which is still needed
    if hasattr(os, "killpg"):  # processes that have left the tree but not the group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _working_on(folder: Path, child: int) -> list[psutil.Process]:
    """The processes other than the child that were started on a folder for this process, and their
    children."""
    import psutil

    mine = {"GZ_PARENT": str(os.getpid()), FOLDER_VARIABLE: str(folder)}
    ranks: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            if start.SCRIPT in process.cmdline() and mine.items() <= process.environ().items():
                ranks |= {process, *process.children(recursive=True)}
    return [process for process in ranks if process.pid != child]


def outcome(target: Run, returncode: int, received: list[int]) -> dict[str, Any]:
    """The status of a finished run or job. Otherwise raises the error that the engine recorded, or one
    deduced from the exit code (−N if signal N ended the process)."""
    if returncode == UsageError.code and files.is_locked(target.lock):
        raise claims.in_use(target)  # by a process left behind by another `gz`
    status = target.status()
    if status.get("state") == "finished":
        return status
    # if one rank is killed, the others record the lost connection as their own error
    killed = returncode in (KILLED_CODE, 128 - KILLED_CODE) or status.get("lost")
    consequence = killed and (status.get("error") or {}).get("kind") == GzError.kind
    if (recorded := status.get("error")) and not consequence:
        message = recorded["message"]
        hint = recorded["hint"] and Hint(recorded["hint"], recorded.get("python"))
        if recorded["kind"] == Interrupted.kind:  # with the signal that this process received
            signum = received[0] if received else status["code"] - 128
            raise Interrupted(message, signum=signum, hint=hint)
        raise ERROR_CLASSES.get(recorded["kind"], GzError)(message, hint=hint)
    error = deduced_error(target, returncode, received)
    target.update(state="interrupted" if received else "failed", code=error.code, error=error.record)
    raise error


def deduced_error(target: Run, returncode: int, received: list[int]) -> GzError:
    """The error of an engine that ended without a record, as after SIGKILL or a crash in a library."""
    trains = target.recipe_file.exists()
    saved = saved_state(target) if trains else None
    state = "" if not trains else f"; {saved or 'there is no checkpoint yet'}"
    resume = [f"gz train {target.id} --resume"] if saved else []
    code = 128 - returncode if returncode < 0 else returncode
    signum = received[0] if received else code - 128
    if signum in signals.ENDING_SIGNALS:
        message = f"stopped by {signals.signal_name(signum)}{state}"
        return Interrupted(message, signum=signum, hint="".join(resume) or None)
    lost = target.status().get("lost")
    who = f"rank {lost['rank']} (process {lost['pid']})" if lost else "the process"
    if code == KILLED_CODE:
        smaller = "`train.batch_size` or a larger `train.accumulate`" if trains else "`-n`"
        message = f"{who} was killed (SIGKILL), most likely because memory ran out{state}"
        return DeviceError(message, hint="; ".join([*resume, f"use a smaller {smaller}"]))
    if signum > 0:
        message = f"{who} was terminated by {signals.signal_name(signum)}{state}"
        crash = "most likely a library or a driver crashed; check their versions with `gz doctor`"
        return DeviceError(message, hint="; ".join([*resume, crash]))
    if code == MissingError.code:  # its own error, which it could not write
        hint = "check the free space of the disk, and the limits that `ulimit -a` shows"
        return MissingError(f"{who} could not record why it failed{state}", hint="; ".join([*resume, hint]))
    message = f"{who} exited with code {returncode} and no error message{state}"
    return GzError(message, hint="; ".join([*resume, f"see `{target.log_file}`"]))


def saved_state(target: Run) -> str | None:
    """A sentence that names the last complete checkpoint of a run; None if there is none."""
    for part in reversed(target.stages or [target]):
        for step in reversed(part.saved_steps):
            if part.checkpoint(step).meta.exists():
                of_stage = f" of stage `{part.path.name}`" if target.stages else ""
                return f"the last checkpoint is at step {step}{of_stage}"
    return None


# ---------------------------------------------------------------------------- options after `--`


def check_extra(words: list[str]) -> list[str]:
    """Checks the words after `--`, which are for accelerate. Raises UsageError for an option outside
    `ALLOWED`, and for a word that accelerate would interpret as the program to start."""
    checked, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name not in ALLOWED_OPTIONS:
            if not word.startswith("-"):
                hint = "put only options and their values after `--`"
                raise UsageError(f"`{word}` is not an option of `accelerate launch`", hint=hint)
            ours = next((ours for option, ours in REPLACED_OPTIONS.items() if name.startswith(option)), None)
            hint = f"use `{ours}` instead" if ours else f"allowed options: {' '.join(ALLOWED_OPTIONS)}"
            raise UsageError(f"`{word}` cannot be passed to `accelerate launch`", hint=hint)
        if not ALLOWED_OPTIONS[name]:
            if equals:
                raise UsageError(f"`{name}` takes no value", hint=name)
            checked.append(name)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("-"):
            raise UsageError(f"`{name}` needs a value", hint="see `accelerate launch --help`")
        checked += [name, value]
    return checked


# ---------------------------------------------------------------------------- processes side by side


def slots(most: int, *, gpus: bool) -> list[dict[str, str]]:
    """The environments of at most this many parallel processes, each with one GPU or one core."""
    if not gpus:
        return [{"OMP_NUM_THREADS": "1"}] * most
    visible = os.environ.get(VISIBLE_DEVICES) or ",".join(map(str, range(usable_gpus().usable)))
    return [{VISIBLE_DEVICES: name.strip()} for name in visible.split(",")[:most]]


def parallel(at_once: int | None, *, gpus: bool) -> int:
    """How many of `at_once` processes, each on one core or GPU, this machine can run in parallel."""
    return min(len(slots(at_once or 1, gpus=gpus)), start.cores())


def side_by_side(
    module: str, folders: Mapping[int, Path], free: list[dict[str, str]], heard: Sequence[int]
) -> Iterator[tuple[int, float, int]]:
    """Runs a module of gz on folders, as many in parallel as there are slots. Yields key, start time and exit
    code of each process when it has ended. Forwards the signals in `heard`; after one, no process starts."""
    waiting, running, passed = list(folders), dict[int, tuple[Any, ...]](), 0
    try:
        while running or (waiting and not heard):
            while free and waiting and not heard:
                key, slot = waiting.pop(0), free.pop(0)
                words = [sys.executable, start.SCRIPT, module, str(folders[key])]
                # in its own session, where Ctrl-C does not reach it beside the signal that is passed on
                how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
                child = subprocess.Popen(words, env=os.environ | slot, stdout=subprocess.DEVNULL, **how)
                running[key] = child, slot, time.monotonic()
            for number in heard[passed:]:
                for child, *_ in running.values():
                    child.send_signal(number)
                passed += 1
            for key in [key for key, (child, *_) in running.items() if child.poll() is not None]:
                child, slot, since = running.pop(key)
                free.append(slot)
                yield key, since, child.returncode
            time.sleep(CHILD_SECONDS)
    finally:
        for child, *_ in running.values():
            child.terminate()
            child.wait()


def end_with_parent() -> None:
    """Has this process receive SIGTERM when its parent is gone, for example after `kill -9`."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
