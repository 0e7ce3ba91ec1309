"""No process of gz imports from the working folder, where a user may have a `random.py`."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TRAPS, traps

from gzcli.core import start, streams
from gzcli.launch import launcher

ROOT = Path(start.SCRIPT).parents[2]


@pytest.fixture
def bare(monkeypatch):
    """A working folder whose files must not be imported; no variable of the environment prevents it."""
    monkeypatch.chdir(traps())
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def python(*words: str, code: int = 0) -> str:
    """What a Python of these words prints, after its exit code was checked."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_traps_work(bare):
    for name in TRAPS:
        python("-c", f"import {name}", code=99)


def test_a_module_is_started_without_the_working_folder(bare):
    found = re.findall(r"'(.*)',", python(start.SCRIPT, "site"))  # which prints `sys.path`
    assert str(ROOT) in found and str(Path.cwd()) not in found and str(ROOT / "gzcli") not in found
    python(start.SCRIPT, "random")
    assert "vae" in python("-m", "gzcli", "list", "models")


@pytest.mark.parametrize("version", [(3, 10), sys.version_info])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes(bare, monkeypatch, version, method):
    """Python 3.10 does not know `PYTHONSAFEPATH`: there it is unset again before they start."""
    util = pytest.importorskip("multiprocessing.util")
    monkeypatch.setattr(util, "_args_from_interpreter_flags", util._args_from_interpreter_flags)
    monkeypatch.setattr(sys, "version_info", version)
    if method == "forkserver":
        from multiprocessing import forkserver

        monkeypatch.setattr(forkserver, "_forkserver", server := forkserver.ForkServer())
        monkeypatch.setattr(forkserver, "ensure_running", server.ensure_running)
        monkeypatch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
    start.safe_children()
    start.safe_children()  # once is enough
    if version == (3, 10):
        assert util._args_from_interpreter_flags().count("-I") == 1
        monkeypatch.delenv("PYTHONSAFEPATH")
    child = multiprocessing.get_context(method).Process(target=os.getpid)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    if method == "forkserver":
        server._stop()


def test_children_get_no_empty_entry(bare, monkeypatch):
    """`PYTHONPATH=$PYTHONPATH:/opt/lib` often begins with an empty one, which is the working folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/opt/lib", ".", str(Path.cwd())]))
    env = launcher.environment(launcher.Plan(), "quiet")
    assert env["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/opt/lib"]) and env["PYTHONSAFEPATH"] == "1"
    monkeypatch.chdir(ROOT)  # a clone without an installation
    assert launcher.environment(launcher.Plan(), "quiet")["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_every_process_is_started_so(tmp_path):
    one = launcher.command(tmp_path, launcher.Plan(), launcher=False)
    assert one == [sys.executable, start.SCRIPT, "gzcli.engine", str(tmp_path)]
    several = launcher.command(tmp_path, launcher.Plan(processes=2), launcher=True)
    assert several[:3] == [sys.executable, start.SCRIPT, start.LAUNCHER] and several[-3:] == one[1:]
    assert launcher.show(tmp_path, launcher.Plan(gpus=1)).startswith("accelerate launch --config_file ")
    assert launcher.show(tmp_path, launcher.Plan()) == shlex.join(one)
    assert "-m" not in one + several and "-c" not in one + several


def test_a_spinner_waits_on_a_terminal_and_a_line_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    seen = Terminal()
    streams.start_spinner("loading torch", seen)
    streams.stop_spinner()
    assert "loading torch" in seen.getvalue() and "…" not in seen.getvalue()
    monkeypatch.setattr(streams, "LONG", 0.05)
    for stream, variable in ((io.StringIO(), "HOME"), (Terminal(), "CI")):
        monkeypatch.setenv(variable, "1")
        streams.start_spinner("loading torch", stream)
        streams.start_spinner("reading the images", stream)  # what is short has no line
        while not stream.getvalue():
            time.sleep(0.01)
        streams.stop_spinner()
        assert stream.getvalue() == "reading the images …\n"
    monkeypatch.setattr(streams, "_shows", False)
    streams.change_spinner("building the model")  # in a process that shows nothing
    assert not streams._spinners
