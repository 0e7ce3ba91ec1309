"""Recipes and runs in stages: a tokenizer, then the prior of its codes, trained in one run."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lines
from refused import refused
from safetensors.torch import load_file

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.batches import scan
from gzcli.data.packs.open import open_pack
from gzcli.engine import validate as validation
from gzcli.engine.__main__ import main, record_status, train_one
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.launch import launcher
from gzcli.launch.plan import continued, with_data, write_run
from gzcli.recipe.recipe import recipe_of
from gzcli.recipe.resolve import resolve
from gzcli.recipe.yaml import dump
from gzcli.store import runs
from gzcli.store.runs import Run

pytestmark = pytest.mark.usefixtures("undrawn")

RECIPE = """
data: {name: digits}
train: {steps: 6, batch_size: 16, sample_every: 0, eval_every: 3, log_every: 1, precision: fp32}
optim: {lr: 1e-3}
stages:
  tokenizer:
    model: {name: vqvae, hidden: 16, residual: 8, blocks: 1, codes: 16, dim: 8}
    train: {steps: 40}
    optim: {lr: 3e-3}
  prior:
    model: {name: transformer, width: 16, layers: 1, heads: 2, dropout: 0.1}
    sample: {temperature: 0.9}
for:
  mnist: {train: {ema: 0.5}, stages: {prior: {train: {steps: 9}}}}
"""


@pytest.fixture
def path(tmp_path) -> str:
    (tmp_path / "two.yaml").write_text(RECIPE)
    return str(tmp_path / "two.yaml")


def make(path: str, *sets: str, **flags) -> Run:
    """A run as `gz train` plans it."""
    recipe = resolve(path, sets=sets, flags={"launch.cpu": True, **flags})
    recipe = with_data(recipe, recipe.dataset)
    run = runs.create(recipe.card.name, "digits")
    write_run(run, recipe, launcher.plan(recipe.launch, every_gpu=True))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("recipe") / "two.yaml"
    path.write_text(RECIPE)
    run = make(str(path))
    assert main(run.path) == 0
    return run


def test_stages_lay_their_own_over_what_is_shared_and_the_command_line_over_all(path, tmp_path):
    for data, steps, ema in (("digits", 6, 0.0), ("mnist", 9, 0.5)):
        recipe = resolve(path, data=data)
        tokenizer, prior = recipe.parts
        assert [part.stage for part in recipe.parts] == ["tokenizer", "prior"]
        assert [part.optim.lr for part in recipe.parts] == [3e-3, 1e-3]
        assert prior.train.steps == steps and tokenizer.train.ema == ema
        assert all(part.data.name == data and part.seed == 0 for part in recipe.parts)
    assert recipe.card.name == "vqvae" and recipe.parts[1].model == "transformer"
    assert recipe.origin["stages.prior.train.steps"].startswith("for.mnist ")
    assert recipe.origin["stages.tokenizer.optim.lr"].endswith("two.yaml:9")
    assert recipe.origin["stages.prior.model.width"].endswith("two.yaml:11")
    sets = ["optim.lr=5e-4", "stages.prior.train.ema=0.9"]
    recipe = resolve(path, data="mnist", sets=sets, flags={"train.steps": 50})
    assert [part.train.steps for part in recipe.parts] == [50, 50]
    assert [part.optim.lr for part in recipe.parts] == [5e-4, 5e-4]
    assert [part.train.ema for part in recipe.parts] == [0.5, 0.9]
    assert recipe.origin["stages.prior.train.steps"] == "--steps"
    assert recipe.origin["stages.prior.train.ema"] == "--set"
    recipe = resolve(path, sets=["stages.prior.model.name=maskgit", "stages.prior.model.layers=3"])
    prior = recipe.parts[1]
    assert prior.model == "maskgit" and prior.options["layers"] == 3 and prior.options["width"] == 16
    assert prior.sample.get("temperature", 0.9) == 0.9
    recipe = resolve(path, sets=["stages.prior.data.n=7", "stages.prior.data.augment=[mutate=0.1]"])
    recipe = recipe.on(replace(recipe.data, size=16, n=9))
    assert [part.data.size for part in recipe.parts] == [16, 16]
    assert [part.data.n for part in recipe.parts] == [9, 7]
    assert recipe.tree()["stages"]["prior"]["data"] == {"n": 7, "augment": ["mutate=0.1"]}
    assert recipe_of(recipe.tree()).parts == recipe.parts
    assert recipe.value("stages.prior.data.n") == 7 and recipe.value("stages.prior.data.nothing") == {}
    tree = resolve(path, data="mnist").tree()
    (tmp_path / "again.yaml").write_text(dump(tree))
    assert resolve(str(tmp_path / "again.yaml")).tree() == tree


MISTAKES = {  # what stands in the recipe in place of what, and what is said
    ("  tokenizer:", "  tokeniser:"): "`transformer` needs a stage `tokenizer` before it",
    ("width: 16", "widht: 16"): "unknown key `widht` in `stages.prior.model` (did you mean `width`?)",
    ("name: transformer", "name: transfomer"): "there is no model `transfomer`",
    ("    sample: {temp", "    data: {name: mnist}\n    sample: {temp"): "`name` in `stages.prior.data`",
    ("train: {steps: 6", "sample: {}\ntrain: {steps: 6"): "did you mean `stages.tokenizer.sample`?",
    ("    model: {name: vqvae", "    model: {x: 1"): "`stages.tokenizer.model.name` is missing",
}


def test_a_mistake_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for change, message in MISTAKES.items():
        assert change[0] in RECIPE
        Path("bad.yaml").write_text(RECIPE.replace(*change))
        e = refused("", resolve, "./bad.yaml")
        text = f"{e.message} ({e.hint})"
        assert message in text and "bad.yaml:" in text, change


def test_each_stage_is_a_whole_run_and_codes_are_the_tokenizer_s(trained, path):
    assert trained.state == "finished" and [stage.state for stage in trained.stages] == ["finished"] * 2
    for stage in trained.stages:
        steps = stage.tree()["train"]["steps"]
        assert (stage.path / "model.safetensors").exists()
        assert (stage.path / f"samples/{steps:08d}.png").exists()
        logged = [row["step"] for row in lines(stage.path / "metrics.jsonl") if "loss" in row]
        assert logged == list(range(1, steps + 1))
    assert trained.serving.id == f"{trained.id}/stages/prior" and trained.serving.owner == trained
    assert runs.find(trained.id) == trained and runs.by_name(trained.serving.id) == trained.serving
    recipe = resolve(str(trained.path / "run.yaml"), flags={"train.steps": 8})
    recipe = continued(trained, with_data(recipe, recipe.dataset))
    assert [part.train.steps for part in recipe.parts] == [40, 8]
    codes = np.load(trained.stage("prior").path / "prepared" / "codes.npy")
    pack, tokenizer = open_pack("digits"), load_trained(trained.stage("tokenizer"), "cpu").model
    index = [0, 7, 1000, len(codes) - 1]
    batch = next(scan(pack, "train", batch_size=4, levels=17, device="cpu", index=index))
    assert np.array_equal(codes[index], tokenizer.encode(batch.x).flatten(1).numpy())
    assert len(codes) == pack.meta.counts["train"]


def test_verbs_talk_to_the_last_stage(forks, trained, path):
    model = load_trained(trained, torch.device("cpu"))
    assert model.part.model == "transformer" and model.name == "vqvae"
    refused("no model or run is called `nope`", resolve, path, sets=["stages.tokenizer=nope"])
    for more in ("--temperature 0.5", "--do reconstruct"):
        shown = forks.gz("sample", trained.id, "-n", "4", "-q", *more.split()).stdout.strip()
        assert Path(shown).exists() and shown.startswith(str(trained.path / "sampled"))


def test_broken_off_in_any_stage_it_goes_on_as_if_it_were_not(trained, path):
    run = make(path)
    for stage in run.stages:
        (run.path / "stop").write_text("15")
        assert main(run.path) == 143 and run.state == stage.state == "interrupted"
        assert stage.status()["step"] == 1
        if stage != run.serving:
            with record_status(stage, Log(stage.path)):
                train_one(stage, Log(stage.path))
    assert main(run.path) == 0
    for stage, whole in zip(run.stages, trained.stages, strict=True):
        a, b = (load_file(s.path / "model.safetensors") for s in (stage, whole))
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_finished_stage_serves_another_prior_and_no_prior_takes_another(trained, path, tmp_path):
    run = make(path, f"stages.tokenizer={trained.id}", "stages.prior.model.name=maskgit")
    before = (run.stage("tokenizer").path / "model.safetensors").read_bytes()
    assert main(run.path) == 0 and load_trained(run, "cpu").part.model == "maskgit"
    assert (run.stage("tokenizer").path / "model.safetensors").read_bytes() == before
    assert resolve(str(run.path / "run.yaml")).reused == {"tokenizer": trained.id}
    copy = Run(Path(shutil.copytree(trained.path, tmp_path / "copy")))
    weights = (copy.stage("prior").path / "model.safetensors").read_bytes()
    (copy.stage("tokenizer").path / "model.safetensors").write_bytes(weights)
    refused("was trained with a different stage `tokenizer`", load_trained, copy, "cpu", error=MissingError)


def test_what_is_prepared_is_augmented_by_one_draw(trained, path):
    codes, reused = [], f"stages.tokenizer={trained.id}"
    for rate in (0, 0.3, 0.3):
        run = make(path, reused, f"stages.prior.data.augment=[mutate={rate}]", "train.steps=1")
        assert main(run.path) == 0
        codes.append(np.load(run.stage("prior").path / "prepared" / "codes.npy"))
    assert np.array_equal(codes[0], np.load(trained.stage("prior").path / "prepared" / "codes.npy"))
    assert (codes[0] != codes[1]).mean() > 0.05 and np.array_equal(codes[1], codes[2])


def test_only_the_images_that_are_trained_on_are_prepared(trained, path):
    run = make(path, f"stages.tokenizer={trained.id}", "stages.prior.data.n=40", "train.steps=1")
    assert main(run.path) == 0
    some, every = (np.load(r.stage("prior").path / "prepared" / "codes.npy") for r in (run, trained))
    there = some.any(1)
    assert there.sum() == 40 and len(some) == len(every) and np.array_equal(some[there], every[there])


def test_preparation_takes_a_share_of_the_time(trained, path, monkeypatch):
    """As many images as the share allows, at least a batch; the number is in both files of the run."""
    monkeypatch.setattr("gzcli.engine.prepared.PREPARATION_SHARE", 1e-9)
    run = make(path, f"stages.tokenizer={trained.id}", "train.minutes=0.01")
    prior = run.stage("prior")
    with monkeypatch.context() as patch:
        patch.setattr("gzcli.engine.__main__.steps_of_minutes", lambda *args: sys.exit(9))
        assert main(run.path) != 0
    monkeypatch.setattr("gzcli.engine.prepared.PREPARATION_SHARE", 0.4)
    assert main(run.path) == 0, "a second attempt uses the images that the first one prepared"
    assert np.load(prior.path / "prepared" / "codes.npy").any(1).sum() == 64
    assert prior.tree()["data"]["n"] == run.tree()["stages"]["prior"]["data"]["n"] == 64
    assert "64 of 1,298 training images are used" in (prior.path / "log.txt").read_text()
    model = load_trained(run, "cpu")
    assert validation.mean_count(model, 144) == 6 and validation.mean_count(model, 3) == 3


def test_weights_and_wrong_options_of_a_later_stage(path, tmp_path):
    run = make(path, "stages.prior.model.heads=3")
    assert main(run.path) == UsageError.code
    assert run.status()["error"]["message"] == "`model.width` is 16, which is not divisible by 3 heads"
    assert not any((stage.path / "metrics.jsonl").exists() for stage in run.stages)
    text = """
    train: {steps: 2, batch_size: 8, sample_every: 0, best: none, precision: fp32}
    stages:
      first: {model: {name: vae, net: mlp, hidden: [8], latent: 2}}
      second: {model: {name: vae, net: mlp, hidden: [8], latent: 2}, train: {init: first}, optim: {lr: 1e-12}}
    """
    (tmp_path / "again.yaml").write_text(text)
    run = make(str(tmp_path / "again.yaml"))
    assert main(run.path) == 0
    first, second = (load_file(stage.path / "model.safetensors") for stage in run.stages)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_two_processes_prepare_what_one_prepares(trained, path, forks):
    words = f"--set stages.tokenizer={trained.id} --steps 4 --cpu --processes 2 --name pair"
    forks.gz("train", path, *words.split())
    run = runs.find("pair")
    one, two = (np.load(r.stage("prior").path / "prepared" / "codes.npy") for r in (trained, run))
    assert np.array_equal(one, two) and run.state == "finished"
