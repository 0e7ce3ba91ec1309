"""Command lines of gz side by side, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gzcli.core import start
from gzcli.core.devices import VISIBLE
from gzcli.core.types import Say
from gzcli.launch import launcher

LOOK_EVERY = 0.1  # seconds between looks at the processes


def slots(most: int, *, gpus: bool) -> list[dict[str, str]]:
    """The environments of at most so many processes at a time: a GPU for each, or a core."""
    if not gpus:
        return [{"OMP_NUM_THREADS": "1"}] * most
    visible = os.environ.get(VISIBLE) or ",".join(map(str, range(launcher.usable_gpus().usable)))
    return [{VISIBLE: name.strip()} for name in visible.split(",")[:most]]


@dataclass
class Task:
    """A command line that runs in a slot."""

    words: Sequence[str]
    slot: Mapping[str, str]
    say: Say  # is called with each line of its stderr
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 -- `end` closes it
        self.process = subprocess.Popen(
            [sys.executable, start.SCRIPT, "gzcli", *self.words],
            env={**os.environ, **self.slot},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it by `side_by_side` alone
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.say(line.rstrip())

    def end(self) -> tuple[str, int, float]:
        """Its stdout, its exit code, and the seconds that it took."""
        code = self.process.wait()
        self.reader.join(1.0)  # longer only where something that it has started outlives it
        self.output.seek(0)
        with self.output:
            return self.output.read(), code, time.monotonic() - self.since


def side_by_side(
    lines: Mapping[int, tuple[Sequence[str], Say]], free: list[dict[str, str]], heard: Sequence[int]
) -> Iterator[tuple[int, tuple[str, int, float]]]:
    """Runs command lines, as many at a time as there are free slots. Yields the key of each that has ended,
    with what `Task.end` says. Every signal of `heard` is passed on, and no line begins after one."""
    waiting, running, passed = list(lines), dict[int, Task](), 0
    try:
        while running or (waiting and not heard):
            while free and waiting and not heard:
                key = waiting.pop(0)
                words, say = lines[key]
                running[key] = Task(words, free.pop(0), say)
            for number in heard[passed:]:
                for task in running.values():
                    task.process.send_signal(number)
                passed += 1
            for key in [key for key, task in running.items() if task.process.poll() is not None]:
                task = running.pop(key)
                free.append(dict(task.slot))
                yield key, task.end()
            time.sleep(LOOK_EVERY)
    finally:
        for task in running.values():
            task.process.terminate()
        for task in running.values():
            task.end()


def end_with_parent() -> None:
    """Sends this process SIGTERM when the one that has started it is gone, as after `kill -9`."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
