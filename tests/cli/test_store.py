"""The store: what it makes and removes lies inside it, its locks hold, its index sees every change."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from gzcli.cli.app import build
from gzcli.cli.completion import candidates
from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.core.sections import Part, TrainSection
from gzcli.engine.log import Log
from gzcli.engine.trained import init_from
from gzcli.recipe.resolve import check
from gzcli.store import files, index, paths, runs
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
        assert (code, stdout) == (2, "") and "is not a run in gz's store, so gz does not remove it" in stderr
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
    refusals = ("is not a valid name for a stage", "a key must be a word")
    names = ("../../x", "a/b", "..", ".", "", "a.b", "Prior", "a b", "a\n", "/tmp/x", "a\\b")
    for i, name in enumerate(names):
        with pytest.raises(UsageError, match="is not a valid name for a stage"):
            run.stage(name)
        recipe = tmp_path / f"evil{i}.yaml"
        recipe.write_text(f"stages:\n  {json.dumps(name)}: {{model: {{name: vae}}}}\n")
        assert any(text in problem for problem in check(str(recipe)) for text in refusals), name
        run.recipe_file.write_text(recipe.read_text())  # one from elsewhere
        assert run.stages == []
        with pytest.raises(DamagedError, match="is not a recipe"):
            run.tree()
    (run.stages_folder / "prior").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not inside"):
        run.stage("prior")


def test_a_run_s_id_is_made_of_names(home):
    with pytest.raises(UsageError, match="is not valid in a run's id"):
        runs.create("vae", "../x")
    assert runs.create("vae", "MyPhotos").id.startswith("vae-myphotos-")
    run = runs.create("sd_lora", "digits")
    assert run.id.startswith("sd-lora-digits-") and run.model == "sd-lora"  # as it is typed
    assert runs.all_runs(model="sd_lora") == [run]


def test_a_name_can_be_typed_and_is_checked_before_anything_is_done(call):
    for alias in ("-x", ".x", "_x", "..", "a/b", "a b", ""):
        with pytest.raises(UsageError, match="is not a valid name"):
            runs.check_alias(alias)
    runs.check_alias("a-1.b_2")
    for words in (("--dry-run",), ()):
        code, stdout, stderr = call("train", "vae", "--name", "-x", *words)
        assert (
            (code, stdout) == (2, "") and "`--name -x` is not a valid name" in stderr and not runs.all_runs()
        )


def test_a_run_is_read_wherever_it_lies_and_no_weights_by_a_path_that_is_none(call, tmp_path):
    run = runs.create("vae", "digits")
    with pytest.raises(MissingError, match="does not exist"):  # no stage of that name either
        init_from(nn.Linear(1, 1), Part("vae", train=TrainSection(init="../../elsewhere")), run, Log())
    run.update(state="finished")
    run.recipe_file.write_text("model: {name: vae}\n")
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    assert call("runs", "path", str(moved))[:2] == (0, f"{moved}\n")
    assert call("runs", "remove", str(moved), "--yes")[0] == 2 and Run(moved).state == "finished"


def test_a_missing_run_is_told_with_the_set_as_it_was_typed_and_with_a_run_on_it(home):
    hints = []
    for alias in ("mine", "other"):
        with pytest.raises(MissingError, match=r"no finished run of `fm` on `\./my photos`") as error:
            runs.find("fm", data="photos-abc", typed="./my photos")
        hints.append(error.value.hint)
        runs.create("cfm", "photos-abc", alias=alias).update(state="finished")
    assert hints == [(line := "gz train fm --data './my photos'"), f"`{line}`, or use your run `mine`"]


def test_ids_are_in_order_and_the_newest_is_the_last_one_made_whatever_the_clock_says(home, monkeypatch):
    made = []
    for clock in (1_700_000_000, 1_700_000_000, 1_699_996_400, 1_700_000_001):  # an hour back
        monkeypatch.setattr(time, "time", lambda clock=clock: float(clock))
        made.append(runs.create("vae", "digits"))
    ids = [run.id for run in made]
    assert ids == sorted(ids) and len({name[:26] for name in ids}) == 4 and runs.all_runs() == made[::-1]
    runs.remove(made.pop())
    assert runs.all_runs()[0] == made[-1]
    monkeypatch.setattr(time, "time", lambda: 1_600_000_000.0)  # the others are of a clock that was wrong
    assert runs.create("vae", "digits").id < ids[0] and runs.all_runs()[-1] == made[0]
    for run, created in zip(runs.all_runs()[1:], (1.0, 2.0, 3.0), strict=True):
        run.update(created=created, order=0)  # as before they were numbered
    assert [run.status()["created"] for run in runs.all_runs()][1:] == [3.0, 2.0, 1.0]


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
    notices = []
    with files.lock(path, on_wait=lambda: (notices.append(1), child.kill())) as got:
        assert got and notices == [1] and files.is_locked(path)  # who waits is told so once
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


MANY = 40


@pytest.fixture
def store(home, monkeypatch) -> list[Run]:
    """Finished runs, whose files count as settled at once."""
    monkeypatch.setattr(index, "SETTLED", 0)
    monkeypatch.setattr(index, "_open", {})
    made = []
    for i in range(MANY):
        run = Run(home / "runs" / f"vae-digits-20260101-0000{i % 60:02}-{i:04x}")
        run.checkpoints_folder.mkdir(parents=True)
        status = {"state": "finished", "model": "vae", "data": "digits", "order": i, "step": 4, "steps": 4}
        run.status_file.write_text(json.dumps(status | {"alias": f"own{i}"}))
        run.mark_file.write_text('{"kind": "run"}')
        run.best_file.write_text(f'{{"metric": "bpd", "value": {i}, "step": 4}}')
        run.metrics_file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n')
        made.append(run)
    return made


@pytest.fixture
def counted(monkeypatch):
    """counted(work) → what `work` returns as in a new process, and how many files of the store it opens."""

    def counted(work) -> tuple:
        opened: list[str] = []

        def counting(function, file, /, *args, **options):
            if "/runs/" in str(file):
                opened.append(str(file))
            return function(file, *args, **options)

        monkeypatch.setattr(index, "_open", {})
        with monkeypatch.context() as patch:
            for module in (builtins, io, os):
                patch.setattr(module, "open", partial(counting, module.open))
            result = work()
        return result, len(opened)

    return counted


@pytest.fixture
def listed(call, counted):
    """listed() → the rows of `gz runs list --json` by id, and how many files of the store it opens."""

    def listed() -> tuple[dict[str, dict], int]:
        (code, text, _), count = counted(lambda: call("runs", "list", "--json"))
        assert code == 0
        return {row["run"]: row for row in json.loads(text)["runs"]}, count

    return listed


def test_a_list_of_many_opens_few_files(store, listed, call, counted):
    first, all_of_them = listed()
    again, few = listed()
    assert first == again and len(first) == MANY and all_of_them > 3 * MANY and few == 2
    for ref in ("own7", store[7].id):
        (_, text, _), count = counted(lambda ref=ref: call("runs", "path", ref))
        assert text.strip() == str(store[7].path) and count <= 2
    show = build(["runs"])
    names, count = counted(lambda: candidates(show, ["runs", "show"], "own1"))
    assert len(names) == 11 and count <= 1


def test_what_others_change_is_seen(store, listed):
    listed()
    store[3].update(state="interrupted", step=2)  # renamed into place
    path = store[4].status_file
    path.write_text(path.read_text().replace("own4", "new4"))  # in place
    os.utime(path, ns=(0, 0))
    files.write_json(store[5].best_file, {"metric": "bpd", "value": 9, "step": 4})
    with open(store[6].metrics_file, "a") as f:
        f.write('{"step": 3, "loss": 1}\n')
    files.write_atomic(store[7].samples_picture(1), bytes(5000))
    runs.remove(store[8])
    new = runs.create("vae", "digits")
    before, (rows, _) = listed()[0], listed()
    assert before == rows and len(rows) == MANY and store[8].id not in rows
    assert rows[new.id]["state"] == "planned"
    assert (rows[store[3].id]["state"], rows[store[3].id]["step"]) == ("interrupted", 2)
    assert rows[store[4].id]["alias"] == "new4" and rows[store[5].id]["best"]["value"] == 9
    assert rows[store[6].id]["curve"]["values"] == [3, 2, 1] and rows[store[7].id]["bytes"] > 5000
    assert next(iter(rows)) == new.id  # numbered after the newest that is known


def test_an_index_that_is_damaged_or_gone_is_made_again_in_silence(store, listed, call):
    rows, _ = listed()
    for how in (None, b"", b"[]", b"gz 1 00000000\n{}", bytes(9), "cut", "changed"):
        for path in (store[0].path.parent / index.INDEX_NAME.format(kind) for kind in ("status", "summary")):
            whole = path.read_bytes()
            changed = {"cut": whole[: len(whole) // 2], "changed": whole.replace(b"finished", b"diverged")}
            path.unlink() if how is None else path.write_bytes(changed.get(how, how))
        assert listed()[0] == rows and listed() == (rows, 2), how
    assert call("runs", "list")[2] == ""


def test_a_store_that_may_only_be_read_and_a_file_of_this_moment(store, listed, monkeypatch):
    """A second change within the clock's tick could leave time and size of a file as they are."""

    def refuse(path: Path, content: str) -> None:
        raise PermissionError(13, "no", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", refuse)
        assert listed()[0] == listed()[0]
    monkeypatch.setattr(index, "SETTLED", 3600e9)
    listed()
    assert listed()[1] > MANY
