"""`gz train --dry-run` and the start of a run: memory, and what a model needs of its data, told before
anything is launched."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pictures import RED, png, write

from gzcli.cli import out
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.sections import OptimSection, Part, TrainSection
from gzcli.launch import forecast, launcher
from gzcli.launch import plan as planning
from gzcli.models import catalog
from gzcli.recipe.recipe import check_data
from gzcli.recipe.resolve import resolve
from gzcli.store import runs
from gzcli.store.jobs import TrialJob


@pytest.fixture
def dry_run(gz):
    """dry_run("vae", "--cpu") → the plan of that training, for scripts"""

    def plan_of(*words: str) -> dict:
        code, stdout, stderr = gz("train", *words, "--dry-run", "--json")
        assert code == 0, stdout + stderr
        return json.loads(stdout)

    return plan_of


pytestmark = pytest.mark.usefixtures("home")

FEW = ("--set", "train.batch_size=8")
PARAMS, FLOPS, BYTES = 35_700_000, 6e12, 900_000_000


@pytest.fixture
def photos(tmp_path) -> str:
    """The path of a folder of 40 pictures."""
    return str(write(tmp_path / "photos", {f"{i}.png": png(RED) for i in range(40)}))


@pytest.fixture
def planned(monkeypatch):
    """What the engine would find of a recipe's parts: planned(seconds of a step, error, refused=hint)."""

    def trials(seconds: float | None = 0.5, error: str | None = None, **refused: str) -> list[TrialJob]:
        jobs: list[TrialJob] = []

        def measure(job: TrialJob, say: Callable[[str], None] = lambda text: None) -> list[dict]:
            jobs.append(job)
            rows = []
            for timed in (row["timed"] for row in job.parts):
                values = {"params": PARAMS, "flops": FLOPS, "kernels": 100.0, "seconds": None, "bytes": None}
                values |= {"seconds": seconds, "bytes": BYTES} if timed else {}
                values = {"params": None} if error else values
                rows.append({"timed": timed, "error": error, **values, **refused})
            return rows

        monkeypatch.setenv("GZ_TRIAL", "1")
        monkeypatch.setattr(forecast, "measured", measure)
        return jobs

    return trials


def test_the_first_lines_of_a_dry_run_and_its_plan_for_scripts(gz, dry_run, planned):
    jobs = planned()
    words = ("ddpm", "--data", "cifar10", "--cpu")
    code, stdout, _ = gz("train", *words, "--dry-run")
    lines = stdout.splitlines()
    assert code == 0 and max(map(len, lines[:6])) <= 80
    assert lines[0] == "scale   small (no GPU is used)"
    assert lines[1] == "set     cifar10: 48,000 colour training images of 32×32 (170 MB to download)"
    assert lines[2].startswith("model   ddpm, 35.7M parameters, ")
    assert lines[2].endswith(" images; 6,000 GFLOP per step")
    assert lines[3].startswith("memory  900 MB per process, measured for one step here; this machine has ")
    assert lines[4].startswith("time    about 65 minutes here, ")
    assert "on an H100; `--minutes 60` makes 6,480 steps" in " ".join(map(str.strip, lines[4:6]))
    assert "\npaper   --scale paper: " in stdout
    assert len(jobs) == 1 and not runs.all_runs()
    result = dry_run(*words)
    assert len(jobs) == 1, "the second time it is known"
    recipe = result["recipe"]
    assert (result["params"], result["gflop_per_step"], result["scale"]) == (PARAMS, 6000, "small")
    assert result["seconds"] == pytest.approx(recipe["train"]["steps"] * 0.5 / 0.9)
    assert result["seconds_on_h100"] > 0 and result["bytes"] == result["memory"][0]["bytes"] == BYTES
    assert (recipe["params"], recipe["data"]["size"], recipe["data"]["levels"]) == (PARAMS, 32, 256)


@pytest.mark.parametrize("words", [("vqvae",), ("reflow",), ("ddpm", "--data", "cifar10", "--gpus", "4")])
def test_a_plan_is_short_and_the_keys_are_asked_for(gz, planned, monkeypatch, words):
    planned()
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = gz("train", *words, "--dry-run")
    assert code == 0 and len(stdout.splitlines()) <= 12 and "optim.lr" not in stdout
    assert gz("train", *words, "--dry-run", "--keys")[1].startswith(stdout + "\nkey ")
    code, _, stderr = gz("train", *words, "--keys")
    assert code == 2 and "`--keys` needs `--dry-run`" in stderr and not runs.all_runs()


def test_words_of_other_programs_are_understood(gz, dry_run):
    words = ("vae", "--data", "glyphs", "--epochs", "3", "--batch-size", "100", "--lr", "1e-3")
    recipe = dry_run(*words)["recipe"]
    assert (recipe["train"]["batch_size"], recipe["optim"]["lr"]) == (100, 1e-3)
    assert recipe["train"]["steps"] == 588 == 3 * 19_600 / 100
    said = gz("train", *words, "--dry-run")[2]
    assert "3 epochs of 19,600 images in batches of 100: --steps 588" in said
    assert "learning rate 0.001: --set optim.lr=0.001" in said
    stages = dry_run("vqvae", "--epochs", "0.5")["recipe"]["stages"]
    assert [stage["train"]["steps"] for stage in stages.values()] == [11, 11]
    for line, *messages in (
        ("--epochs 3 --steps 4", "`--steps` and `--epochs` cannot be used together"),
        ("--lr 0", "`--lr`: `optim.lr` must be greater than 0"),
        ("--data ./nowhere --epochs 3 --dry-run", "not known yet", "`--steps N`"),
    ):
        code, _, stderr = gz("train", "vae", *line.split())
        assert code == 2 and all(text in stderr for text in messages), line


def test_each_stage_has_its_lines(gz, dry_run, planned):
    planned()
    code, stdout, _ = gz("train", "vqvae", "--cpu", "--dry-run")
    assert code == 0 and "tokenizer: vqvae, 35.7M parameters" in stdout and "prior: transformer" in stdout
    assert "total   about" in stdout
    result = dry_run("vqvae", "--cpu")
    assert result["params"] == 2 * PARAMS and len(result["memory"]) == 2
    assert all(stage["params"] == PARAMS for stage in result["recipe"]["stages"].values())


def test_what_cannot_be_found_is_said_and_what_cannot_be_built_refused(gz, dry_run, planned):
    assert dry_run("vae", "--data", "./nowhere")["needs"] == ["`./nowhere` does not exist"]
    planned(error="the weights of `a/b` are not available")
    result = dry_run("vae")
    assert result["params"] is None and result["seconds"] is None and result["memory"] == []
    assert result["needs"] == ["the weights of `a/b` are not available"]
    planned(error="`model.width` is 64, which is not divisible by 7 heads", refused="set `model.heads`")
    code, stdout, _ = gz("train", "vqvae", "--cpu", "--dry-run", "--json")
    error = json.loads(stdout)["error"]
    assert code == error["code"] == 2 and error["hint"] == "set `model.heads`"
    planned(error="no step was tried")
    assert gz("train", "vqvae", "--cpu", "--dry-run")[0] == 0


def test_gpus_that_are_not_here_are_planned_for(gz, dry_run, planned, monkeypatch):
    jobs = planned()
    monkeypatch.setattr(forecast, "gpu_memory", lambda: None)
    words = ("ddpm", "--data", "cifar10", "--gpus")
    for gpus, here, elsewhere in (("4", "on 4 H100s", "on an H100"), ("1", "on an H100", "on 4 H100s")):
        code, stdout, _ = gz("train", *words, gpus, "--dry-run")
        assert code == 0 and here in stdout and elsewhere not in stdout and "unknown here, " in stdout
    assert not any(row["timed"] for row in jobs[0].parts)
    one, four = (dry_run(*words, gpus) for gpus in ("1", "4"))
    assert one["seconds_on_gpus"] == one["seconds_on_h100"] == four["seconds_on_h100"]
    assert four["seconds_on_gpus"] - 60 == pytest.approx((one["seconds_on_h100"] - 60) / 4)


def test_no_gpu_is_faster_than_its_kernels_or_ready_at_once():
    """A small net is bound by the launches of its kernels, on many GPUs as on one."""
    part = resolve("vae", data="digits", flags={"train.steps": 6000}).parts[0]
    small, large = (forecast.Forecast(part, 1, flops, 500.0) for flops in (1e8, 1e13))
    assert small.on_h100s(1) == small.on_h100s(8) == pytest.approx(60 + 6000 * 500 * 4e-6 / 0.9)
    assert large.on_h100s(1) == pytest.approx(60 + 6000 * 1e13 / (0.2 * 989e12) / 0.9)
    one_step = replace(part, train=replace(part.train, steps=1))
    assert forecast.Forecast(one_step, 1, 1e6, 10.0).on_h100s(1) >= 60
    assert forecast.Forecast(part, 1, None, None).on_h100s(1) is None
    # of a run that the start takes longer than, no time is claimed: 73 seconds, of which compiling takes 60
    assert forecast.h100_seconds([small], 1) is None
    assert forecast.h100_seconds([large], 1) == large.on_h100s(1)
    assert forecast.h100_seconds([small, large], 1) == pytest.approx(small.on_h100s(1) + large.on_h100s(1))


def test_a_batch_that_gz_chose_is_rounded_to_the_gpus(gz, planned, monkeypatch):
    """The plan says so; one of the user's own is refused, by the plan too, and so is that of a run."""
    planned()
    monkeypatch.setattr(forecast, "gpu_memory", lambda: None)
    words = ("train", "vqgan", "--data", "cifar10", "--gpus", "3", "--dry-run", "--keys")
    code, stdout, stderr = gz(*words)
    assert (
        code == 0 and len(re.findall(r"a batch of \d+ of stage `\w+` cannot be divided among 3", stderr)) == 2
    )
    assert re.search(r"stages.prior.train.batch_size +\d+ +\d+, for 3 processes", stdout)
    code, _, stderr = gz(*words, "--set", "stages.prior.train.batch_size=64")
    assert code == 2 and "`stages.prior.train.batch_size` is the global batch: 64 cannot be divided" in stderr
    assert "--set stages.prior.train.batch_size=66" in stderr
    run = runs.create("vae", "digits", alias="mine")
    run.recipe_file.write_text("model: {name: vae}\ntrain: {batch_size: 8}\n")
    run.update(state="interrupted")
    code, _, stderr = gz("train", "mine", "--resume", "--gpus", "3", "--dry-run")
    assert code == 2 and "keeps its batch size: resume on 2 processes" in stderr


def test_parts_and_small_sets_are_rounded_too(home):
    """Parts that gz chose are fewer where the processes are many; a batch is no larger than the set."""

    def shared(typed: str, processes: int, **parts: int) -> tuple[int, int]:
        recipe = planning.ask("vae", None, [typed], {}).recipe
        (part,) = recipe.parts
        recipe = replace(recipe, parts=(replace(part, train=replace(part.train, **parts)),))
        train = planning.shared_out(recipe, processes)[0].parts[0].train
        return train.batch_size, train.accumulate

    assert shared("data.n=32", 3)[0] == 30
    assert shared("data.n=32", 3, batch_size=4, accumulate=4) == (3, 1)
    assert shared("train.batch_size=12", 6, accumulate=4) == (12, 2)
    batch, accumulate = shared("train.accumulate=4", 3)
    assert (batch % 12, accumulate) == (0, 4)


def test_a_start_tells_in_two_lines(gz, planned, monkeypatch, photos):
    jobs = planned()
    monkeypatch.setattr(launcher, "run", lambda *args, **options: {})
    code, stdout, stderr = gz("train", "vae", "--cpu")
    assert (code, stdout, jobs) == (0, "", [])  # the embedded digits take a minute: nothing is tried
    assert "tiny (set by the recipe for digits): digits: 1," in stderr
    words = ("train", "vae", "--data", photos, "--cpu", *FEW)
    for length in (("--steps", "5"), ("--set", "train.steps=5")):
        assert gz(*words, *length)[0] == 0 and not jobs
    code, _, stderr = gz(*words)
    assert code == 0 and len(jobs) == 1
    assert "35.7M parameters, " in stderr and " steps: about " in stderr and "run: " in stderr
    lines = [line for line in stderr.splitlines() if "parameters" in line or "--scale" in line]
    assert max(map(len, lines)) <= 80
    assert "parameters" not in gz(*words, "-q")[2]


def test_a_trial_that_fails_is_no_reason_not_to_start_but_ctrl_c_is(gz, monkeypatch, photos):
    monkeypatch.setenv("GZ_TRIAL", "1")
    for error, code, count in ((Interrupted("interrupted", signum=2), 130, 0), (GzError("no trial"), 0, 1)):

        def engine(folder, *args, error=error, **options):
            if (folder / "job.json").exists():
                raise error
            return {}

        monkeypatch.setattr(launcher, "run", engine)
        assert gz("train", "vae", "--data", photos, "--cpu", *FEW)[0] == code
        assert len(runs.all_runs()) == count


def test_more_than_a_week_is_asked_for_on_a_terminal(gz, planned, monkeypatch, photos):
    planned(seconds=3600.0)
    monkeypatch.setattr(launcher, "run", lambda *args, **options: {})
    words = ("train", "vae", "--data", photos, "--cpu", *FEW)
    code, _, stderr = gz(*words)
    assert code == 0 and "more than a week; with `--yes`, gz does not warn" in stderr  # a script has started
    assert "than a week" not in gz(*words, "--yes")[2]
    monkeypatch.setattr(out, "on_terminal", lambda: True)
    for answer, expected in (("y\n", 0), ("n\n", 2), ("", 2)):
        before = len(runs.all_runs())
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        code, _, stderr = gz(*words)
        assert code == expected and "Start? [y/N]" in stderr and ("not started" in stderr) == bool(code)
        assert len(runs.all_runs()) == before + (code == 0)


def test_a_common_time_is_split_over_stages_by_their_operations():
    parts = resolve("vqvae", data="mnist").parts
    equal = [forecast.Forecast(part, flops=FLOPS) for part in parts]
    steps = [part.train.steps for part in parts]
    first = round(20 * steps[0] / sum(steps)) / 20
    assert forecast.shares(equal) == pytest.approx([0.25 + first / 2, 0.75 - first / 2])
    tiny = forecast.Forecast(parts[0], flops=FLOPS / 1e6)
    assert forecast.shares([tiny, equal[1]]) == pytest.approx([0.25, 0.75])
    assert forecast.shares([forecast.Forecast(parts[0]), equal[1]]) == [0.5, 0.5]  # one is not known


def test_a_hint_where_it_does_not_fit(gz, planned, monkeypatch):
    planned()
    words = ("train", "vae", "--dry-run", "--cpu", "--set", "train.batch_size=64")
    monkeypatch.setattr(forecast, "host_memory", lambda: 800_000_000)
    code, _, stderr = gz(*words)
    assert code == 0 and "`vae` may not fit: this machine has 800 MB per process" in stderr
    assert "`--set train.accumulate=2`" in stderr
    monkeypatch.setattr(forecast, "host_memory", lambda: 1_000_000_000)
    assert "fit" not in gz(*words)[2]
    assert "500 MB per process" in gz(*words, "--processes", "2")[2]  # they share the machine


def test_ways_to_save_are_those_that_the_model_has():
    options = {"checkpointing": False, "cache": True, "dtype": "fp32"}
    part = Part("sd_lora", options, train=TrainSection(batch_size=9), optim=OptimSection(name="adamw"))
    ways = ["`--set model.checkpointing=true`", "`--set model.dtype=bf16`"]
    accumulate = "`--set train.accumulate=3`"
    assert forecast.ways_to_save(part, launcher.Plan()) == [*ways, accumulate]
    adam = "`--set optim.name=adamw8bit`"
    assert forecast.ways_to_save(part, launcher.Plan(gpus=3, processes=3)) == [*ways, adam, accumulate]
    train = TrainSection(batch_size=8, accumulate=8)
    part = Part("vae", train=train, optim=OptimSection(name="sgd"))
    assert forecast.ways_to_save(part, launcher.Plan(gpus=1)) == []


def test_stable_diffusion_plans_for_weights_that_are_absent(dry_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def fetched(base: str) -> list[str]:
        result = dry_run("sd-lora", "--data", "digits-captioned", "--set", f"model.base={base}")
        assert result["recipe"]["model"]["base"] == base and not runs.all_runs()
        return [need for need in result["needs"] if "hf download" in need]

    unknown = "nobody/has-such-a-model"
    for base in ("stable-diffusion-v1-5/stable-diffusion-v1-5", unknown):
        assert fetched(base) == [f"`hf download {base}`"]
    (tmp_path / "models--nobody--has-such-a-model" / "snapshots" / "0a1b").mkdir(parents=True)
    assert not any(fetched(base) for base in (unknown, str(tmp_path), "./no/folder"))


SMI = """#!/bin/sh
echo "0, GPU-aaa, 81559
1, GPU-bbb, 24576
2, GPU-ccc, [N/A]"
"""


def test_the_memory_of_gpus_is_that_of_the_smallest_visible(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert forecast.gpu_memory() == 24576 << 20
    for visible, mebibytes in (("0", 81559), ("0,1", 24576), ("GPU-aaa", 81559), ("2", None), ("7", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert forecast.gpu_memory() == (mebibytes and mebibytes << 20), visible
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert forecast.gpu_memory() is None and forecast.host_memory() > 1 << 28


def test_what_a_set_lacks_is_told_with_the_sets_that_have_it():
    def check(needs: str, extras: tuple[str, ...]) -> None:
        reader = replace(catalog.card("vae"), name="reader", needs=tuple(needs.split()))
        photos = SimpleNamespace(name="photos", shape=(3, 8, 8), classes=(), extras=extras)
        check_data(Part("reader"), reader, photos)

    for needs, extras in (("caption", ("caption",)), ("caption before", ("caption", "before")), ("", ())):
        check(needs, extras)
    for needs, extras, lacking, sets in (
        ("caption", (), "captions", "shapes, emoji, digits-captioned, digits-edited;"),
        ("caption before", (), "captions and `before` images", ": digits-edited;"),
        ("caption before", ("caption",), "`before` images", ": digits-edited;"),
        ("control", ("caption", "before"), "`control` images", "have them: none"),
    ):
        with pytest.raises(UsageError) as e:
            check(needs, extras)
        assert e.value.message == f"`reader` needs {lacking}, but `photos` has none"
        assert sets in e.value.hint and "metadata.jsonl" in e.value.hint


@pytest.fixture
def reader(monkeypatch):
    """`vae` needs captions and images before an instruction."""
    card, lookup = replace(catalog.card("vae"), needs=("caption", "before")), catalog.card
    monkeypatch.setattr(catalog, "card", lambda name: card if name == "vae" else lookup(name))


def captioned(path: Path, *more: str) -> Path:
    rows = [{"file_name": f"{i}.png", "text": "a", **dict.fromkeys(more, "other.png")} for i in range(12)]
    files = {f"{i}.png": png(RED) for i in range(12)} | ({"other.png": png(RED)} if more else {})
    return write(path, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})


def test_refused_before_launch(gz, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "run", lambda *args, **options: pytest.fail("launched"))
    for name in ("digits", "digits-captioned", "mnist"):
        for more in ((), ("--dry-run",)):
            code, _, stderr = gz("train", "vae", "--data", name, *more)
            assert code == 2 and f"but `{name}` has none" in stderr
            assert "sets that have them: digits-edited" in stderr
    assert gz("train", "vae", "--data", "digits-edited", "--dry-run")[0] == 0
    folder = str(captioned(tmp_path / "photos"))
    for more in ((), ("--dry-run",)):  # a plan looks into a folder that was never packed
        code, _, stderr = gz("train", "vae", "--data", folder, *more)
        assert code == 2 and "`vae` needs `before` images, but `" in stderr and "photos` has none" in stderr
    assert not runs.all_runs()
    whole = str(captioned(tmp_path / "triples", "before"))
    monkeypatch.setattr(launcher, "run", lambda *args, **options: {})
    assert gz("train", "vae", "--data", whole, *FEW)[0] == 0 and len(runs.all_runs()) == 1


def test_gz_says_which_model_to_begin_with(gz, planned, monkeypatch, photos, tmp_path):
    """The end of an import, a training without a model, and the hint of a refused one agree."""
    monkeypatch.setattr(launcher, "run", lambda *args, **options: {})
    flat = str(captioned(tmp_path / "flat"))
    classed = tmp_path / "classed"
    for name in "ab":
        captioned(classed / name)
    for path, model in ((flat, "fm"), (str(classed), "cfm"), ("digits", "cfm")):
        code, _, stderr = gz("train", "--data", path, "--dry-run")
        assert code == 0 and f"model: {model}\n" in stderr
    code, _, stderr = gz("train", "cfm", "--data", flat, "--dry-run")
    assert code == 2 and f"hint: `gz train fm --data {flat}`" in stderr.replace("\n", " ")
    for path, model in ((flat, "fm"), (str(classed), "cfm")):
        assert f"next: gz data show {model}-set" in (
            said := gz("data", "import", path, "--name", f"{model}-set")[2]
        )
        assert f"gz train {model} --data {model}-set" in said
    code, _, stderr = gz("train")
    assert code == 2 and "gz train --data" in stderr


def test_an_import_says_what_was_found(gz, tmp_path):
    folder = captioned(tmp_path / "triples", "before", "control")
    code, stdout, stderr = gz("data", "import", str(folder), "--name", "edits")
    assert (code, stdout) == (0, "edits\n")
    assert "; no classes; with captions and `before` images and `control` images\n" in stderr
    rows = {row["name"]: row["extras"] for row in json.loads(gz("list", "data", "--json")[1])["data"]}
    assert rows["edits"] == ["caption", "before", "control"]
    assert rows["digits-edited"] == ["caption", "before"]
    assert "with each  captions and `before` images\n" in gz("data", "list", "--long")[1]
