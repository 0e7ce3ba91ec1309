"""Commands of gz in children of a process that has loaded it: see `zygote`. The ranks of a training are
children, too."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import traps

TESTS = Path(__file__).resolve().parent


class Zygote:
    """The process that forks: `do` runs a command in a child of it, which speaks into the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        read, write = os.pipe()
        env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(TESTS / "zygote.py"), str(write)]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, env=env, pass_fds=[write])
        os.close(write)
        self.answers = open(read)  # noqa: SIM115

    def do(self, *words: str, home: Path, **job: Any) -> int:
        """The exit code of a command, −9 where it was killed.

        at, when: it is killed "before" or "after" this change of the store, counted from 1, or the first one
          of a path with this text; none without.
        how: by "SIGKILL", or by an "exit" without a word.
        """
        here = home.parent / "here"
        here.mkdir(exist_ok=True)
        job |= {"home": str(home), "here": str(here), "said": str(self.folder / "said.txt")}
        return self.code_of(words=words, **job)

    def gz(self, *words: str, code: int = 0, env: dict[str, str] | None = None):
        """As `helpers.gz`, seconds sooner: the command, and an engine of one process, run in the child."""
        err = self.folder / "err.txt"
        got = self.here(words=words, env={**os.environ, **(env or {})}, err=str(err))
        done = subprocess.CompletedProcess(words, got, self.said(), err.read_text())
        assert got == code, f"gz {' '.join(words)} → {got}\n{done.stdout}\n{done.stderr}"
        return done

    def train(self, by_world: dict[str, list[str]]) -> None:
        """Trains runs by one process or several: see `two_ranks`."""
        assert self.here(train=by_world, env=dict(os.environ)) == 0, self.said()

    def here(self, **job: Any) -> int:
        """The exit code of a job in the home of the test."""
        where = {"home": os.environ["GZ_HOME"], "here": str(traps()), "said": str(self.folder / "said.txt")}
        return self.code_of(**job, **where)

    def code_of(self, **job: Any) -> int:
        """The exit code of a job."""
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.flush()
        return json.loads(self.answers.readline())["code"]

    def changes(self, *words: str, home: Path, code: int = 0, **job: Any) -> list[str]:
        """The changes of the store by a command that is not killed."""
        log = self.folder / "changes.txt"
        log.unlink(missing_ok=True)
        assert self.do(*words, home=home, log=str(log), **job) == code, self.said()
        return log.read_text().splitlines()

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()
        self.answers.close()


@contextmanager
def zygote(folder: Path) -> Iterator[Zygote]:
    one = Zygote(folder)
    try:
        yield one
    finally:
        one.close()


def forked(world: int, work: Callable[[], object]) -> list[int]:
    """The exit codes of `world` children of this process, the ranks, that do the work: what it returns, or 0.
    This process serves the store by which they meet: no port is free first and taken later."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            code = 1
            if store:
                several = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": store.port}
                several |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
                os.environ |= {name: str(value) for name, value in several.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
            try:
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                # gloo's threads now and then abort an interpreter that exits by itself
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
