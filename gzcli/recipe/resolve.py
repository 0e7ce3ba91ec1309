"""A recipe as it will run: every key of every section, and where each value comes from.

The layers, of which a later one wins: defaults of the signatures and sections < a preset < the recipe < its
sections of `for` that apply < the user's own recipe that `extends` it < its own sections < flags < `--set`.
In a recipe with stages each layer gives a stage first the values that all stages share, then those of the
stage itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError, canonical
from gzcli.core.sections import SCALES, DataSection
from gzcli.core.units import Size
from gzcli.data.sets.names import DataSet, data_key, locate, names
from gzcli.data.sets.registry import DataSpec
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe import schema, stages
from gzcli.recipe.files import RecipeFile, read_chain
from gzcli.recipe.layers import (
    GENERAL,
    Choice,
    Layer,
    choice_of,
    dotted,
    lay,
    layer_of,
    layers_of,
    layers_typed,
    misspelt,
    without_meeting,
)
from gzcli.recipe.recipe import Recipe, check_data, check_strategy, recipe_of
from gzcli.recipe.yaml import Problem, in_order, refusal

USUAL = "GZ_DATA"  # the environment variable that names the set to train on where none is named


@dataclass(frozen=True)
class Whole:
    """A complete run as the recipe's files plan it, whatever was typed: a run that was cut short is told from
    it, and one whose loss the reference does not have.

    steps: of each stage, "" of a recipe without stages; None where the recipe gives a time.
    size: of the images in the recipe that gz ships; None where it leaves it to the set.
    loss: who changed what the loss depends on, beside the recipe that gz ships: "file", "typed".
    """

    steps: Mapping[str, int | None] = field(default_factory=dict)
    size: Size | None = None
    loss: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Resolved(Recipe):
    """A recipe as it was asked for, with where its values come from.

    origin: the place of the value of each dotted key: "default" | "recipes/glow.yaml:9" |
      "for.mnist recipes/glow.yaml:14" | "my.yaml:3" | "--steps" | "--set".
    ours: the dotted keys whose values gz itself chose.
    card: the model that the run is called after.
    cards: the models of the stages, by the stages' names.
    source: the file.
    found: the data set; None where it is not there yet.
    """

    origin: Mapping[str, str]
    ours: Collection[str]
    card: ModelCard
    cards: Mapping[str, ModelCard]
    source: Path
    found: DataSet | None
    whole: Whole
    choice: Choice

    @property
    def key(self) -> str:
        """The short name of the data set in ids of runs: `mnist`, or `my-photos-3f2a1c`."""
        return self.found.key if self.found else data_key(self.data.name)


def resolve(
    what: str,
    *,
    data: str | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    gpus: int = 0,
) -> Resolved:
    """The recipe of a model, or of a file, for a data set.

    Raises UsageError that lists everything that is wrong, each with its place.

    what: name of a model, or path of a .yaml file.
    data: name of a data set, with which the sections of `for` are compared, or its path; None: the recipe's.
    sets: texts `a.b=v`, as `--set` gets them.
    flags: values of other options, by dotted key.
    gpus: number of GPUs that are there, by which the scale is chosen where none is asked for.
    """
    recipe, problems = _resolve(what, data, sets, flags or {}, gpus=gpus)
    if recipe is None or problems:
        raise refusal(problems)
    return recipe


def check(path: str | Path) -> list[str]:
    """Everything that is wrong with a recipe, for its own data set and for each that it names under `for`."""
    try:
        chain, problems = read_chain(str(path))
    except UsageError as e:
        return [e.message]
    paths = dict.fromkeys(path for file in chain for path in file.sections)
    problems += _resolve(str(path), None, (), {})[1]
    for at in paths:
        scale, is_set = at[0] if at[0] in SCALES else None, at[-1] not in GENERAL
        forced = Choice(scale, "", (tuple(map(canonical, at)),))
        problems += _resolve(str(path), at[-1] if is_set else None, (), {}, forced=forced)[1]
        if problem := misspelt(at, names()):
            file = next(file for file in chain if at in file.sections)
            problems.append(Problem(file.document.where(("for", *file.written[at])), *problem))
    return [str(problem) for problem in in_order(problems)]


# ---------------------------------------------------------------------------- layers


def _resolve(
    what: str,
    data: str | None,
    sets: Iterable[str],
    flags: Mapping[str, Any],
    *,
    gpus: int = 0,
    forced: Choice | None = None,
) -> tuple[Resolved | None, list[Problem]]:
    chain, problems = read_chain(what)
    typed = layers_typed({"data.name": data, **flags}, sets, problems)
    own = [*(layer_of(file) for file in chain), *typed]
    usual = _usual_set(chain, own)
    name = usual or _data_name([layer.tree for layer in own])
    found = _located(name, own, {at[-1] for file in chain for at in file.sections}, problems)
    choice = forced or choice_of(chain, own, found, name, gpus, problems)
    layers = [layer for file in chain for layer in layers_of(file, choice)] + typed
    staged = stages.cards_of(layers, problems)
    cards, reused = staged or {}, stages.reused_runs(layers)
    card = _card(chain, problems) if staged is None else stages.called_after(cards)
    rules = schema.schema(card) if staged is None else schema.staged(cards)
    if staged is not None:
        layers = stages.fitting(layers, rules, cards)
    clean = [_checked(layer, rules, problems) for layer in layers]
    applied = [layer for layer in clean if layer.applies]
    if card is None:
        return None, problems

    def composed(layers: list[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
        return stages.compose(layers, rules, cards, reused) if cards else compose(layers, rules, card)

    tree, origin = composed(applied)
    if not cards:
        _check_name(tree, origin, card, problems)
    tree["data"]["name"] = found.name if isinstance(found, DataSpec) else name
    if usual:
        origin["data.name"] = USUAL
    ours = chosen_by_gz(origin, chain)
    if choice.scale:
        tree["scale"], origin["scale"] = choice.scale, choice.why
    if choice.facts:
        lower_batches(tree, origin, choice.facts.n, ours)
    if not problems:
        label = chain[-1].label
        problems += [Problem(label, f"`{key}` must be given") for key in schema.missing(tree, rules)]
    recipe = recipe_of(tree)
    problems += _needs(recipe, found)
    plan = Whole() if problems else whole(applied, lambda layers: recipe_of(composed(layers)[0]))
    about: dict[str, Any] = {"origin": origin, "ours": ours, "card": card, "cards": cards}
    about |= {"source": chain[-1].path, "found": found, "whole": plan, "choice": choice}
    return Resolved(**vars(recipe), **about), problems


def _check_name(
    tree: dict[str, Any], origin: Mapping[str, str], card: ModelCard, problems: list[Problem]
) -> None:
    """Adds to `problems` that `--set` names another model; spells the model's name as it is."""
    other = tree["model"]["name"]
    if canonical(other) != canonical(card.name):
        message = f"this is a recipe of `{card.name}`"
        problems.append(Problem(f"`{origin['model.name']}`", message, f"gz train {other}"))
    tree["model"]["name"] = card.name


def _needs(recipe: Recipe, found: DataSet | None) -> Iterator[Problem]:
    """What the set or the processes lack that the models need."""
    for part in recipe.parts:
        try:
            check_strategy(part, model := catalog.card(part.model))
            if isinstance(found, DataSpec):
                check_data(part, model, found.classes, found.name, found.extras)
        except UsageError as e:
            yield Problem("", e.message, e.hint)


def compose(
    layers: Iterable[Layer], rules: schema.Rules, card: ModelCard
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of defaults and layers, and the origin of each value."""
    tree = schema.defaults(rules)
    tree["model"] = {"name": card.name, **tree["model"]}
    origin = dict.fromkeys(dotted(tree), "default")
    for layer in layers:
        lay(tree, layer.tree, origin, layer.origin)
    return tree, origin


def _card(chain: list[RecipeFile], problems: list[Problem]) -> ModelCard | None:
    """The model of the files: one of them at least names it, and none names another."""
    card = None
    for file in chain:
        model = file.own.get("model") or {}
        name = model.get("name") if isinstance(model, dict) else None
        where = file.document.where(("model", "name"), value=True)
        if not isinstance(name, str):
            continue
        if card and canonical(name) != canonical(card.name):
            problems.append(Problem(where, f"what it extends is a recipe of `{card.name}`, not of `{name}`"))
            return None
        try:
            card = card or catalog.card(name)
        except UsageError as e:
            problems.append(Problem(where, e.message, e.hint))
            return None
    if card is None and not problems:
        hint = "write `model: {name: vae}`, or `extends: vae`"
        problems.append(Problem(chain[-1].document.where(("model",)), "`model.name` is missing", hint))
    return card


def _data_name(trees: Iterable[Mapping[str, Any]]) -> str:
    """The name of the data set, which decides which sections of `for` apply: the last one given."""
    name = DataSection().name
    for tree in trees:
        section = tree.get("data")
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            name = section["name"]
    return name


def _usual_set(chain: Iterable[RecipeFile], own: Collection[Layer]) -> str | None:
    """The set that `GZ_DATA` puts in the place of a shipped recipe's own; None where it does not: where the
    recipe lacks settings for one of the two, or the user names a set."""
    usual, shipped = os.environ.get(USUAL), [layer.tree for layer in own if layer.source == "shipped"]
    sections = {
        canonical(at[-1]) for file in chain if file.shipped for at in file.sections if at[0] == "tiny"
    }
    given = [layer.tree.get("data") for layer in own if layer.source != "shipped"]
    if not usual or any(isinstance(data, Mapping) and "name" in data for data in given):
        return None
    return usual if {canonical(usual), canonical(_data_name(shipped))} <= sections else None


def chosen_by_gz(origin: Mapping[str, str], chain: Collection[RecipeFile]) -> frozenset[str]:
    """The dotted keys whose values nobody but gz chose: defaults, and values of its own recipes."""
    of_user = {file.label for file in chain if not file.shipped}
    shipped = {file.label for file in chain} - of_user

    def is_ours(place: str) -> bool:
        return place == "default" or place.split()[-1].rpartition(":")[0] in shipped

    return frozenset(key for key, place in origin.items() if is_ours(place))


def lower_batches(tree: dict[str, Any], origin: dict[str, str], n: int, ours: Collection[str]) -> None:
    """Lowers each batch that gz itself chose, and that is larger than the n images of the set, to the largest
    power of two that the set holds, of parts no larger than before. One that the user chose stays, and is
    refused later."""
    stages = {f"stages.{name}.": part for name, part in tree.get("stages", {}).items()} or {"": tree}
    for prefix, part in stages.items():
        key = f"{prefix}train.batch_size"
        if not isinstance(part, Mapping) or part["train"]["batch_size"] <= n:
            continue
        if key in ours:
            train, fits = part["train"], 1 << (n.bit_length() - 1)
            train["accumulate"] = max(1, train["accumulate"] * fits // train["batch_size"])
            train["batch_size"] = fits
            origin[key] = f"{n} images"


def _checked(layer: Layer, rules: schema.Rules, problems: list[Problem]) -> Layer:
    """The layer with its values converted. What is wrong is left out, and added to `problems`."""
    if not isinstance(layer.tree, Mapping):
        problems.append(
            Problem(layer.where((), True), "a section of `for` must hold what changes, as `{train: {…}}`")
        )
        return replace(layer, tree={})
    tree, wrong = schema.check(without_meeting(layer, problems), rules, layer.where)
    problems += wrong
    if layer.inside and tree.get("data", {}).pop("name", None) is not None:
        message = "`data.name` has no place here: a section of `for` is named by its data set"
        problems.append(Problem(layer.where(("data", "name"), False), message))
    return replace(layer, tree=tree)


# ---------------------------------------------------------------------------- data sets


def _located(
    name: str, layers: Iterable[Layer], sections: Collection[str], problems: list[Problem]
) -> DataSet | None:
    """The data set of that name or path. Adds to `problems` that there is none, with the place of the name.

    A path, and a name that a recipe has settings `for`, may be there by the time it is needed: then None.
    """
    try:
        return locate(name)
    except UsageError as e:
        if canonical(name) not in map(canonical, sections):
            given = [layer for layer in layers if not layer.inside and _data_name([layer.tree]) == name]
            where = given[-1].where(("data", "name"), True) if given else ""
            problems.append(Problem(where, e.message, e.hint))
    except MissingError:
        pass
    return None


# ---------------------------------------------------------------------------- a complete run


def whole(layers: Iterable[Layer], compose: Callable[[list[Layer]], Recipe]) -> Whole:
    """The complete run that the files among the layers plan. A size that the user's own file gives does not
    count: a run of the set's own size is preferred to it."""
    layers = list(layers)
    written = [layer for layer in layers if layer.source != "typed"]
    steps = {p.stage: None if p.train.minutes else p.train.steps for p in compose(written).parts}
    shipped = [layer.tree.get("data", {}) for layer in written if layer.source == "shipped"]
    sizes = [data["size"] for data in shipped if data.get("size")]
    loss = {layer.source for layer in layers if layer.source != "shipped" and any(_of_loss(layer.tree))}
    return Whole(steps, sizes[-1] if sizes else None, frozenset(loss))


def _of_loss(tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a layer on which the loss depends: those of models and images, but for the name of the set,
    and a run in the place of a stage. How long, how fast and in which batches is trained changes no loss.
    """
    yield from tree.get("model", {}).keys() - {"name"}
    yield from tree.get("data", {}).keys() - {"name"}
    for name, part in tree.get("stages", {}).items():
        if isinstance(part, str) or part.get("model") or part.get("data"):
            yield name
