"""A process that has loaded gz once and forks a child for each command, which saves seconds of imports; the
child may end itself by SIGKILL, or by os._exit, just before or after its n-th change of the store.

It reads a JSON object a line: {words | train | fetch, home, here, env, said, err, at, when, how, log}, and
answers {"code": …}, the exit code, or −9, on the file whose number is its argument. What the child says goes
into the file `said`, its errors too unless `err` names another. The engine runs in the child itself, or in
children of it if it has several processes. A change is a call of os.fsync, replace, rename, unlink, remove,
rmdir or mkdir that does something below `home`.
"""

import hashlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

LOADED = (
    "torch._dynamo torch.distributed.tensor accelerate sklearn.metrics matplotlib.pyplot "
    "rich.progress rich.table PIL.PngImagePlugin gzcli.data.packs.build gzcli.engine.trainer "
    "gzcli.engine.__main__ gzcli.export.export gzcli.cli.app gzcli.launch.plan gzcli.cli.jobs"
)
CHANGES = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir")


def patched(job: dict[str, Any]) -> None:
    """Counts the changes of the store, writes them into `log`, and ends the process at one of them."""
    home, seen = os.path.realpath(job["home"]), 0

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *more: Any, **options: Any) -> Any:
            nonlocal seen
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fsdecode(first)
            below = options.get("dir_fd") is not None or os.path.abspath(path).startswith(home)
            below = below and not (name == "mkdir" and os.path.exists(path))
            seen += below
            at = job.get("at")
            here = below and (at in path if isinstance(at, str) else at == seen)
            if below and job.get("log"):
                with open(job["log"], "a") as f:
                    f.write(f"{name} {os.path.relpath(path, home)}\n")
            if here and job["when"] == "before":
                die(job)
            try:
                return real(first, *more, **options)
            finally:
                if here:
                    die(job)

        return call

    for name in CHANGES:
        setattr(os, name, watch(name, getattr(os, name)))


def die(job: dict[str, Any]) -> None:
    if job.get("how") == "exit":
        os._exit(99)
    os.kill(os.getpid(), signal.SIGKILL)


def here(started: Any, folder: Path, plan: Any, *, launcher: bool, mode: str = "human") -> dict[str, Any]:
    """`launch.run` without its process, in the environment that it gives to one: several processes are forks
    of this one, and the launcher has no part in them. `started`, the real one, is for GPUs."""
    from forks import forked
    from helpers import engine

    from gzcli.launch.launcher import child_environment, outcome
    from gzcli.store.runs import Run

    if plan.gpus or plan.machines > 1:
        return started(folder, plan, launcher=launcher, mode=mode)
    variables = child_environment(plan, mode)
    del variables["GZ_PARENT"]
    os.environ.clear()
    os.environ.update(variables)
    if plan.distributed:
        ended = forked(plan.processes, partial(engine, folder))
        return outcome(Run(folder), next(filter(None, ended), 0), [])
    return outcome(Run(folder), engine(folder), [])


def toy(url: str, content: bytes) -> Any:
    """A set of one file of this content, at an address."""
    from gzcli.data.sets.registry import SPECS, DataFile

    file = DataFile("a.bin", (f"{url}/a.bin",), len(content), md5=hashlib.md5(content).hexdigest())
    return replace(SPECS["mnist"], name="toy", files=(file,))


def work(job: dict[str, Any]) -> int:
    """Does a job in this process. Returns the exit code."""
    from gzcli.cli import app
    from gzcli.launch import launcher as launch

    os.environ.update(job.get("env", {}), GZ_HOME=job["home"])
    os.chdir(job["here"])
    launch.run = partial(here, launch.run)
    if "at" in job or "log" in job:
        patched(job)
    if "largest" in job:  # bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], resource.RLIM_INFINITY))
    if "train" in job:
        import two_ranks

        two_ranks.train(job["train"])
        return 0
    if "fetch" in job:
        from gzcli.core.errors import GzError
        from gzcli.data.download import http
        from gzcli.data.download.fetch import fetch

        http.LARGE, http.BACKOFF_SECONDS, http.STALL_SECONDS = (
            1 << 16,
            0.01,
            0.5,
        )  # so that it comes in pieces, and soon
        try:
            fetch(toy(job["fetch"], Path(job["content"]).read_bytes()))
        except GzError as error:
            print(error)
            return error.code
        return 0
    return app.run(job["words"])


def main() -> None:
    for name in LOADED.split():
        importlib.import_module(name)
    code = importlib.import_module("gzcli.store.code")
    code.code_hash(*code.DRAWING, *code.JUDGING)  # which each child would compute
    sys.modules["torch"].set_num_threads(1)
    os.fsync = lambda fd: None  # as in `conftest`; `patched` counts it all the same
    for line in sys.stdin:
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            code = 1
            try:
                with open(job["said"], "w") as said, open(job.get("err", os.devnull), "w") as err:
                    os.dup2(said.fileno(), 1)
                    os.dup2((err if "err" in job else said).fileno(), 2)
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                # the parent's streams remember that their descriptor was a file, but it may be a pipe now
                sys.stdout, sys.stderr = (open(fd, "w", 1, closefd=False) for fd in (1, 2))  # noqa: SIM115
                code = work(job)
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(int(sys.argv[1]), json.dumps({"code": code}).encode() + b"\n")
    os._exit(0)  # what has been loaded is not put away


if __name__ == "__main__":
    main()
