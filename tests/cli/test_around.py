"""What surrounds a training: variables of launchers and schedulers, and the processes of an earlier start."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

import gzcli
from gzcli.cli import doctor, out
from gzcli.core import devices, units
from gzcli.core.errors import DeviceError, MissingError, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.engine.__main__ import explain
from gzcli.engine.log import Log
from gzcli.launch import launcher, plan
from gzcli.launch.launcher import Plan
from gzcli.launch.plan import write_run
from gzcli.store import runs


def test_threads_are_the_first_number_of_a_list(monkeypatch):
    found = {"3": 3, "2,1": 2, " 4 ": 4, "": None, "0": None, "x": None, "²": None}
    for text, threads in found.items():
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert units.threads_wanted() == threads, text
        assert launcher.plan(LaunchSection(cpu=True, threads=None), every_gpu=True).threads >= 1


def test_a_variable_that_is_no_number_is_told(monkeypatch):
    for variable in ("SLURM_NNODES", "SLURM_STEP_NUM_NODES", "GZ_MAX_ARCHIVE"):
        monkeypatch.setenv(variable, "many")
        with pytest.raises(UsageError, match=f"`{variable}` is a number of .*, not `many`"):
            units.number_in(variable, "nodes")


def test_ranks_of_an_outer_launcher_are_not_the_engines(monkeypatch):
    for variable in ("PMI_SIZE", "OMPI_COMM_WORLD_RANK", "RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(variable, "4")
    env = launcher.environment(Plan(gpus=1), "quiet")
    assert not [key for key in env if key.startswith(("PMI_", "OMPI_", "RANK", "LOCAL_", "ACCELERATE_"))]


def test_a_run_goes_on_with_its_processes(home):
    def asked(**typed):
        return plan.ask("vae", "digits", (), {f"launch.{key}": value for key, value in typed.items()})

    first = asked(processes=2, cpu=True)
    run = runs.create("vae", "digits")
    write_run(run, first.recipe, Plan(processes=2, threads=3))

    def again(**typed):
        section = plan.launched_again(run, asked(**typed).recipe)
        return section.processes, section.gpus, section.cpu, section.threads

    assert again() == (2, None, True, 3)
    assert again(processes=1) == (1, None, True, None), "what is typed counts, and cores are shared out anew"
    assert again(gpus=4) == (None, 4, False, None)
    assert again(threads=5) == (2, None, True, 5)


# moves a cursor, sets a title, conceals, colours, turns the order of letters, is not seen, is half a letter
HOSTILE = "a\x1b[2J\x07\x9b31m\r\x1b]0;title\x1b[8m\x1b[31m\u202efdp\u2066\u200b\ufeff\U000e0041\ufdd0\udc80"
UNSEEN = {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160), 0x200B, *range(0x202A, 0x202F))}
UNSEEN |= {chr(i) for i in (*range(0x2066, 0x206A), 0xFEFF, 0xE0041, 0xFDD0, 0xDC80)}


@pytest.mark.parametrize("coloured", [True, False])
def test_control_characters_of_names_do_not_reach_the_terminal(capsys, monkeypatch, coloured):
    monkeypatch.setattr(out, "colourful", lambda stream: coloured)
    name = HOSTILE.replace("\ufdd0", "") if coloured else HOSTILE
    out.text(name)
    out.configure(json=True)
    out.data({"name": HOSTILE})
    out.configure(json=False)
    out.warn(f"{name}\tnext")
    out.line(out.style(name, "bold"))
    out.error(MissingError(name, hint=name))
    out.table(["name"], [[name]], to_stderr=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("y"))
    assert out.confirmed(f"remove {name}?")
    log = Log(mode="human")
    log.warn(name)
    shown, told = capsys.readouterr()
    assert json.loads(shown.splitlines()[1])["name"] == HOSTILE
    for code in (1, 31, 33, 36, 0):  # the colours of gz itself stay, and nothing else is one
        assert (f"\x1b[{code}m" in told) == coloured
        told = told.replace(f"\x1b[{code}m", "")
    assert not set(shown + told) & UNSEEN
    assert "\\u001b[8m\\u001b[31m\\u202efdp" in told and "\tnext\n" in told


def test_control_characters_of_names_do_not_reach_bars_and_logs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = Log(tmp_path, mode="human")
    with log.bar(f"sample {HOSTILE} [/red] [bold]") as progress:
        progress(1, 2)
        log.info(HOSTILE)
    with out.progress(f"{HOSTILE} [/red]") as report:
        report(1, 2)
    told = capsys.readouterr().err
    for sequence in (r"\x1b\[\??[0-9;]*[a-zA-Z]", "\r"):  # those by which rich draws its bars
        told = re.sub(sequence, "", told)
    assert "[/red] [bold]" in told and not set(told) & UNSEEN
    assert not set((tmp_path / "log.txt").read_text()) & UNSEEN


def test_control_characters_of_names_do_not_reach_pictures(tmp_path, capsys, recwarn):
    import numpy as np

    from gzcli.engine.pictures import sample_rows
    from gzcli.engine.sheets import Row, sheet

    names = [f"{HOSTILE}\nline", r"$\frac{$ and $x^2$", "\u6f22 \U0001f600"]
    sample_rows(tmp_path / "rows.png", [(name, np.zeros((2, 1, 8, 8), np.uint8)) for name in names])
    images = np.zeros((3, 1, 8, 8), np.uint8)
    assert sheet([[Row(name, images, names)] for name in names], "\n".join(names)).size
    assert not recwarn.list and capsys.readouterr() == ("", "")


def test_places_where_no_folder_can_be_made(gz, home, tmp_path, monkeypatch):
    """A message of its own, and no bug in gz; a dry run needs none."""
    file = tmp_path / "FILE"
    file.write_text("mine")
    cases = [
        (home, f"sample pretrained:vae -n 1 --out {file}/x", "not a directory"),
        (home, f"recipe copy vae {file}/x.yaml", "file exists"),
        (file, "train vae --steps 1", "not a directory"),
        (file / "home", "sample pretrained:vae -n 1", "not a directory"),
        (file, f"data import {tmp_path} --name mine", "file exists"),
        (file, "train vae --submit slurm", "not a directory"),
    ]
    if Path("/proc/self").exists():
        cases.append((Path("/proc/none"), "train vae --steps 1", "no such file or directory"))
    for place, words, told in cases:
        monkeypatch.setenv("GZ_HOME", str(place))
        code, _, stderr = gz(*words.split())
        error = stderr.partition("error: ")[2]
        assert code == 3 and told in error and "hint: " in error and "bug" not in error, words
        if place != home:
            bad = {check.name for check in doctor.folders() if check.state == "bad"}
            assert bad >= {"cache", "runs"} or "proc" in place.parts  # root may write there, the system says
            monkeypatch.setenv("GZ_TRIAL", "1")
            code, stdout, _ = gz("train", "vae", "--dry-run")
            assert code == 0 and "/costs` cannot be written (" in " ".join(stdout.split())
    assert file.read_text() == "mine"
    assert explain(NotADirectoryError(20, "Not a directory", "/a/b")).code == 3


# ---------------------------------------------------------------------------- GPUs that torch cannot use


@pytest.fixture
def foreign_gpu(home, tmp_path, monkeypatch):
    """A GPU that the driver lists and this machine's torch cannot use."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there are GPUs here")
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: GPU-aaa)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_that_torch_cannot_use_is_refused_by_all(foreign_gpu, gz, monkeypatch):
    """Exit code 4 with the reason where GPUs were asked for; by `gz doctor` with the same words."""
    told = "torch cannot use the GPU that is here: "
    for words in (
        "train vae --steps 1 --gpus 1",
        "train vae --steps 1 --gpus all",
        "sample pretrained:vae -n 1 --gpus 1",
        "ood pretrained:vae --out digits -n 10 --gpus 1",
        "bench pretrained:vae --gpus all",
        "bench --train-missing --budget 9s --models vae --data digits --gpus 1",
    ):
        code, _, stderr = gz(*words.split())
        assert code == 4 and told in stderr and "hint: install the torch that fits it" in stderr, words
    assert not runs.all_runs()
    with pytest.raises(DeviceError, match=told):
        gzcli.train("vae", steps=1, gpus=1)
    (check,) = [check for check in doctor.devices() if check.name == "gpu"]
    assert check.state == "bad" and check.detail == launcher.usable_gpus().lack
    with pytest.raises(DeviceError, match=told):
        devices.pick_device(LaunchSection(gpus=1))
    monkeypatch.setenv("GZ_GPUS", "1")
    with pytest.raises(DeviceError, match=told):
        devices.check_planned()
    assert explain(RuntimeError("CUDA error: no kernel image is available\nCompile with")).code == 4


def test_nobody_asked_for_the_gpu_that_torch_cannot_use(foreign_gpu, gz, monkeypatch):
    """The CPU is used, which is told."""
    monkeypatch.setattr(launcher, "_tried_apart", lambda there: devices.tried())
    words = ("train", "vae", "--dry-run", "--json")
    code, said, told = gz(*words)
    assert code == 0 and json.loads(said)["scale"] == "tiny" and json.loads(said)["gpus"] == 0
    assert "warning: torch cannot use the GPU that is here: " in told and "; the CPU is used" in told
    code, _, told = gz(*words, "--cpu")
    assert code == 0 and "GPU" not in told
    code, said, _ = gz(*words, "--gpus", "1")
    assert code == 0 and "1 GPU (torch cannot use" in json.loads(said)["needs"][0]
    with pytest.warns(UserWarning, match="the CPU is used"):
        assert devices.pick_device(LaunchSection()).type == "cpu"


def test_a_card_that_is_too_new_is_named(monkeypatch):
    """The first GPUs that can be used are; one without free memory counts as one of them."""
    ones = torch.ones

    def on_a_gpu(*shape, device):
        if device == "cuda:0":
            raise RuntimeError("CUDA error: out of memory")
        if device == "cuda:2":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with …")
        return ones(*shape)

    monkeypatch.setattr(devices, "count_gpus", lambda: 3)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(torch, "ones", on_a_gpu)
    found = devices.tried()
    assert (found.there, found.usable) == (3, 2)
    told = "CUDA error: no kernel image is available for execution"
    assert found.lack == f"torch can use 2 of the 3 GPUs that are here: card 2: {told}"
    monkeypatch.setattr(launcher, "usable_gpus", lambda: found)
    assert launcher.plan(LaunchSection(), every_gpu=True).note.endswith("; 2 are used")
    assert launcher.plan(LaunchSection(), every_gpu=False).note is None
    assert launcher.plan(LaunchSection(gpus="all"), every_gpu=True).gpus == 2
    with pytest.raises(DeviceError, match="`--gpus 3`: torch can use 2 of the 3"):
        launcher.plan(LaunchSection(gpus=3), every_gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5,6")
    assert devices.tried().why == "it sees 1 (`CUDA_VISIBLE_DEVICES=0,5,6`)"


def test_that_gpus_can_be_used_is_remembered(home, tmp_path, monkeypatch):
    """For the driver and the torch that are here; what cannot be used is tried each time."""
    asked, answers = [], [devices.Gpus(2, 0, "no driver"), devices.Gpus(2, 2)]
    monkeypatch.setattr(launcher, "count_gpus", lambda: 2)
    monkeypatch.setattr(launcher, "_tried_apart", lambda there: asked.append(there) or answers.pop(0))
    monkeypatch.setattr(launcher, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("580")
    for usable, times in ((0, 1), (2, 2), (2, 2)):
        launcher._usable.cache_clear()
        assert (launcher.usable_gpus().usable, len(asked)) == (usable, times)
    launcher._usable.cache_clear()
