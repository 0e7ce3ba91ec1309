"""`python tests/faults/table.py`: faults × commands, each run twice, as one table. Ends with 1 where a row is
not as it must be. With words only the rows that have them.

A row makes a fault in a copy of a store, gives a command, and looks at its exit code, at what it says, and at
what it leaves. A command that is killed is given again, and what it makes compared with the unbroken one.
"""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]

from forks import Zygote, zygote
from killing import left_over, outside, unreadable, weights
from server import serve
from test_damaged import DAMAGES
from test_hostile import HEADS, IMAGES, npz
from test_killed import CONTENT, TRAIN

from gzcli.data.packs.pack import Use
from gzcli.data.sets.names import locate
from gzcli.data.sets.registry import SPECS
from gzcli.store import claims, files
from gzcli.store.run_folder import Run

NAMED = re.compile(r"by (process \d+|another process|a job that writes)")
RESUME = ("train", "a", "--resume", "--steps", "6", "--cpu")
Fault = Callable[[Path], AbstractContextManager[object] | None]
Look = Callable[[Path], str]


@dataclass(frozen=True)
class Row:
    """A fault and a command.

    fault: in words.
    words: the command line.
    code: the exit code that it must have.
    outcome: what must be so then, in words.
    make: makes the fault in a store; as a context manager it holds while the command runs.
    look: returns what is so then.
    job: further keys of the zygote's job.
    again: whether the command was killed and is given again.
    """

    fault: str
    words: tuple[str, ...]
    code: int
    outcome: str = "refused, the store as it was"
    make: Fault = lambda home: None
    look: Look | None = None
    job: dict[str, Any] = field(default_factory=dict)
    again: bool = False


def run_a(home: Path) -> Path:
    return next(path.parent for path in sorted(home.glob("runs/*/.gz")))


def content(home: Path) -> dict[str, bytes]:
    """All files of a store, but those of locks."""
    found = (path for path in sorted(home.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(home)): path.read_bytes() for path in found}


def damage(name: str, how: str) -> Fault:
    """A file of the run `a`, or of the store, that has another content; "half": half of its own."""

    def make(home: Path) -> None:
        (file,) = [*run_a(home).glob(name), *home.glob(name)][:1]
        new = file.read_bytes()[: file.stat().st_size // 2] if how == "half" else DAMAGES[how]
        file.unlink() if new is None else file.write_bytes(new)

    return make


def other_bytes(home: Path) -> None:
    """Files of `mnist` that have their sizes and not their checksums."""
    for file in SPECS["mnist"].files:
        (path := home / "raw" / "mnist" / file.name).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, file.size)


def goes_on(home: Path) -> str:
    """Of a run that went on: whether it has its steps, and whole files."""
    state = json.loads((run_a(home) / "status.json").read_text())
    whole = state["state"] == "finished" and state["step"] == 6 and not unreadable(home) + left_over(home)
    return "goes on to its end" if whole else f"{state['state']} at {state['step']}"


def killed(
    forks: Zygote, source: Path, top: Path, words: tuple[str, ...], few: int, **job: Any
) -> Iterator[Row]:
    """Rows of a command that is killed at some of its changes of the store."""
    home = copied(source, top / "whole")
    changes = forks.changes(*words, home=home, **job)
    whole = made(home)
    shutil.rmtree(home.parent)

    def look(home: Path) -> str:
        broken = unreadable(home) + left_over(home) + outside(home)
        return "the same, to the bit" if made(home) == whole and not broken else f"another end {broken}"

    for i in range(few):
        at, when = 1 + (2 * i + 1) * len(changes) // (2 * few), "before" if i % 2 else "after"
        what = changes[at - 1].split()
        fault = f"SIGKILL {when} {what[0]} {Path(what[1]).name[:24]}"
        more = {**job, "at": at, "when": when}
        yield Row(fault, words, -9, "the same, to the bit", look=look, job=more, again=True)


def made(home: Path) -> object:
    """What commands make that must not depend on their being killed."""
    kinds = ("packs/*/*/*.npy", "raw/*/*", "runs/*/export/*.safetensors")
    files = [path for kind in kinds for path in sorted(home.glob(kind))]
    runs = [weights(path.parent) for path in sorted(home.glob("runs/*/model.safetensors"))]
    return [(path.name, path.read_bytes()) for path in files], runs


def copied(source: Path, folder: Path) -> Path:
    if source.exists():
        shutil.copytree(source, folder / "home", symlinks=True)
    else:
        (folder / "home").mkdir(parents=True)
    return folder / "home"


def held(what: str) -> Fault:
    """What another process holds while the command runs: this one, as seen from the command's."""

    @contextlib.contextmanager
    def make(home: Path) -> Iterator[None]:
        os.environ["GZ_HOME"] = str(home)
        run = Run(run_a(home))
        if what == "run":
            with claims.claimed(run):
                claims.sign(run)
                yield
        elif what == "engine":
            run.update(state="running", pid=os.getpid())
            with files.lock(run.lock):
                yield
        elif what == "job":
            with claims.claimed_folder(run.path / "sampled" / "x"):
                yield
        elif what == "set":
            use = Use(locate("digits"))
            yield
            use.end()
        else:
            with files.lock(home / "raw" / ".mnist.lock"):
                yield

    return make


def rows(forks: Zygote, trained: Path, top: Path, site: Any) -> Iterator[Row]:
    """All rows."""
    none, file = top / "none", str(site.file)
    yield from killed(forks, none, top, TRAIN, 10)
    yield from killed(forks, none, top, ("data", "import", str(top / "set.npz"), "--name", "mine"), 4)
    fetch = {"fetch": site.url, "content": file, "env": {"GZ_OFFLINE": "0", "no_proxy": "*"}}
    yield from killed(forks, none, top, (), 4, **fetch)
    yield from killed(forks, trained, top, ("runs", "export", "a"), 3)
    yield from killed(forks, trained, top, ("runs", "remove", "a", "--yes"), 3)
    for how in ("gone", "empty", "half", "zeros", "a list", "other keys", "deep"):
        made = damage("status.json", how)
        yield Row(f"status.json {how}", ("runs", "list"), 0, make=made)
        yield Row(f"status.json {how}", ("sample", "ID"), 3, make=made)
    for how in ("gone", "zeros", "noise", "a tag", "null"):
        yield Row(f"run.yaml {how}", ("sample", "ID", "--cpu"), 3, make=damage("run.yaml", how))
    for name in ("meta.json", "train.pt", "model.safetensors", "ema.safetensors"):
        made, seen = damage(f"checkpoints/00000004/{name}", "half"), "goes on to its end"
        yield Row(f"last checkpoint: {name} half", RESUME, 0, seen, made, goes_on)
    for name, how in (("env.json", "noise"), ("metrics.jsonl", "noise"), ("checkpoints/best.json", "zeros")):
        yield Row(f"{name} {how}", ("runs", "list"), 0, make=damage(name, how))
    made = damage("packs/digits/16x1/train.npy", "half")
    yield Row("pack train.npy half", RESUME, 0, "goes on to its end", made, goes_on)
    yield Row("fetched files of other bytes", ("train", "vae", "--data", "mnist"), 3, make=other_bytes)
    for name, (head, _) in HEADS.items():
        bad = npz(top / f"{name.replace(' ', '-')}.npz", x_train=head)
        yield Row(f"npz, its head {name}", ("data", "import", str(bad), "--name", "bad"), 3)
    for key in ("train.samples=1000000000", "train.batch_size=1000000000000000000", "optim.lr=1e400"):
        yield Row(key[:40], ("train", "vae", "--data", "digits", "--set", key), 2)
    who = "refused, names who"
    for what, words, code in (
        ("run", RESUME, 2),
        ("run", ("runs", "remove", "a", "--yes"), 2),
        ("run", ("runs", "prune", "--keep", "0", "--yes"), 0),
        ("engine", RESUME, 2),
        ("engine", ("runs", "remove", "a", "--yes"), 2),
        ("job", ("runs", "remove", "a", "--yes"), 2),
        ("set", ("data", "remove", "digits", "--yes"), 2),
        ("download", ("data", "remove", "mnist", "--yes"), 2),
    ):
        there: Look | None = None if code else lambda home: "left" if run_a(home).is_dir() else "gone"
        yield Row(f"another process has the {what}", words, code, who if code else "left", held(what), there)
    served = {"404": 3, "html": 3, "wrong": 3, "long": 3, "cut": 0, "503": 0, "whole": 0}
    for fault, code in served.items():
        done = "" if code else "whole"
        look: Look = nothing_kept if code else lambda home: "whole" if whole_file(home) else "another"
        job = {**fetch, "served": [fault] * (40 if code else 2)}
        yield Row(f"server: {fault}", (), code, done or "refused, nothing kept", look=look, job=job)
    for variable, code in (
        ("CUDA_VISIBLE_DEVICES=0", 0),
        ("OMP_NUM_THREADS=2,1", 0),
        ("PMI_SIZE=4", 0),
        ("SLURM_NNODES=x", 2),
    ):
        key, _, value = variable.partition("=")
        after, look = ("goes on to its end", goes_on) if not code else ("refused, the store as it was", None)
        yield Row(variable, RESUME, code, after, look=look, job={"env": {key: value}})

    smi = top / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text("#!/bin/sh\necho 'GPU 0: a card'\n")
    smi.chmod(0o755)
    env = {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}"}
    words = (*TRAIN[:2], "--gpus", "1")
    yield Row("a GPU that torch cannot use", words, 4, "refused, the store as it was", job={"env": env})


def nothing_kept(home: Path) -> str:
    kept = [path.name for path in home.glob("raw/toy/*")]
    return f"kept {kept}" if kept else "refused, nothing kept"


def whole_file(home: Path) -> bool:
    return (home / "raw" / "toy" / "a.bin").read_bytes() == CONTENT and not left_over(home)


def tried(row: Row, forks: Zygote, trained: Path, top: Path, site: Any) -> str:
    """Runs a row. Returns the exit code and what is so then, in words."""
    fresh = (row.again and row.words[:1] in ((), ("train",), ("data",))) or "fetch" in row.job
    home = copied(top / "none" if fresh else trained, top / "store")
    job = {key: value for key, value in row.job.items() if key != "served"}
    site.server.faults.clear()
    site.server.faults.extend(row.job.get("served", ()))
    try:
        fault = row.make(home)
        before = content(home)
        with fault or contextlib.nullcontext():
            named = (run_a(home).name if word == "ID" else word for word in row.words)
            code = forks.do(*named, home=home, **job)
        said = forks.said()
        found = row.outcome
        if row.again:
            rest = {key: value for key, value in job.items() if key not in ("at", "when")}
            if broken := unreadable(home):
                return f"{code} unreadable {broken}"
            gone = row.words[:2] == ("runs", "remove") and not list(home.glob("runs/[!.]*/status.json"))
            words = ("runs", "prune", "--keep", "9", "--yes") if gone else row.words
            if (again := forks.do(*words, home=home, **rest)) != 0:
                return f"{code} then {again}: {forks.said()[-200:]}"
        elif "Traceback" in said or "bug in gz" in said:
            found = f"says {said[-200:]}"
        elif row.outcome.startswith("refused, the store") and content(home) != before:
            found = f"changed {sorted(set(content(home).items()) ^ set(before.items()))[:1]}"[:120]
        elif row.outcome == "refused, names who" and not NAMED.search(said):
            found = f"says {said[-200:]}"
        return f"{code} {row.look(home) if row.look else found}"
    finally:
        shutil.rmtree(home.parent)


@dataclass(frozen=True)
class Site:
    """A data server with one file."""

    server: Any
    url: str
    file: Path


def main() -> int:
    top = Path(tempfile.mkdtemp(prefix="faults-"))
    for key in [key for key in os.environ if key.startswith(("GZ_", "SLURM_", "ACCELERATE_"))]:
        del os.environ[key]
    os.environ.update(GZ_OFFLINE="1", GZ_DATA="digits", GZ_TRIAL="0", HF_HUB_OFFLINE="1", COLUMNS="80")
    npz(top / "set.npz", x_train=IMAGES)
    (top / "site").mkdir()
    (top / "site" / "a.bin").write_bytes(CONTENT)
    marks = []
    with zygote(top) as forks, serve(top / "site") as server:
        site = Site(server, server.url, top / "site" / "a.bin")
        trained = top / "trained" / "home"
        trained.mkdir(parents=True)
        assert forks.do(*TRAIN, home=trained) == 0, forks.said()
        print(f"{'fault':<42} {'command':<16} exit  outcome, twice")
        for row in rows(forks, trained, top, site):
            if not all(word in f"{row.fault} {' '.join(row.words)}" for word in sys.argv[1:]):
                continue
            found = [tried(row, forks, trained, top, site) for _ in range(2)]
            right = found == [f"{row.code} {row.outcome}"] * 2
            marks.append(right)
            command = " ".join(row.words[:2]) or "data download"
            shown = row.outcome if right else f"FAILED: {found}"
            print(f"{row.fault:<42.42} {command:<16.16} {row.code:>4}  {shown}", flush=True)
    print(f"{len(marks)} rows, {sum(marks)} as they must be")
    shutil.rmtree(top)
    return 0 if all(marks) else 1


if __name__ == "__main__":
    sys.exit(main())
