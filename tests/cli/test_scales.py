"""Shipped recipes: settings that build for each scale and shape class; `full` takes a day of one H100."""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import cache

import pytest
from pictures import png, write

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.core.units import sides
from gzcli.data.packs.open import SHAPES, Facts
from gzcli.data.sets.registry import SPECS
from gzcli.launch import forecast
from gzcli.launch.launcher import Plan
from gzcli.launch.plan import shared_out
from gzcli.models import catalog
from gzcli.recipe.files import read_chain, recipes
from gzcli.recipe.resolve import GENERAL, resolve

RECIPES = {name: [at for file in read_chain(name)[0] for at in file.sections] for name in recipes()}
NEEDS = {name: frozenset(resolve(name).card.needs) for name in RECIPES}
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
        files |= {f"{folder}{name}": png((40, 0, 9)) for folder in ("", "before/", "maps/")}
        further = {"before": f"before/{name}", "control": f"maps/{name}"}
        rows.append(json.dumps({"file_name": name, "text": "a red door", **further}))
    files["metadata.jsonl"] = "\n".join(rows).encode()
    return str(write(tmp_path_factory.mktemp("captioned"), files))


@pytest.fixture
def chosen(captioned):
    """chosen(name, scale, shape, **typed): the recipe of a model for a set of a shape class."""
    return lambda name, scale, shape, **typed: _chosen(name, scale, shape, captioned, tuple(typed.items()))


@cache
def _chosen(name, scale, shape, captioned, typed):
    data, flags = STAND_INS[shape]
    sets = []
    if "caption" in NEEDS[name]:
        import tiny_sd

        data, flags = captioned, {"data.size": max(32, SIDES[shape])}  # a base takes multiples of 8
        sets = [f"model.base={tiny_sd.base()}"]
    elif "second_domain" in NEEDS[name]:
        data, flags = "horse2zebra", {"data.size": SIDES[shape], "data.channels": 1 if shape == "grey" else 3}
    typed = {key.replace("_", "."): value for key, value in typed}
    return resolve(name, data=data, sets=sets, flags={**flags, "scale": scale, **typed})


def info_of(part, classes: int = 10) -> DataInfo:
    """What the model of a part is built for, as after the set is packed."""
    data, spec = part.data, SPECS.get(part.data.name, SPECS["svhn"])
    height, width = sides(data.size or spec.size)
    names = tuple(map(str, range(classes)))
    if data.latent:  # of Stable Diffusion's autoencoder
        return DataInfo((4, height // 8, width // 8), None, names, n=1000, steps=part.train.steps)
    shape = (data.channels or spec.channels, height, width)
    return DataInfo(shape, data.levels or spec.levels, names, n=1000, steps=part.train.steps)


def build(recipe, classes: int = 10) -> None:
    """Each part on the meta device: shapes alone. A later stage is built on the earlier ones."""
    built = {}
    for part in recipe.parts:
        earlier = {stage: built[stage] for stage in catalog.card(part.model).stages}
        built[part.stage] = _build(
            part.model, json.dumps(part.options), astuple(info_of(part, classes)), **earlier
        )


@cache
def _build(model, options, info, **earlier):
    import torch

    with torch.device("meta"):
        return catalog.load(model).of(DataInfo(*info), **json.loads(options), **earlier)


@pytest.mark.parametrize("name", RECIPES)
def test_each_class_has_a_setting_that_builds(name, chosen):
    """The batches of all parts are shared out over any number of GPUs, few changed by more than an eighth."""
    for scale in ("tiny", *SCALES):
        for shape in SHAPES:
            recipe = chosen(name, scale, shape)
            if "caption" not in NEEDS[name]:  # a base decides on channels and size itself
                assert ("small" if scale == "tiny" else scale, shape) in recipe.choice.order
            build(recipe)
            check_sharing(recipe, shape)
            check_averages(recipe, shape)


def check_sharing(recipe, shape) -> None:
    for gpus in (1, 2, 3, 5, 6, 7, 12):
        shared, told = shared_out(recipe, gpus)
        changed = 0
        for part, own in zip(shared.parts, recipe.parts, strict=True):
            now, before = part.train.batch_size, own.train.batch_size
            assert now % (gpus * part.train.accumulate) == 0, (shape, gpus)
            assert abs(now - before) <= max(before / 8, gpus), (shape, gpus)
            assert gpus > 1 or now == before
            changed += now != before
        assert len(told) == changed


def check_averages(recipe, shape) -> None:
    for part in recipe.parts:
        horizon, steps = 1 / (1 - part.train.ema), part.train.steps
        assert not part.train.ema or horizon <= 0.101 * steps, (shape, part.stage)
        assert part.optim.warmup <= 0.1 * steps, (shape, part.stage)


OTHERS = {  # shapes that a class also holds
    "48x32": ("colour", {"data_size": "48x32"}),
    "96x64": ("64px", {"data_size": "96x64"}),
    "grey 64": ("64px", {"data_channels": 1}),
    "300 classes": ("colour", {}),
}


@pytest.mark.parametrize("scale", ["small", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_few_images_and_other_shapes_of_a_class(name, scale, chosen):
    """Few images are trained on for fewer steps; a model that takes squares says so."""
    for shape in SHAPES if not NEEDS[name] & {"caption", "second_domain"} else ():
        many, few = (chosen(name, scale, shape, **n) for n in ({}, {"data_n": 2000}))
        check_averages(few, shape)
        for part, own in zip(many.parts, few.parts, strict=True):
            assert own.train.steps < part.train.steps, (shape, part.stage)
    for other, (shape, typed) in OTHERS.items():
        recipe = chosen(name, scale, shape, **typed)
        assert "caption" in NEEDS[name] or (scale, shape) in recipe.choice.order
        try:
            build(recipe, 300 if other == "300 classes" else 10)
        except UsageError as e:
            assert other in ("48x32", "96x64") and "square" in e.message, e.message
    for pair in PAIRS if not NEEDS[name] - {"labels"} else ():
        trees = [resolve(name, data=data, flags={"scale": scale}).tree() for data in pair]
        for tree in trees:
            tree["data"].pop("name")
        assert trees[0] == trees[1], pair


DAY = 86_400  # of one H100
# of the families that took the most of it
WORST = {"hvae": "colour", "vqgan": "256px", "ncsnv2": "256px", "pixelcnn": "colour", "dit": "imagenet"}


def rows_of(name) -> list[str]:
    """The shape classes, and the sets that have settings of their own at scale `full`."""
    own = [at[-1] for at in RECIPES[name] if at[0] == "full" and at[-1] not in GENERAL]
    return [*SHAPES, *dict.fromkeys(own)]


def at_full(name, row, monkeypatch, n=50_000):
    """The recipe of a row as a set of its own side gets it, and the description of the set."""
    data = row
    if row in SHAPES:
        found = Facts(SIDES[row], SIDES[row], 1 if row == "grey" else 3, n)
        monkeypatch.setattr("gzcli.recipe.resolve.facts_of", lambda *_, **__: found)
        data = "horse2zebra" if "second_domain" in NEEDS[name] else STAND_INS[row][0]
    recipe = resolve(name, data=data, flags={"scale": "full"})
    if row not in SHAPES:
        return recipe, forecast.of_data(recipe)[0].info()
    height, width = sides(recipe.data.size or found.height)
    shape = [recipe.data.channels or found.channels, height, width]
    known = {"levels": recipe.data.levels or 256, "multilabel": False, "n": n}
    return recipe, {"shape": shape, "classes": list("0123456789"), **known}


def check_day(name, row, monkeypatch, tmp_path, n=50_000) -> None:
    """By gz's own forecast: time over all stages."""
    import torch

    from gzcli.engine.forecast import run

    recipe, info = at_full(name, row, monkeypatch, n)
    measure = lambda job: run(job, tmp_path, torch.device("cpu"), None)["parts"]  # noqa: E731
    monkeypatch.setenv("GZ_TRIAL", "1")
    own, _ = forecast.expect(recipe, Plan(gpus=1), info, measure=measure, timed=False)
    assert forecast.together([one.on_h100s(1) for one in own]) <= DAY, (row, n)


@pytest.mark.parametrize(("name", "row"), WORST.items())
def test_full_takes_a_day_of_one_gpu_where_it_takes_the_most(name, row, monkeypatch, tmp_path):
    assert row in rows_of(name)
    check_day(name, row, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_full_takes_a_day_of_one_gpu(name, monkeypatch, tmp_path):
    if "caption" in NEEDS[name]:
        pytest.skip("its base decides on what a step costs")
    for row in rows_of(name):
        for n in (50_000, 2_000) if row in SHAPES else (None,):
            check_day(name, row, monkeypatch, tmp_path, n=n)
