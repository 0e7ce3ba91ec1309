"""Commands of gz in children of a process that has loaded it: see `zygote`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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

        at, when: it is killed "before" or "after" this change of the store, counted from 1; none without.
        how: by "SIGKILL", or by an "exit" without a word.
        """
        here = home.parent / "here"
        here.mkdir(exist_ok=True)
        job |= {"home": str(home), "here": str(here), "said": str(self.folder / "said.txt")}
        return self.code_of(words=words, **job)

    def gz(self, *words: str, code: int = 0, env: dict[str, str] | None = None):
        """As `helpers.gz`, seconds sooner: the command, and an engine of one process, run in the child."""
        home, err = Path(os.environ["GZ_HOME"]), self.folder / "err.txt"
        where = {"home": str(home), "here": str(traps()), "said": str(self.folder / "said.txt")}
        got = self.code_of(words=words, env={**os.environ, **(env or {})}, err=str(err), **where)
        done = subprocess.CompletedProcess(words, got, self.said(), err.read_text())
        assert got == code, f"gz {' '.join(words)} → {got}\n{done.stdout}\n{done.stderr}"
        return done

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
