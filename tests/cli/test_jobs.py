"""What the command line hands to the engine: a typed job, which is read back as it was written; and where it
writes: into a folder of its own, or one that the user gave and that holds nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gzcli.cli.jobs import do_job, new_folder
from gzcli.core import jobs
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.jobs import AlarmJob, BenchJob, ExportJob, OodJob, SampleJob
from gzcli.core.sections import LaunchSection
from gzcli.launch import launcher
from gzcli.models import catalog
from gzcli.store import claims, files, runs
from gzcli.store.run_folder import Run

PLAIN = LaunchSection(cpu=True)
JOBS = [
    SampleJob(
        "/run", n=3, prompts=("a", "b"), options={"steps": 5, "sizes": [1, 2]}, launch=LaunchSection(2)
    ),
    OodJob("/run", "mnist", ("digits", "/my, own"), scores=("nll",), launch=replace(PLAIN, threads=3)),
    AlarmJob("/run", "mnist", "/pictures", 0.05, scores=("nll", "far"), others=("/b",), maps=True),
    BenchJob(("/a", "/b"), "digits", weights="/inception", images=("/c.npz", "/d"), split="all"),
    ExportJob("/run", "diffusers", "/out", checkpoint="20"),
]


def finished(model: str, alias: str, data: str = "digits", options: str = "") -> Run:
    """A finished run without weights that could be read."""
    run = runs.create(model, data, alias=alias)
    run.update(state="finished", step=700)
    run.recipe_file.write_text(f"model: {{name: {model}{options}}}\ndata: {{name: {data}}}\n")
    run.model_file.write_bytes(b"x")
    return run


def test_a_job_is_read_as_it_was_written(tmp_path):
    assert jobs.read(tmp_path) is None, "a run is no job"
    for job in JOBS:
        jobs.write(tmp_path, job)
        assert jobs.read(tmp_path) == job, job.verb


@pytest.fixture
def asked(call, monkeypatch):
    """asked("sample", …) → the job that the command line hands over, and a finished run called `mine`."""
    run, found = finished("vae", "mine", options=", conditional: true"), []

    class Done(Exception):
        pass

    def do_job(folder: Path, job: jobs.Job) -> dict:
        found.append(job)
        raise Done

    monkeypatch.setattr("gzcli.cli.jobs.do_job", do_job)

    def ask(*words: str) -> tuple[jobs.Job, Run]:
        code, _, err = call(*words)
        assert code == 1 and "Done" in err, err
        return found[-1], run

    return ask


def test_sample(asked, tmp_path):
    job, run = asked("sample", "mine", "-n", "6", "--label", "3", "--temperature", "0.5", "--npz", "--cpu")
    options = {"temperature": 0.5}
    path = str(run.path)
    assert job == SampleJob(path, 6, "3", checkpoint="last", options=options, formats=("npz",), launch=PLAIN)
    (tmp_path / "in").mkdir()
    job, _ = asked("sample", "mine", "--do", "reconstruct", "--input", str(tmp_path / "in"), "--gpus", "all")
    assert (job.do, job.input, job.input_as, job.n) == ("reconstruct", str(tmp_path / "in"), None, 64)
    assert job.launch == LaunchSection(gpus="all")


def test_a_job_that_failed_without_output_leaves_no_folder(home, tmp_path, monkeypatch):
    empty, bug = tmp_path / "empty", GzError("bug")
    empty.mkdir()
    for error in (UsageError("no"), Interrupted("stopped", signum=2), bug):

        def fails(folder, plan, error=error, **more):
            Run(folder).update(state="failed", error={"kind": error.kind})
            raise error

        monkeypatch.setattr(launcher, "run", fails)
        for folder in (new_folder(home / "runs" / "r" / "sampled", "n4"), tmp_path / "new", empty):
            with pytest.raises(GzError):
                do_job(folder, SampleJob("/run"))
            assert folder.exists() is (error is bug or folder == empty), error


def test_samples_of_classes_fill_whole_rows(call, monkeypatch):
    """As many of each class, unless `-n` asks for another number."""
    found = []
    monkeypatch.setattr("gzcli.cli.jobs.do_job", lambda folder, job: found.append(job.n) or 1 / 0)
    words = ("sample", "cvae", "--pretrained")
    for more in ((), ("-n", "64"), ("--label", "A,B,C"), ("--do", "reconstruct"), ("--label", "no such")):
        call(*words, *more)
    assert found == [72, 64, 63, 64, 64], "of `glyphs`, which have 36 classes"


def test_ood(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    words = ["--score", "ELBO", "--k", "3", "--background", "mine", "--seed", "4"]
    job, run = asked("ood", "mine", "--out", "FashionMNIST,a, b", *words)
    path, outs = str(run.path), ("fashionmnist", str(tmp_path / "a, b"))
    more = {"scores": ("elbo",), "seed": 4, "options": {"k": 3}, "background": path}
    assert job == OodJob(path, "digits", outs, checkpoint="last", **more)
    assert asked("ood", "mine", "--in", "Digits", "--out", "mnist", "--full")[0].ins == "digits"


def test_bench(asked):
    job, run = asked("bench", "--data", "Digits", "--metrics", "fd,bpd", "--checkpoint", "best")
    assert job == BenchJob((str(run.path),), "digits", ("fd", "bpd"), checkpoint="best")
    job, _ = asked("bench", "mine", "patches", "--split", "train")
    more = {"checkpoint": "last", "images": ("patches",), "split": "train"}
    assert job == BenchJob((str(run.path),), "digits", **more)


def test_export(asked, tmp_path):
    to = ("runs", "export", "mine")
    job, run = asked(*to, "--to", "diffusers", "--out", str(tmp_path / "it"))
    assert job == ExportJob(str(run.path), "diffusers", str(tmp_path / "it"), "last", launch=PLAIN)
    job, run = asked(*to, "--dtype", "bf16")
    file = str(run.path / "export" / f"{run.id}.safetensors")
    assert job == ExportJob(str(run.path), "file", file, "last", "bf16", launch=PLAIN)


def test_alarms(asked, tmp_path):
    (tmp_path / "here" / "mine").mkdir()
    job, run = asked("ood", "mine", "--input", "mine", "--fpr", "5%", "--map", "--score", "all", "--k", "9")
    path = str(tmp_path / "here" / "mine")
    more = {"checkpoint": "last", "scores": ("all",), "maps": True, "options": {"k": 9}}
    assert job == AlarmJob(str(run.path), "digits", path, 0.05, **more)
    for words, fpr in ((("--fpr", "0.02"), 0.02), ((), 0.01)):
        assert asked("ood", "mine", "--input", "mine", *words)[0].fpr == fpr


def test_a_flagged_picture_is_an_exit_code_on_demand(asked, call, monkeypatch):
    one = {"file": "a.png", "p": 0.001, "side": "high", "scores": {"elbo": 1.0}}
    result = {"in": "digits", "input": "here", "fpr": 0.01, "thresholds": {"elbo": 0.5}}
    result |= {"seeds": 1, "unreadable": [], "compared": {"n": 200}}
    for count, code in ((0, 0), (2, 6)):
        rows = [one | {"flagged": i < count} for i in range(3)]
        found = result | {"files": rows, "flagged": count}
        monkeypatch.setattr("gzcli.cli.jobs.do_job", lambda folder, job, found=found: found)
        plain, failing = (call("ood", "mine", "--input", ".", "--json", *more) for more in ((), ("--fail",)))
        assert (plain[0], failing[0]) == (0, code) and plain[1] == failing[1]


def test_further_runs_of_one_set_make_an_ensemble(asked, call):
    other = finished("glow", "other")
    job, run = asked("ood", "mine", "other", "mine", "--out", "mnist", "--seeds", "3", "--steps", "5")
    assert job.run == str(run.path) and job.others == (str(other.path), str(run.path))
    assert job.seeds == 3 and job.options == {"steps": 5}
    assert "waic" in job.scores and "recon" not in job.scores, "those that all of them have"
    assert asked("ood", "mine", "other", "--out", "mnist", "--score", "WAIC,nll")[0].scores == ("waic", "nll")
    finished("glow", "elsewhere", data="patches")
    code, _, err = call("ood", "mine", "elsewhere", "--out", "mnist")
    assert code == 2 and "was trained on `patches`, the first run on `digits`" in err


MISTAKES = [
    ("--out mnist --fpr 5%", 2, "`--fpr` goes with `--input`"),
    ("--out mnist --map", 2, "`--map` goes with `--input`"),
    ("--out mnist --fail", 2, "`--fail` goes with `--input`"),
    ("--input here --out mnist", 2, "`--input` judges single pictures, `--out` compares sets"),
    ("--input here --png", 2, "`--png` writes maps"),
    ("--input nowhere", 3, "there is no `nowhere`"),
    ("--input . --fpr 150%", 2, "`--fpr 150%` is no share between 0 and 1"),
    ("--input . --fpr much", 2, "`--fpr much` is no share between 0 and 1"),
    ("--out mnist --imglists .", 2, "`--imglists` goes with `--benchmark`"),
    ("unknown --out mnist", 2, "`unknown`"),
    ("--out mnist --score ell", 2, "`vae` has no score `ell`"),
]


def test_mistakes_of_ood_are_told(asked, call):
    for words, code, message in MISTAKES:
        found, _, err = call("ood", "mine", *words.split())
        assert found == code and message in err, words


def test_a_model_without_maps_names_those_that_make_some(asked, call, monkeypatch):
    card = catalog.card("vae")
    monkeypatch.setattr(catalog, "card_of", lambda *given: replace(card, maps=()))
    code, _, err = call("ood", "mine", "--input", ".", "--map")
    assert code == 2 and "does not say where" in err and "pixelcnn" in err and "glow" in err


# ---------------------------------------------------------------------------- where jobs write


@pytest.fixture
def run(home) -> Run:
    """A finished run called `mine`."""
    return finished("vae", "mine")


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
    (tmp_path / "empty").mkdir()
    for place, code in (
        (run.path, 2),
        (run.path / "run.yaml", 2),
        (tmp_path / "new" / "one", 0),
        (tmp_path / "new" / "one", 2),  # files of two jobs would mix
        (tmp_path / "empty", 0),
    ):
        assert call("sample", "mine", "--out", str(place))[0] == code, place
    assert run.status() == status
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
