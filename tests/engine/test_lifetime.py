"""How a run ends: lost readers, signals, kills; by substitutes for the processes of test_processes.py."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from refused import refused

from gzcli.cli import app, out
from gzcli.core import ranks, signals, streams
from gzcli.core.errors import DeviceError, GzError, Interrupted, MissingError
from gzcli.engine import cadence
from gzcli.launch import forecast
from gzcli.launch import launcher as launch
from gzcli.store import files, runs, start
from gzcli.store.runs import Run

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; time.sleep(99)"]
# an engine that signals who started it, once it runs, and again once the first signal was heard
SIGNALS = """
import os, sys, time
for i, number in enumerate(sys.argv[2:]):
    while i and not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    os.kill(os.getppid(), int(number))
time.sleep(600)
"""


def stop(folder: Path, world: int = 1) -> cadence.Stop:
    return cadence.Stop(folder, world=world, device=torch.device("cpu"))


class Broken(io.StringIO):
    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(5, "terminal"), OSError(28, "disk")])
def test_a_stream_that_nobody_reads(error, monkeypatch):
    broken, output = Broken(error), Broken(error)
    stream = streams.Tolerant(broken)
    stream.write("a")
    stream.flush()
    monkeypatch.setattr(sys, "stderr", broken)
    out.configure(json=False, quiet=False)
    out.info("a")
    out.warn("b")  # what was to be said is lost, nothing else
    monkeypatch.setattr(sys, "stdout", output)
    out.configure(lenient=True)
    out.text("a training's image")
    out.configure(lenient=False)
    refused("", out.text, "data", error=SystemExit if isinstance(error, BrokenPipeError) else OSError)


def test_streams_that_are_closed_or_full(tmp_path):
    """Nothing that is opened later gets the number of a closed stream."""
    code = """
        import os, sys
        from gzcli.core import streams
        streams.tolerate()
        file = open(sys.argv[1], "w")
        print("x" * 99999, flush=True)
        print("y", file=sys.stderr, flush=True)
        os.write(2, b"z") if sys.argv[2] == "closed" else None
        file.write(f"{file.fileno() > 2} {sys.stderr.isatty()}")
    """
    for name, how in (("closed", ">&- 2>&- <&-"), ("full", ">/dev/full 2>/dev/full")):
        line = f'exec "$0" -c "$1" "$2" {name} {how}'
        words = ["sh", "-c", line, sys.executable, textwrap.dedent(code), str(tmp_path / name)]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
        assert done.returncode == 0 and (tmp_path / name).read_text() == "True False"


def test_what_is_ignored_stays_ignored(monkeypatch):
    """`nohup gz train` ignores SIGHUP and has to go on doing so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    got = []
    try:
        heard = signals.hear(lambda number, frame: got.append(number))
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.restore(heard)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert got == [signal.SIGTERM] and signal.SIGHUP not in heard
    assert signal.getsignal(signal.SIGTERM) == heard[signal.SIGTERM]


@pytest.fixture
def heard(monkeypatch):
    """Signals are heard as an engine hears them, until the test is over; also what `nohup` ignores."""
    before = {signum: signal.getsignal(signum) for signum in signals.ENDING_SIGNALS}
    for signum in signals.ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    monkeypatch.setattr(cadence, "_heard", [])
    yield cadence._heard
    signals.restore(before)


def test_a_signal_between_two_stages_stops_the_next_one(heard, tmp_path):
    stage = Run(tmp_path)
    with cadence.listening(stage):  # at its last step
        stop(tmp_path)
        for signum in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert stage.status()["stepping"]
    assert not stage.status()["stepping"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stop(tmp_path).signal(1) == signal.SIGHUP


def test_the_stop_file_and_the_death_of_gz(tmp_path, monkeypatch):
    watcher = stop(tmp_path)
    assert watcher.signal(1) == 0
    (tmp_path / "stop").write_text("2")
    assert watcher.signal(2) == 2
    (tmp_path / "stop").unlink()
    monkeypatch.setattr(cadence, "CLOCK_SECONDS", 0.0)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    monkeypatch.setenv("GZ_PARENT", str(child.pid))
    watcher = stop(tmp_path)
    assert watcher.signal(3) == 0
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert watcher.signal(4) == signal.SIGTERM
    child.wait()
    again = stop(tmp_path)
    assert watcher.signal(5) == again.signal(6) == signal.SIGTERM


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """launcher(function): the exit code of accelerate's launcher, were it that function."""
    register = signal.signal
    before = {signum: signal.getsignal(signum) for signum in signals.ENDING_SIGNALS}

    def call(function) -> int:
        monkeypatch.setattr("runpy.run_module", lambda *words, **options: function())
        return start.launch(["-x", str(tmp_path)])

    yield call
    signal.signal = register
    signals.restore(before)


def test_the_launcher_hears_signals_and_ends_as_its_process_did(launcher, tmp_path):
    def run():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch's launcher installs its own, which would end us
        os.kill(os.getpid(), signal.SIGTERM)

    assert launcher(run) == 0 and (tmp_path / "stop").read_text() == "15"
    (tmp_path / "stop").unlink()

    def one(code: int):
        def run():
            raise subprocess.CalledProcessError(code, ["python"])

        return run

    def several():
        error = RuntimeError("ChildFailedError")
        error.failures = {rank: SimpleNamespace(exitcode=code, pid=7) for rank, code in enumerate((1, -9))}
        raise error

    assert [launcher(run) for run in (one(3), one(-9), several)] == [3, 137, 137]
    assert Run(tmp_path).status() == {"lost": {"rank": 1, "pid": 7}}
    codes = [1, -15, -6, -9, -11]  # from the last consequence to the first cause
    assert sorted(codes, key=start._cause, reverse=True) == codes
    refused("", launcher, lambda: 1 / 0, error=ZeroDivisionError)


@pytest.fixture
def run(home) -> Run:
    made = runs.create("vae", "digits")
    files.write_atomic(made.path / "run.yaml", "model: {name: vae}\n")
    return made


def test_no_process_is_left(run, monkeypatch):
    """Neither one in a session of its own, nor one that ignores SIGTERM; also without groups."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(0, flush=True); time.sleep(99)"
    started = f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    outer = f"import subprocess, sys; {started}.wait()"
    monkeypatch.setattr(launch, "KILL_SECONDS", 0.3)
    monkeypatch.delattr(os, "killpg")  # as on Windows
    child = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    import psutil

    (inner,) = psutil.Process(child.pid).children()
    launch.end_all(child)
    assert child.returncode in (0, -15) and (not inner.is_running() or inner.status() == psutil.STATUS_ZOMBIE)


def test_what_is_told_of_an_engine_that_ended_silently(run, tmp_path):
    for returncode, got, kind, code, message in (
        (139, [], DeviceError, 4, "the process was terminated by SIGSEGV"),
        (1, [], GzError, 1, "the process exited with code 1 and no error message"),
        (3, [], MissingError, 3, "the process could not record why it failed"),
        (-15, [], Interrupted, 143, "stopped by SIGTERM"),
        (137, [2], Interrupted, 130, "stopped by SIGINT"),
    ):
        run.update(state="running", error=None, code=None)
        e = refused("", launch.outcome, run, returncode, got, error=kind)
        assert e.message == f"{message}; there is no checkpoint yet" and e.code == code
    run.update(state="running", error=None, code=None)
    killed = "the process was killed (SIGKILL), most likely because memory ran out"
    e = refused("", launch.outcome, run, 137, [], error=DeviceError)
    assert e.message == f"{killed}; there is no checkpoint yet"
    assert e.hint.startswith("use a smaller `train.batch_size`") and e.code == 4
    for step in (20, 100):
        files.write_json(run.path / "checkpoints" / f"{step:08d}" / "meta.json", {})
    (run.path / "checkpoints" / "00000120").mkdir()  # half of one
    run.update(state="running", error=None)
    e = refused("", launch.outcome, run, -9, [], error=DeviceError)
    assert e.message.endswith("the last checkpoint is at step 100")
    assert e.hint.startswith(f"gz train {run.id} --resume; ")
    assert run.status()["error"]["kind"] == "device" and run.status()["code"] == 4 and run.state == "failed"
    # rank 0 records a broken connection, which is a consequence of the kill; the lost rank is named
    broken = {"kind": "bug", "message": "RuntimeError: Connection reset by peer", "hint": None}
    rank, who = {"rank": 1, "pid": 4321}, "rank 1 (process 4321)"
    for code, lost, said in (
        (137, None, "the process was killed (SIGKILL)"),
        (137, rank, f"{who} was killed (SIGKILL)"),
        (139, rank, f"{who} was terminated by SIGSEGV"),
    ):
        run.update(state="failed", code=1, error=broken, lost=lost)
        e = refused("", launch.outcome, run, code, [], error=DeviceError)
        assert e.message.startswith(said) and run.status()["error"]["message"] == e.message
    run.update(state="failed", code=1, lost=None, error={**broken, "message": "KeyError: 'x'"})
    refused("KeyError", launch.outcome, run, 1, [], error=GzError)
    e = refused("", launch.outcome, Run(tmp_path), -9, [], error=DeviceError)
    assert "checkpoint" not in e.message and e.hint == "use a smaller `-n`"


def test_without_the_names_that_windows_lacks(monkeypatch):
    for name in ("SIGHUP", "SIGKILL"):
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "sysconf")
    try:
        assert [signals.signal_name(s) for s in importlib.reload(signals).ENDING_SIGNALS] == [
            "SIGTERM",
            "SIGINT",
        ]
        assert signals.signal_name(99) == "signal 99"
        assert forecast.host_memory() > 1 << 28
        child = subprocess.Popen(SLEEP)
        monkeypatch.delattr(os, "killpg")
        launch.end_all(child)
        assert child.returncode == -15
    finally:
        monkeypatch.undo()
        importlib.reload(signals)


def test_a_model_in_pieces_is_refused(capsys, home):
    fsdp = ("--use_fsdp", "--use-fsdp", "--fsdp_offload_params=true")
    for option in (*fsdp, "--use_deepspeed", "--use_megatron_lm", "--zero_stage"):
        error = refused(f"`{option}` cannot be passed", launch.check_extra, ["--gpu_ids", "0", option])
        assert "--set launch.strategy=fsdp" in error.hint
    assert app.run(["train", "vae", "--json", "--", option]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage" and not runs.all_runs()


@pytest.fixture
def sends(run, monkeypatch):
    """sends(signal.SIGINT): the engine sends these signals to this process."""

    def sends(*numbers: int) -> None:
        words = [sys.executable, "-c", SIGNALS, str(run.stop_file), *(str(int(number)) for number in numbers)]
        monkeypatch.setattr(launch, "command", lambda *args, **options: words)

    return sends


def test_a_second_signal_or_one_before_the_first_step_does_not_wait(run, sends, monkeypatch, capfd):
    run.update(stepping=True)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 600)
    sends(signal.SIGINT, signal.SIGINT)
    since = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGINT; there is no checkpoint yet"):
        launch.run(run.path, launch.Plan(), launcher=True)
    assert time.monotonic() - since < 600 and (run.path / "stop").read_text() == "2"
    capfd.readouterr()
    # there is nothing to save while the engine loads and prepares; later it gets time for a checkpoint
    sends(signal.SIGINT)
    for stepping, grace in ((False, 600), (True, 0.5)):
        monkeypatch.setattr(launch, "GRACE_SECONDS", grace)
        run.update(stepping=stepping)
        since = time.monotonic()
        e = refused("", launch.run, run.path, launch.Plan(), launcher=False, error=Interrupted)
        assert e.code == 130 and (0.5 if stepping else 0) <= time.monotonic() - since < 600
        assert ("stopping: saving a checkpoint" in capfd.readouterr().err) is stepping


def test_a_signal_that_a_finished_engine_did_not_end_by_is_noted(run, sends):
    """Its result is there; whoever would go on after it knows of the signal."""
    sends(signal.SIGTERM)
    (run.path / "job.json").write_text("{}")
    run.update(state="finished")
    with signals.noted() as got:
        assert launch.run(run.path, launch.Plan(), launcher=False)["state"] == "finished"
    assert got == [signal.SIGTERM]
    with signals.noted() as later:
        os.kill(os.getpid(), signal.SIGINT)
    assert got == [signal.SIGTERM] and later == [signal.SIGINT]


def test_ranks_with_slow_steps_agree_at_each(heard, tmp_path, monkeypatch):
    """A signal must not wait for ten steps of a minute: gz kills what has not ended in two."""
    now, agreed = [0.0], []
    monkeypatch.setattr(cadence.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "maximum", lambda flags: (agreed.append(step), flags)[1])
    watcher = stop(tmp_path, world=2)
    for step in range(1, 41):
        now[0] += 0.01 if step < 22 else 60.0
        watcher.signal(step)
    assert agreed == [1, 11, 21, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
    heard.append(15)
    assert watcher.signal(41) == 15
