"""What the command line hands to the engine: a typed job, which is read back as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from gzcli import jobs
from gzcli.jobs import BenchJob, ExportJob, OodJob, SampleJob
from gzcli.sections import LaunchSection
from gzcli.store import runs
from gzcli.store.run import Run

JOBS = [
    SampleJob(
        "/run", n=3, prompts=("a", "b"), options={"steps": 5, "sizes": [1, 2]}, launch=LaunchSection(2)
    ),
    OodJob(
        "/run", "mnist", ("digits", "/my, own"), scores=("nll",), launch=LaunchSection(cpu=True, threads=3)
    ),
    BenchJob(
        ("/a", "/b"), "digits", metrics=None, weights="/inception", images=("/c.npz", "/d"), split="all"
    ),
    ExportJob("/run", "diffusers", "/out", checkpoint="20"),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.verb)
def test_a_job_is_read_as_it_was_written(tmp_path, job):
    jobs.write(tmp_path, job)
    assert jobs.read(tmp_path) == job


def test_a_run_is_no_job(tmp_path):
    assert jobs.read(tmp_path) is None


@pytest.fixture
def asked(call, monkeypatch):
    """asked("sample", …) → the job that the command line hands over, and a finished run called `mine`."""
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished")
    (run.path / "run.yaml").write_text("model: {name: vae, conditional: true}\ndata: {name: digits}\n")
    (run.path / "model.safetensors").write_bytes(b"x")
    found = []

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
    options, launch = {"temperature": 0.5}, LaunchSection(cpu=True)
    path = str(run.path)
    assert job == SampleJob(path, "last", 6, 0, "3", options=options, npz=True, launch=launch)
    (tmp_path / "in").mkdir()
    job, _ = asked("sample", "mine", "--do", "reconstruct", "--input", str(tmp_path / "in"), "--gpus", "all")
    assert (job.do, job.input, job.input_as, job.n) == ("reconstruct", str(tmp_path / "in"), None, 64)
    assert job.launch == LaunchSection(gpus="all")


def test_ood(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    words = (
        "--out",
        "FashionMNIST,a, b",
        "--score",
        "ELBO",
        "--k",
        "3",
        "--background",
        "mine",
        "--seed",
        "4",
    )
    job, run = asked("ood", "mine", *words)
    path = str(run.path)
    outs = ("fashionmnist", str(tmp_path / "a, b"))
    options = {"k": 3}
    assert job == OodJob(path, "digits", outs, "last", ("elbo",), seed=4, options=options, background=path)
    assert asked("ood", "mine", "--in", "Digits", "--out", "mnist", "--full")[0].ins == "digits"


def test_bench(asked):
    job, run = asked("bench", "--data", "Digits", "--metrics", "fd,bpd", "--checkpoint", "best")
    assert job == BenchJob((str(run.path),), "digits", ("fd", "bpd"), checkpoint="best")
    assert asked("bench", "mine", "patches", "--split", "train")[0] == BenchJob(
        (str(run.path),), "digits", checkpoint="last", images=("patches",), split="train"
    )


def test_export(asked, tmp_path):
    job, run = asked("runs", "export", "mine", "--out", str(tmp_path / "it"))
    launch = LaunchSection(cpu=True)
    assert job == ExportJob(str(run.path), "diffusers", str(tmp_path / "it"), "last", launch)
