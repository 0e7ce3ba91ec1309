"""train, sample, ood and bench as a user calls them, on the digits; and their messages on mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_process
from PIL import Image

from gzcli.cli import app
from gzcli.cli.jobs import as_options
from gzcli.engine.__main__ import main
from gzcli.engine.checkpoint import read_weights
from gzcli.engine.log import Log
from gzcli.engine.trained import build_model
from gzcli.judge import ood
from gzcli.judge.sample import Frames
from gzcli.launch import launcher
from gzcli.launch.plan import with_data, write_run
from gzcli.recipe.resolve import resolve
from gzcli.store import jobs, runs

SHORT = ("--set", "train.sample_every=0", "--set", "train.eval_every=0", "--set", "train.best=none", "--cpu")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory, forks):
    """One home for the module, with a VAE and a conditional one trained for a moment."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("verbs")))
    done = forks.gz("train", "vae", "--steps", "60", "--name", "first", *SHORT)
    assert Path(done.stdout.strip()).exists() and done.stdout.strip().endswith("00000060.png")
    trained("labelled", "model.conditional=true")
    trained("binary", "data.levels=2")
    yield
    patch.undo()


def trained(name: str, *sets: str) -> None:
    """A run of 20 steps, planned and trained in this process: the one that is called `first` is a user's."""
    recipe = resolve("vae", sets=(*SHORT[1:-1:2], *sets), flags={"train.steps": 20, "launch.cpu": True})
    recipe = with_data(recipe, recipe.dataset)
    run = runs.create("vae", "digits", alias=name)
    write_run(run, recipe, launcher.plan(recipe.launch, every_gpu=True))
    assert main(run.path) == 0


def call(capsys, *words: str) -> tuple[int, str, str]:
    """`gz` in this process: exit code, stdout, stderr."""
    code = app.run(list(words))
    return (code, *capsys.readouterr())


def test_a_run_directory_is_complete_and_its_weights_suffice():
    path = runs.by_name("first").path
    names = "run.yaml env.json status.json log.txt metrics.jsonl loss.png model.safetensors"
    assert set(names.split()) <= {file.name for file in path.iterdir()}
    assert (path / "samples" / "00000060.png").exists()
    status = runs.by_name("first").status()
    assert (status["state"], status["step"], status["code"]) == ("finished", 60, 0)
    env = json.loads((path / "env.json").read_text())
    assert {"packages", "python", "git", "threads", "command"} <= env.keys()
    # the safetensors file alone is enough
    saved = read_weights(runs.by_name("first").path / "model.safetensors")
    build_model(saved.part, saved.info).load_state_dict(saved.weights)
    assert saved.step == 60 and saved.info.shape == (1, 16, 16)
    words = ["--set", "sample.steps=15", "--clip", "--set=sample.sampler=dpmpp"]
    assert as_options(words, "sample") == ["--steps=15", "--clip", "--sampler=dpmpp"]


def test_sample_writes_what_it_says(forks, tmp_path):
    words = ("sample", "first", "-n", "6", "--seed", "3", "--npz", "--cpu", "--json")
    result = json.loads(forks.gz(*words, "--out", str(tmp_path / "a")).stdout)
    assert (result["schema"], result["n"], result["seed"]) == (1, 6, 3)
    assert len(result["files"]) == 6 and all(Image.open(f).size == (16, 16) for f in result["files"])
    samples = np.load(result["npz"])["samples"]
    assert samples.shape == (6, 16, 16, 1) and samples.dtype == np.uint8
    again = json.loads(forks.gz(*words, "--out", str(tmp_path / "b"), "--temperature", "0.5").stdout)
    assert not np.array_equal(samples, np.load(again["npz"])["samples"])
    done = forks.gz("sample", "labelled", "--label", "11", "--cpu", code=2)
    assert "no label `11` among the 10 classes" in done.stderr


def test_two_processes_draw_what_one_draws(forks, tmp_path):
    """Each rank draws its share; image i is the same whoever draws it."""
    drawn = []
    for n in (1, 2):
        words = f"sample first -n 7 --npz --cpu --processes {n} --json --out {tmp_path / str(n)}"
        done = json.loads(forks.gz(*words.split()).stdout)
        drawn.append(np.load(done["npz"])["samples"].astype(int))
    assert drawn[0].shape == drawn[1].shape == (7, 16, 16, 1)
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_animation_shows_the_way(tmp_path):
    frames = Frames(lambda x: x)
    show = frames.watch(lambda i, n, x=None: None)
    for i in range(5):
        show(i + 1, 5, torch.full((3, 1, 8, 8), i / 5))
    frames.save(tmp_path / "animation.gif", np.full((3, 1, 8, 8), 255, np.uint8))
    with Image.open(tmp_path / "animation.gif") as gif:
        assert gif.n_frames == 6  # five states, and the result, on which it rests


def test_applications_take_pictures_or_test_images(forks, tmp_path):
    grey = tmp_path / "grey.png"
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(grey)
    for i, line in enumerate((f"first --do reconstruct --input {grey}", "binary --do reconstruct -n 4")):
        done = forks.gz("sample", *line.split(), "--cpu", "--out", str(tmp_path / str(i)))
        assert Path(done.stdout.strip()).exists()
    words = ["sample", "first", "--do", "interpolate", "--steps", "5", "-n", "4", "--cpu", "--json", "--out"]
    done = forks.gz(*words, str(tmp_path / "i"))
    assert json.loads(done.stdout)["n"] == 10  # two pairs, five steps each


def test_ood_and_bench_and_their_files(forks):
    words = "ood first --in digits --out digits-ab -n 60 --score elbo,complexity,iwae --k 3 --cpu --json"
    result = json.loads(forks.gz(*words.split()).stdout)
    rows = {(row["out"], row["score"]): row for row in result["results"]}
    folder = Path(result["files"]["scores"]).parent
    assert json.loads((folder / "job.json").read_text())["options"] == {"k": 3}
    without_model = {"png", "mean", "knn_pixels", "pca", "pca_local"}
    assert {"elbo", "complexity", "iwae", *without_model} == {score for _, score in rows}
    wanted = "out score baseline auroc aupr_in aupr_out fpr95 fpr95_id n_in n_out"
    assert all(set(wanted.split()) <= row.keys() for row in rows.values())
    assert (folder / "histograms.png").exists() and (folder / "ood.json").exists()
    header = (folder / "scores.csv").read_text().splitlines()[0]
    assert header.startswith("set,role,index,file,elbo,complexity,iwae")
    words = "bench first labelled --data digits -n 100 --metrics fd,classes,bpd --cpu --json"
    result = json.loads(forks.gz(*words.split()).stdout)
    assert [row["run"] for row in result["rows"]] == [runs.by_name(name).id for name in ("first", "labelled")]
    assert all({"model", "run", "params", "metrics", "seconds"} <= row.keys() for row in result["rows"])
    assert result["floor"]["fd"] < result["rows"][0]["metrics"]["fd"]
    assert Path(result["picture"]).exists()


def test_ood_in_two_processes_is_ood_in_one(forks, tmp_path):
    """Two real processes against the same job in this process; without `--in`, on the run's own set."""
    words = "ood first --out digits-ab -n 140 --score elbo,typicality --cpu --processes 2 --json"
    result = json.loads(forks.gz(*words.split()).stdout)
    assert result["processes"] == 2 and result["in"] == "digits"
    folder = Path(result["files"]["scores"]).parent
    one = ood.run(jobs.read(folder), tmp_path, torch.device("cpu"), Log())
    two, alone = ((path / "scores.csv").read_text().splitlines() for path in (folder, tmp_path))
    assert len(two) == len(alone) == 281
    assert one["results"][0]["auroc"] == pytest.approx(result["results"][0]["auroc"], abs=1e-4)
    for a, b in zip(two[1:], alone[1:], strict=True):
        (*cells, elbo, typical), (*same, other_elbo, other_typical) = (line.split(",")[:6] for line in (a, b))
        assert cells == same and float(elbo) == pytest.approx(float(other_elbo), rel=1e-5)
        assert float(typical) == pytest.approx(float(other_typical), abs=1e-5 * float(elbo))


WRONG = {  # a command: its exit code, and what message and hint say
    "train vaee": (2, "no model `vaee`", "did you mean `vae`?"),
    "train vae --data mnits": (2, "no data set `mnits`", "did you mean `mnist`?"),
    "train vae --data mnist": (3, "`mnist` is not in the cache", "gz data download mnist"),
    "train vae --set train.stepz=3": (2, "unknown key `stepz`", "did you mean `steps`?"),
    "train vae --gpus 2": (4, "`--gpus 2`: there are no GPUs here", "--cpu --processes 2"),
    "train vae --gpus two": (2, "`--gpus two` is neither a number nor `all`", ""),
    "train glow --resume": (3, "no unfinished run of `glow` on `digits`", "gz train glow"),
    "train first --resume --seed 5": (2, "seed: 0 in the run, 5 requested", "without `--resume`"),
    "train first --resume --steps 10": (2, "the run has done 60, 10 requested", ""),
    "train vae --steps 5 --minutes 1": (2, "cannot be used together", ""),
    "train vae --name first": (2, "the name `first` is already used", "choose another"),
    "train vae --name sd_lora": (2, "`sd_lora` is the name of a model", "sd_lora-1"),
    "train vae --set train.batch_size=63 --cpu --processes 2": (2, "63 cannot be divided", "batch_size=6"),
    "sample glow": (3, "no finished run of `glow`", "gz train glow; `--pretrained` uses"),
    "sample flowpp": (3, "no finished run of `flowpp`", "gz train flowpp"),
    "sample vaee": (2, "no model or run is called `vaee`", "did you mean `vae`?"),
    "sample first --temprature 1": (2, "no such option `--temprature`", "did you mean `--temperature`?"),
    "sample first --lable 3": (2, "no such option `--lable`", "did you mean `--label`?"),
    "sample --lable 3 first": (2, "no such option `--lable`", "did you mean `--label`?"),
    "sample first 16": (2, "unexpected argument `16`", "options of `vae`: "),
    "sample first --temperature warm": (2, "`--temperature` must be", ""),
    "sample first --set sample.temperature=warm": (2, "`--temperature` must be", ""),
    "sample first --set model.latent=3": (
        2,
        "a trained model accepts only `sample.KEY=VALUE`",
        "sample.steps",
    ),
    "sample first --do reconstrct": (2, "`reconstrct`", "did you mean `reconstruct`?"),
    "sample first --label 3": (2, "was not trained with labels", "model.conditional=true"),
    "sample first --do interpolate --label 3": (2, "was not trained with labels", "model.conditional=true"),
    "sample first --checkpoint worst": (2, "neither `last`, `best` nor a step", ""),
    "ood first --in digits --out pathces": (2, "no data set `pathces`", "did you mean `patches`?"),
    "ood first --in digits --out patches --score elbow": (2, "no score `elbow`", "did you mean `elbo`?"),
    "ood first --in digits --out patches --stesp 3": (2, "no such option `--stesp`", "`--steps`?"),
    "ood --in digits": (2, "needs the images to judge", "gz ood --in digits --input ./today"),
    "ood first --map": (2, "`--map` needs `--input`", "gz ood first --input ./today"),
    "ood --in digits --inptu patches": (2, "no such option `--inptu`", "did you mean `--input`?"),
    "bench --data patches": (3, "no finished run on `patches`", "gz train vae --data patches"),
}


def test_wrong_words_recipes_and_data_are_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for command, (code, message, hint) in WRONG.items():
        got, out, err = call(capsys, *command.split())
        assert (got, out) == (code, ""), (command, err)
        assert message in err and hint in err.partition("hint:")[2] and "Traceback" not in err, command
    recipe, pictures = tmp_path / "mine.yaml", tmp_path / "pictures"
    recipe.write_text("extends: vae\nmodel: {latnet: 4}\ntrain:\n  steps: many\noptim: {lr: -1}\n")
    code, _, err = call(capsys, "train", str(recipe))
    assert code == 2 and all(f"mine.yaml:{line}:" in err for line in (2, 4, 5))
    pictures.mkdir()
    for i in range(12):
        Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(pictures / f"{i}.png")
    before = len(runs.all_runs())
    code, _, err = call(capsys, "train", "vae", "--data", str(pictures), "--set", "model.conditional=true")
    assert code == 2 and "needs labels" in err and "gz train fm --data " in err
    assert len(runs.all_runs()) == before
    code, out, _ = call(capsys, "sample", "vaee", "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"], error["kind"], error["hint"]) == (2, 2, "usage", "did you mean `vae`?")


def test_dry_run_creates_nothing_and_plans_for_what_is_absent(capsys):
    before = len(runs.all_runs())
    code, out, _ = call(capsys, "train", "glow", "--data", "mnist", "--gpus", "4", "--dry-run", "--keys")
    assert code == 0 and len(runs.all_runs()) == before
    pieces = ("model.depth", "recipes/glow.yaml:", "accelerate launch", "4 GPUs", "gz data download mnist")
    assert all(piece in out for piece in (*pieces, "(12 MB to download)")), out


def test_a_larger_steps_extends_a_finished_run_and_a_run_can_be_repeated(forks):
    forks.gz("train", "first", "--resume", "--steps", "70", *SHORT[-1:])
    assert runs.by_name("first").status()["step"] == 70
    forks.gz("train", "first", "--name", "again", "--cpu")
    a, b = runs.by_name("first"), runs.by_name("again")
    assert a.tree()["train"]["steps"] == b.tree()["train"]["steps"] == 70


def test_weights_and_biases_offline(forks):
    pytest.importorskip("wandb")
    words = "train vae --steps 2 --name logged --wandb"
    forks.gz(*words.split(), *SHORT, env={"WANDB_MODE": "offline"})
    assert list(runs.by_name("logged").path.glob("wandb/offline-run-*"))


def test_export_to_diffusers(forks, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "run", in_process)  # where diffusers, which takes seconds, is loaded once
    diffusers = pytest.importorskip("diffusers")
    small = ("--set", "model.channels=8", "--set", "sample.steps=2")
    forks.gz("train", "ddpm", "--steps", "2", "--name", "noisy", *small, *SHORT)
    code, _, err = call(capsys, "runs", "export", "noisy", "--to", "diffusers", "--out", str(tmp_path / "it"))
    assert code == 0, err
    assert diffusers.DDIMPipeline.from_pretrained(tmp_path / "it").unet.config.sample_size == [16, 16]
    code, _, err = call(capsys, "runs", "export", "first", "--to", "diffusers", "--quiet")
    assert code == 2 and "has no counterpart in diffusers" in err and "--can export" in err
