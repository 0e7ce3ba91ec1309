"""A run finds its data from any folder, and notices that it is not what it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import RED, png, write

from gzcli.cli import app
from gzcli.core.errors import MissingError
from gzcli.data.packs import pack as packs
from gzcli.data.packs.open import open_pack
from gzcli.data.sets.registry import locate
from gzcli.launch import launcher
from gzcli.launch.plan import anchored
from gzcli.recipe.recipe import recipe_of
from gzcli.store import files, runs

SMALL = ("--set", "train.batch_size=2")  # fewer than the few pictures of these sets


@pytest.fixture
def gz(home, capsys, monkeypatch):
    """gz("train", "vae") → (exit code, stdout, stderr); nothing is launched."""
    monkeypatch.setattr(launcher, "run", lambda *words, **options: {})

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(list(words))
        return (code, *capsys.readouterr())

    return call


def classes(root: Path, *names: str, each: int = 10) -> Path:
    return write(root, {f"{name}/{i}.png": png(RED, (8, 8)) for name in names for i in range(each)})


def test_a_run_holds_the_absolute_path_of_its_data(gz, tmp_path, monkeypatch):
    classes(tmp_path / "here" / "photos", "a", "b")
    classes(tmp_path / "there" / "photos", "c", "d")  # another set, of the same relative path
    monkeypatch.chdir(tmp_path / "here")
    assert gz("train", "vae", "--data", "photos", "--steps", "5", *SMALL)[0] == 0
    (run,) = runs.all_runs()
    assert run.tree()["data"]["name"] == str(tmp_path / "here" / "photos")
    monkeypatch.chdir(tmp_path / "there")
    assert gz("train", run.id, "--resume")[0] == 0
    assert run.tree()["data"]["name"] == str(tmp_path / "here" / "photos")
    code, _, stderr = gz("train", run.id, "--data", "photos", "--resume")
    here, there = (tmp_path / name / "photos" for name in ("here", "there"))
    assert code == 2 and f"data.name: {here} in the run, {there} requested" in stderr
    monkeypatch.chdir(tmp_path / "here")
    assert gz("train", run.id, "--data", "./photos", "--resume")[0] == 0  # the same by another name
    assert gz("train", "vae", "--data", "DIGITS", "--steps", "5")[0] == 0
    assert runs.all_runs()[0].tree()["data"]["name"] == "digits" and len(runs.all_runs()) == 2


def test_other_paths_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = ("kl/config.json", "base/model_index.json", "weights.safetensors", "vqgan/notes.txt")
    write(tmp_path, dict.fromkeys(there, b"{}"))
    run = runs.create("vae", "digits")
    shutil.copytree(run.path, tmp_path / "arun")
    part = {"model": {"name": "sd", "base": "base"}, "train": {"init": "weights.safetensors"}}
    stages = {"prior": part | {"ood": {"background": "arun"}}, "tokenizer": "arun", "other": "vqgan"}
    tree = {"data": {"name": "./absent", "latent": "kl"}, "stages": stages}
    tree = anchored(recipe_of(tree), None).tree()
    part = tree["stages"]["prior"]
    assert (tree["data"]["name"], tree["data"]["latent"]) == ("./absent", str(tmp_path / "kl"))
    assert tree["stages"]["tokenizer"] == str(tmp_path / "arun")
    assert tree["stages"]["other"] == "vqgan"  # a model; the folder of that name is no run
    assert part["model"] == {"name": "sd", "base": str(tmp_path / "base")}
    assert part["train"]["init"] == str(tmp_path / "weights.safetensors")
    assert part["ood"]["background"] == str(tmp_path / "arun")
    tree = {"data": {"name": "mnist", "latent": "owner/name"}, "model": {"name": "fm"}}
    tree |= {"train": {"init": "tokenizer"}, "ood": None}
    tree = anchored(recipe_of(tree), locate("MNIST")).tree()
    assert (tree["data"]["name"], tree["data"]["latent"]) == ("mnist", "owner/name")
    assert tree["train"]["init"] == "tokenizer"


def test_a_run_whose_data_has_changed_does_not_go_on_and_names_what(gz, tmp_path, home):
    photos = classes(tmp_path / "photos", "cat", "dog", "eel")
    assert gz("train", "vae", "--data", str(photos), "--steps", "5", *SMALL)[0] == 0
    (run,) = runs.all_runs()
    packs.record_data(run.path, open_pack(photos).meta)  # as the engine does
    assert gz("train", run.id, "--resume")[0] == 0
    run.update(state="finished", code=0)
    shutil.rmtree(photos / "cat")
    code, stdout, _ = gz("train", run.id, "--steps", "9", "--resume", "--json")
    error = json.loads(stdout.splitlines()[-1])["error"]
    assert (
        code == 3 and "has changed since" in error["message"] and "missing classes `cat`" in error["message"]
    )
    assert "train images instead of" in error["message"]
    assert run.state == "finished" and run.tree()["train"]["steps"] == 5  # it is what it was
    classes(photos, "cat")
    with pytest.raises(MissingError) as e:
        packs.check_unchanged(run.path, replace(open_pack(photos).meta, digest="x"))
    assert e.value.message.endswith("different pixels, labels or texts")
    packs.check_unchanged(run.path, open_pack(photos).meta)  # put back as they were
    then = {"classes": list("abcdefgh"), "counts": {"train": 900, "val": 100, "test": 0}}
    then |= {"shape": [3, 32, 32], "extras": []}
    now = {"classes": ["a", "x"], "counts": {"train": 90, "val": 10, "test": 0}}
    now |= {"shape": [1, 28, 28], "extras": ["caption"]}
    assert packs._changes(then, now) == [
        "missing classes `b` `c` `d` `e` `f` and 2 more",
        "new classes `x`",
        "90 train images instead of 900",
        "10 val images instead of 100",
        "images of 28×28×1 instead of 32×32×3",
        "caption beside each image instead of nothing",
    ]
    assert packs._changes(then, then) == ["different pixels, labels or texts"]
    run = runs.create("vae", "digits")
    digits = open_pack("digits").meta
    patches = replace(digits, name="patches", digest="x")
    packs.check_unchanged(run.path, digits)  # an older run, which recorded nothing
    packs.record_data(run.path, digits)
    packs.record_data(run.path, patches)  # once
    packs.check_unchanged(run.path, patches)  # `gz ood --in patches`
    assert files.read_json(run.path / "env.json")["data"]["digest"] == digits.digest


def test_a_dry_run_knows_the_set_and_what_is_not_here(gz, tmp_path, monkeypatch):
    for key, name, said in (
        ("data.latent", "vqvae", "no finished run of `vqvae` (gz train vqvae)"),
        ("train.init", "nowhere.safetensors", "`nowhere.safetensors` does not exist"),
        ("ood.background", "glow", "no finished run of `glow` (gz train glow)"),
    ):
        model = "fm" if key == "data.latent" else "glow"
        code, stdout, _ = gz("train", model, "--set", f"{key}={name}", "--dry-run", "--json")
        needs = json.loads(stdout)["needs"]
        assert code == 0 and any(need.startswith(f"`{key}`: {said}") for need in needs), needs
    (tmp_path / "w.safetensors").write_bytes(b"")
    init = f"train.init={tmp_path / 'w.safetensors'}"
    assert json.loads(gz("train", "glow", "--set", init, "--dry-run", "--json")[1])["needs"] == []
    photos = classes(tmp_path / "photos", "a", "b")
    words = ("train", "vae", "--data", str(photos), "--dry-run", *SMALL)
    assert "(cached, not packed yet)" in " ".join(gz(*words)[1].split())
    result = json.loads(gz("train", "vae", "--dry-run", "--json")[1])
    # an embedded set is known before it is packed
    assert not result["data"]["packed"] and result["data"]["cached"]
    assert [result["recipe"]["data"][key] for key in ("size", "channels", "levels")] == [16, 1, 17]
    assert result["origin"]["data.levels"] == "the set"
    gz("train", "vae", "--data", str(photos), "--steps", "1", *SMALL)
    out = gz(*words, "--keys")[1]
    assert "packed)" not in out and "data.size" in out and "\nparams" not in out
    section = json.loads(gz(*words, "--json")[1])["recipe"]["data"]
    assert (section["size"], section["channels"]) == (8, 3)
    mixed = classes(tmp_path / "mixed", "a", ".")  # the plan refuses what the training does
    code, _, stderr = gz("train", "vae", "--data", str(mixed), "--dry-run")
    assert code == 2 and "images beside its class folders" in stderr
