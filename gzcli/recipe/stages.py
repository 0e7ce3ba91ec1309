"""Recipes in stages: models that are trained one after the other, as a tokenizer and the prior of its codes.

    data: {name: digits}
    train: {ema: 0.999}                                  # of every stage, unless it says otherwise
    stages:
      tokenizer: {model: {name: vqgan}, train: {steps: 2000}}
      prior: {model: {name: transformer}, sample: {temperature: 0.9}}
      prior: vqgan-mnist-20260131-142501-ab12            # or: the stage of an earlier run

A model that is built on earlier stages takes them as parameters of type `Model`, by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gzcli.core.errors import GzError, canonical
from gzcli.core.parts import part_of
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe import schema
from gzcli.recipe.layers import Layer, changes_model, dotted, lay
from gzcli.recipe.recipe import SHARED
from gzcli.recipe.yaml import Key, Problem
from gzcli.store import runs
from gzcli.store.paths import is_name, recipe_names

INHERITED = ("train", "optim")  # sections at the top of a recipe that every stage begins with
OF_MODEL = ("model", "sample", "ood")  # sections whose keys the model decides


def cards_of(layers: Iterable[Layer], problems: list[Problem]) -> dict[str, ModelCard] | None:
    """The model of each stage, in order; None of a recipe without stages."""
    names: dict[str, tuple[str, str]] = {}  # stage → its model's name, and where it stands
    staged = False
    for layer in layers:
        given = layer.tree.get("stages") if isinstance(layer.tree, Mapping) else None
        staged |= given is not None
        if given is not None and not isinstance(given, Mapping):
            message = "`stages` must hold stages, as `stages: {prior: {model: …}}`"
            problems.append(Problem(layer.where(("stages",), True), message))
            continue
        for stage, part in (given or {}).items():
            if not is_name(stage):  # it is a folder of the run
                message = f"`{stage}` cannot be a stage's name"
                hint = "use lower-case letters, digits, `-` and `_`"
                problems.append(Problem(layer.where(("stages", stage), False), message, hint))
                continue
            names.setdefault(stage, ("", layer.where(("stages", stage), False)))
            if layer.applies and (name := _named(part, stage, layer, problems)):
                names[stage] = name, layer.where(("stages", stage), True)
    if not staged:
        return None
    cards: dict[str, ModelCard] = {}
    for stage, (name, where) in names.items():
        try:
            if not name:
                problems.append(Problem(where, f"`stages.{stage}.model.name` is missing"))
                continue
            card = cards[stage] = catalog.card(name)
        except GzError as e:
            problems.append(Problem(where, e.message, e.hint))
            continue
        for needed in card.stages:
            if needed not in list(cards)[:-1]:
                problems.append(Problem(where, f"`{card.name}` needs a stage `{needed}` before it"))
    return cards


def called_after(cards: Mapping[str, ModelCard]) -> ModelCard | None:
    """The model after which a run in stages is called: the last one that has a recipe of its own, else the
    first."""
    shipped = {canonical(name) for name in recipe_names()}
    return next(
        (card for card in reversed(list(cards.values())) if card.name in shipped),
        next(iter(cards.values()), None),
    )


def fitting(layers: Iterable[Layer], rules: schema.Rules, cards: Mapping[str, ModelCard]) -> list[Layer]:
    """The layers as far as the rules of the models apply that the stages have in the end: without runs in the
    place of stages, and without keys of an earlier model that the later one does not have."""
    now: dict[str, str] = {}
    fitted = []
    for layer in layers:
        parts = {stage: part for stage, part in _parts(layer).items() if not isinstance(part, str)}
        for stage, part in parts.items():
            if not isinstance(part, Mapping) or stage not in cards:
                continue
            name = (part.get("model") or {}).get("name") or now.get(stage, cards[stage].name)
            if layer.applies:
                now[stage] = name
            if canonical(str(name)) != canonical(cards[stage].name):
                own = schema.below(schema.below(rules, "stages"), stage)
                parts[stage] = {key: _known(key, value, own) for key, value in part.items()}
        staged = parts or "stages" in layer.tree
        fitted.append(replace(layer, tree={**layer.tree, "stages": parts}) if staged else layer)
    return fitted


def compose(
    layers: list[Layer],
    rules: schema.Rules,
    cards: Mapping[str, ModelCard],
    reused: Mapping[str, tuple[str, str]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of defaults and the layers that apply, and the origin of each value by dotted key."""
    top = {key: rules[key] for key in SHARED}
    tree = schema.defaults(top)
    origin = dict.fromkeys(dotted(tree), "default")
    for layer in layers:
        lay(tree, {key: value for key, value in layer.tree.items() if key in top}, origin, layer.origin)
    tree.pop("params", None)
    shown: dict[str, Any] = {}
    for stage, card in cards.items():
        if stage in reused:
            shown[stage], origin[f"stages.{stage}"] = reused[stage]
            continue
        shown[stage], of = _stage(layers, stage, card)
        origin |= {f"stages.{stage}.{key}": value for key, value in of.items()}
    first = {key: tree.pop(key) for key in ("about", "scale", "seed", "data")}
    return {**first, "stages": shown, **tree}, origin


def reused_runs(layers: Iterable[Layer]) -> dict[str, tuple[str, str]]:
    """The runs that are used in the place of stages, each with the origin of its name."""
    return {
        stage: (part, layer.origin(("stages", stage)))
        for layer in layers
        if layer.applies
        for stage, part in _parts(layer).items()
        if isinstance(part, str)
    }


def _stage(layers: Iterable[Layer], stage: str, card: ModelCard) -> tuple[dict[str, Any], dict[str, str]]:
    rules = schema.schema(card)
    tree = schema.defaults({key: rules[key] for key in ("model", *INHERITED, "sample", "ood", "params")})
    tree = {"model": {"name": card.name, **tree.pop("model")}, "data": {}, **tree}
    origin = dict.fromkeys(dotted(tree), "default")
    for layer in layers:
        if changes_model(layer.tree):  # another size of the images
            tree["params"] = None
        lay(tree, {key: layer.tree[key] for key in INHERITED if key in layer.tree}, origin, layer.origin)
        own = _parts(layer).get(stage) or {}
        lay(tree, own, origin, partial(_origin, layer, stage))
    tree["model"]["name"] = card.name
    return tree, origin


def _origin(layer: Layer, stage: str, path: Key) -> str:
    return layer.origin(("stages", stage, *path))


def _parts(layer: Layer) -> Mapping[str, Any]:
    given = layer.tree.get("stages") if isinstance(layer.tree, Mapping) else None
    return given if isinstance(given, Mapping) else {}


def _named(part: Any, stage: str, layer: Layer, problems: list[Problem]) -> str | None:
    """The name of the model that a layer gives a stage, in words or as the model of a run."""
    if isinstance(part, str):
        try:
            return part_of(runs.find_stage(part, stage).tree()).model
        except GzError as e:
            problems.append(Problem(layer.where(("stages", stage), True), e.message, e.hint))
            return None
    model = part.get("model") if isinstance(part, Mapping) else None
    name = model.get("name") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) else None


def _known(section: str, value: Any, rules: schema.Rules) -> Any:
    if section not in OF_MODEL or not isinstance(value, Mapping):
        return value
    return {key: v for key, v in value.items() if key in schema.below(rules, section)}
