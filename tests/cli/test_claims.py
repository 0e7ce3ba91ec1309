"""Where jobs write: into a folder of their own, or one that the user gave and that holds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from gzcli.core.errors import GzError, UsageError
from gzcli.launch import launcher
from gzcli.store import claims, files, runs
from gzcli.store.runs import Run


@pytest.fixture
def run(home) -> Run:
    """A finished run called `mine`."""
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished", step=700)
    (run.path / "run.yaml").write_text("model: {name: vae}\n")
    (run.path / "model.safetensors").touch()
    return run


@pytest.fixture
def engine(monkeypatch):
    """The engine writes a result, or fails: engine.append(error)."""
    errors: list[Exception] = []

    def work(folder: Path, plan, **options):
        (folder / "log.txt").write_text("…")
        if errors:
            Run(folder).update(state="failed")
            raise errors.pop()
        Run(folder).update(state="finished")
        (folder / "grid.png").touch()
        grid = str(folder / "grid.png")
        more = {"npz": None, "animation": None, "n": 1, "seconds": 1.0}
        files.write_json(folder / "result.json", {"grid": grid, "files": [grid], **more})

    monkeypatch.setattr(launcher, "run", work)
    return errors


def test_a_folder_that_holds_anything_is_never_written_into(call, run, engine, tmp_path):
    for name in ("status.json", "job.json", "result.json", "grid.png", "stop", "chapter.tex"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        code, stdout, stderr = call("sample", "mine", "--out", str(folder))
        assert (code, stdout) == (2, "") and f"the folder `{folder}` is not empty" in stderr
        assert "hint: name a new or an empty one" in stderr
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}
        words = ("runs", "export", "mine", "--to", "diffusers", "--out", str(folder))
        assert call(*words)[0] == 2 and len(list(folder.iterdir())) == 1
    status = run.status()
    assert call("sample", "mine", "--out", str(run.path))[0] == 2 and run.status() == status
    assert call("sample", "mine", "--out", str(run.path / "run.yaml"))[0] == 2
    assert call("sample", "mine", "--out", str(tmp_path / "new" / "one"))[0] == 0
    # files of two jobs would be mixed
    assert call("sample", "mine", "--out", str(tmp_path / "new" / "one"))[0] == 2
    (tmp_path / "empty").mkdir()
    assert call("sample", "mine", "--out", str(tmp_path / "empty"))[0] == 0
    assert call("runs", "remove", str(tmp_path / "empty"), "--yes")[0] == 2
    assert (tmp_path / "empty" / "grid.png").exists()


def test_after_a_failed_attempt_the_folder_is_free_again(call, run, engine, tmp_path):
    words = ("sample", "mine", "--out", str(tmp_path / "out"))
    engine.append(GzError("no memory"))  # a bug, whose log stays
    assert call(*words)[0] == 1 and (tmp_path / "out" / "log.txt").exists()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert call(*words)[0] == 2
    (tmp_path / "out" / "notes.txt").unlink()
    with files.lock(tmp_path / "out" / ".lock"):
        assert call(*words)[0] == 2
    assert call(*words)[0] == 0
    assert call(*words)[0] == 2


def test_one_folder_is_claimed_by_one(tmp_path):
    with claims.claimed_folder(tmp_path / "out"):
        with pytest.raises(UsageError, match="is not empty"), claims.claimed_folder(tmp_path / "out"):
            pass
        (tmp_path / "out" / ".gz").unlink()
        with pytest.raises(UsageError, match="in use by another"), claims.claimed_folder(tmp_path / "out"):
            pass
    (tmp_path / "raced").mkdir()
    Run(tmp_path / "raced").mark("job")
    with pytest.raises(FileExistsError):
        Run(tmp_path / "raced").mark("job")
