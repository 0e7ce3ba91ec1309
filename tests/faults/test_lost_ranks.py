"""Ranks that are killed, crash or stop: real processes, for minutes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import gz, lines, spawn

from gzcli.store import runs
from gzcli.store.run_folder import Run

pytestmark = [pytest.mark.slow, pytest.mark.launch]
WORDS = ("train", "vae", "--data", "digits", "--cpu", "--processes", "2", "--steps", "100000")
SETS = ("train.log_every=1", "train.checkpoint_every=5", "train.sample_every=0", "train.eval_every=0")
WORDS += tuple(word for key in (*SETS, "train.best=none") for word in ("--set", key))
PATIENCE, END = 240, 30  # seconds for a start on a busy machine; for the end of the others


@pytest.fixture
def two(home) -> tuple[subprocess.Popen[str], Run, dict[int, psutil.Process], list[psutil.Process]]:
    """A training of two processes with a checkpoint: `gz`, its run, the ranks, and all processes."""
    child = spawn(*WORDS)
    deadline = time.monotonic() + PATIENCE
    while not any(run.checkpoints for run in runs.all_runs()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.1)
    everyone = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    ranks = {int(p.environ()["RANK"]): p for p in everyone if "RANK" in p.environ()}
    yield child, runs.all_runs()[0], ranks, everyone
    for process in everyone:
        if process.is_running():
            process.kill()


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, 4), (signal.SIGSEGV, 4)], ids=["kill", "segv"])
def test_a_rank_that_dies_is_named_and_the_run_goes_on(two, rank, signum, code):
    child, run, ranks, everyone = two
    since = time.monotonic()
    ranks[rank].send_signal(signum)
    err = child.communicate(timeout=PATIENCE)[1]
    took = time.monotonic() - since
    named = f"rank {rank} (process {ranks[rank].pid}) was"
    assert child.returncode == code and named in err and "Traceback" not in err.partition("error")[2]
    assert took < END and gone(everyone)
    assert run.state == "failed" and run.status()["error"]["message"].startswith(named)
    step = int(run.checkpoints[-1].name)
    gz("train", run.id, "--resume", "--steps", str(step + 5), "--set", "launch.threads=1")
    assert run.state == "finished" and lines(run.path / "metrics.jsonl")[-1]["step"] == step + 5


def test_two_ctrl_c_end_a_stopped_rank(two):
    child, run, ranks, everyone = two
    ranks[1].suspend()
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(1)
    child.communicate(timeout=END)
    assert child.returncode == 130 and gone(everyone) and not run.is_held
    assert run.state == "interrupted"


def test_a_launcher_that_dies_first_is_outlived_by_the_checkpoint(two):
    child, run, ranks, everyone = two
    launcher = ranks[0].parent()
    assert launcher.pid != child.pid
    launcher.kill()
    child.communicate(timeout=PATIENCE)
    assert gone(everyone) and run.state in ("interrupted", "failed")
    assert run.checkpoints and Path(run.checkpoints[-1] / "meta.json").exists()


def test_gz_that_is_killed_leaves_an_engine_that_saves(two):
    child, run, ranks, _ = two
    for rank in ranks.values():  # so that they do not save before others have come
        rank.suspend()
    child.kill()
    child.wait()
    gz("train", run.id, "--resume", code=2)
    gz("runs", "remove", run.id, "--yes", code=2)
    for rank in ranks.values():
        rank.resume()
    deadline = time.monotonic() + PATIENCE
    while not gone(list(ranks.values())) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert run.state == "interrupted" and not run.is_held and gone(list(ranks.values()))
