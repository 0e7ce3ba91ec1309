"""The store: what it makes and removes lies inside it, its names are no paths, its locks hold on every
system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gzcli.cli import app
from gzcli.engine.trainer import Trainer
from gzcli.errors import MissingError, UsageError
from gzcli.recipe.resolve import check, resolve
from gzcli.store import files, owned, paths, runs
from gzcli.store.runs import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gz(home, capsys, monkeypatch, tmp_path):
    """gz("runs", "list") in a clean folder → (exit code, stdout, stderr); no data is packed."""
    monkeypatch.setattr("gzcli.cli.train.with_data", lambda recipe, run=None: recipe)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(list(words))
        return (code, *capsys.readouterr())

    return call


def tree_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def thesis(tmp_path) -> Path:
    """A folder of the user's that looks like one of ours."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    for name in ("status.json", "job.json", "result.json", "run.yaml", "grid.png", "stop", "chapter.tex"):
        text = json.dumps({"state": "finished", "model": "vae", "data": "digits", "created": 1.0})
        (folder / name).write_text(text if name == "status.json" else "mine")
    return folder


# --- what is removed ---


def test_a_folder_of_the_user_s_is_never_removed(gz, thesis, monkeypatch):
    before = tree_of(thesis)
    for ref in (str(thesis), f"{thesis}/.", "../thesis"):
        code, stdout, stderr = gz("runs", "remove", ref, "--yes")
        assert (code, stdout) == (2, "") and "is no run in gz's store, and stays" in stderr
    monkeypatch.chdir(thesis)
    assert gz("runs", "remove", ".", "--yes")[0] == 2
    owned.mark(thesis, "run")  # a copied mark does not help outside the store
    assert gz("runs", "remove", str(thesis), "--yes")[0] == 2
    (thesis / ".gz").unlink()
    (thesis / "status.json").write_text('{"state": "finished"}')  # another program's
    assert "no run is called" in gz("runs", "remove", str(thesis), "--yes")[2]
    before["status.json"] = '{"state": "finished"}'
    assert tree_of(thesis) == before


def test_a_link_in_the_store_is_not_followed(gz, thesis):
    before, link = tree_of(thesis), paths.user_dir("runs") / "vae-digits-20260131-142501-ab12"
    link.parent.mkdir(parents=True)
    link.symlink_to(thesis)
    assert gz("runs", "remove", link.name, "--yes")[0] == 2
    assert gz("runs", "prune", "--keep", "0", "--yes")[0] == 0
    assert tree_of(thesis) == before and link.is_symlink()


def test_a_folder_put_into_the_store_by_hand_stays(gz, thesis):
    mine = paths.user_dir("runs") / "thesis"
    mine.parent.mkdir(parents=True)
    thesis.rename(mine)
    assert gz("runs", "prune", "--keep", "0", "--unfinished", "--yes")[0] == 0
    assert gz("runs", "remove", "thesis", "--yes")[0] == 2 and (mine / "chapter.tex").exists()


def test_runs_made_before_there_was_a_mark_can_be_removed(gz):
    run = runs.create("vae", "digits")
    (run.path / owned.MARK).unlink()
    run.update(state="finished", order=None)
    assert gz("runs", "remove", run.id, "--yes")[0] == 0 and not run.path.exists()


def test_a_stage_goes_with_its_run_only(gz):
    run = runs.create("vqgan", "digits")
    (run.path / "run.yaml").write_text("stages: {tokenizer: {}, prior: {}}\n")
    for name in ("tokenizer", "prior"):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).update(state="finished", model=name)
    code, _, stderr = gz("runs", "remove", f"{run.id}/stages/prior", "--yes")
    assert code == 2 and f"hint: gz runs remove {run.id}\n" in stderr and run.stage("prior").path.exists()
    assert gz("runs", "remove", f"{run.id}/stages/../..", "--yes")[0] == 2 and run.path.exists()
    assert gz("runs", "remove", run.id, "--yes")[0] == 0 and not run.path.exists()


# --- names are no paths ---


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "", "a.b", "Prior", "a b", "a\n", "/tmp/x", "a\\b"])
def test_a_stage_s_name_is_no_path(home, tmp_path, name):
    run = runs.create("vqgan", "digits")
    with pytest.raises(UsageError, match="cannot be a stage's name"):
        run.stage(name)
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"stages:\n  {json.dumps(name)}: {{model: {{name: vae}}}}\n")
    refusals = ("cannot be a stage's name", "a key must be a word")
    assert any(text in problem for problem in check(str(recipe)) for text in refusals)
    (run.path / "run.yaml").write_text(recipe.read_text())  # one from elsewhere
    (run.path / "stages").mkdir()
    with pytest.raises(UsageError, match="cannot be a stage's name"):
        _ = run.stages


def test_a_link_among_the_stages_leads_nowhere(home, tmp_path):
    run = runs.create("vqgan", "digits")
    (run.path / "stages").mkdir()
    (run.path / "stages" / "prior").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="does not lie inside"):
        run.stage("prior")


def test_a_run_s_id_is_made_of_names(home):
    with pytest.raises(UsageError, match="cannot be in a run's id"):
        runs.create("vae", "../x")
    assert runs.create("vae", "MyPhotos").id.startswith("vae-myphotos-")
    run = runs.create("sd_lora", "digits")
    assert run.id.startswith("sd-lora-digits-") and run.model == "sd-lora"  # as it is typed
    assert runs.all_runs(model="sd_lora") == [run]


@pytest.mark.parametrize("alias", ["-x", ".x", "_x", "..", "a/b", "a b", ""])
def test_an_alias_can_be_typed(home, alias):
    with pytest.raises(UsageError, match="a letter or digit first"):
        runs.create("vae", "digits", alias=alias)
    assert runs.create("vae", "digits", alias="a-1.b_2").alias == "a-1.b_2"


def test_a_name_is_checked_before_anything_is_done(gz):
    for words in (("--dry-run",), ()):
        code, stdout, stderr = gz("train", "vae", "--name", "-x", *words)
        assert (code, stdout) == (2, "") and "`--name -x` may hold letters" in stderr and not runs.all_runs()


def test_weights_to_begin_with_are_looked_for_in_place(home, tmp_path):
    """`train.init` is a path or a run's name: it is no stage's name until there is one."""
    trainer = Trainer.__new__(Trainer)
    trainer.run = runs.create("vae", "digits")
    with pytest.raises(UsageError, match="no model or run is called"):
        trainer.init_from("../../elsewhere")


# --- order ---


def test_the_newest_is_the_last_one_made_whatever_the_clock_says(home, monkeypatch):
    made = []
    for clock in (3000.0, 2000.0, 1000.0):  # set back twice
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        made.append(runs.create("vae", "digits"))
    assert runs.all_runs() == made[::-1]
    runs.remove(made[2])
    assert runs.all_runs()[0] == made[1] and runs.create("vae", "digits") == runs.all_runs()[0]


def test_runs_of_before_they_were_counted_come_by_their_time(home):
    made = [runs.create("vae", "digits") for _ in range(3)]
    for run, created in zip(made[:2], (2.0, 1.0), strict=True):
        run.update(created=created, order=0)
    assert runs.all_runs() == [made[2], made[0], made[1]]


def test_runs_made_in_one_second_are_apart(home, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260131-142501")
    assert len({runs.create("vae", "digits").path for _ in range(20)}) == 20
    assert sorted(run.status()["order"] for run in runs.all_runs()) == list(range(1, 21))


# --- locks ---

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
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not files.is_locked(path)
    with files.lock(path, wait=False) as got:
        assert got and files.is_locked(path)
    assert not files.is_locked(path)


def test_who_waits_is_told_so_once(tmp_path):
    path, told = tmp_path / ".lock", []
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    with files.lock(path, on_wait=lambda: (told.append(1), child.kill())) as got:
        assert got and told == [1]
    child.communicate()


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
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0 and "here  killed" in done.stdout, done.stderr


# --- failed starts ---


def test_a_start_that_failed_leaves_no_run_and_no_name_taken(gz, monkeypatch):
    from gzcli import launch

    def fail(error):
        def run(folder, *args, **options):
            raise error

        return run

    monkeypatch.setattr(launch, "run", fail(MissingError("no such weights")))
    code, _, stderr = gz("train", "vae", "--name", "mine")
    assert code == 3 and "nothing was trained: `vae-digits-" in stderr and not runs.all_runs()
    monkeypatch.setattr(launch, "run", fail(RuntimeError("boom")))  # a fault of ours: its log is wanted
    assert gz("train", "vae", "--name", "mine")[0] == 1
    (kept,) = runs.all_runs()
    assert (kept.state, kept.alias) == ("failed", None)
    assert gz("train", "vae", "--resume")[0] == 3  # and nothing takes it
    assert gz("sample", "vae")[0] == 3
    monkeypatch.setattr(launch, "run", fail(KeyboardInterrupt()))
    assert gz("train", "vae", "--name", "mine")[0] == 130 and runs.all_runs() == [kept]


def test_a_run_that_was_trained_a_while_stays(gz, monkeypatch):
    from gzcli import launch

    def run(folder, *args, **options):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        raise MissingError("the disk is gone")

    monkeypatch.setattr(launch, "run", run)
    assert gz("train", "vae", "--name", "mine")[0] == 3
    (kept,) = runs.all_runs()
    assert kept.alias == "mine" and kept.has_begun


# --- recipes start nothing ---


def test_a_recipe_starts_no_program(gz, tmp_path, monkeypatch):
    from gzcli import launch

    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch:\n  extra: [--no_python, touch, X]\n")
    code, _, stderr = gz("train", str(recipe))
    assert code == 2 and f"{recipe}:3:3: `launch.extra` is for the command line alone" in stderr
    assert "after `--`" in stderr
    assert gz("train", "vae", "--set", "launch.extra=[--no_python]")[0] == 2
    started = []
    monkeypatch.setattr(launch, "run", lambda folder, plan, **options: started.append(plan))
    assert gz("train", "vae", "--", "--gpu-ids=0", "--debug")[0] == 0
    assert started[0].extra == ("--gpu_ids", "0", "--debug")
    (run,) = runs.all_runs()
    assert "extra" not in run.tree()["launch"]
    text = (run.path / "run.yaml").read_text().replace("launch:\n", "launch:\n  extra: [--no_python, touch, X]\n")
    (run.path / "run.yaml").write_text(text)
    for words in (("train", run.id), ("train", run.id, "--resume"), ("train", "vae", "--resume")):
        gz(*words)
        assert all(plan.extra == () for plan in started[1:])
    (run.path / "run.yaml").write_text(text.replace("[--no_python, touch, X]", "[]"))  # of a run made before today
    assert resolve(str(run.path / "run.yaml")).card.name == "vae"
    env = {"command": ["gz", "train", "vae", "--", "--debug"]}
    (run.path / "env.json").write_text(json.dumps(env))
    assert "note: it was started with `-- --debug`, which is not taken over" in gz("train", run.id, "--resume")[2]
    assert started[-1].extra == ()


def test_a_recipe_does_not_say_where_processes_meet(gz, tmp_path, monkeypatch):
    """They unpickle what they are sent there."""
    from gzcli import launch

    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch: {machines: 2, machine_rank: 1, main_ip: evil.example}\n")
    code, _, stderr = gz("train", str(recipe))
    assert code == 2 and all(f"`launch.{key}` is for" in stderr for key in ("machines", "machine_rank", "main_ip"))
    started = []
    monkeypatch.setattr(launch, "run", lambda folder, plan, **options: started.append(plan))
    typed = ("--num-machines", "2", "--machine-rank", "1", "--main-process-ip", "10.0.0.1")
    assert gz("train", "vae", *typed)[0] == 0 and started[0].main_ip == "10.0.0.1"
    (run,) = runs.all_runs()
    assert run.tree()["launch"]["main_ip"] is None
    assert gz("train", run.id)[0] == 0 and started[1].main_ip is None and started[1].machines == 1


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("--no_python", "`--no_python` is not passed on", "these are: --debug"),
        ("--no_py", "`--no_py` is not passed on", "--gpu_ids"),  # argparse would complete it
        ("--config_file x.yaml", "`--config_file` is not passed on", "--gpu_ids"),
        ("--use_fsdp", "sharding them is not supported", "train.accumulate"),
        ("--use-deepspeed", "sharding them is not supported", "train.accumulate"),
        ("-m x", "`-m` is not passed on", "--gpu_ids"),
        ("--debug evil.py", "`evil.py` is no option", "only options and their values"),
        ("--gpu_ids", "`--gpu_ids` needs a value", "accelerate launch --help"),
        ("--gpu_ids --debug", "`--gpu_ids` needs a value", "accelerate launch --help"),
        ("--debug=1", "`--debug` takes no value", "--debug"),
        ("--rdzv_backnd c10d", "`--rdzv_backnd` is not passed on", "--rdzv_backend"),
        ("--mixed_precision bf16", "`--mixed_precision` is not passed on", "--set train.precision=bf16"),
        ("--num-machines 2", "`--num-machines` is not passed on", "`--num-machines N`"),
    ],
)
def test_what_may_stand_after_the_dashes(gz, words, message, hint):
    code, stdout, stderr = gz("train", "vae", "--dry-run", "--", *words.split())
    assert (code, stdout) == (2, "") and message in stderr and hint in stderr.partition("hint:")[2]


def test_a_run_is_read_wherever_it_lies(gz, tmp_path):
    run = runs.create("vae", "digits")
    run.update(state="finished")
    (run.path / "run.yaml").write_text("model: {name: vae}\n")
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    assert gz("runs", "path", str(moved))[:2] == (0, f"{moved}\n")
    assert gz("runs", "remove", str(moved), "--yes")[0] == 2 and Run(moved).state == "finished"
