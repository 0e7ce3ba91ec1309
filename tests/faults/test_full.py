"""Files that cannot be written: a disk or a quota that is full, a folder that is gone. Each is a message with
exit code 3 that says what to do, leaves nothing half, and the same command goes on once there is space."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_killed import TRAIN, left_over, run_a, unreadable, weights

from gzcli.cli.app import as_error
from gzcli.core.errors import SPACE_HINT
from gzcli.core.units import size
from gzcli.data.sets import registry
from gzcli.engine.pictures import pyplot, save_figure
from gzcli.store import files, png

WEIGHTS, NOISE = (
    {"w": torch.arange(64.0).reshape(8, 8)},
    np.random.default_rng(0).integers(0, 255, (64, 64, 1)),
)


def draw(path: Path) -> None:
    figure = pyplot().figure()
    figure.add_subplot().plot([0, 1], [0, 1])
    save_figure(figure, path)


# every writer of gz: (the file's name, a call that writes it)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text.json": lambda path: files.write_json(path, "x" * 500),
    "w.safetensors": lambda path: files.write_tensors(path, WEIGHTS, {"a": "b"}),
    "state.pt": lambda path: files.write_state(path, WEIGHTS),
    "a.npy": lambda path: files.write_array(path, np.arange(500.0)),
    "a.npz": lambda path: files.write_arrays(path, {"a": NOISE}),
    "a.png": lambda path: png.save_png(path, NOISE.astype(np.uint8)),
    "figure.png": draw,
}


@contextmanager
def largest(count: int) -> Iterator[None]:
    """No file of this process may be larger, as under `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def open_at_once(count: int) -> Iterator[None]:
    """This process may open so many files more, as under `ulimit -n`."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    for number in free:
        os.close(number)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_beyond_the_quota_is_a_message_and_leaves_nothing(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(OSError) as caught, largest(200):
        WRITERS[name](path)
    error = as_error(caught.value)
    assert (error.code, error.message) == (3, f"`{path}`: file too large") and SPACE_HINT in error.hint
    assert list(tmp_path.iterdir()) == []
    WRITERS[name](path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_in_another_library_is_a_message(tmp_path):
    with pytest.raises(Exception) as caught, largest(200):
        save_file({"w": torch.zeros(100)}, tmp_path / "w.safetensors")
    error = as_error(caught.value)
    assert error.code == 3 and "file too large" in error.message


@pytest.mark.parametrize("name", WRITERS)
def test_files_have_the_rights_of_the_umask(name, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            WRITERS[name](path := tmp_path / f"{mask}" / name)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_another_library_wrote_has_them_too(tmp_path):
    (tmp_path / "net").mkdir(mode=0o755)
    save_file(WEIGHTS, path := tmp_path / "net" / "w.safetensors")
    path.chmod(0o600)
    files.readable(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_tensors_come_back_with_equal_bytes_for_equal_metadata(tmp_path):
    texts = {letter: letter for letter in "qwertzuiop"}
    made = {
        files.bytes_of(WEIGHTS, dict(sorted(texts.items(), key=lambda _: os.urandom(4)))) for _ in range(9)
    }
    assert len(made) == 1
    files.write_tensors(tmp_path / "w", WEIGHTS, texts)
    assert torch.equal(load_file(tmp_path / "w")["w"], WEIGHTS["w"])
    assert files.read_tensors(tmp_path / "w")[1] == texts


def test_a_training_beyond_its_quota_says_so_and_resumes_to_the_bit(forks, tmp_path):
    unbroken, home = tmp_path / "unbroken" / "home", tmp_path / "full" / "home"
    for folder in (unbroken, home):
        folder.mkdir(parents=True)
    assert forks.do(*TRAIN, home=unbroken) == 0, forks.said()
    for most in (100_000, 10_000):  # a pack of the digits is larger, then a checkpoint
        assert forks.do(*TRAIN, home=home, largest=most) == 3, forks.said()
        assert "file too large" in forks.said().lower() and "hint: free some space" in forks.said()
        assert "bug" not in forks.said() and "internal" not in forks.said()
        assert unreadable(home) == []
        assert forks.do("runs", "list", home=home) == 0
        if most == 100_000:
            assert forks.do("data", "show", "digits", home=home) == 0, forks.said()
    assert forks.do(*TRAIN, home=home) == 0, forks.said()
    assert weights(run_a(home)) == weights(run_a(unbroken)) and left_over(home) == []


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (lambda: largest(2048), "file too large"),
        *((lambda n=n: open_at_once(n), "too many open files") for n in (4, 5)),
    ],
    ids=["size", "4 files", "5 files"],
)
def test_a_set_that_cannot_be_packed_is_a_message_and_leaves_nothing(limit, problem, call, home, tmp_path):
    (folder := tmp_path / "set").mkdir()
    for i in range(12):
        Image.fromarray(np.full((32, 32), i, np.uint8)).save(folder / f"{i}.png")
    words = ("data", "import", str(folder), "--name", "mine", "--skip-bad")
    assert call(*words)[0] == call("data", "remove", "mine", "--yes")[0] == 0, "all modules are loaded"
    with limit():
        code, _, stderr = call(*words)
    assert code == 3 and problem in stderr.lower() and "hint: " in stderr and "`ulimit -" in stderr
    assert not list(home.rglob("*.part*")) and "mine" not in registry.imports()
    assert call(*words)[0] == 0


def test_a_folder_that_cannot_be_made_is_a_message(call, tmp_path, monkeypatch):
    code, _, stderr = call("recipe", "copy", "vae", "/proc/nothing/vae.yaml")
    assert code == 3 and stderr.startswith("error: the folder `/proc/nothing` cannot be created\n")
    code, _, stderr = call("recipe", "copy", "vae", "/proc/vae.yaml")
    assert code == 3 and stderr.startswith("error: `/proc/vae.yaml` cannot be created\n")
    for name, write in WRITERS.items():
        with pytest.raises(files.MissingError, match="cannot be created"):
            write(Path("/proc") / name)
    monkeypatch.chdir("/proc")
    assert call("model", "new", "mine")[0] == 3
    monkeypatch.setenv("GZ_HOME", "/proc/nothing")
    code, _, stderr = call("train", "vae", "--data", "digits", "--steps", "2")
    assert code == 3 and "the folder `/proc/nothing" in stderr and "`GZ_HOME`" in stderr


def test_a_working_folder_that_was_removed_is_a_message(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    for words in (
        ("recipe", "copy", "vae"),
        ("data", "import", "x", "--name", "y"),
        ("model", "new", "mine"),
    ):
        code, _, stderr = call(*words)
        assert (code, stderr.splitlines()[0]) == (3, "error: the working folder was removed"), words
    words = [sys.executable, "-m", "gzcli", "--version"]
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_small_sizes_are_shown_in_kilobytes(tmp_path):
    assert [size(n) for n in (300, 4_321_000, 12e6, 3e9)] == ["300 bytes", "4.3 MB", "12 MB", "3.0 GB"]
    with pytest.raises(files.MissingError) as caught:
        files.need_space(tmp_path, 10**18)
    assert "GB of free space" in caught.value.message
