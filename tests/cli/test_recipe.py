"""Recipes: YAML 1.2, closed keys, all mistakes at once, the order of layers; shipped ones at any scale."""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pictures
import pytest
import yaml
from generated import generated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from zoo import first_of_families

from gzcli.core.errors import UsageError, canonical
from gzcli.core.sections import FIXED_KEYS, SECTIONS, SYNONYMS, Part, keys_of, part_of
from gzcli.core.types import DataInfo
from gzcli.core.units import sides
from gzcli.data.packs.facts import SHAPES, Facts
from gzcli.data.sets.registry import SPECS, find
from gzcli.launch import forecast
from gzcli.launch.launcher import Plan
from gzcli.launch.needs import of_data
from gzcli.launch.plan import shared_out
from gzcli.models import catalog
from gzcli.recipe import schema
from gzcli.recipe.describe import annotated, key_texts, section_texts
from gzcli.recipe.files import presets, read_chain, recipes, show
from gzcli.recipe.recipe import check_data, recipe_of
from gzcli.recipe.resolve import GENERAL, check, dotted, large_limits, resolve
from gzcli.recipe.yaml import Mark, dump, load, read_text, refusal


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("my.yaml", text) → its name, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return f"./{name}" if "/" not in name else name

    return write


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Shipped recipes of its own: shipped("glow.yaml", text)."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr("gzcli.recipe.files.recipes_dir", lambda: folder)
    return lambda name, text: (folder / name).write_text(text)


def problems(function, *args, **options) -> list[str]:
    """The lines of the UsageError, the hint of a lone one in brackets as it stands beside others."""
    with pytest.raises(UsageError) as e:
        function(*args, **options)
    head, *lines = e.value.message.split("\n")
    if not lines:
        return [head + (f" ({e.value.hint})" if e.value.hint else "")]
    assert head == f"{len(lines)} mistakes"
    return [line.removeprefix("  ") for line in lines]


words = str.split
NUMBERS = words("1e-4 1E+3 1. .5 -2.5e3 +.inf -.INF 0 -7 +5 010 0o17 0xff 12345678901234567890")
VALUES = [1e-4, 1e3, 1.0, 0.5, -2500.0, math.inf, -math.inf, 0, -7, 5, 10, 15, 255, 12345678901234567890]
TEXTS = words("no on yes Off y 12:30 2024-01-31 0b101 -0x1 1e e5 . nan tRUE")
CORE = [
    *zip(NUMBERS, VALUES, strict=True),
    *zip(TEXTS, TEXTS, strict=True),
    *((text, None) for text in ("null", "~", "", "Null")),
    *(("true", True), ("FALSE", False), ("'1e-4'", "1e-4"), ('"null"', "null"), ("!!str 5", "5")),
    *(("|\n  12\n", "12\n"), ("[1, 1e-3, no]", [1, 1e-3, "no"]), ("{a: [~]}", {"a": [None]})),
]


def test_the_core_schema_of_yaml_1_2():
    for text, value in CORE:
        document = read_text(f"key: {text}", "r.yaml")
        got = document.tree["key"]
        assert not document.problems and got == value and type(got) is type(value), text
    assert math.isnan(read_text("a: .NaN", "r.yaml").tree["a"])


def test_every_key_and_value_has_its_place():
    document = read_text("a: 1\nb:\n  ü: [x, {c: 2}]\n", "r.yaml")
    assert document.keys == {("a",): (1, 1), ("b",): (2, 1), ("b", "ü"): (3, 3), ("b", "ü", 1, "c"): (3, 11)}
    assert document.values[("b", "ü", 0)] == Mark(3, 7)
    assert document.where(("b", "ü", 1, "c"), value=True) == "r.yaml:3:14"
    assert document.where(("b", "nothing", "here")) == "r.yaml:2:1"


NOT_YAML = {
    "a: 1\n\tb: 2": "2:1: a tab where only spaces are allowed",
    "a: [1, 2": "2:1: a list that is not closed: `]` or `,` is missing",
    "a: @x": "1:4: a value cannot begin with this character",
    'a: "x': "1:6: a quote that is not closed",
    "a: {b: 1": "2:1: a map that is not closed: `}` or `,` is missing",
    "a: b: c": "1:5: a colon that is not allowed here",
    "a: 1\n---\nb: 1": "2:1: a second document",
    "é: *x": "1:4: an undefined alias (`*`)",
    "b: é\x07": "1:5: control characters are not allowed",
    "[" * 5000: "1:1001: exceeded maximum nesting depth",
}


def test_what_is_not_yaml_is_refused_with_its_place():
    for text, message in NOT_YAML.items():
        with pytest.raises(UsageError) as e:
            read_text(text, "r.yaml")
        assert e.value.message == f"r.yaml:{message}"


def test_what_yaml_allows_and_recipes_do_not():
    lines = ["a: &x [1]", "b: *x", "<<: {c: 1}", "a: 2", "7: 8", "d: 200_000", "e: !!int '5'"]
    lines += ["f: !!python/name:os.system", "g: &l [*l]"]
    document = read_text("\n".join(lines), "r.yaml")
    assert [str(p) for p in document.problems] == [
        "r.yaml:2:1: aliases are not supported (write the value out)",
        "r.yaml:3:1: merge keys are not supported (write the values out)",
        "r.yaml:4:1: the key `a` is already on line 1 (remove one of them)",
        'r.yaml:5:1: a key must be a word (write `"7"`)',
        "r.yaml:6:4: `200_000` is not a number (write 200000)",
        "r.yaml:7:4: the tag `!!int` is not supported (remove it)",
        "r.yaml:8:4: the tag `!!python/name:os.system` is not supported (remove it)",
        "r.yaml:9:1: aliases are not supported (write the value out)",
    ]
    assert refusal(document.problems).message.startswith("8 mistakes")


def test_a_path_that_a_recipe_cannot_name_is_refused_in_a_dry_run(call, tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    for i in range(4):
        Image.new("L", (28, 28), i).save(folder / f"{i}.png")
    for words in (("train", "vae"), ("which", "--budget", "3m")):
        code, _, stderr = call(*words, "--data", str(folder), "--dry-run")
        assert code == 2 and "which is not UTF-8" in stderr and "gz data import PATH --name" in stderr
    assert call("data", "import", str(folder), "--name", "cafe")[0] == 0
    assert call("train", "vae", "--data", "cafe", "--steps", "9", "--dry-run")[0] == 0


def test_load_reads_plainly(write):
    path = Path(write("my.yaml", "x: {y: 1e-4, z: no}\n"))
    assert load(path) == {"x": {"y": 1e-4, "z": "no"}}
    path.write_bytes(b"\xef\xbb\xbfx: 1\n")
    assert load(path) == {"x": 1}, "a byte order mark is no content"
    for content, message in ((b"x: \xff\n", "not valid UTF-8"), (b"- 1\n", "not a map")):
        path.write_bytes(content)
        assert message in problems(load, path)[0]
    with pytest.raises(UsageError, match="`/caf\\udce9`, which is not UTF-8") as e:
        dump({"data": {"name": "/caf\udce9"}})
    assert "gz data import" in e.value.hint
    assert problems(load, Path("none.yaml")) == ["none.yaml: no such file or directory"]
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert len(read_text(text, "r.yaml").problems) == 29 * 9, "a bomb of aliases costs nothing"


def test_all_mistakes_are_told_at_once(write, tmp_path):
    """A wrong name of a data set is among them; `check` reads each section, for whichever set."""
    training = "train:\n  stepz: 10\n  batch_size: 0\n  keep: 1_0\noptim: {lr: '1e-4'}\n"
    sections = "for:\n  minst: {train: {steps: 5}}\n  faces: {train: {stepz: 5}}\n"
    path = write("my.yaml", f"model: {{name: glow, dpeth: 4}}\ndata: {{name: mnits}}\n{training}{sections}")
    mistakes = [
        "my.yaml:1:21: unknown key `dpeth` in `model` (did you mean `depth`?)",
        "my.yaml:2:14: there is no data set `mnits` (did you mean `mnist`?)",
        "my.yaml:4:3: unknown key `stepz` in `train` (did you mean `steps`?)",
        "my.yaml:5:15: `train.batch_size` must be 1 … 1,000,000, not `0`",
        "my.yaml:6:9: `1_0` is not a number (write 10)",
        "my.yaml:7:13: `optim.lr` must be a number, not the string `1e-4` (remove the quotes)",
        "my.yaml:9:3: there is no data set `minst` (did you mean `mnist`?)",
        "my.yaml:10:19: unknown key `stepz` in `train` (did you mean `steps`?)",
    ]
    assert check(path) == mistakes
    resolved = [line for line in mistakes if "minst" not in line]
    assert problems(resolve, path) == resolved
    typed = [line for line in resolved if "mnits" not in line]
    assert problems(resolve, path, data=str(tmp_path / "later.zip")) == typed, "a path may come to be"
    assert problems(resolve, path, data="cifra10", sets=["train.steps=0"]) == [
        *typed,
        "`--data`: there is no data set `cifra10` (did you mean `cifar10`?)",
        "`--set train.steps=0`: `train.steps` must be 1 … 1,000,000,000, not `0`",
    ]
    write("my.yaml", "model: {name: glow}\nfor: {photos: {train: {steps: 5}}}\n")
    assert resolve(path, data="photos").tree()["train"]["steps"] == 5, "the recipe knows of it"
    assert check("./none.yaml") == ["there is no recipe `./none.yaml`"]


# what follows `model: {name: glow}`, or a whole recipe → the mistake
MISTAKES = {
    "steps: 5": "2:1: unknown key `steps` (did you mean `train.steps`?)",
    "train: {epochs: 5}": "2:9: unknown key `epochs` in `train` (use `train.steps`; ",
    "trian: {}": "2:1: unknown key `trian` (did you mean `train`?)",
    "data: mnist": "2:7: `data` must contain keys, not the string `mnist`",
    "train: {steps: 1e4}": "2:16: `train.steps` must be an integer, not `10000.0` (write 10000)",
    "train: {steps: true}": "2:16: `train.steps` must be an integer, not true",
    "train: {steps: }": "2:16: `train.steps` must be an integer, not null",
    "train: {compile: yes}": "2:18: `train.compile` must be true or false or `auto`, not the string"
    " `yes` (write true)",
    "train: {ema: 1}": "2:14: `train.ema` must be in [0, 1), not `1`",
    "optim: {lr: .nan}": "2:13: `optim.lr` must be a number, not `nan`",
    "optim: {lr: 1e39}": "2:13: `optim.lr` must be a number, not `1e+39`",
    "optim: {betas: [0.5]}": "2:16: `optim.betas` must be a list of 2 numbers, not `[0.5]`",
    "optim: {betas: [0.5, 1]}": "2:16: `optim.betas` must be in [0, 1), not `[0.5, 1]`",
    "optim: {schedule: cosin}": "2:19: `optim.schedule` must be `constant`, `cosine`, "
    "`linear`, `late_linear` or `wsd`",
    "data: {augment: flip}": "2:17: `data.augment` must be a list of strings, not the string `flip`"
    " (write [flip])",
    "data: {channels: 2}": "2:18: `data.channels` must be `1`, `3` or null, not `2`",
    "launch: {gpus: most}": "2:16: `launch.gpus` must be an integer, `all` or null",
    "ood: {scores: [nl]}": "2:15: `ood.scores` must be a list from `nll`, `typicality`, "
    "`complexity`, `ratio`, `gradnorm`, `ensemble`, `local` or null, not `['nl']` (did you mean `nll`?)",
    "model: {name: wgan}\noptim: {critic: {lrr: 1}, genrator: {lr: 1}}": "2:18: unknown key `lrr` in "
    "`optim.critic` (did you mean `lr`?)",
    "model: {name: wgan}\noptim: {critic: 3}": "2:17: `optim.critic` must contain keys, not `3`",
    "model: {name: glwo}": "1:15: there is no model `glwo` (did you mean `glow`?)",
    "model: {depth: 4}": "1:1: `model.name` is missing (write `model: {name: vae}`",
    "scale: brief": "2:8: `scale` must be `tiny`, `small`, `full`, `paper` or null",
    "for: [mnist]": "2:1: `for` must contain data sets, such as `for: {mnist: {…}}`",
    "for: {mnist: 3}": "2:14: a section of `for` must contain the keys that change, such as `{train: {…}}`",
    "for: {mnist: {data: {name: x}}}": "2:22: `data.name` is not allowed here: a section of `for` is"
    " named by its data set",
    "for: {mnist: {extends: vae}}": "2:15: unknown key `extends`",
    "for: {small: {train: {stepz: 1}}}": "2:23: unknown key `stepz` in `train`",
    "for: {small: {'mnist, cifar10': {model: {dept: 1}}}}": "2:42: unknown key `dept` in `model`",
    "for: {small: 3}": "2:7: `for.small` is a scale: it must contain sections",
    "stages: {a: {model: {name: vae}}}": "1:1: unknown key `model`",
}


def test_a_mistake_is_told_with_its_place_and_what_to_write(write):
    for text, message in MISTAKES.items():
        head = "" if text.startswith("model:") else "model: {name: glow}\n"
        messages = problems(resolve, write("my.yaml", f"{head}{text}\n"))
        assert messages[0].startswith(f"my.yaml:{message}"), text
        assert len(messages) == (2 if "genrator" in text else 1), text


def test_unknown_names(write):
    for name, text in (("mine", ""), ("list", "- 1"), ("a", "extends: x.yaml"), ("b", "extends: c.yaml")):
        write(f"{name}.yaml", text)
    write("c.yaml", "extends: b.yaml")
    write("d.yaml", "model: {name: glow}")
    write("e.yaml", "extends: d.yaml\nmodel: {name: vae}")
    for what, message in (
        ("pixelcn", "there is no model `pixelcn` (did you mean `pixelcnn`?)"),
        ("vea", "there is no model `vea` (did you mean `vae`?)"),
        ("AdvVAE", "there is no model `AdvVAE` (the closest model in gz is `aae`)"),
        ("./mien.yaml", "there is no recipe `./mien.yaml` (did you mean `mine.yaml`?)"),
        ("./list.yaml", "list.yaml:1:1: a recipe is a map of sections"),
        ("./a.yaml", "a.yaml:1:10: there is no recipe `x.yaml`"),
        ("./b.yaml", "c.yaml:1:10: `extends` forms a circle: `b.yaml` also extends this recipe"),
        ("./e.yaml", "e.yaml:2:15: the extended recipe is for `glow`, not for `vae`"),
    ):
        (problem,) = problems(resolve, what)
        assert problem.startswith(message)


def test_other_programs_words_are_read(write):
    """Each is a key of some recipe; in a section where it is no key, the hint names the right one."""
    for section, words in SYNONYMS.items():
        for word, name in words.items():
            shown = {
                key for model in ("r3gan", "fm", "vae") for key in schema.schema(catalog.card(model))[section]
            }
            assert name in shown and word not in shown, f"{section}.{word}"
    text = (
        "model: {name: fm, channel_mult: [1, 2]}\ntrain: {max_grad_norm: 2, gradient_accumulation_steps: 4}\n"
    )
    path = write("words.yaml", f"{text}sample: {{guidance_scale: 3}}\n")
    (part,) = resolve(str(path)).parts
    assert (part.train.clip, part.train.accumulate, part.sample["guidance"]) == (2, 4, 3)
    assert part.options["mult"] == [1, 2]
    for model in ("fm", "cfm", "rf", "sgm"):
        for word in ("process", "path", "sde"):
            options = resolve(model, sets=(f"model.{word}=subvp",)).parts[0].options
            assert options["process"] == "subvp" and (word == "process") == (word in options)
    (problem,) = problems(resolve, write("wrong.yaml", "model: {name: fm}\ntrain: {warmup_steps: 5}\n"))
    assert "did you mean `optim.warmup`?" in problem


GLOW = """\
about: a flow
model: {name: glow, depth: 2, hidden: 16}
train: {steps: 100, clip: 50}
optim: {lr: 1e-3}
for:
  mnist:
    train: {steps: 200}
    model: {hidden: 32}
    params: 1M
  cifar10: {train: {steps: 300}, data: {levels: 32}}
"""


def test_later_layers_win_and_origins_tell_which(write, shipped):
    shipped("glow.yaml", GLOW)
    block = "  MNIST: {optim: {warmup: 5}, train: {steps: 400}}\n"
    path = write("my.yaml", f"extends: glow\ntrain: {{batch_size: 8}}\nmodel: {{depth: 3}}\nfor:\n{block}")
    plain, recipe = resolve("glow"), resolve(path, data="mnist")
    assert (plain.tree()["train"]["steps"], plain.origin["train.steps"]) == (100, "recipes/glow.yaml:3")
    assert (plain.tree()["train"]["clip"], plain.tree()["train"]["keep"]) == (50.0, None)
    assert type(plain.tree()["train"]["clip"]) is float
    assert plain.origin["train.keep"] == plain.origin["data.name"] == "default"
    tree, origin = recipe.tree(), recipe.origin
    assert (tree["model"]["depth"], origin["model.depth"]) == (3, "my.yaml:3")
    assert (tree["model"]["hidden"], origin["model.hidden"]) == (32, "for.mnist recipes/glow.yaml:8")
    assert (tree["train"]["steps"], origin["train.steps"]) == (400, "for.MNIST my.yaml:5")
    assert (tree["optim"]["warmup"], tree["optim"]["lr"]) == (5, 1e-3)
    assert (tree["data"]["name"], origin["data.name"]) == ("mnist", "--data")
    assert tree["params"] is None, "1M was the size before `depth: 3`"
    assert resolve("GLOW", data="MNIST").tree()["params"] == "1M"
    recipe = resolve(path, data="mnist", flags={"train.steps": 5, "seed": None}, sets=["optim.lr=1e-2"])
    assert (recipe.tree()["train"]["steps"], recipe.origin["train.steps"]) == (5, "--steps")
    assert (recipe.tree()["optim"]["lr"], recipe.origin["optim.lr"]) == (1e-2, "--set")
    recipe = resolve(path, flags={"train.steps": 5}, sets=["train.steps=6", "train.steps=7"])
    assert (recipe.tree()["train"]["steps"], recipe.origin["train.steps"]) == (7, "--set")
    assert recipe.source.name == "my.yaml" and recipe.card.name == "glow"
    assert set(recipe.origin) == set(dotted(recipe.tree()))


def test_the_data_set_decides_on_for_however_it_is_named(write, shipped):
    shipped("glow.yaml", GLOW)
    path = write("my.yaml", "extends: glow\ndata: {name: cifar10}\n")
    assert resolve(path).tree()["train"]["steps"] == 300
    assert resolve(path, data="mnist").tree()["train"]["steps"] == 200
    assert resolve(path, sets=["data.name=MNIST"]).tree()["data"]["name"] == "mnist"
    assert resolve("glow", sets=["data={name: cifar10}"]).tree()["data"]["levels"] == 32
    tree = resolve("glow", data="./MNIST").tree()
    assert (tree["data"]["name"], tree["train"]["steps"]) == ("./MNIST", 100)
    named = write("named.yaml", "extends: glow\nfor: {./photos: {data: {size: 64}}}\n")
    assert resolve(named, data="./photos").tree()["data"]["size"] == 64
    write("sub/base.yaml", "extends: glow\ntrain: {steps: 7}\n")
    write("sub/top.yaml", "extends: base.yaml\nseed: 3\n")
    tree = resolve("sub/top.yaml").tree()
    assert (tree["train"]["steps"], tree["seed"], tree["model"]["depth"]) == (7, 3, 2)


def test_check_reads_the_sections_of_a_shipped_recipe_that_do_not_apply(shipped):
    shipped("glow.yaml", GLOW.replace("levels: 32", "levles: 32"))
    assert resolve("glow", data="mnist").tree()["train"]["steps"] == 200
    (line,) = check(recipes()["glow"])
    assert line.startswith("recipes/glow.yaml:10:") and "`levles`" in line


SCALED = """\
model: {name: glow, depth: 1}
train: {steps: 1, batch_size: 64, accumulate: 4}
for:
  grey: {model: {depth: 2, hidden: 20}, train: {clip: 9}}
  tiny:
    model: {depth: 7}
    digits: {train: {steps: 2}}
  small:
    mnist, cifar10: {model: {hidden: 60}}
    few: {model: {depth: 5}}
    grey: {model: {depth: 3, hidden: 30}, train: {steps: 10}}
    train: {steps: 9, keep: 4}
  full:
    64px: {train: {steps: 20}}
  paper:
    mnist: {train: {steps: 30}}
"""


def test_the_scale_the_shape_few_images_and_the_set_decide_on_for(shipped):
    """Scale < class < few < set, however they stand in the file; of one name, all scales < one. `tiny`
    changes `small`; a set that it names takes that section alone."""
    shipped("glow.yaml", SCALED)

    def chosen(data, **more):
        recipe = resolve("glow", data=data, **more)
        model, train = recipe.tree()["model"], recipe.tree()["train"]
        return recipe.scale, model["depth"], model["hidden"], train["steps"], train["clip"], train["keep"]

    assert chosen("fashionmnist") == ("small", 3, 30, 10, 9.0, 4)
    assert chosen("mnist") == ("small", 3, 60, 10, 9.0, 4)
    assert chosen("mnist", flags={"data.n": 5000}) == ("small", 5, 60, 10, 9.0, 4)
    assert chosen("cifar10")[:4] == ("small", 1, 60, 9)
    assert chosen("mnist", flags={"train.minutes": 15.0}) == ("tiny", 7, 60, 10, 9.0, 4)
    assert chosen("mnist", flags={"train.minutes": 16.0})[0] == "small"
    assert chosen("mnist", gpus=1)[:4] == ("full", 2, 20, 1)
    assert chosen("mnist", gpus=1, flags={"train.minutes": 8.0})[0] == "full"
    assert chosen("mnist", gpus=1, flags={"launch.cpu": True})[0] == "small"
    assert chosen("mnist", flags={"data.size": 64, "scale": "full"})[::3] == ("full", 20)
    assert chosen("digits", gpus=1) == ("tiny", 1, 64, 2, None, None)
    assert chosen("digits", flags={"scale": "small"})[:4] == ("small", 5, 30, 10)
    assert chosen("digits-ab")[:2] == ("small", 5), "it is not named"
    for data, scale, n, has in (("svhn", "full", "71,257", "64px"), ("cifar10", "paper", "48,000", "mnist")):
        assert problems(resolve, "glow", data=data, flags={"scale": scale}) == [
            f"`--scale`: the recipe has no `{scale}` settings for {n} colour training images of 32×32"
            f" (use `--scale small`; `{scale}` has settings for: {has})"
        ]
    assert resolve("glow", data="mnist").origin["model.hidden"] == "for.small.mnist recipes/glow.yaml:9"


def test_a_preset_holds_what_recipes_share(write, shipped, tmp_path):
    """Of a preset too the recipe's own values win; a recipe of the user may name it."""
    (tmp_path / "shipped" / "presets").mkdir()
    shipped("presets/deep.yaml", "model: {depth: 8}\nfor: {small: {grey: {model: {depth: 9, hidden: 99}}}}\n")
    shipped("glow.yaml", "extends: presets/deep\nmodel: {name: glow, hidden: 16}\n")
    path = write("my.yaml", "extends: presets/deep\nmodel: {name: glow}\n")
    assert presets() == ["presets/deep"] and list(recipes()) == ["glow"]
    for what, hidden in (("glow", 16), (path, 99)):
        tree, origin = resolve(what, data="mnist").tree(), resolve(what, data="mnist").origin
        assert (tree["model"]["depth"], tree["model"]["hidden"]) == (9, hidden)
        assert origin["model.depth"] == "for.small.grey recipes/presets/deep.yaml:2"
    assert {layer.source for layer in resolve("glow").layers} == {"shipped"}, "a preset is gz's own"


def test_a_batch_that_gz_chose_is_no_larger_than_the_set(write, shipped):
    """Its parts are as large as they were; one of the user's, and of the user's own file, stays."""
    shipped("glow.yaml", SCALED)

    def batch(what, **more):
        recipe = resolve(what, data="svhn", **more)
        train = recipe.tree()["train"]
        return train["batch_size"], train["accumulate"], recipe.origin["train.batch_size"]

    assert batch("glow", flags={"data.n": 64}) == (64, 4, "recipes/glow.yaml:2")
    assert batch("glow", flags={"data.n": 63}) == (32, 2, "63 images")
    assert batch("glow", flags={"data.n": 3}) == (2, 1, "3 images")
    assert batch("glow", flags={"data.n": 17}, sets=["train.batch_size=20"])[::2] == (20, "--set")
    path = write("recipes/my.yaml", "extends: glow\ntrain: {batch_size: 20}\n")
    assert batch(path, flags={"data.n": 17}) == (20, 4, "recipes/my.yaml:2")


CLUSTERED = {
    "cfm": "model",
    "cddpm": "model",
    "dit": "model",
    "fm": "model",
    "zigma": "model",
    "vqvae": "stages.prior.model",
}


@pytest.mark.parametrize("model, section", CLUSTERED.items())
def test_images_with_several_labels_have_no_clusters_unless_set(model, section, write):
    """Clusters within classes need one class an image. The user's own clusters stay, and are refused."""

    def clusters(what=model, data="chestmnist", conditional="true", sets=()):
        sets = [f"{section}.conditional={conditional}", *sets]
        recipe = resolve(what, data=data, sets=sets, flags={"scale": "small"})
        part = recipe.parts[-1]
        return part.options["clusters"], recipe.origin[f"{section}.clusters"].split(":")[0]

    grey = clusters(data="mnist")
    assert grey[0] == 100 and grey[1].startswith("for.small.grey recipes/")
    assert clusters() == (0, "images with several labels")
    assert clusters(conditional="false") == grey
    assert clusters(sets=[f"{section}.clusters=50"]) == (50, "--set")
    assert clusters(data="shapes-factors", sets=["data.channels=1"])[0] == 0
    part = "{model: {clusters: 50}}"
    part = part if section == "model" else f"{{stages: {{prior: {part}}}}}"
    path = write("my.yaml", f"extends: {model}\nfor: {{small: {{grey: {part}}}}}\n")
    assert clusters(path) == (50, "for.small.grey my.yaml")


def test_set_takes_yaml(write):
    path = write("my.yaml", "model: {name: ddpm}")
    sets = ["model.mult=[1, 2]", "optim.betas=[0, .9]", "train.clip=1", "about=no", "train.clip=null"]
    tree = resolve(path, sets=[*sets, "optim.main.lr=1e-5", "ood={budget: 5}"]).tree()
    assert (tree["model"]["mult"], tree["optim"]["betas"], tree["about"]) == ([1, 2], [0.0, 0.9], "no")
    assert (tree["train"]["clip"], tree["optim"]["main"], tree["ood"]["budget"]) == (None, {"lr": 1e-5}, 5.0)
    assert resolve(path, sets=["about=c=d"]).about == "c=d"
    wrong = ["train.stepz=5", "x", "optim.lr", "train.keep=[", "seed=1_0", "model.name=vae"]
    assert problems(resolve, path, sets=wrong) == [
        "`--set x`: not of the form `a.b=v` (write it as `--set train.steps=1000`)",
        "`--set optim.lr`: not of the form `a.b=v` (write it as `--set optim.lr=VALUE`)",
        "`--set train.keep=[`: `[` is not valid YAML (quote it: `--set 'a.b=\"…\"'`)",
        "`--set seed=1_0`: `1_0` is not a number (write 10)",
        "`--set train.stepz=5`: unknown key `stepz` in `train` (did you mean `steps`?)",
        "`--set`: this recipe is for `ddpm` (gz train vae)",
    ]
    (problem,) = problems(resolve, path, sets=["model.mult=1,2"])
    assert problem.endswith("must be a list of integers or null, not the string `1,2` (write [1, 2])")
    (problem,) = problems(resolve, path, flags={"launch.machines": 0})
    assert problem.startswith("`--num-machines`: `launch.machines` must")


KEYS = {
    "train": "steps minutes clock batch_size accumulate precision ema ema_snapshots clip skip compile "
    "deterministic log_every sample_every samples eval_every eval_images checkpoint_every keep best patience "
    "init parent",
    "data": "name size fit channels levels latent latent_draw augment n",
    "optim": "name lr betas eps weight_decay warmup schedule critic",
}


def test_a_tree_has_every_key_and_is_resolved_again_as_that_of_a_run(write):
    wgan = "model: {name: wgan}\noptim: {critic: {lr: 1}}\ndata: {name: mnist}"
    tree, card = resolve(write("my.yaml", wgan)).tree(), catalog.card("wgan")
    assert " ".join(tree) == "about scale seed format model data train optim sample ood bench launch params"
    assert {section: " ".join(tree[section]) for section in KEYS} == KEYS
    assert list(tree["model"]) == ["name", *card.params] and list(tree["sample"]) == list(card.sample)
    assert tree["optim"]["critic"] == {"lr": 1.0}, "what a phase does not say it has from the section"
    shared, keywords = {"scores", "budget", "background"}, {k for o in card.scores.values() for k in o}
    assert shared <= set(tree["ood"]) <= shared | keywords
    assert resolve(write("run.yaml", dump(tree)), data="mnist").tree() == tree


def test_an_option_that_became_a_constant_is_read_where_it_has_its_value(write):
    fixed = [(name, key, value) for name, options in FIXED_KEYS.items() for key, value in options.items()]
    for name, key, value in fixed:
        constant, other = (value, "log_sigma") if isinstance(value, str) else (f"{value:g}", value + 1)
        model = f"data: {{name: digits}}\nmodel: {{name: {name}, {key}: "
        assert key not in catalog.card(name).params
        same, changed = (check(write("old.yaml", f"{model}{each}}}")) for each in (value, other))
        assert key not in "\n".join(same) and f"unknown key `{key}`" in "\n".join(changed)
        assert part_of({"model": {"name": name, key: value, "x": 1}}).options == {"x": 1}
        with pytest.raises(UsageError, match=f"`model.{key}` is {constant} in this version"):
            part_of({"model": {"name": name, key: other}})
        assert part_of({"model": {"name": "maf", key: 3}}).options == {key: 3}


def test_keys_that_are_gone_are_read(write):
    launch = "launch: {wandb: true, track: [mlflow]}"
    text = f"data: {{name: digits}}\nmodel: {{name: pixelcnn}}\nsample: {{naive: true}}\n{launch}"
    part = resolve(write("old.yaml", text)).parts[0]
    assert part.launch.track == ("mlflow", "wandb") and "naive" not in part.sample
    old = part_of({"model": {"name": "vae"}, "sample": {"naive": False}, "launch": {"wandb": False}})
    assert old.launch.track == () and old.sample == {}


def test_values_of_the_command_line():
    sampler = schema.Rule("Literal['ddim', 'dpm']")
    assert schema.check_value(3, schema.Rule("float"), "--rate") == 3.0
    assert schema.check_value("1,2", schema.Rule("tuple[int, ...]"), "--rows") == [1, 2]
    assert schema.check_value("ddim", sampler, "--sampler") == "ddim"
    message = "`--sampler` must be `ddim` or `dpm`, not the string `ddmi` (did you mean `ddim`?)"
    assert problems(schema.check_value, "ddmi", sampler, "--sampler") == [message]
    assert schema.check_scores(["NLL", "iwae"], catalog.card("vae")) == ["nll", "iwae"]
    (problem,) = problems(schema.check_scores, ["nll"], catalog.card("wgan"))
    assert problem.startswith("`wgan` has no score `nll`")
    one, two = ({"k": catalog.Param("k", "int", default, False)} for default in (1, 2))
    for scores, shared in (({"a": one, "b": one}, {"k": 1}), ({"a": one, "b": two}, {})):
        rules = schema.score_options(replace(catalog.card("vae"), scores=scores))
        assert schema.defaults(rules) == shared, "of two scores each keeps its own"


def test_a_conditional_model_needs_labels(write, monkeypatch):
    monkeypatch.setitem(SPECS, "mnist", replace(SPECS["mnist"], classes=()))
    path = write("my.yaml", "model: {name: glow, conditional: true}\ntrain: {steps: 5}\n")
    assert resolve(path, data="digits").tree()["model"]["conditional"] is True
    assert resolve(path, data="./photos").tree()["data"]["name"] == "./photos", "only its pack can tell"
    (problem,) = problems(resolve, path, data="mnist")
    assert problem.startswith("`glow` needs labels, but `mnist` has none (`gz train fm --data mnist`")
    assert problem.endswith("or `--set model.conditional=false`)")
    recipe = resolve(path)
    (part,) = recipe.parts
    photos = SimpleNamespace(name="photos", shape=(3, 8, 8), classes=("a", "b"), extras=())
    check_data(part, recipe.card, photos)
    with pytest.raises(UsageError, match="`photos` has none"):
        check_data(part, recipe.card, SimpleNamespace(**{**vars(photos), "classes": ()}))


# what a word may be taken for, one a line
WORDS = words(r"""1e-4 no 010 12:30 y N Yes on ~ null ' " \ é 日本 😀 0x1F 0b1 _1_0 1_000 .5 .inf = << !x
&x *x %x @x `x ? --- ... 2024-01-01 1:2:3 +1 0o7 True x: :x # /data/x ./a C:\x
glow-celeba-20260131-142501-ab12 1.5e3x 685_230.15 [x {x""")
WORDS += ["", " ", "a: b", "a #b", "- a", "x, y", "\n", "\t", "? x", "a ", " a"]
WORDS += ["\x07", "\x85", "\u2028", "\ufeff"]
EDGES = [0, -1, 10, 8, 2**63, -(10**20), 0.0, -0.0, 1e-5, 1e16, 1e22, 5e-324, 1.7e308, math.inf, -math.inf]
NAMES = st.sampled_from([word for word in WORDS if word])
SIGNS = st.characters(codec="utf-8", exclude_categories=("Cs",))
LEAVES = st.none() | st.booleans() | st.sampled_from(EDGES + WORDS) | st.text(SIGNS, max_size=8)
VALUES = st.recursive(
    LEAVES | st.floats(allow_nan=False) | st.integers(-(2**80), 2**80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=9,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


def reads_back(tree: dict) -> None:
    text = dump(tree)
    document = read_text(text, "r.yaml")
    assert not document.problems, text
    for read in (document.tree, yaml.safe_load(text), yaml.load(text, yaml.CSafeLoader)):
        assert same(read, tree), text


def test_what_is_written_reads_alike_under_yaml_1_1_and_1_2():
    reads_back({**{word: word for word in WORDS if word}, "list": WORDS, "a": {"b": {"c": {}}}})


@pytest.mark.slow
@generated(150)
@given(VALUES)
def test_any_value_that_is_written_reads_alike(value):
    reads_back({"k": value})


def test_the_form_of_what_is_written():
    critic = {"betas": [0.0, 0.9]}
    model = {"name": "glow", "mult": (1, 2), "on": None}
    assert dump({"model": model, "optim": {"lr": 1e-5, "eps": 1e-8, "critic": critic}}) == (
        'model:\n  name: glow\n  mult: [1, 2]\n  "on": null\n'
        "optim:\n  lr: 1.0e-05\n  eps: 1.0e-08\n  critic:\n    betas: [0.0, 0.9]\n"
    )
    with pytest.raises(TypeError, match="a recipe cannot contain a"):
        dump({"a": object()})


RECIPES = list(recipes())


@cache
def sections_of(name: str) -> list[tuple[str, ...]]:
    """The sections of settings of a recipe and of those that it extends."""
    return [at for file in read_chain(name)[0] for at in file.sections]


def pairs(name: str) -> list[tuple[str | None, str]]:
    """(scale, set) of each set that a recipe names."""
    at = dict.fromkeys(at for at in sections_of(name) if at[-1] not in GENERAL)
    return [(path[0] if path[1:] else None, path[-1]) for path in at]


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_right(name):
    """One page: a paper, lines to type, what is trained; for each set that it names it resolves, reads back,
    and has as many parameters as it says."""
    assert check(recipes()[name]) == []
    text = show(name)
    assert re.match(r"# .+\n(# {2,}gz .+\n)+(# .+\n)*(extends: presets/.+\n)?about: ", text)
    assert len(text.splitlines()) <= 45
    recipe = resolve(name)
    own_set = recipe.tree()["data"]["name"]
    assert recipe.scale == "tiny" and find(own_set).embedded, "it must train in a minute without a download"
    assert canonical(recipe.card.name) == canonical(name) and recipe.tree()["about"]
    assert ("tiny", own_set) in pairs(name)
    for scale, data in pairs(name):
        recipe = resolve(name, data=data, flags={"scale": scale})
        tree = recipe.tree()
        assert same(read_text(dump(tree), "r.yaml").tree, tree)
        assert same(recipe_of(tree).tree(), tree), "it is read back as it was written"
        counted = any(part.params is not None for part in recipe.parts)
        for part, model in zip(recipe.parts, build(recipe, None) if counted else (), strict=counted):
            if part.params is not None:
                digits, unit = re.fullmatch(r"([\d.]+)([KMB]?)", str(part.params)).groups()
                said = float(digits) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]
                assert sum(p.numel() for p in model.parameters()) == pytest.approx(said, rel=0.02)


def test_every_key_of_a_section_and_every_option_of_a_model_has_a_text():
    for section in (Part, *SECTIONS.values()):
        assert list(section_texts(section)) == [field.name for field in keys_of(section)]
    for card in catalog.cards().values():
        option_texts = catalog.option_texts(card)
        has = {"model": card.params, "sample": card.sample, "ood": schema.score_options(card), **card.do}
        assert {of: set(has[of]) for of in has} == {of: set(option_texts[of]) for of in has}, card.name


def test_a_recipe_is_shown_with_the_text_of_each_key():
    sections = {name: {field.name for field in keys_of(section)} for name, section in SECTIONS.items()}
    for name in RECIPES:
        recipe = resolve(name)
        tree, option_texts = recipe.tree(), key_texts(recipe)
        shown = annotated(tree, option_texts)
        assert same(read_text(shown, "r.yaml").tree, tree), "texts are comments"
        lines = shown.splitlines()
        assert set(dump(tree).splitlines()) <= {line.split("#")[0].rstrip() for line in lines}, name
        assert all(len(line) <= 80 or "#" not in line for line in lines), name
        comments = " ".join(line.partition("# ")[2] for line in lines)
        assert all(text in comments for key, text in option_texts.items() if key in recipe.origin), name
        for key in recipe.origin:
            *_, section, option = ("", *key.split("."))
            assert key in option_texts or option not in sections.get(section, ()), (name, key)


def test_the_set_that_is_meant_where_none_is_named(monkeypatch, tmp_path):
    """`GZ_DATA` stands in for the set of a shipped recipe that has settings for both, and never for a set
    that somebody named."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: cvae\ndata: {name: glyphs}\n")
    for usual, cvae in (("digits", "digits"), ("glyphs", "glyphs"), (None, "glyphs"), ("mnist", "glyphs")):
        monkeypatch.setenv("GZ_DATA", usual) if usual else monkeypatch.delenv("GZ_DATA")
        assert resolve("cvae").data.name == cvae
        assert resolve("cyclegan").data.name == "digits-ab" and resolve(str(mine)).data.name == "glyphs"
        assert resolve("cvae", data="patches").data.name == "patches"
    monkeypatch.setenv("GZ_DATA", "digits")
    assert resolve("cvae").origin["data.name"] == "GZ_DATA"
    assert resolve("cvae").parts[0].options["latent"] == 8


@cache
def needs(name: str) -> frozenset[str]:
    return frozenset(resolve(name).card.needs)


SCALES = ("small", "full")

# By shape class a set of that class, and what is typed beside its name.
STAND_INS = {
    "grey": ("fashionmnist", {}),
    "colour": ("svhn", {}),
    "64px": ("tinyimagenet", {}),
    "128px": ("imagenette", {"data.size": 128}),
    "256px": ("imagenette", {"data.size": 256}),
}
SIDES = {"grey": 28, "colour": 32, "64px": 64, "128px": 128, "256px": 256}
PAIRS = [("cifar100", "svhn"), ("octmnist", "tissuemnist"), ("tinyimagenet", "places365")]


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> str:
    """A folder of captioned pictures with the pictures before them."""
    files, rows = {}, []
    for name in ("0.png", "1.png", "2.png"):
        files |= {f"{folder}{name}": pictures.png((40, 0, 9)) for folder in ("", "before/", "maps/")}
        further = {"before": f"before/{name}", "control": f"maps/{name}"}
        rows.append(json.dumps({"file_name": name, "text": "a red door", **further}))
    files["metadata.jsonl"] = "\n".join(rows).encode()
    return str(pictures.write(tmp_path_factory.mktemp("captioned"), files))


@pytest.fixture
def chosen(captioned):
    """chosen(name, scale, shape, **typed): the recipe of a model for a set of a shape class."""
    return lambda name, scale, shape, **typed: _chosen(name, scale, shape, captioned, tuple(typed.items()))


@cache
def _chosen(name, scale, shape, captioned, typed):
    data, flags = STAND_INS[shape]
    sets = []
    if "caption" in needs(name):
        import tiny_sd

        data, flags = captioned, {"data.size": max(32, SIDES[shape])}  # a base takes multiples of 8
        sets = [f"model.base={tiny_sd.base()}"]
    elif "second_domain" in needs(name):
        data, flags = "horse2zebra", {"data.size": SIDES[shape], "data.channels": 1 if shape == "grey" else 3}
    typed = {key.replace("_", "."): value for key, value in typed}
    return resolve(name, data=data, sets=sets, flags={**flags, "scale": scale, **typed})


def info_of(part, classes: int | None) -> DataInfo:
    """What the model of a part is built for, as after the set is packed."""
    data, spec = part.data, SPECS.get(part.data.name, SPECS["svhn"])
    height, width = sides(data.size or spec.size)
    more = {
        "classes": tuple(map(str, range(classes or spec.n_classes))),
        "n": 1000,
        "steps": part.train.steps,
    }
    if data.latent:  # of Stable Diffusion's autoencoder
        return DataInfo((4, height // 8, width // 8), None, **more)
    return DataInfo((data.channels or spec.channels, height, width), data.levels or spec.levels, **more)


INITS = ("uniform_", "normal_", "trunc_normal_", "zeros_", "ones_", "constant_", "orthogonal_")
INITS += ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")


def build(recipe, classes: int | None = 10) -> list:
    """The model of each part on the meta device: shapes alone. A later stage is built on the earlier ones."""
    built = {}
    for part in recipe.parts:
        earlier = {stage: built[stage] for stage in catalog.card(part.model).stages}
        info = astuple(info_of(part, classes))
        built[part.stage] = _build(part.model, json.dumps(part.options), info, **earlier)
    return list(built.values())


@cache
def _build(model, options, info, **earlier):
    import torch

    with ExitStack() as unset:  # there are no values
        unset.enter_context(mock.patch("torch.nn.utils.parametrizations._SpectralNorm._power_method"))
        for name in INITS:
            unset.enter_context(mock.patch(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor))
        unset.enter_context(torch.device("meta"))
        return catalog.load(model).of(DataInfo(*info), **json.loads(options), **earlier)


BUILT = pytest.mark.parametrize("built", ["one", pytest.param("all", marks=pytest.mark.slow)])
ONE = ("small", "colour")  # the scale and the shape class of the models that are built
ONE_A_FAMILY = first_of_families(RECIPES)


@BUILT
@pytest.mark.parametrize("name", RECIPES)
def test_each_class_has_a_setting_that_builds(name, built, chosen):
    """The batches of all parts are shared out over any number of GPUs, few changed by more than an eighth."""
    for scale in ("tiny", *SCALES):
        for shape in SHAPES:
            recipe = chosen(name, scale, shape)
            if "caption" not in needs(name):  # a base decides on channels and size itself
                assert ("small" if scale == "tiny" else scale, shape) in recipe.choice.order
            if built == "all" or ((scale, shape) == ONE and name in ONE_A_FAMILY):
                build(recipe)
            check_sharing(recipe, shape)
            check_averages(recipe, shape)


def check_sharing(recipe, shape) -> None:
    for gpus in (1, 2, 3, 5, 6, 7, 12):
        shared, notes = shared_out(recipe, gpus)
        changed = 0
        for part, original in zip(shared.parts, recipe.parts, strict=True):
            now, before = part.train.batch_size, original.train.batch_size
            assert now % (gpus * part.train.accumulate) == 0, (shape, gpus)
            assert abs(now - before) <= max(before / 8, gpus), (shape, gpus)
            assert gpus > 1 or now == before
            changed += now != before
        assert len(notes) == changed


def check_averages(recipe, shape) -> None:
    for part in recipe.parts:
        horizon, steps = 1 / (1 - part.train.ema), part.train.steps
        assert not part.train.ema or horizon <= 0.101 * steps, (shape, part.stage)
        assert part.optim.warmup <= 0.1 * steps, (shape, part.stage)


FURTHER_SHAPES = {  # shapes that a class also holds
    "48x32": ("colour", {"data_size": "48x32"}),
    "96x64": ("64px", {"data_size": "96x64"}),
    "grey 64": ("64px", {"data_channels": 1}),
    "300 classes": ("colour", {}),
}


@BUILT
@pytest.mark.parametrize("scale", ["small", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ONE_A_FAMILY else pytest.mark.slow) for name in RECIPES],
)
def test_few_images_and_other_shapes_of_a_class(name, scale, built, chosen):
    """Few images are trained on for fewer steps; a model that takes squares says so."""
    for shape in SHAPES if not needs(name) & {"caption", "second_domain"} else ():
        many, few = (chosen(name, scale, shape, **n) for n in ({}, {"data_n": 2000}))
        check_averages(few, shape)
        for part, few_part in zip(many.parts, few.parts, strict=True):
            assert few_part.train.steps < part.train.steps, (shape, part.stage)
    for case, (shape, typed) in FURTHER_SHAPES.items():
        recipe = chosen(name, scale, shape, **typed)
        assert "caption" in needs(name) or (scale, shape) in recipe.choice.order
        if built == "one" and case != "48x32":
            continue
        try:
            build(recipe, 300 if case == "300 classes" else 10)
        except UsageError as e:
            assert case in ("48x32", "96x64") and "square" in e.message, e.message
    for pair in PAIRS if not needs(name) - {"labels"} else ():
        trees = [resolve(name, data=data, flags={"scale": scale}).tree() for data in pair]
        for tree in trees:
            tree["data"].pop("name")
        assert trees[0] == trees[1], pair


DAY = 86_400  # of one H100


def rows_of(name) -> list[str]:
    """The shape classes, and the sets that have settings of their own at scale `full`."""
    sets = [at[-1] for at in sections_of(name) if at[0] == "full" and at[-1] not in GENERAL]
    return [*SHAPES, *dict.fromkeys(sets)]


def at_full(name, row, monkeypatch, n=50_000):
    """The recipe of a row as a set of its own side gets it, and the description of the set."""
    data = row
    if row in SHAPES:
        facts = Facts(SIDES[row], SIDES[row], 1 if row == "grey" else 3, n)
        monkeypatch.setattr("gzcli.recipe.resolve.facts_of", lambda *_, **__: facts)
        data = "horse2zebra" if "second_domain" in needs(name) else STAND_INS[row][0]
    recipe = resolve(name, data=data, flags={"scale": "full"})
    if row not in SHAPES:
        return recipe, of_data(recipe)[0].info()
    height, width = sides(recipe.data.size or facts.height)
    shape = [recipe.data.channels or facts.channels, height, width]
    rest = {"levels": recipe.data.levels or 256, "multilabel": False, "n": n}
    return recipe, {"shape": shape, "classes": list("0123456789"), **rest}


def check_day(name, row, monkeypatch, tmp_path, n=50_000) -> None:
    """By gz's own forecast: time over all stages."""
    import torch

    from gzcli.engine.forecast import run

    recipe, info = at_full(name, row, monkeypatch, n)
    measure = lambda job: run(job, tmp_path, torch.device("cpu"), None)["parts"]  # noqa: E731
    monkeypatch.setenv("GZ_TRIAL", "1")
    estimates, _ = forecast.expect(recipe, Plan(gpus=1), info, measure=measure, timed=False)
    assert forecast.together([one.on_h100s(1) for one in estimates]) <= DAY, (row, n)


def test_full_takes_a_day_of_one_gpu_where_it_takes_the_most(monkeypatch, tmp_path):
    check_day("pixelcnn", "colour", monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_full_takes_a_day_of_one_gpu(name, monkeypatch, tmp_path):
    if "caption" in needs(name):
        pytest.skip("its base decides on what a step costs")
    for row in rows_of(name):
        for n in (50_000, 2_000) if row in SHAPES else (None,):
            check_day(name, row, monkeypatch, tmp_path, n=n)


def test_a_limit_for_the_loss_of_a_whole_image_is_shown_in_the_unit_of_today(write):
    """Up to format 2 `clip` and `skip` limited the gradient of a loss summed over pixels."""
    old = "train: {max_grad_norm: 100, skip: 5}\n"  # a limit of 5 is usual in either unit
    [line] = large_limits(resolve(write("my.yaml", f"extends: glow\n{old}"), data="digits"))
    assert f"`train.clip: {100 / 256:.3g}`" in line and "(my.yaml:2)" in line
    [line] = large_limits(resolve("vae", data="mnist", sets=["train.skip=1000"]))
    assert f"`train.skip: {1000 / 784:.3g}`" in line and "(--set)" in line
    for head in ("extends: glow\nformat: 2\n", "extends: glow\nformat: 3\n", "extends: ddpm\n"):
        assert not large_limits(resolve(write("my.yaml", head + old), data="digits")), head
    paper = resolve("vdvae", data="cifar10", flags={"scale": "paper"})
    assert paper.parts[0].train.clip == 200 and not large_limits(paper)  # a shipped recipe means it
