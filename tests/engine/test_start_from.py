"""A training that starts from trained weights: whose recipe it has, what begins anew, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import in_process
from PIL import Image
from safetensors.torch import load_file, save_file

import gzcli
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import DataInfo
from gzcli.engine.log import Log
from gzcli.engine.trained import _of_other_data
from gzcli.launch import launcher
from gzcli.launch.from_file import find_run
from gzcli.launch.plan import ask, prepare
from gzcli.models import catalog
from gzcli.store import files

pytestmark = pytest.mark.usefixtures("undrawn")

QUICK = ("train.sample_every=0", "train.eval_every=0", "train.best=none", "train.patience=null")
QUICK += ("train.samples=2",)
CPU = {"launch.cpu": True}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(launcher, "run", in_process)


def tuned(what, data, *sets, steps=2):
    """A run that started from weights, in this process."""
    start = prepare(ask(what, data, (*QUICK, *sets), CPU | {"train.steps": steps}))
    return start.train(start.recipe())


def weights(name):
    return {key: value.float() for key, value in load_file(find_run(name).model_file).items()}


def test_net_and_preprocessing_are_of_the_weights_and_the_length_is_of_few_images():
    run = find_run("pretrained:vae-glyphs")
    there, part = run.tree(), ask("pretrained:vae-glyphs", "patches", (), CPU).recipe.parts[0]
    options = part.tree()["model"]
    assert options == {key: there["model"].get(key, value) for key, value in options.items()}
    assert (part.data.size, part.data.channels, part.data.levels) == (28, None, None)
    few = ask("vae", "patches", ("data.size=28", "data.n=200"), {"scale": "small", **CPU}).recipe.parts[0]
    assert part.train.steps == few.train.steps != there["train"]["steps"] and part.train.ema == few.train.ema
    assert part.train.parent == f"pretrained:vae-glyphs sha256:{files.checksum(run.model_file)}"
    assert ask("pretrained:vae-glyphs", "patches", (), {"scale": "small", **CPU}).recipe.scale == "small"
    typed = ask(
        "pretrained:vae-glyphs", "patches", ("optim.lr=0.5",), {"train.steps": 7, **CPU}
    ).recipe.parts[0]
    assert (typed.train.steps, typed.optim.lr) == (7, 0.5)


def test_layers_of_other_classes_begin_anew_and_a_line_says_so(capfd):
    run = tuned("pretrained:cvae-glyphs", "digits")
    said = (run.path / "log.txt").read_text()
    assert "these layers start from scratch (10 classes instead of 36, 17 levels instead of 256" in said
    assert run.tree()["train"]["parent"].startswith("pretrained:cvae-glyphs sha256:")
    old, new = weights("pretrained:cvae-glyphs"), weights(run.id)
    rows = {
        name: (len(old[name]), len(value)) for name, value in new.items() if old[name].shape != value.shape
    }
    assert rows and set(rows.values()) == {(37, 11)}
    near = max(
        float((old[n] - v).abs().max()) for n, v in new.items() if n not in rows and v.is_floating_point()
    )
    assert 0 < near < 0.2  # two steps away from the weights, where new ones would be far
    start = ask(run.id, "digits-ab", (), CPU)  # other images: its weights
    assert start.parent and start.recipe.parts[0].train.parent.startswith(f"{run.id} sha256:")
    assert ask(run.id, "digits", (), CPU).earlier == run  # its own: the same training again
    assert ask(run.id, "digits-ab", (), CPU, resume=True).earlier == run


def test_without_labels_a_network_begins_as_the_one_that_hides_them():
    """Clusters within classes, clusters alone and classes alone; onto clusters, classes and nothing."""
    x, t, log = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), Log(mode="quiet")
    net = {"channels": 8, "mult": (1, 2), "groups": 4}

    def model(classes, conditional, clusters, **more):
        info = DataInfo((3, 8, 8), 256, tuple(map(str, range(classes))))
        made = catalog.load("cfm").of(info, conditional=conditional, clusters=clusters, **{**net, **more})
        for p in made.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return made.eval()

    dit = {"net": "dit", "width": 16, "heads": 2, "layers": 1, "patch": 4}
    for more in ({}, dit):
        for old in (model(3, True, 6, **more), model(3, True, 0, **more)):
            want = old.net(x, t, None)
            for new in (model(0, False, 4, **more), model(0, False, 0, **more), model(2, True, 4, **more)):
                values = _of_other_data(new, {"conditional": True}, old.data, old.state_dict(), log)
                new.load_state_dict(new.state_dict() | values[0] | values[1])
                for y in (None, torch.tensor([0, 1])) if new.labelled else (None,):
                    torch.testing.assert_close(new.net(x, t, y), want)


def test_images_without_classes_take_the_weights_of_a_conditional_model(call, tmp_path):
    folder, rng = tmp_path / "flat", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i}.png")
    run = tuned("pretrained:cfm-glyphs", str(folder), steps=1)
    tree, said = run.tree(), (run.path / "log.txt").read_text()
    assert (tree["model"]["conditional"], tree["sample"]["guidance"]) == (False, None)
    assert "unused layers of the weights: `net.label.table.weight`" in said
    stdout = call("train", "pretrained:cfm-emoji", "--data", str(folder), "--dry-run")[1]
    assert "steps on emoji, without its labels" in " ".join(stdout.split())


def test_a_start_has_a_short_warm_up():
    for name, warmup in (("vae-glyphs", 10), ("wgan-glyphs", 0)):
        assert ask(f"pretrained:{name}", "patches", (), CPU).recipe.parts[0].optim.warmup == warmup


def test_colour_images_take_the_weights_of_grey_ones(capfd):
    run = tuned("pretrained:fm-glyphs", "patches", "data.n=64")
    said = (run.path / "log.txt").read_text()
    assert "start from scratch (3 channels instead of 1" in said and "`net.conv_in.weight`" in said
    name, new, old = "net.mid.blocks.0.conv1.weight", weights(run.id), weights("pretrained:fm-glyphs")
    assert new["net.conv_in.weight"].shape[1] == 3 and not new[name].equal(old[name])
    torch.testing.assert_close(new[name], old[name], atol=0.1, rtol=0)


def test_stages_start_from_the_stages_of_their_names(capfd):
    recipe = ask("pretrained:vqvae-glyphs", "digits", (), CPU).recipe
    parents = {part.stage: part.train.parent for part in recipe.parts}
    assert list(parents) == ["tokenizer", "prior"] and len(set(parents.values())) == 2
    there = find_run("pretrained:vqvae-glyphs")
    assert {p.stage: p.train.init for p in recipe.parts} == {
        s.path.name: str(s.model_file) for s in there.stages
    }
    run = tuned("pretrained:vqvae-glyphs", "digits", "stages.prior.train.steps=1", "data.n=64")
    assert [stage.status()["state"] for stage in run.stages] == ["finished"] * 2
    stage = tuned(f"{run.id}/stages/tokenizer", "digits-ab", "data.n=32")  # a tokenizer alone
    assert stage.tree()["model"]["name"] == "vqvae" and not stage.stages


def test_train_init_takes_the_same_names_and_refuses_another_net(capfd, tmp_path):
    run = tuned(
        "fm",
        "digits",
        "train.init=pretrained:cfm-glyphs",
        "model.conditional=true",
        "model.patch=2",
        "model.channels=16",
        "model.mult=[1,2]",
        "model.clusters=0",
        "data.n=64",
    )
    assert run.tree()["train"]["parent"].startswith("pretrained:cfm-glyphs sha256:")
    with pytest.raises(UsageError, match="different architecture") as e:
        tuned("fm", "digits", "train.init=pretrained:fm-glyphs", "model.channels=40", "data.n=64")
    assert "`model.channels` 16 instead of 40" in e.value.hint
    with pytest.raises(UsageError, match="different architecture"):
        tuned("vae", "digits", "train.init=pretrained:fm-glyphs", "data.n=64")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(MissingError, match="does not name its model"):
        ask(str(tmp_path / "a.safetensors"), "digits", (), CPU)
    # the recipe names its weights by hash, and others at their place are refused
    tree = run.tree()
    assert tree["train"]["init"].endswith("model.safetensors")
    moved = tmp_path / "w.safetensors"
    moved.write_bytes((run.model_file).read_bytes())
    wrong = ("train.init=" + str(moved), f"train.parent=w sha256:{'0' * 64}")
    start = prepare(ask(run.id, None, wrong, CPU))
    with pytest.raises(MissingError, match="is no longer `w`"):
        recipe = start.recipe()
        parts = [replace(p, train=replace(p.train, parent=f"w sha256:{'0' * 64}")) for p in recipe.parts]
        start.train(replace(recipe, parts=tuple(parts)))


def test_what_is_refused_before_anything_starts(call):
    for words, said in (
        (("pretrained:fm-glyphs",), "needs `--data`, the images to fine-tune on"),
        (
            ("pretrained:fm-glyphs", "--data", "digits", "--scale", "full"),
            "the network comes from `pretrained:fm",
        ),
        (("pretrained:nothing", "--data", "digits"), "no pretrained model"),
        (("vae", "--set", "train.init=pretrained:nothing", "--cpu"), "no pretrained model"),
    ):
        code, stdout, stderr = call("train", *words, *(() if "--set" in words else ("--dry-run",)))
        assert code in (2, 3) and not stdout and said in stderr, stderr
    code, stdout, _ = call("train", "pretrained:fm-glyphs", "--data", "digits", "--dry-run", "--json")
    plan = json.loads(stdout)
    assert code == 0 and plan["recipe"]["train"]["parent"].startswith("pretrained:fm-glyphs sha256:")
    stdout = call("train", "pretrained:fm-glyphs", "--data", "digits", "--dry-run")[1]
    assert "start   the weights of pretrained:fm-glyphs: fm +100 clusters" in stdout


def test_python_starts_from_weights(capfd):
    run = gzcli.train(
        "pretrained:vae-glyphs",
        data="digits",
        steps=1,
        cpu=True,
        quiet=True,
        set={"train.best": "none", "data.n": 64},
    )
    assert run.sample(2).shape == (2, 1, 28, 28)
