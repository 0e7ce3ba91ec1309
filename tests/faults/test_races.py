"""Two processes at one run, one set, one folder or one file, and what killed ones leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial

import psutil
import pytest
from helpers import ROOT

from gzcli.cli import app
from gzcli.core.errors import DeviceError, Interrupted, MissingError, UsageError
from gzcli.data.packs.open import Use, open_pack
from gzcli.data.sets.registry import locate
from gzcli.launch import launcher, plan
from gzcli.store import claims, files, runs, start
from gzcli.store.files import part_path, remove_leftovers
from gzcli.store.run_folder import Run

DEAD = 2**22 + 1  # beyond the numbers that Linux gives to processes


def together(*works) -> None:
    threads = [threading.Thread(target=work) for work in works]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


@pytest.fixture
def broken(home) -> Run:
    """A run that was broken off."""
    run = runs.create("vae", "digits")
    tree = "model: {name: vae}\ndata: {name: digits, size: 16, channels: 1, levels: 17}\n"
    files.write_atomic(run.path / "run.yaml", tree)
    run.update(state="interrupted", step=1)
    return run


def outcomes(call, monkeypatch, at: str, *words: str) -> list[tuple[int, str]]:
    """What becomes of commands that are given at a moment of `gz train`: exit code and words of each."""
    answers: list[tuple[int, str]] = []
    real = getattr(plan, at) if at == "write_run" else None

    def moment(*args: object, **more: object) -> object:
        (run,) = runs.all_runs()
        for line in ("runs remove ID --yes", "runs prune --unfinished --yes", "train ID --resume --cpu"):
            code, said, err = call(*line.replace("ID", run.id).split())
            answers.append((code, said + err))
        assert run.path.exists() and run.state == "running"
        return real(*args, **more) if real else {}

    monkeypatch.setattr(launcher, "run", lambda *args, **more: {})
    monkeypatch.setattr(*((plan, "write_run") if real else (launcher, "run")), moment)
    assert call("train", *words, "--cpu", "--quiet")[0] in (0, 3)
    return answers


@pytest.mark.parametrize("at", ["write_run", "launch"])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_run_that_is_about_to_start_is_left_alone(call, monkeypatch, request, at, resumed):
    words = ("vae", "--data", "digits")
    if resumed:
        words = (request.getfixturevalue("broken").id, "--resume")
    remove, prune, resume = outcomes(call, monkeypatch, at, *words)
    named = f"is being trained by process {os.getpid()}"
    assert remove[0] == 2 and named in remove[1]
    if resumed or at == "launch":  # before it has a recipe there is nothing to go on with
        assert resume[0] == 2 and named in resume[1]
    assert prune[0] == 0 and "nothing to remove" in prune[1]


def test_of_two_resumes_at_one_instant_one_is_refused(broken, monkeypatch):
    began, ends = [], []
    gate, over = threading.Barrier(2), threading.Event()

    def wait(*args: object, **more: object) -> dict:
        began.append(args)
        over.wait(20)
        return {}

    monkeypatch.setattr(launcher, "run", wait)
    monkeypatch.setattr(plan, "write_run", lambda *args: None)
    monkeypatch.setattr(plan, "note_whole", lambda *args: None)
    request = plan.ask(broken.id, None, (), {"launch.cpu": True})

    def go() -> None:
        gate.wait()
        try:
            plan.Start(request, launcher.Plan(), broken).train(plan.continued(broken, request.recipe))
        except UsageError as error:
            ends.append(error.message)
            over.set()

    together(go, go)
    assert len(began) == len(ends) == 1
    assert ends[0] == f"`{broken.id}` is being trained by process {os.getpid()}"


def test_a_run_that_was_removed_meanwhile_is_not_made_again(broken):
    runs.remove(broken)
    with pytest.raises(MissingError, match="no longer exists"), claims.claimed(broken):
        pass
    broken.path.mkdir()  # as a lock does that is made in that moment
    with pytest.raises(MissingError, match="no longer exists"), claims.claimed(broken):
        pass
    assert not broken.path.exists()


def test_an_engine_that_another_gz_left_behind_keeps_the_run(broken):
    """`gz` was killed, its engine saves: the next one is refused, and leaves the status alone."""
    broken.update(state="running", pid=os.getpid())
    with files.lock(broken.lock):
        before = (broken.path / "status.json").read_bytes()
        with pytest.raises(UsageError, match=f"trained by process {os.getpid()}"):
            launcher.outcome(broken, 2, [])
        with pytest.raises(UsageError, match=f"trained by process {os.getpid()}"), claims.claimed(broken):
            pass
    assert (broken.path / "status.json").read_bytes() == before and broken.state == "killed"


def test_a_run_that_a_job_reads_is_left_alone(call, broken, monkeypatch):
    broken.update(state="finished")
    folder, answers = claims.new_folder(broken.path / "sampled", "x"), []
    with claims.claimed_folder(folder):
        for words in (("remove", broken.id), ("prune", "--keep", "0")):
            code, said, err = call("runs", *words, "--yes")
            answers.append((code, said + err))
    assert answers[0][0] == 2 and f"is in use by a job that writes to `{folder}`" in answers[0][1]
    assert answers[1][0] == 0 and "kept:" in answers[1][1] and broken.path.exists()
    assert call("runs", "remove", broken.id, "--yes")[0] == 0 and not broken.path.exists()


def test_jobs_of_one_second_and_one_suffix_are_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260131-142501")
    suffixes = iter([b"\0\0", b"\0\0", b"\0\1"])
    monkeypatch.setattr(os, "urandom", lambda n: next(suffixes))
    made = [claims.new_folder(tmp_path, "ood") for _ in range(2)]
    assert [folder.name for folder in made] == ["ood-20260131-142501-0000", "ood-20260131-142501-0001"]


HOLD = """
import sys, time
from gzcli.data.packs.open import Use
from gzcli.data.sets.registry import locate
use = Use(locate(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_set_that_another_process_uses_or_downloads_is_not_removed(home, capsys):
    folder = open_pack("digits").folder  # its own use is no hindrance
    words = [sys.executable, "-c", HOLD, "digits"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ)
    try:
        child.stdout.readline()
        assert app.run(["data", "remove", "digits", "--yes"]) == 2
        assert f"`digits` is being used by process {child.pid}" in capsys.readouterr().err
        assert folder.exists()
    finally:
        child.kill()
        child.communicate()
    assert app.run(["data", "remove", "digits", "--yes"]) == 0 and not folder.exists()
    assert not list(home.glob("packs/.*.used"))
    with files.lock(home / "raw" / ".mnist.lock"):
        assert app.run(["data", "remove", "mnist", "--yes"]) == 2
    assert "is being downloaded by another process" in capsys.readouterr().err


AT_EXIT = """
import sys
from gzcli.data.packs.open import Use
from gzcli.data.sets.registry import locate
sys.use = Use(locate("digits"))  # it lives as long as the interpreter
"""


def test_a_set_is_let_go_with_its_pack_its_error_or_its_process(home):
    """Also where the interpreter collects nothing any more; a forked child leaves it to its parent."""
    pack = open_pack("digits")
    assert len(list(home.glob("packs/.digits.*.used"))) == 1
    del pack
    with pytest.raises(UsageError), Use(locate("digits")):
        raise UsageError("x")
    assert not list(home.glob("packs/.digits.*.used"))
    words = [sys.executable, "-c", AT_EXIT]
    done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and not list(home.glob("packs/.*.used"))
    use = Use(locate("digits"))
    child = os.fork()
    if not child:
        use.end()
        os._exit(0)
    os.waitpid(child, 0)
    (file,) = home.glob("packs/.digits.*.used")
    assert files.is_locked(file)
    use.end()
    assert not file.exists()


def test_two_writers_of_one_file(tmp_path):
    """As two `gz bench` write the features of one set: one whole file, and no error."""
    file, texts, errors = tmp_path / "x.json", [f"{i}" * 50_000 for i in range(4)], []

    def write(text: str) -> None:
        try:
            for _ in range(30):
                files.write_atomic(file, text)
        except BaseException as error:
            errors.append(error)

    together(*(partial(write, text) for text in texts))
    assert not errors and file.read_text() in texts and os.listdir(tmp_path) == ["x.json"]


def test_who_looks_at_a_lock_does_not_keep_others_from_it(tmp_path):
    """`gz runs list` in the moment in which an engine starts."""
    lock, over = tmp_path / ".lock", threading.Event()
    lock.touch()

    def look() -> None:
        while not over.is_set():
            files.is_locked(lock)

    threads = [threading.Thread(target=look) for _ in range(4)]
    [thread.start() for thread in threads]
    got = []
    for _ in range(150):
        with files.lock(lock, wait=False) as one:
            got.append(one)
    over.set()
    [thread.join() for thread in threads]
    assert all(got)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    part = part_path(tmp_path / "a.json")
    named = f".a.json.{files._machine()}.%d.0.part"
    parent, day = tmp_path / (named % os.getppid()), tmp_path / f".a.json.00000000.{DEAD}.0.part"
    mine = [part, parent, day, tmp_path / "b.part", tmp_path / ".c.part"]  # living, elsewhere, of others
    old = [tmp_path / (named % DEAD), tmp_path / f".a.json.{DEAD}.part"]  # the second as version 0.1 named it
    for file in (*mine, *old):
        file.write_text("x")
    (tmp_path / f".d.{files._machine()}.{DEAD}.3.part").mkdir()
    remove_leftovers(tmp_path, tmp_path / "none")
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    os.utime(day, (0, 0))  # of a machine that we cannot look into: after a day
    os.utime(parent, (0, 0))  # older than the process that has its number now
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted({*mine} - {day, parent})


SAVES = """
import os, sys, time
from pathlib import Path
from gzcli.store import files
from gzcli.store.run_folder import Run

run = Run(Path(sys.argv[-1]))
at_work, begins = os.pipe()
if os.fork():  # the launcher is gone once the engine works
    os.read(at_work, 1)
    os.kill(os.getpid(), 9)
with files.lock(run.lock):
    parent = int(os.environ["GZ_PARENT"])
    run.update(state="running", parent=parent, pid=os.getpid(), error=None, stepping=True)
    os.write(begins, b"x")
    while not (run.path / "stop").exists():
        time.sleep(0.02)
    with files.new_dir(run.path / "checkpoints" / "00000007") as part:
        for i in range(8):
            (part / f"{i}").write_text("x")
            time.sleep(0.2)
        (part / "meta.json").write_text("{}")
    time.sleep(0.5)  # it is whole, and the status does not say so yet
    error = {"kind": "interrupted", "message": "checkpoint saved", "hint": "--resume"}
    run.update(state="interrupted", code=143, error=error)
"""


def test_an_engine_is_not_killed_while_it_saves(broken, monkeypatch):
    """Its launcher is gone, and it takes longer than `gz` waits for a step."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(launcher, "command", lambda *_, **__: [sys.executable, "-c", SAVES, str(broken.path)])
    with pytest.raises(Interrupted, match="checkpoint saved"):
        launcher.run(broken.path, launcher.Plan(), launcher=True)
    assert launcher.saved_state(broken) == "the last checkpoint is at step 7"


ORPHAN = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "launcher":
    words = [sys.executable, "-c", sys.argv[2], "rank", *sys.argv[3:]]
    rank = subprocess.Popen(words, start_new_session=True)
    os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
    os.kill(os.getpid(), 9)
signal.signal(15, signal.SIG_IGN)
open(sys.argv[-1] + "/pid", "w").write(str(os.getpid()))
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_stopped_rank_of_a_dead_launcher_is_ended(broken, monkeypatch):
    """It has a session of its own, so it is neither in the tree nor in the group of processes any more."""
    monkeypatch.setattr(launcher, "KILL_SECONDS", 0.5)
    words = [sys.executable, "-c", ORPHAN, "launcher", ORPHAN, start.SCRIPT, str(broken.path)]
    monkeypatch.setattr(launcher, "command", lambda *_, **__: words)
    with pytest.raises(DeviceError, match="SIGKILL"):
        launcher.run(broken.path, launcher.Plan(), launcher=True)
    pid = int((broken.path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
