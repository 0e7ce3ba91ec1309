"""Jobs of the engine: what the command line hands over, where they write, and which prompts and pictures each
image of each rank is made from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gzcli.cli import app
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.ranks import gather, joined
from gzcli.core.sections import DataSection, LaunchSection, Part
from gzcli.core.types import Applied, DataInfo
from gzcli.data.packs.open import counts_of, open_pack, peek
from gzcli.data.sets.registry import locate
from gzcli.engine import sampler
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.judge import sample
from gzcli.launch import cost, forecast, launcher, scoring
from gzcli.launch.comparing import likelihood_images
from gzcli.launch.jobs import do_job
from gzcli.metrics import networks
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.models.catalog import Param
from gzcli.store import claims, files, jobs, runs
from gzcli.store.jobs import AlarmJob, BenchJob, ExportJob, OodJob, SampleJob
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


def test_a_dry_run_says_what_a_job_takes_and_starts_none(call, home, monkeypatch):
    monkeypatch.setattr(launcher, "run", None)
    run = finished("vae", "here")
    run.update(sample_seconds=20.0)
    with run.recipe_file.open("a") as file:
        file.write("sample: {steps: 10}\n")
    code, shown, _ = call("sample", "here", "-n", "500", "--dry-run")
    files_of_it = f"files: {run.path / 'sampled' / 'n500-<time>-<id>'}\n"
    assert (code, shown) == (0, f"{run.id}: 500 images, about 10 seconds\n{files_of_it}")
    folder = run.path / "bench" / "one"
    row = {"run": run.id, "calls": 30}
    files.write_json(folder / "result.json", {"rows": [row]})
    code, shown, _ = call("bench", "here", "here", "--data", "digits", "-n", "300", "--dry-run")
    assert code == 0 and shown.count("300 images, about 6 seconds, 30 calls per image\n") == 2
    assert shown.endswith("\nthen about 20 seconds of evaluation\ntotal: about 32 seconds\n"), "with torch"
    words = ("bench", "here", "--data", "digits", "--metrics", "fd,worth,fid", "--dry-run")
    _, shown, said = call(*words)
    assert "note: the time of `worth`, `fid` is not included\n" in said and "worth" not in shown
    assert "note: the weights of `inception` are downloaded if they are missing\n" in said
    assert "weights of" not in call(*words, "--weights", str(run.model_file))[2]
    value = json.loads(call("sample", "here", "--do", "reconstruct", "--dry-run", "--json")[1])
    assert value["rows"] == [{"run": run.id, "n": 64, "seconds": None, "calls": None}]
    assert value["out"] == str(run.path / "sampled" / "reconstruct-<time>-<id>")
    code, shown, _ = call("ood", "here", "--out", "patches", "-n", "40", "--score", "elbo", "--dry-run")
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert code == 0 and dict(lines) == {
        "in": "digits",
        "against": "patches",
        "by": "elbo",
        "images": "40 per data set",
        "time": "unknown",
    }
    assert not (run.path / "ood").exists() and not (run.path / "sampled").exists()


def test_a_dry_run_times_what_a_run_did_not_measure(call, home, monkeypatch):
    """By an untrained copy with the options of the sampler, once."""
    jobs_done, no_likelihood = [], {"log_prob_seconds": None, "classes": 0, "error": None}

    def measure(job, say):
        jobs_done.append(job)
        steps = job.parts[0]["tree"]["sample"]["steps"]
        return [{"sample_seconds": 0.02 * steps, "calls": 2 * steps, "timed": False, **no_likelihood}]

    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", measure)
    words = ("sample", "pretrained:fm-glyphs", "-n", "100", "--steps", "5", "--dry-run")
    first, again = call(*words)[1], call(*words)[1]
    assert first == again and ": 100 images, about 10 seconds, 10 calls per image\nfiles: " in first
    (job,) = jobs_done
    assert job.parts[0]["draws"] == ("samples",)
    folder = call(*words, "--out", "here", "--json")[1]
    assert json.loads(folder)["out"] == str(Path("here").absolute())
    call("bench", "pretrained:fm-glyphs", "-n", "100", "--dry-run")
    assert jobs_done[-1].parts[0]["draws"] == ("samples", "exact", "bound")


def test_a_dry_run_names_metrics_with_too_few_images(call, home, tmp_path):
    """A set need not be packed for that, and a submitted job is refused before it waits in a queue."""
    images = np.zeros((60, 8, 8), np.uint8)
    np.savez(few := tmp_path / "few.npz", images=images), np.savez(tmp_path / "theirs.npz", images=images)
    least = f"`prc_lenet` needs at least 12 test images, but `{few}` has 6"
    words = ("bench", str(tmp_path / "theirs.npz"), "--data", str(few))
    league = ("bench", "--train-missing", "--budget", "8m", "--data", str(few))
    for packed in (False, True):
        code, _, shown = call(*words, "--dry-run")
        assert code == 0 and f"note: omitted: {least}; use `--split all`" in " ".join(shown.split())
        for more in ((*words, "--dry-run"), (*words, "--submit", "slurm"), (*league, "--submit", "slurm")):
            code, _, shown = call(*more, "--metrics", "prc_lenet")
            assert code == 2 and least in " ".join(shown.split())
        assert likelihood_images(BenchJob((), "", likelihoods=20_000), locate(few)) == 6
        assert (peek(few) is not None) == packed
        assert open_pack(few).meta.counts["test"] == 6


FITS = {"fit_seconds": 0.01, "train_fit_seconds": 0.0, "map_seconds": 0.02}  # of an image


def test_a_dry_run_of_scores_names_images_calls_and_time(call, home, monkeypatch):
    costs, jobs_done = {"score_seconds": 0.02, "score_calls": 5, "error": None, **FITS}, []

    def measure(job, say):
        jobs_done.append(job)
        return [{**costs, "timed": False}]

    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", measure)
    words = ("ood", "pretrained:vae-glyphs", "--out", "digits,patches", "--dry-run")
    first, again = (call(*words, "-n", "100")[1] for _ in range(2))
    assert first == again and "\nimages   100 per data set\n" in first
    # 10 s to start, 500 · .01 s and 300 · .02 s to fit, 3 · 100 · .02 s
    time = "time     about 27 seconds for 300 images × 5 network calls; 11 seconds of it to\n"
    assert first.endswith(f"{time}         fit the scores\n")
    (job,) = jobs_done
    assert job.parts[0]["scores"] == ("elbo", "recon", "kl", "complexity", "local")
    value = json.loads(call(*words, "--json")[1])
    tests = [counts_of(locate(name))["test"] for name in ("glyphs", "digits", "patches")]
    scored = sum(min(n, 4800) for n in tests)
    assert (value["n"], value["scored"]) == (4800, scored) and scored < 3 * 4800, "300 s, less the fits"
    assert value["seconds"] == 10 + 11 + scored * 0.02


def test_a_dry_run_of_an_ensemble_times_each_run(call, home, monkeypatch):
    """The number of images suits the slowest run, as in the call itself."""
    seconds = {"pixelcnn": 0.02, "glow": 0.06}

    def measure(job, say):
        (part,) = job.parts
        assert part["scores"] == ("nll", "complexity"), "`waic` is a statistic of `nll`"
        cost = seconds[part["tree"]["model"]["name"]]
        return [{"score_seconds": cost, "score_calls": 1, "error": None, "timed": False, **FITS}]

    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", measure)
    runs = ("pretrained:pixelcnn-glyphs", "pretrained:glow-glyphs")
    for first, second in (runs, runs[::-1]):
        words = ("ood", first, second, "--out", "digits", "--dry-run", "--json")
        value = json.loads(call(*words, "-n", "100")[1])
        assert value["scored"] == 400 and value["seconds"] == pytest.approx(10 + 2 * 11 + 200 * 0.08)
    n = [json.loads(call("ood", *some, *words[3:])[1])["n"] for some in (runs, runs[::-1])]
    assert n == [1200, 1200], "300 s, less the fits"


def test_a_dry_run_of_scores_includes_the_training_of_a_judge(call, home, tmp_path, monkeypatch):
    """It is a LeNet for `recon`, unless it is trained, the score uses pixels alone, or LPIPS is here."""
    costs = {"score_seconds": 0.02, "score_calls": None, "error": None, **FITS}
    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", lambda job, say: [{**costs, "timed": False}])
    Image.new("L", (28, 28)).save(tmp_path / "a.png")

    def seconds(model, *words):
        words = (f"pretrained:{model}", "--input", str(tmp_path / "a.png"), "--score", "recon", *words)
        return json.loads(call("ood", *words, "--dry-run", "--json")[1])["seconds"]

    alone = seconds("cfm-emoji", "--pixels", "true")
    assert seconds("cfm-emoji") == alone + networks.TRAINING
    words = call("ood", "pretrained:cfm-emoji", "--input", str(tmp_path / "a.png"), "--dry-run")[1].split()
    assert "60 seconds of it to train judge networks of the data set" in " ".join(words)
    assert seconds("cfm-glyphs") == seconds("cfm-glyphs", "--pixels", "true")
    with monkeypatch.context() as patch:
        patch.setattr(
            "gzcli.data.packs.open.peek", lambda *args, **how: SimpleNamespace(values={"channels": 3})
        )
        assert seconds("cfm-emoji") == alone, "of values beyond 8 bits, only pixels are compared"
    monkeypatch.setattr(networks, "has_lpips", lambda: True)
    assert seconds("cfm-emoji") == alone


def test_a_dry_run_of_an_alarm_counts_its_images(call, home, tmp_path, monkeypatch):
    """Of a run, with the held-out images and the synthetic defects; of a method without training."""
    costs = {"score_seconds": 0.02, "score_calls": 5, "error": None, **FITS}
    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", lambda job, say: [{**costs, "timed": False}])
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (28, 28), 20 * i).save(folder / f"my picture {i}.png")
    words = ("ood", "pretrained:vae-glyphs", "--input", str(folder), "--score", "elbo", "--dry-run")
    value, counts = json.loads(call(*words, "--json")[1]), counts_of(locate("glyphs"))
    held_out = min(counts["val"] + counts["test"] - 500, value["n"])
    assert f"\nimages   12, compared with {held_out:,} held-out images\n" in call(*words)[1]
    scored = 4 * (12 + held_out)
    assert (value["scored"], value["seconds"]) == (scored, 10 + 4 * 11 + scored * 0.02), "four draws"
    chosen = json.loads(call(*words[:4], "--dry-run", "--json")[1])
    assert chosen["scored"] == scored + 300, "and images by which a score is chosen"
    _, _, stderr = call(*words, "--fpr", "0.001%")
    assert "warning: a false-alarm rate of 0.001 % needs 99,999 held-out images, but there are only" in stderr
    words = ("ood", "--in", str(folder), "--input", str(folder), "--dry-run")
    assert "\nimages   12, compared with 12 good images\ntime     about 11 seconds\n" in call(*words)[1]
    cost.note_checking({"compared": {"n": 10}, "files": [{}] * 5, "seconds": 30.0, "method": "combined"})
    assert "\ntime     about 58 seconds\n" in call(*words)[1]


def test_a_dry_run_of_a_method_says_what_becomes_of_images(call, home, tmp_path, monkeypatch):
    """Images of mixed sizes are refused, images of another shape are cropped, and few are too few."""

    def folder(name, sizes):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size, 20 * i).save(tmp_path / name / f"{i}.png")
        return str(tmp_path / name)

    alike, wide = folder("alike", [(28, 28)] * 12), folder("wide", [(40, 28), (28, 28), (56, 56)])
    for sets in (("--input", alike), ("--out", alike)):
        code, _, stderr = call("ood", "pca", "--in", wide, *sets, "--dry-run")
        assert code == 2 and "have mixed sizes: `1.png` is 28×28, but others are 40×28" in stderr
        assert "hint: use `--set data.size=16` to crop" in stderr
        code, _, stderr = call("ood", "pca", "--in", wide, *sets, "--set", "data.size=28", "--dry-run")
        assert code == 0 and "`: 1 image cropped to 28×28, which cuts away 30 %" in " ".join(stderr.split())
    for sets in (("--input", wide), ("--out", wide)):
        code, _, stderr = call("ood", "pca", "--in", alike, *sets, "--dry-run")
        assert code == 0 and "/wide`: 1 image cropped to 28×28" in " ".join(stderr.split())
        assert "data.fit" not in stderr, "a method cannot pad"
    code, stdout, stderr = call(
        "ood", "--in", alike, "--input", f"{alike}/0.png", "--fpr", "10%", "--dry-run"
    )
    assert code == 0 and "\nimages   1, compared with 12 good images\n" in stdout and "cropped" not in stderr
    assert "warning" not in stderr
    few = "warning: a false-alarm rate of 1 % needs 99 good images, but there are only 12"
    assert few in call("ood", "--in", alike, "--input", alike, "--dry-run")[2]
    monkeypatch.setattr(scoring, "MAX_SCORED_IMAGES", 1)
    some, every = (
        json.loads(call("ood", "--in", alike, "--out", wide, *full, "--dry-run", "--json")[1])["seconds"]
        for full in ((), ("--full",))
    )
    assert some < every


@pytest.mark.parametrize(
    ("n", "fpr", "compared", "fitted", "maps"),
    [(40, "50%", 6, 2, 2), (40, "12.5%", 8, 32, 132), (300, "5%", 45, 15, 115)],
    ids=["tiny", "fitted on training images", "small"],
)
def test_the_fits_of_an_alarm_take_as_long_as_their_images(
    n, fpr, compared, fitted, maps, call, home, tmp_path, monkeypatch
):
    """A quarter of the held-out images, or the training images if too few would remain to compare with. With
    12 of them, the score is chosen by synthetic defects."""
    monkeypatch.setenv("GZ_TRIAL", "1")
    costs = {"score_seconds": 1.0, "score_calls": 5, "error": None, **FITS}
    monkeypatch.setattr(forecast, "measured", lambda job, say: [{**costs, "timed": False}])
    (folder := tmp_path / "photos").mkdir()
    for i in range(n):
        Image.new("L", (28, 28), i % 256).save(folder / f"{i}.png")
    words = ("ood", "pretrained:vae-glyphs", "--in", str(folder), "--input", str(folder), "--fpr", fpr)
    value = json.loads(call(*words, "--dry-run", "--json")[1])
    scored = 4 * (n + compared) + (maps if fitted >= 12 else 0)
    assert value["scored"] == scored
    assert value["seconds"] == pytest.approx(10 + 4 * (fitted * 0.01 + maps * 0.02) + scored)


def test_a_job_is_read_as_it_was_written(tmp_path):
    assert jobs.read(tmp_path) is None, "a run is no job"
    for job in JOBS:
        jobs.write(tmp_path, job)
        assert jobs.read(tmp_path) == job, job.verb


@pytest.fixture
def order(call, monkeypatch):
    """order("sample", …) → the job that the command line hands over, and a finished run called `mine`."""
    run, queue = finished("vae", "mine", options=", conditional: true"), []

    class Done(Exception):
        pass

    def do_job(folder: Path, job: jobs.Job) -> dict:
        queue.append(job)
        raise Done

    monkeypatch.setattr("gzcli.cli.jobs.do_job", do_job)

    def ask(*words: str) -> tuple[jobs.Job, Run]:
        code, _, err = call(*words)
        assert code == 1 and "Done" in err, err
        return queue[-1], run

    return ask


def test_what_is_typed_becomes_a_job(order, tmp_path, monkeypatch):
    job, run = order("sample", "mine", "-n", "6", "--label", "3", "--temperature", "0.5", "--npz", "--cpu")
    path, options = str(run.path), {"temperature": 0.5}
    assert job == SampleJob(path, 6, "3", checkpoint="last", options=options, formats=("npz",), launch=PLAIN)
    (tmp_path / "in").mkdir()
    job, _ = order("sample", "mine", "--do", "reconstruct", "--input", str(tmp_path / "in"), "--gpus", "all")
    assert (job.do, job.input, job.input_as, job.n) == ("reconstruct", str(tmp_path / "in"), None, 64)
    assert job.launch == LaunchSection(gpus="all")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    words = ["--score", "ELBO", "--k", "3", "--background", "mine", "--seed", "4"]
    job, _ = order("ood", "mine", "--out", "FashionMNIST,a, b", *words)
    more = {"scores": ("elbo",), "seed": 4, "options": {"k": 3}, "background": path}
    assert job == OodJob(path, "digits", ("fashionmnist", str(tmp_path / "a, b")), checkpoint="last", **more)
    assert order("ood", "mine", "--in", "Digits", "--out", "mnist", "--full")[0].ins == "digits"
    job, _ = order("bench", "--data", "Digits", "--metrics", "fd,bpd", "--checkpoint", "best")
    assert job == BenchJob((path,), "digits", ("fd", "bpd"), checkpoint="best")
    job, _ = order("bench", "mine", "patches", "--split", "train")
    more = {"checkpoint": "last", "images": ("patches",), "split": "train"}
    assert job == BenchJob((path,), "digits", **more)
    to = ("runs", "export", "mine")
    job, _ = order(*to, "--to", "diffusers", "--out", str(tmp_path / "it"))
    assert job == ExportJob(path, "diffusers", str(tmp_path / "it"), "last", launch=PLAIN)
    file = str(run.path / "export" / f"{run.id}.safetensors")
    assert order(*to, "--dtype", "bf16")[0] == ExportJob(path, "file", file, "last", "bf16", launch=PLAIN)
    (tmp_path / "mine").mkdir()  # `--input` is a path, whatever a run is called
    job, _ = order("ood", "mine", "--input", "mine", "--fpr", "5%", "--map", "--score", "all", "--k", "9")
    more = {"checkpoint": "last", "scores": ("all",), "maps": True, "options": {"k": 9}}
    assert job == AlarmJob(path, "digits", str(tmp_path / "mine"), 0.05, **more)
    for words, fpr in ((("--fpr", "0.02"), 0.02), ((), 0.01)):
        assert order("ood", "mine", "--input", "mine", *words)[0].fpr == fpr


def test_a_job_that_failed_without_output_leaves_no_folder(home, tmp_path, monkeypatch):
    empty, bug = tmp_path / "empty", GzError("bug")
    empty.mkdir()
    for error in (UsageError("no"), Interrupted("stopped", signum=2), bug):

        def fails(folder, plan, error=error, **more):
            Run(folder).update(state="failed", error={"kind": error.kind})
            raise error

        monkeypatch.setattr(launcher, "run", fails)
        for folder in (claims.new_folder(home / "runs" / "r" / "sampled", "n4"), tmp_path / "new", empty):
            with pytest.raises(GzError):
                do_job(folder, SampleJob("/run"))
            assert folder.exists() is (error is bug or folder == empty), error


def test_samples_of_classes_fill_whole_rows(call, monkeypatch):
    """As many of each class, unless `-n` asks for another number."""
    numbers = []
    monkeypatch.setattr("gzcli.cli.jobs.do_job", lambda folder, job: numbers.append(job.n) or 1 / 0)
    words = ("sample", "cvae", "--pretrained")
    for more in ((), ("-n", "64"), ("--label", "A,B,C"), ("--do", "reconstruct"), ("--label", "no such")):
        call(*words, *more)
    assert numbers == [72, 64, 63, 64], "of `glyphs`, which have 36 classes, none of them `no such`"


def test_a_flagged_picture_is_an_exit_code_on_demand(order, call, monkeypatch):
    one = {"file": "a.png", "p": 0.001, "side": "high", "scores": {"elbo": 1.0}}
    result = {"in": "digits", "input": "here", "fpr": 0.01, "thresholds": {"elbo": 0.5}}
    result |= {"run": None, "seeds": 1, "compared": {"n": 200}}
    for count, unreadable, code in ((0, [], 0), (2, [], 6), (0, ["`b.png` cannot be decoded"], 6)):
        rows = [one | {"flagged": i < count} for i in range(3)]
        verdict = result | {"files": rows, "flagged": count, "unreadable": unreadable}
        monkeypatch.setattr("gzcli.cli.jobs.do_job", lambda folder, job, verdict=verdict: verdict)
        plain, failing = (call("ood", "mine", "--input", ".", "--json", *more) for more in ((), ("--fail",)))
        assert (plain[0], failing[0]) == (0, code) and plain[1] == failing[1]


def test_further_runs_of_one_set_make_an_ensemble(order, call):
    glow = finished("glow", "other")
    job, run = order("ood", "mine", "other", "mine", "--out", "mnist", "--seeds", "3", "--steps", "5")
    assert job.run == str(run.path) and job.others == (str(glow.path), str(run.path))
    assert job.seeds == 3 and job.options == {"steps": 5}
    assert "waic" in job.scores and "recon" not in job.scores, "those that all of them have"
    assert order("ood", "mine", "other", "--out", "mnist", "--score", "WAIC,nll")[0].scores == ("waic", "nll")
    finished("glow", "elsewhere", data="patches")
    code, _, err = call("ood", "mine", "elsewhere", "--out", "mnist")
    assert code == 2 and "was trained on `patches`, but the first run on `digits`" in err


MISTAKES = [
    ("--out mnist --fpr 5%", 2, "`--fpr` needs `--input`"),
    ("--out mnist --map", 2, "`--map` needs `--input`"),
    ("--out mnist --fail", 2, "`--fail` needs `--input`"),
    ("--input here --out mnist", 2, "`--input` checks single images, but `--out` compares data sets"),
    ("--input here --png", 2, "`--png` needs `--map`"),
    ("--input nowhere", 3, "`nowhere` does not exist"),
    ("--input . --fpr 150%", 2, "`--fpr 150%` is not a rate between 0 and 1"),
    ("--input . --fpr much", 2, "`--fpr much` is not a rate between 0 and 1"),
    ("--input . --fpr=", 2, "`--fpr ` is not a rate between 0 and 1"),
    ("--out mnist --calibrate=", 2, "`--calibrate` needs `--input`"),
    ("--input . --calibrate nowhere", 3, "`--calibrate nowhere` does not exist"),
    ("--input . --calibrate=", 3, "`--calibrate ` does not exist"),
    ("--in . --input . --calibrate .", 2, "`--calibrate` and `--in` are the same images"),
    ("--export there --fpr 2%", 2, "`--fpr` needs `--input`"),
    ("--out mnist --imglists .", 2, "`--imglists` needs `--benchmark`"),
    ("unknown --out mnist", 2, "`unknown`"),
    ("--out mnist --score ell", 2, "`vae` has no score `ell`"),
    ("--out ,", 2, "`--out ,` names no data set"),
    ("--out mnist --score ,", 2, "`,` contains no names"),
    ("--out mnist -n 40 --full", 2, "`-n` and `--full` exclude each other"),
    ("--out mnist --export there", 2, "`--out` and `--export` exclude each other"),
]


def test_mistakes_of_ood_are_told(order, call, monkeypatch):
    for words, code, message in MISTAKES:
        status, _, err = call("ood", "mine", *words.split())
        assert status == code and message in err, words
    of_model = "--score recon", "--background mine", "--seeds 2", "--checkpoint best", "--precision bf16"
    for words in (*of_model, "--processes 2", "--pretrained", "-n 40", "--full"):
        status, _, err = call("ood", "--in", ".", "--input", ".", *words.split(), "--dry-run")
        assert status == 2 and f"`{words.split()[0]}` needs a model or a run" in err
    card = replace(catalog.card("vae"), maps=())
    monkeypatch.setattr(catalog, "card_of", lambda *args: card)
    code, _, err = call("ood", "mine", "--input", ".", "--map")
    assert code == 2 and all(text in err for text in ("has no anomaly maps", "pixelcnn", "glow"))


@pytest.fixture
def run(home) -> Run:
    """A finished run called `mine`."""
    return finished("vae", "mine")


def test_what_can_be_known_is_refused_before_the_engine_starts(run, call, tmp_path):
    """Labels that the set does not have, and statistics that are of no one metric or have no place."""
    finished("cvae", "classes", options=", conditional: true")
    for words, message in (
        ("sample classes --label AB", "no label `AB` among the 10 classes"),
        ("sample classes --do reconstruct --label 12", "no label `12` among the 10 classes"),
        (f"bench mine --data digits --export-stats {tmp_path}", "is a folder"),
        (
            "bench mine --data digits --metrics swd --export-stats s.npz",
            "need exactly one Fréchet distance among the metrics, not 0",
        ),
        (
            "bench mine --data digits --metrics fd,fid --export-stats s.npz",
            "Fréchet distance among the metrics, not 2",
        ),
        ("bench mine --data digits --metrics ,", "`,` contains no names"),
    ):
        code, _, err = call(*words.split())
        assert code == 2 and message in err, words


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
        assert "hint: use a new or an empty folder" in stderr
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
    words, out = ("sample", "mine", "--out", str(tmp_path / "out")), tmp_path / "out"
    engine.append(GzError("no memory"))  # a bug, whose log stays
    assert call(*words)[0] == 1 and (out / "log.txt").exists()
    (out / "notes.txt").write_text("mine")
    assert call(*words)[0] == 2
    (out / "notes.txt").unlink()
    with files.lock(out / ".lock"):
        assert call(*words)[0] == 2
    assert call(*words)[0] == 0 and call(*words)[0] == 2


def test_a_folder_does_not_get_the_name_of_a_file(call, run, tmp_path):
    words = ("sample", "mine", "-n", "4", "--out", str(tmp_path / "cats.png"))
    for more in ((), ("--dry-run",)):
        code, _, stderr = call(*words, *more)
        assert code == 2 and "`cats.png` is the name of a file" in stderr and "such as `cats`" in stderr
    (tmp_path / "cats.png").mkdir()
    claims.check_free(tmp_path / "cats.png")
    claims.check_free(tmp_path / "v1.5")


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


OPTIONS = {
    "prompt": Param("prompt", "str | list[str] | None", None, False),
    "negative": Param("negative", "str", "", False),
    "guidance": Param("guidance", "float", 7.5, False),
    "size": Param("size", "int | None", None, False),
    "edges": Param("edges", "bool", False, False),
}
EDIT = {"edit": {"prompt": OPTIONS["prompt"]}}
READS = replace(catalog.card("vae"), sample=OPTIONS, inputs=("control",), do=EDIT)


class Reader(Model):
    """Draws flat images; their brightness is the prompt's length plus the input's brightness plus noise."""

    paper = "none"

    def sample(
        self, n, *, noise, progress, labels=None, control=None, prompt=None, negative="", guidance=1.0,
        size=None, edges=False
    ):  # fmt: skip
        assert prompt is None or (len(prompt) == n and all(isinstance(text, str) for text in prompt))
        self.seen = [*getattr(self, "seen", []), (n, prompt, control, negative, edges)]
        side = size or self.data.shape[1]
        x = torch.zeros(n, 1, side, side) + 0.01 * noise.rand(n, 1, 1, 1)
        if prompt:
            x += torch.tensor([len(text) / 100 for text in prompt])[:, None, None, None]
        return x if control is None else x + control.mean((1, 2, 3), keepdim=True) / 2

    def edit(self, x, *, noise, progress, prompt=None):
        self.seen = [prompt]
        return Applied(x)


@pytest.fixture
def trained(home, monkeypatch):
    """A run of a model that takes prompts, as the engine loads it; the command line takes it for a `vae`."""
    run = runs.create("vae", "digits", alias="reader")
    run.update(state="finished")
    run.recipe_file.write_text("model: {name: vae}\ndata: {name: digits, size: 16, channels: 1}\n")
    (run.path / "model.safetensors").write_bytes(b"x")
    info = DataInfo((1, 16, 16))
    part = Part("vae", sample={"prompt": None, "size": None}, data=DataSection(size=16, channels=1))
    reader = Trained(run, Reader(info), info, part, torch.device("cpu"), 1)
    monkeypatch.setattr(sample, "load_trained", lambda *args: reader)
    monkeypatch.setattr(catalog, "card", lambda name: READS)
    return reader


@pytest.fixture
def gz(trained, capsys, monkeypatch):
    """gz("--prompt", "x") → (exit code, the result or the error of `gz sample reader … --json`); the engine
    runs in this process."""

    def here(folder: Path, job: SampleJob) -> dict:
        jobs.write(folder, job)
        return sample.run(jobs.read(folder), folder, torch.device("cpu"), Log())

    monkeypatch.setattr("gzcli.cli.jobs.do_job", here)

    def call(*words: str) -> tuple[int, dict]:
        code = app.run(["sample", "reader", *words, "--json"])
        value = json.loads(capsys.readouterr().out)
        return code, value.get("error", value)

    return call


def flat_pictures(path: Path, **brightness: int) -> Path:
    path.mkdir()
    for name, value in brightness.items():
        Image.fromarray(np.full((40, 30), value, np.uint8)).save(path / f"{name}.png")
    return path


def test_prompts_are_cycled_and_are_as_many_as_the_images(gz, trained):
    """Those of the line come first, or the recipe's, or none."""
    words = ("--prompt", "a red door", "--prompt", "three")
    code, result = gz(*words, "--negative", "3", "--guidance", "7", "--seed", "1")
    assert (code, result["n"], result["prompts"]) == (0, 2, ["a red door", "three"])
    code, result = gz("--prompt", "a", "--prompt", "bb", "-n", "5")
    assert (code, result["n"], result["prompts"]) == (0, 5, ["a", "bb"]) and len(result["files"]) == 5
    assert trained.model.seen[-1][:2] == (5, ["a", "bb", "a", "bb", "a"])
    assert gz()[1]["n"] == 64 and trained.model.seen[-1][1] is None and gz()[1]["prompts"] == []
    for default, words, drawn in (
        ("of the recipe", "-n 2", ["of the recipe"] * 2),
        (["x", "y"], "-n 3", ["x", "y", "x"]),
        (["x", "y"], "--prompt mine -n 2", ["mine", "mine"]),
    ):
        trained.part.sample["prompt"] = default
        gz(*words.split())
        assert trained.model.seen[-1][1] == drawn


def test_prompts_of_a_file_come_after_those_of_the_line(gz, trained, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('\ufeff# doors\na red door, "open"\n\n  ein grüner   \n# none\n', encoding="utf-8")
    code, result = gz("--prompts", str(file), "--prompt", "first")
    assert (code, result["n"], result["prompts"]) == (0, 3, ["first", 'a red door, "open"', "ein grüner"])
    assert trained.model.seen[-1][1] == result["prompts"]


def test_wrong_words(gz, tmp_path, monkeypatch):
    """Also of a model that reads no prompts, or takes no pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn\n")
    flat_pictures(tmp_path / "maps", a=3)
    silent = replace(READS, sample={}, inputs=(), do={"edit": {}})
    edits = replace(READS, do={"edit": {"frames": None}})
    plain = replace(silent, do={}, can=("sample",))
    for card, words, message, hint in (
        (READS, "--prompts none.txt", "none.txt", ""),
        (READS, "--prompts empty.txt", "contains no prompts", "one prompt per line"),
        (READS, "--prompts latin.txt", "not UTF-8 text", "one per line"),
        (READS, "--promt x", "no such option `--promt`", "did you mean `--prompt`?"),
        (READS, "--guidance much", "`--guidance` must be a number", ""),
        (READS, "--guidance 1e39", "`--guidance` must be a number", "3.4e+38"),
        (READS, "--mask empty.txt", "`--mask` needs `--do`", "supports: edit"),
        (READS, "--input maps -n 2 --sise 8", "no such option `--sise`", "did you mean `--size`?"),
        (edits, "--frames 3", "no such option `--frames`", "it is an option of `--do edit`"),
        (plain, "--prompt x", "`vae` takes no prompts", "--can prompt"),
        (silent, "--prompt x --do edit", "`--do edit` takes no prompts", "--label"),
        (silent, "--input maps", "`--input` needs `--do`", "supports: edit"),
    ):
        monkeypatch.setattr(catalog, "card", lambda name, card=card: card)
        code, error = gz(*words.split())
        assert code == (3 if message == "none.txt" else 2), words  # a path that does not exist is missing
        assert message in error["message"] and hint in (error["hint"] or ""), words


def test_an_application_gets_them_too(gz, trained, tmp_path):
    folder = str(flat_pictures(tmp_path / "p", a=3, b=4, c=5))
    code, _ = gz("--do", "edit", "--input", folder, "--prompt", "x", "--prompt", "y")
    assert code == 0 and trained.model.seen == [["x", "y", "x"]]


def test_how_pictures_were_read_is_in_the_notes(gz, trained, tmp_path):
    Image.fromarray(np.full((16, 16), 900, np.uint16)).save(tmp_path / "deep.png")
    for words in (("--do", "edit"), ()):
        assert "nearly black" in gz("--input", str(tmp_path / "deep.png"), *words)[1]["notes"][0]
    assert gz("-n", "2")[1]["notes"] == []


def test_pictures_are_given_to_sample(gz, trained, tmp_path):
    folder = flat_pictures(tmp_path / "maps", a=0, b=255)
    code, result = gz("--input", str(folder), "--edges", "--npz")
    assert (code, result["n"]) == (0, 2) and "from-input" in result["grid"]
    n, prompt, control, _, edges = trained.model.seen[-1]
    assert (n, prompt, edges, control.shape) == (2, None, True, (2, 1, 16, 16))
    assert control[0].unique().tolist() == [-1] and control[1].unique().tolist() == [1]
    # maps above, images below, each six times as large, with names beside and a caption below
    width, height = Image.open(result["grid"]).size
    assert height > 2 * (96 + 3) + 16 and width > 2 * (96 + 3) + 16
    bright = np.load(result["npz"])["samples"].mean((1, 2, 3))
    assert bright[0] < 70 and bright[1] > 185 and len(result["files"]) == 2
    code, result = gz("--input", str(folder), "--prompt", "1", "--prompt", "22", "--prompt", "333")
    assert result["n"] == 3 and trained.model.seen[-1][2][:, 0, 0, 0].tolist() == [-1, 1, -1]
    code, result = gz("--input", str(folder / "b.png"), "-n", "3")
    assert result["n"] == 3 and trained.model.seen[-1][2][:, 0, 0, 0].tolist() == [1, 1, 1]
    assert gz("--input", str(folder), "-n", "1")[1]["n"] == 1


def test_pictures_and_images_of_another_size(gz, trained, tmp_path):
    words = ("--input", str(flat_pictures(tmp_path / "maps", a=0, b=255, c=9)), "--npz")
    for of_the_recipe, more in ((None, ("--size", "24")), (24, ())):
        trained.part.sample["size"] = of_the_recipe
        code, result = gz(*words, *more)
        assert code == 0 and trained.model.seen[-1][2].shape == (3, 1, 24, 24)
        assert np.load(result["npz"])["samples"].shape == (3, 24, 24, 1)
        assert Image.open(result["files"][0]).size == (24, 24)


@pytest.fixture
def ranks(monkeypatch):
    """ranks(world, draw) → what all ranks draw together, each its own share."""

    def all_of(world: int, draw) -> np.ndarray:
        parts = []
        monkeypatch.setattr("gzcli.core.ranks.gather", lambda rows: rows)
        monkeypatch.setattr("gzcli.core.ranks.world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr("gzcli.core.ranks.rank", lambda rank=rank: rank)
            parts.append(draw())
        return joined(parts)

    return all_of


def test_ranks_and_batches_share_prompts_and_pictures(trained, ranks, monkeypatch):
    prompts = ["x" * (3 * i) for i in range(1, 6)]
    control = torch.linspace(-1, 1, 4)[:, None, None, None].expand(-1, 1, 16, 16)
    conditions, usual = {"prompt": prompts, "control": control}, sampler.BATCH_SIZE
    for size, world in product((None, 24), (2, 3, 7)):

        def draw(size=size) -> np.ndarray:
            return sampler.draw(trained, 6, seed=3, conditions=conditions, options={"size": size})

        monkeypatch.setattr(sampler, "BATCH_SIZE", usual)
        whole = ranks(1, draw)
        assert whole.shape == (6, 1, size or 16, size or 16) and trained.model.seen[-1][0] == 6
        # with seven ranks the last has nothing, and does not know the size
        assert (ranks(world, draw) == whole).all(), (size, world)
        monkeypatch.setattr(sampler, "BATCH_SIZE", 8)
        assert (ranks(world, draw) == whole).all(), (size, world)
        assert trained.model.seen[-1][1] == [prompts[i % 5] for i in rows_of_last(world)]


def rows_of_last(world: int) -> range:
    """The images of the last batch of the last rank that has any; batches are of four at most."""
    share = -(-6 // world)
    start = (5 // share) * share
    return range(start, min(start + 4, 6)) if share <= 4 else range(4, 6)


def test_gathering_skips_who_had_nothing(monkeypatch):
    def gathered(parts, rows):
        parts[:] = [rows, np.zeros((0, 1, 16, 16), np.uint8)]

    monkeypatch.setattr("gzcli.core.ranks.world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    assert gather(np.ones((2, 1, 8, 8), np.uint8)).shape == (2, 1, 8, 8)
    assert joined([np.zeros((0, 3, 4, 4), np.uint8)]).shape == (0, 3, 4, 4)


def test_large_images_come_in_smaller_batches(trained):
    for device, shape, size, images in (
        ("cuda", (1, 28, 28), None, 512),
        ("cuda", (3, 64, 64), None, 512),
        ("cuda", (3, 512, 512), None, 8),
        ("cpu", (3, 64, 64), 512, 2),
        ("cpu", (3, 512, 512), 64, 128),
        ("cpu", (3, 1024, 1024), None, 1),
    ):
        variant = replace(trained, info=DataInfo(shape), device=torch.device(device))
        assert sampler.batch_size(variant, {"size": size}) == images, (device, shape, size)


def test_the_card_tells_of_prompts_and_pictures():
    card = catalog.card("instructpix2pix")
    assert card.inputs == ("before",) and "before" not in card.sample
    assert card.sample["prompt"] and "prompt" in card.can and card.needs == ("caption", "before")
