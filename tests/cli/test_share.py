"""Runs as files, on a stand-in of the hub, and as models that come with gz; and what pictures tell."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import recipe, trainer
from hub import TOKEN, hub
from PIL import Image
from pretrained import ALL, MOST
from safetensors.torch import load_file, save_file
from zoo import Case

import gzcli
from gzcli.docs.page import as_markdown, page_of
from gzcli.engine.__main__ import JOB_MODULES, main
from gzcli.engine.log import Log
from gzcli.export import export
from gzcli.launch import launcher
from gzcli.launch.from_file import find_run, metadata
from gzcli.launch.plan import with_data, write_run
from gzcli.recipe.resolve import resolve
from gzcli.store import claims, files, jobs, png, pretrained, runs

# one worker makes what these tests share, once
pytestmark = pytest.mark.usefixtures("undrawn")
VAE = Case("vae", {"net": "mlp", "hidden": (16,), "latent": 2}, lr=3e-3)
TOKENIZER = Case("vqvae", {"hidden": 8, "residual": 4, "blocks": 1, "codes": 8, "dim": 4}, lr=3e-3)
FM = Case("fm", {"channels": 8, "mult": (1,), "attention": ()}, lr=3e-3, batch=16, sample={"steps": 2})
QUICK = [one for one in pretrained.every() if one.model in ("cvae", "cfm", "vqvae")]
SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in pretrained.every() if one not in QUICK]
STAGES = """
data: {name: digits}
train: {steps: 2, batch_size: 8, sample_every: 0, eval_every: 0, best: none, precision: fp32}
stages:
  tokenizer: {model: {name: vqvae, hidden: 8, residual: 4, blocks: 1, codes: 8, dim: 4}}
  prior: {model: {name: transformer, width: 8, layers: 1, heads: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("share")))
    patch.setattr("gzcli.cli.jobs.do_job", here)
    yield
    patch.undo()


def here(folder: Path, job: jobs.Job) -> dict:
    """Does a job in this process, which saves the start of another."""
    with claims.claimed_folder(folder):
        jobs.write(folder, job)
        verb = importlib.import_module(f"gzcli.{JOB_MODULES[job.verb]}")
        png.made_by(**jobs.origin_of(job))
        return verb.run(jobs.read(folder), folder, torch.device("cpu"), Log(folder, rank=0))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another machine: a GZ_HOME without runs and data."""
    monkeypatch.setenv("GZ_HOME", str(tmp_path / "elsewhere"))
    return tmp_path / "elsewhere"


def trained(case: Case, *sets: str, alias: str | None = None) -> runs.Run:
    t = trainer(recipe(case, steps=2, sets=sets))
    t.fit()
    t.run.update(state="finished", alias=alias, seconds=9.5, work=4.5, clock="cpu")
    return t.run


@pytest.fixture(scope="module")
def run(_home) -> runs.Run:
    return trained(VAE, alias="mine")


@pytest.fixture(scope="module")
def on_latents(_home) -> runs.Run:
    return trained(FM, f"data.latent={trained(TOKENIZER).path}")


@pytest.fixture(scope="module")
def staged(_home, tmp_path_factory) -> runs.Run:
    path = tmp_path_factory.mktemp("recipe") / "two.yaml"
    path.write_text(STAGES)
    two_stages = resolve(str(path), flags={"launch.cpu": True})
    two_stages = with_data(two_stages, two_stages.dataset)
    run = runs.create(two_stages.card.name, "digits")
    write_run(run, two_stages, launcher.plan(two_stages.launch, every_gpu=True))
    assert main(run.path) == 0
    return run


@pytest.mark.usefixtures("run", "on_latents", "staged")  # which are made on the first machine
@pytest.mark.parametrize("name", ["run", "on_latents", "staged"])
def test_a_file_draws_as_its_run_on_another_machine(name, request, gz, tmp_path, elsewhere, monkeypatch):
    run = request.getfixturevalue(name)
    expected = gzcli.load(run.path, device="cpu").sample(3, seed=5)
    file = tmp_path / "shared.safetensors"
    again = tmp_path / "again.safetensors"
    with monkeypatch.context() as there:
        there.setenv("GZ_HOME", str(run.path.parents[1]))
        for place in (file, again):
            code, out, err = gz("runs", "export", str(run.path), "--out", str(place))
            assert (code, out.strip()) == (0, str(place)), err
    assert again.read_bytes() == file.read_bytes()
    loaded = gzcli.load(file, device="cpu")
    assert np.array_equal(loaded.sample(3, seed=5), expected)
    assert str(run.path.parents[2]) not in json.dumps(metadata(file)), "no path of the machine it was made on"
    card = json.loads(metadata(file)["card"])
    assert card["model"] == run.model and card["data"]["licence"] and card["data"]["name"] == "digits"
    known, took = runs.Run(loaded.path).training, run.training
    assert known["train_steps"] == took["train_steps"] and took["train_seconds"] > 0
    assert known["train_seconds"] == pytest.approx(took["train_seconds"], abs=0.1)
    assert Image.open(loaded.path / "preview.png").size[0] >= 64
    assert gz("sample", str(file), "-n", "2", "--out", str(tmp_path / "o"))[0] == 0


def test_half_the_size_is_nearly_the_same_picture_and_what_cannot_be_a_file_is_refused(run, gz, tmp_path):
    places = {dtype: tmp_path / f"{dtype}.safetensors" for dtype in ("fp32", "bf16")}
    for dtype, place in places.items():
        assert gz("runs", "export", "mine", "--dtype", dtype, "--out", str(place))[0] == 0
    assert {value.dtype for value in load_file(places["bf16"]).values()} == {torch.bfloat16}
    a, b = (gzcli.load(place, device="cpu").sample(4) for place in places.values())
    assert 0 < np.abs(a.astype(int) - b).max() < 30
    for words, message in (
        (("--out", str(places["fp32"])), "already"),
        (("--out", str(tmp_path / "it.bin")), "must end in `.safetensors`"),
        (("--to", "diffusers", "--dtype", "bf16"), "`--dtype` works only with `--to file`"),
    ):
        code, _, err = gz("runs", "export", "mine", *words)
        assert code == 2 and message in err


@pytest.fixture
def forged(run, tmp_path):
    """forged(key=value) → a file whose metadata say something else."""

    def forge(**texts) -> str:
        target = tmp_path / "forged.safetensors"
        defaults = {"recipe": json.dumps(run.tree()), "data": json.dumps({"shape": [1, 16, 16]}), "step": "2"}
        save_file({"x": torch.zeros(1)}, target, metadata=defaults | texts)
        return str(target)

    return forge


def test_a_strangers_file_makes_gz_fetch_nothing_and_write_nowhere_else(run, forged, gz, tmp_path):
    tree = run.tree()
    latent = tree | {"data": tree["data"] | {"latent": "evil/autoencoder"}}
    code, _, err = gz("sample", forged(recipe=json.dumps(latent)))
    assert code == 3 and "gz does not download automatically" in err and "hf download evil/autoencoder" in err
    part = {"recipe": json.dumps(tree), "step": "2"}
    outside = [json.dumps({name: part}) for name in ("../../evil", "stages/../evil")]
    for parts in (*outside, "[]", "{", '{"model": 3}'):
        code, _, err = gz("sample", forged(parts=parts))
        assert code == 3 and "is damaged, or from a later version" in err, err
    code, _, err = gz("sample", forged(recipe='{"model": {"name": "os"}, "data": {"name": "x"}}'))
    assert code == 3 and "needs the model file of `os`" in err
    assert not list(tmp_path.rglob("evil*"))


SPANS = {
    "shared": [[0, 64]] * 500,
    "overlapping": [[0, 40], [32, 64]],
    "apart": [[0, 24], [32, 64]],
    "not to the end": [[0, 32]],
    "beyond the end": [[0, 72]],
    "backwards": [[0, 64], [64, 0]],
    "no numbers": [["0", "64"]],
    "fractions": [[0.0, 64.0]],
    "one number": [[64]],
}


def test_tensors_that_do_not_fill_the_file_once_are_refused(run, gz, tmp_path, elsewhere):
    part = {"recipe": json.dumps(run.tree()), "step": "2"}
    texts = part | {"data": json.dumps({"shape": [1, 16, 16]}), "parts": json.dumps({"model": part})}
    file = tmp_path / "forged.safetensors"
    for what, spans in SPANS.items():
        specs = [{"dtype": "U8", "shape": [64], "data_offsets": span} for span in spans]
        head = {"__metadata__": texts} | {f"model:{i}": spec for i, spec in enumerate(specs)}
        text = json.dumps(head).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        # left by a version that took such a file
        left = elsewhere / "files" / f"forged-{files.checksum(file)[:12]}"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(bytes(9))
        code, _, err = gz("runs", "show", str(file))
        assert code == 3 and "damaged" in err and "Error" not in err, (what, err)
        assert not [path for path in elsewhere.rglob("*") if path.is_file()], what


@pytest.fixture
def server(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with hub() as service:
        monkeypatch.setenv("HF_ENDPOINT", service.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("GZ_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield service


def test_a_pushed_run_is_drawn_from_and_pulled_elsewhere(run, server, gz, tmp_path, elsewhere, monkeypatch):
    with monkeypatch.context() as there:
        there.setenv("GZ_HOME", str(run.path.parents[1]))
        code, out, err = gz("runs", "push", "mine", "me/vae-digits")
        expected = gzcli.load(run.path, device="cpu").sample(3)
    assert (code, out.strip()) == (0, f"{server.url}/me/vae-digits"), err
    sent = server.repos["me/vae-digits"]
    assert set(sent) == {"README.md", "model.safetensors", "preview.png"}
    _, header, body = sent["README.md"].decode().split("---\n", 2)
    header = yaml.safe_load(header)
    assert {"license", "library_name", "pipeline_tag", "tags", "datasets", "metrics"} <= header.keys()
    assert all(header.values()) and header["datasets"] == ["digits"]
    assert "None" not in body and "gz sample hf://me/vae-digits" in body and "More Information" not in body
    assert np.array_equal(gzcli.load("hf://me/vae-digits", device="cpu").sample(3), expected)
    code, out, _ = gz("runs", "pull", "me/vae-digits", "--name", "theirs", "--json")
    pulled = runs.by_name("theirs")
    assert (code, json.loads(out)["run"]) == (0, pulled.id)
    assert pulled.status()["from"] == "hf://me/vae-digits"
    assert np.array_equal(gzcli.load("theirs", device="cpu").sample(3), expected)
    assert gz("runs", "remove", "theirs", "--yes")[0] == 0


def test_what_the_hub_does_not_give_is_told(run, server, gz, monkeypatch):
    server.repos["me/empty"] = {}
    for words, code, message in (
        (("sample", "hf://me/nothing"), 3, "the hub has no `me/nothing`, or it is private"),
        (("sample", "hf://me/empty"), 3, "`me/empty` contains neither a `model.safetensors`"),
        (("sample", "hf://me"), 2, "is not a valid hub address"),
        (("runs", "pull", "me/../../x"), 2, "is not a valid hub address"),
        (("runs", "push", "mine", "a b/c"), 2, "is not a valid hub address"),
    ):
        status, _, err = gz(*words)
        assert status == code and message in " ".join(err.split()), err
    monkeypatch.setenv("HF_TOKEN", "wrong")
    code, _, err = gz("runs", "push", "mine", "me/it")
    assert code == 3 and "the hub refused `me/it`" in err and "use a token with write access" in err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = gz("runs", "push", "mine", "me/it")
    assert code == 3 and "there is no hub token" in err and "hf auth login" in err
    monkeypatch.setenv("GZ_OFFLINE", "1")
    count = len(server.requests)
    for words in (("runs", "push", "mine", "me/it"), ("sample", "hf://me/it"), ("runs", "pull", "me/it")):
        code, _, err = gz(*words)
        assert code == 3 and "GZ_OFFLINE" in err
    assert len(server.requests) == count


@pytest.mark.parametrize("one", QUICK + SLOW, ids=lambda one: one.name)
def test_a_pretrained_model_loads_and_draws(one, elsewhere):
    model = gzcli.load(f"pretrained:{one.name}", device="cpu")
    images = model.sample(2)
    assert images.shape[0] == 2 and images.std() > 10 and one.file.stat().st_size <= MOST
    card = files.read_json(model.path / "card.json")
    assert card["work"] > 1 and Image.open(model.path / "preview.png").size[0] >= 64
    assert card["dtype"] == "bf16" and card["command"].startswith("gz train ")
    assert "--json" not in card["command"]
    (row,) = one.figures
    excess, low, high = row["excess"]
    assert (row["name"], row["n"]) == ("fd", 1000) and low <= excess <= high
    assert excess == pytest.approx(row["value"] - row["floor"])
    value = one.cells[0] + (f" ({one.variant})" if one.variant else "")
    assert f", {value}, {one.cells[1]} above real" in " ".join(as_markdown(page_of(one.model)).split())


def test_a_card_names_the_guidance_of_samples():
    row = {"metrics": {"fd": 3.0, "bpd": 1.0, "kl": None}, "on": "mnist (test)", "n": 50}
    by = {one["name"]: one["from"] for one in export.of_row(row | {"sample": {"guidance": 1.3}}, "gz bench")}
    assert by == {"fd": "gz bench, guided 1.3", "bpd": "gz bench, unguided"}
    assert {one["from"] for one in export.of_row(row, "gz train")} == {"gz train"}


def test_pretrained_models_are_small_together_and_have_one_spelling(gz, elsewhere):
    names = pretrained.pretrained_names()
    assert 0 < sum(file.stat().st_size for file in names.values()) <= ALL
    name = next(iter(names))
    model, data = pretrained.parts_of(name)
    run = find_run(f"pretrained:{model}", data=data)
    assert run == find_run(f"pretrained:{name}") and run.status()["from"].startswith("pretrained:")
    assert gzcli.load(model, data=data, pretrained=True, device="cpu").path == run.path
    code, out, _ = gz("list", "pretrained", "--json")
    rows = json.loads(out)["pretrained"]
    assert code == 0 and {row["name"] for row in rows} == {f"pretrained:{n}" for n in names}
    excesses = [one["figures"][0]["excess"][0] for one in rows if one["data"] == "glyphs"]
    assert excesses == sorted(excesses), "the best is first"
    lines = dict(line.split()[:3:2] for line in gz("list", "pretrained")[1].splitlines())
    assert lines["pretrained:cfm-glyphs"] == "1.15" and lines["pretrained:cvae-glyphs"] == "-", "guidance"
    code, _, err = gz("sample", "nothing", "--pretrained")
    assert code == 2 and "`gz list pretrained` lists them" in err
    code, _, err = gz("sample", model, "--pretrained", "--data", "mnist")
    assert code == 3 and f"gz train {model} --data mnist" in err


def test_a_pretrained_model_that_a_wheel_leaves_out_is_told_where_it_is(gz, elsewhere, tmp_path, monkeypatch):
    listed = files.read_json(pretrained.PRETRAINED_FOLDER / "more.json")
    more = pretrained.PRETRAINED_FOLDER / "more"
    assert listed == {file.stem: files.checksum(file) for file in sorted(more.glob("*.safetensors"))}
    assert not pretrained.elsewhere()
    wheel = tmp_path / "pretrained"
    shutil.copytree(pretrained.PRETRAINED_FOLDER, wheel, ignore=shutil.ignore_patterns("more"))
    monkeypatch.setattr(pretrained, "PRETRAINED_FOLDER", wheel)
    pretrained.every.cache_clear()
    assert pretrained.elsewhere() == listed
    for words in (
        ("pretrained:fm-glyphs",),
        ("fm", "--pretrained", "--data", "glyphs"),
        ("pretrained:vqvae",),
    ):
        code, _, err = gz("sample", *words)
        assert code == 3 and "is not included in the installed package" in err, words
        assert "gzcli/pretrained/more/" in err and "SHA-256" in err
    assert pretrained.file_of("pretrained:cfm").parent == wheel
    code, out, err = gz("list", "pretrained")
    assert code == 0 and "vae-glyphs" in out and "vqvae" not in out and f"{len(listed)} more" in err
    pretrained.every.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("one", pretrained.every(), ids=lambda one: one.name)
def test_the_recorded_figures_of_pretrained_models_stand(one, gz):
    """In the home of this file, so that a set's features are trained once. A value may differ by a quarter,
    or by its interval if that is wider."""
    (figure,) = one.figures
    _, low, high = figure["excess"]
    words = ("--data", one.data, "-n", str(figure["n"]), "--metrics", "fd", "--json")
    code, out, err = gz("bench", f"pretrained:{one.name}", *words)
    assert code == 0, err
    result = json.loads(out)
    value = result["rows"][0]["metrics"]["fd"]
    assert value == pytest.approx(figure["value"], rel=0.25, abs=(high - low) / 2)
    assert result["floor"]["fd"] == pytest.approx(figure["floor"], rel=0.25)


@pytest.fixture
def drawn(run, gz, tmp_path) -> Path:
    out = tmp_path / "drawn"
    words = ("sample", "mine", "-n", "5", "--seed", "3", "--temperature", "0.5")
    assert gz(*words, "--out", str(out))[0] == 0
    return out


def test_a_picture_says_what_made_it_and_is_drawn_again(run, drawn, gz, tmp_path):
    origin = png.origin_of(drawn / "images" / "000002.png")
    assert (origin["run"], origin["seed"], origin["n"], origin["index"]) == (run.id, 3, 5, 2)
    assert origin["weights"] == files.checksum(run.path / "model.safetensors") and origin["versions"]["torch"]
    assert origin["command"] == f"gz sample {run.id} -n 5 --seed 3 --temperature=0.5"
    assert str(tmp_path) not in json.dumps(origin)
    for name in ("grid.png", "images/000002.png"):
        out = tmp_path / Path(name).stem
        code, text, err = gz("sample", "--like", str(drawn / name), "--out", str(out), "--json")
        assert code == 0, err
        assert json.loads(text)["like"] == {"file": str(out / name), "same": True, "most": 0}
        assert (out / name).read_bytes() == (drawn / name).read_bytes()


def test_a_picture_that_cannot_be_drawn_again_says_why(run, drawn, gz, tmp_path, monkeypatch):
    picture = drawn / "grid.png"
    plain, cut, text = tmp_path / "plain.png", tmp_path / "cut.png", tmp_path / "text.png"
    Image.open(picture).save(plain)
    cut.write_bytes(picture.read_bytes()[:40])
    text.write_text("no image")
    png.made_by(verb="train", run=run.id)
    png.save_png(tmp_path / "trained.png", np.zeros((4, 4, 1), np.uint8), {"step": 2, "n": 36, "seed": 0})
    second = trained(VAE, "seed=1")
    cases = [
        ((str(plain),), 2, "does not record how it was made"),
        ((str(cut),), 2, "is not a complete PNG"),
        ((str(text),), 2, "is not a complete PNG"),
        ((str(tmp_path / "trained.png"),), 2, f"gz sample {run.id} --checkpoint 2 -n 36"),
        ((str(picture), "-n", "3"), 2, "`--like` and `-n` cannot be used together"),
        ((str(picture), second.id), 3, "does not have the weights that drew the image"),
    ]
    for words, code, message in cases:
        status, _, err = gz("sample", "--like", *words)
        assert status == code and message in " ".join(err.split()), err
    assert gz("sample")[0] == 2
    monkeypatch.setenv("GZ_HOME", str(tmp_path / "empty"))
    code, _, err = gz("sample", "--like", str(picture))
    assert code == 3 and f"`{run.id}`, which is not on this machine" in " ".join(err.split()), err


def test_a_picture_of_ones_own_pictures_asks_for_them(run, drawn, gz, tmp_path):
    source = drawn / "images"
    words = ("sample", "mine", "--do", "reconstruct", "-n", "2")
    assert gz(*words, "--input", str(source), "--out", str(tmp_path / "a"))[0] == 0
    again = ("sample", "--like", str(tmp_path / "a" / "grid.png"), "--out", str(tmp_path / "b"))
    code, _, err = gz(*again)
    assert code == 2 and "made from `images`" in err and "--input PATH" in err
    code, out, err = gz(*again, "--input", str(source), "--json")
    assert code == 0 and json.loads(out)["like"]["same"], err
    (source / "000000.png").unlink()
    code, _, err = gz(*again, "--input", str(source))
    assert code == 2 and "is not the `images`" in err
