"""The store: what it makes and removes lies inside it, its names are no paths, its locks hold on every
system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from gzcli.core.errors import DamagedError, UsageError
from gzcli.engine import checkpoint
from gzcli.engine.log import Log
from gzcli.recipe.resolve import check
from gzcli.store import files, paths, runs
from gzcli.store.runs import Run

ROOT = Path(__file__).resolve().parents[2]


def tree_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def thesis(tmp_path) -> Path:
    """A folder of the user's that looks like one of gz's."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    for name in ("status.json", "job.json", "result.json", "run.yaml", "grid.png", "stop", "chapter.tex"):
        text = json.dumps({"state": "finished", "model": "vae", "data": "digits", "created": 1.0})
        (folder / name).write_text(text if name == "status.json" else "mine")
    return folder


def test_a_folder_of_the_user_s_is_never_removed(call, thesis, monkeypatch):
    before = tree_of(thesis)
    for ref in (str(thesis), f"{thesis}/.", "../thesis"):
        code, stdout, stderr = call("runs", "remove", ref, "--yes")
        assert (code, stdout) == (2, "") and "is no run in gz's store, and stays" in stderr
    monkeypatch.chdir(thesis)
    assert call("runs", "remove", ".", "--yes")[0] == 2
    Run(thesis).mark("run")  # a copied mark does not help outside the store
    assert call("runs", "remove", str(thesis), "--yes")[0] == 2
    (thesis / ".gz").unlink()
    (thesis / "status.json").write_text('{"state": "finished"}')  # another program's
    assert "no run is called" in call("runs", "remove", str(thesis), "--yes")[2]
    before["status.json"] = '{"state": "finished"}'
    assert tree_of(thesis) == before


@pytest.mark.parametrize("name", ["vae-digits-20260131-142501-ab12", "thesis"])
def test_a_link_and_a_folder_put_into_the_store_by_hand_stay(call, thesis, name):
    before, place = tree_of(thesis), paths.user_dir("runs") / name
    place.parent.mkdir(parents=True)
    thesis.rename(place) if name == "thesis" else place.symlink_to(thesis)
    assert call("runs", "remove", name, "--yes")[0] == 2
    assert call("runs", "prune", "--keep", "0", "--unfinished", "--yes")[0] == 0
    assert tree_of(place) == before and place.is_symlink() is (name != "thesis")


def test_runs_made_before_there_was_a_mark_can_be_removed(call):
    run = runs.create("vae", "digits")
    run.mark_file.unlink()
    run.update(state="finished", order=None)
    assert runs.create("vae", "digits").status()["order"] == 1
    assert call("runs", "remove", run.id, "--yes")[0] == 0 and not run.path.exists()


def test_a_stage_goes_with_its_run_only(call):
    run = runs.create("vqgan", "digits")
    run.recipe_file.write_text("stages: {tokenizer: {}, prior: {}}\n")
    for name in ("tokenizer", "prior"):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).update(state="finished", model=name)
    code, _, stderr = call("runs", "remove", f"{run.id}/stages/prior", "--yes")
    assert code == 2 and f"hint: gz runs remove {run.id}\n" in stderr and run.stage("prior").path.exists()
    assert call("runs", "remove", f"{run.id}/stages/../..", "--yes")[0] == 2 and run.path.exists()
    assert call("runs", "remove", run.id, "--yes")[0] == 0 and not run.path.exists()


def test_a_stage_s_name_is_no_path_and_no_link(home, tmp_path):
    run = runs.create("vqgan", "digits")
    run.stages_folder.mkdir()
    refusals = ("cannot be a stage's name", "a key must be a word")
    names = ("../../x", "a/b", "..", ".", "", "a.b", "Prior", "a b", "a\n", "/tmp/x", "a\\b")
    for i, name in enumerate(names):
        with pytest.raises(UsageError, match="cannot be a stage's name"):
            run.stage(name)
        recipe = tmp_path / f"evil{i}.yaml"
        recipe.write_text(f"stages:\n  {json.dumps(name)}: {{model: {{name: vae}}}}\n")
        assert any(text in problem for problem in check(str(recipe)) for text in refusals), name
        run.recipe_file.write_text(recipe.read_text())  # one from elsewhere
        assert run.stages == []
        with pytest.raises(DamagedError, match="is no recipe"):
            run.tree()
    (run.stages_folder / "prior").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="does not lie inside"):
        run.stage("prior")


def test_a_run_s_id_is_made_of_names(home):
    with pytest.raises(UsageError, match="cannot be in a run's id"):
        runs.create("vae", "../x")
    assert runs.create("vae", "MyPhotos").id.startswith("vae-myphotos-")
    run = runs.create("sd_lora", "digits")
    assert run.id.startswith("sd-lora-digits-") and run.model == "sd-lora"  # as it is typed
    assert runs.all_runs(model="sd_lora") == [run]


def test_a_name_can_be_typed_and_is_checked_before_anything_is_done(call):
    for alias in ("-x", ".x", "_x", "..", "a/b", "a b", ""):
        with pytest.raises(UsageError, match="a letter or digit first"):
            runs.check_alias(alias)
    runs.check_alias("a-1.b_2")
    for words in (("--dry-run",), ()):
        code, stdout, stderr = call("train", "vae", "--name", "-x", *words)
        assert (code, stdout) == (2, "") and "`--name -x` may hold letters" in stderr and not runs.all_runs()


def test_a_run_is_read_wherever_it_lies_and_no_weights_by_a_path_that_is_none(call, tmp_path):
    run = runs.create("vae", "digits")
    with pytest.raises(UsageError, match="no model or run is called"):  # no stage of that name either
        checkpoint.init_from(nn.Linear(1, 1), "../../elsewhere", run, Log())
    run.update(state="finished")
    run.recipe_file.write_text("model: {name: vae}\n")
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    assert call("runs", "path", str(moved))[:2] == (0, f"{moved}\n")
    assert call("runs", "remove", str(moved), "--yes")[0] == 2 and Run(moved).state == "finished"


def test_the_newest_is_the_last_one_made_whatever_the_clock_says(home, monkeypatch):
    made = []
    for clock in (3000.0, 2000.0, 1000.0):  # set back twice
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        made.append(runs.create("vae", "digits"))
    assert runs.all_runs() == made[::-1]
    runs.remove(made[2])
    assert runs.all_runs()[0] == made[1] and runs.create("vae", "digits") == runs.all_runs()[0]
    for run, created in zip(runs.all_runs()[1:], (1.0, 2.0), strict=True):  # of before they were numbered
        run.update(created=created, order=0)
    assert [run.status()["created"] for run in runs.all_runs()][1:] == [2.0, 1.0]


HOLD = """
import sys, time
from pathlib import Path
from gzcli.store.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_free_when_its_holder_dies(tmp_path):
    path = tmp_path / "a" / ".lock"
    assert not files.is_locked(path)
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    assert files.is_locked(path)
    with files.lock(path, wait=False) as got:
        assert not got
    told = []
    with files.lock(path, on_wait=lambda: (told.append(1), child.kill())) as got:
        assert got and told == [1] and files.is_locked(path)  # who waits is told so once
    child.communicate()
    assert not files.is_locked(path)


WINDOWS = """
import os, sys
sys.modules["fcntl"] = None
import warnings
warnings.simplefilter("ignore")
from pathlib import Path
from gzcli.store import files, runs
from gzcli.__main__ import main
run = runs.create("vae", "digits", alias="here")
run.update(state="running")
assert run.state == "killed"
with files.lock(run.lock) as got:
    assert got and files.is_locked(run.lock) and run.state == "running"
    with files.lock(run.lock, wait=False) as again:
        assert not again
assert not files.is_locked(run.lock)
os.name = "nt"
files.fsync(run.path)  # a folder, which Windows does not open
os.name = "posix"
sys.exit(main(["runs", "list"]))
"""


def test_without_fcntl(home):
    words = [sys.executable, "-c", WINDOWS]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0 and "here  killed" in done.stdout, done.stderr
