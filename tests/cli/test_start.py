"""What a start runs: nothing from the working folder, no program that a recipe or run of a stranger names."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TRAPS, traps

from gzcli.core import streams
from gzcli.launch import launcher
from gzcli.recipe.resolve import resolve
from gzcli.store import runs, start

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
    paths = re.findall(r"'(.*)',", python(start.SCRIPT, "site"))  # which prints `sys.path`
    assert str(ROOT) in paths and str(Path.cwd()) not in paths and str(ROOT / "gzcli") not in paths
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
    env = launcher.child_environment(launcher.Plan(), "quiet")
    assert env["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/opt/lib"]) and env["PYTHONSAFEPATH"] == "1"
    monkeypatch.chdir(ROOT)  # a clone without an installation
    assert launcher.child_environment(launcher.Plan(), "quiet")["PYTHONPATH"].split(os.pathsep)[0] == str(
        ROOT
    )


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
    monkeypatch.setattr(streams, "LONG_WAIT_SECONDS", 0.05)
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


@pytest.mark.parametrize(("module", "shown"), [(start.ENGINE, True), ("gzcli.league", False)])
def test_only_the_engine_shows_that_torch_is_loading(module, shown, monkeypatch):
    """Nothing ends the spinner of another module, which would turn until the process ends."""
    texts = []
    monkeypatch.setenv("GZ_OUTPUT", "human")
    monkeypatch.setattr(sys, "argv", [start.SCRIPT, module])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(runpy, "run_module", lambda *args, **options: None)
    monkeypatch.setattr(streams, "start_spinner", texts.append)
    start.main()
    assert texts == (["loading torch"] if shown else [])


def test_a_recipe_starts_no_program(call, tmp_path, monkeypatch):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch:\n  extra: [--no_python, touch, X]\n")
    code, _, stderr = call("train", str(recipe))
    assert code == 2 and f"{recipe}:3:3: `launch.extra` is accepted on the command line only" in stderr
    assert "after `--`" in stderr
    assert call("train", "vae", "--set", "launch.extra=[--no_python]")[0] == 2
    started = []
    monkeypatch.setattr(launcher, "run", lambda folder, plan, **options: started.append(plan))
    assert call("train", "vae", "--", "--gpu-ids=0", "--debug")[0] == 0
    assert started[0].extra == ("--gpu_ids", "0", "--debug")
    (run,) = runs.all_runs()
    assert "extra" not in run.tree()["launch"]
    text = run.recipe_file.read_text().replace("launch:\n", "launch:\n  extra: [--no_python, touch, X]\n")
    run.recipe_file.write_text(text)
    for words in (("train", run.id), ("train", run.id, "--resume"), ("train", "vae", "--resume")):
        call(*words)
        assert all(plan.extra == () for plan in started[1:])
    # older runs have the key, without a value
    run.recipe_file.write_text(text.replace("[--no_python, touch, X]", "[]"))
    assert resolve(str(run.recipe_file)).card.name == "vae"
    env = {"command": ["gz", "train", "vae", "--", "--debug"]}
    (run.path / "env.json").write_text(json.dumps(env))
    note = "note: resuming does not repeat `-- --debug`"
    assert note in call("train", run.id, "--resume")[2]
    assert started[-1].extra == ()


def test_a_recipe_does_not_say_where_processes_meet(call, tmp_path, monkeypatch):
    """Processes unpickle what they receive at the address where they meet."""
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch: {machines: 2, machine_rank: 1, main_ip: evil.example}\n")
    code, _, stderr = call("train", str(recipe))
    keys = ("machines", "machine_rank", "main_ip")
    assert code == 2 and all(f"`launch.{key}` is accepted on the command line" in stderr for key in keys)
    started = []
    monkeypatch.setattr(launcher, "run", lambda folder, plan, **options: started.append(plan))
    typed = ("--num-machines", "2", "--machine-rank", "0", "--main-process-ip", "10.0.0.1")
    assert call("train", "vae", *typed)[0] == 0 and started[0].main_ip == "10.0.0.1"
    (run,) = runs.all_runs()
    assert run.tree()["launch"]["main_ip"] is None
    assert call("train", run.id)[0] == 0 and started[1].main_ip is None and started[1].machines == 1


REFUSED = [
    ("--no_python", "`--no_python` cannot be passed", "allowed options: --debug"),
    ("--no_py", "`--no_py` cannot be passed", "--gpu_ids"),  # argparse would complete it
    ("--config_file x.yaml", "`--config_file` cannot be passed", "--gpu_ids"),
    ("--use_fsdp", "`--use_fsdp` cannot be passed", "`--set launch.strategy=fsdp`"),
    ("--use-deepspeed", "`--use-deepspeed` cannot be passed", "`--set launch.strategy=fsdp`"),
    ("-m x", "`-m` cannot be passed", "--gpu_ids"),
    ("--debug evil.py", "`evil.py` is not an option", "only options and their values"),
    ("--gpu_ids", "`--gpu_ids` needs a value", "accelerate launch --help"),
    ("--gpu_ids --debug", "`--gpu_ids` needs a value", "accelerate launch --help"),
    ("--debug=1", "`--debug` takes no value", "--debug"),
    ("--rdzv_backnd c10d", "`--rdzv_backnd` cannot be passed", "--rdzv_backend"),
    ("--mixed_precision bf16", "`--mixed_precision` cannot be passed", "--set train.precision=bf16"),
    ("--num-machines 2", "`--num-machines` cannot be passed", "`--num-machines N`"),
]


def test_what_may_stand_after_the_dashes(call):
    for words, message, hint in REFUSED:
        code, stdout, stderr = call("train", "vae", "--dry-run", "--", *words.split())
        assert (code, stdout) == (2, "") and message in stderr, words
        assert hint in stderr.partition("hint:")[2], words
