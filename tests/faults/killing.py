"""Runs commands of gz that are killed just before or after their n-th change of the store, and looks at what
they leave: see `zygote`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TESTS = Path(__file__).resolve().parents[1]
LEFT = (".part", ".part1", ".part2", ".part3", ".link")


class Zygote:
    """The process that forks: `do` runs a command in a child of it.

    folder: what is said and logged goes here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        read, write = os.pipe()
        env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(TESTS / "faults" / "zygote.py"), str(write)]
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
        self.child.stdin.write(json.dumps({"words": words, **job}) + "\n")
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


def unreadable(home: Path) -> list[str]:
    """The files of a store that are no whole files of their kind, but those on their way."""
    found = []
    for file in sorted(path for path in home.rglob("*") if path.is_file()):
        if any(name.endswith(LEFT) for name in file.relative_to(home).parts) or file.match(".index-*"):
            continue  # an index that is not whole is made again
        try:
            read(file)
        except Exception as e:
            found.append(f"{file.relative_to(home)}: {type(e).__name__} {e}")
    return found


def read(file: Path) -> object:
    """Reads a file by the reader of its kind. Raises any error."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if file.suffix == ".yaml":
        return yaml.safe_load(file.read_text())
    if file.suffix == ".npy":
        return np.load(file)
    if file.suffix == ".png":
        from PIL import Image

        return Image.open(file).load()
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(file)
    if file.suffix == ".pt":
        import torch

        return torch.load(file, weights_only=True)
    return None


def left_over(home: Path) -> list[str]:
    """What is on its way in a store."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.name.endswith(LEFT))


def outside(home: Path) -> list[str]:
    """What lies beside the store, and in the working folder."""
    beside = {path.name for path in home.parent.iterdir()} - {home.name, "here"}
    return sorted(beside | {path.name for path in (home.parent / "here").iterdir()})


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of a run's weights, to the bit."""
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(run / "model.safetensors").items()}


def arrays(folder: Path) -> dict[str, bytes]:
    """The arrays of a pack."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}
