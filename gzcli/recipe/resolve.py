"""A resolved recipe: every key of every section, and the origin of each value.

The layers, of which later ones override earlier ones: defaults of the signatures and sections < a preset <
the recipe < its sections of `for` that apply < the user's own recipe that `extends` it < its own sections <
flags < `--set`.

A recipe in stages trains several models in sequence, such as a tokenizer and the prior of its codes:

    data: {name: digits}
    train: {ema: 0.999}                                  # of every stage, unless it is overridden
    stages:
      tokenizer: {model: {name: vqgan}, train: {steps: 2000}}
      prior: {model: {name: transformer}, sample: {temperature: 0.9}}
      prior: vqgan-mnist-20260131-142501-ab12            # or: the stage of an earlier run

In each layer, the values that all stages share come first, then those of the stage itself. A model that is
built on earlier stages takes them as parameters of type `Model`, by name.

Sections of `for` apply to some sets, at some scales:

    for:
      mnist: {…}             # a set, at every scale
      small:
        train: {…}           # of the whole scale
        colour: {…}          # a shape class
        few: {…}             # sets of few images
        cifar10: {…}         # a set

Within a scale, its own values come first, then those of the shape class, of `few` and of the set. Of two
sections with one name, that of all scales comes before that of the scale. `tiny` is layered on `small`, but a
set that `tiny` names takes that section alone.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gzcli.core.devices import count_gpus
from gzcli.core.errors import GzError, MissingError, UsageError, canonical
from gzcli.core.hints import Option, advice
from gzcli.core.sections import (
    MEETING_KEYS,
    PER_DIMENSION,
    SCALES,
    DataSection,
    leaves,
    part_of,
    plain_values,
)
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.facts import FEW_IMAGES, SHAPES, Facts
from gzcli.data.packs.open import facts_of
from gzcli.data.sets.registry import DataSet, DataSpec, OwnSet, data_key, locate, names
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe import schema
from gzcli.recipe.files import Keys, Layer, RecipeFile, layers_typed, read_chain
from gzcli.recipe.recipe import OF_STAGE, SHARED_KEYS, Recipe, check_data, check_strategy, recipe_of
from gzcli.recipe.yaml import Key, Problem, check_text, in_order, refusal
from gzcli.store import runs
from gzcli.store.paths import is_name, recipe_names, trained_in

DATA_VARIABLE = "GZ_DATA"  # environment variable with the data set to train on by default
INHERITED = ("train", "optim")  # sections at the top of a recipe that apply to every stage
OF_MODEL = ("model", "sample", "ood")  # sections whose keys depend on the model
MAX_TINY_MINUTES = 15.0  # minutes up to which a training on a CPU has the scale `tiny`
MAX_INIT_WARMUP = 10  # most warm-up steps for trained weights; a longer warm-up protects random weights
LARGE_LIMIT = 20.0  # norm of a gradient: rarely reached per dimension, but reached per image
GENERAL = (*SHAPES, FEW_IMAGES, *SCALES)  # sections of `for` that are not about a single set
_TYPED = {
    "extra": "options after `--`",
    "machines": "`--num-machines N`",
    "machine_rank": "`--machine-rank R`",
    "main_ip": "`--main-process-ip HOST`",
    "main_port": "`--main-process-port P`",
}


@dataclass(frozen=True)
class Choice:
    """The scale (None for a recipe without scales), the reason for it, the sections that would apply, in
    order, and the facts of the set (None if unknown)."""

    scale: str | None
    why: str
    order: tuple[Keys, ...]
    facts: Facts | None = None

    def rank(self, path: Keys) -> int | None:
        """The position of a section in `order`; None if it does not apply."""
        path = tuple(map(canonical, path))
        return self.order.index(path) if path in self.order else None


@dataclass(frozen=True, kw_only=True)
class Resolved(Recipe):
    """A requested recipe, with the origin of its values.

    origin: the place of the value of each dotted key: "default" | "recipes/glow.yaml:9" |
      "for.mnist recipes/glow.yaml:14" | "my.yaml:3" | "--steps" | "--set".
    ours: the dotted keys whose values gz itself chose.
    card: the model after which the run is named.
    source: the file.
    dataset: the data set; None if it does not exist yet.
    layers: the written and typed layers that apply.
    written: returns the recipe from the files, without the command line.
    """

    origin: Mapping[str, str]
    ours: Collection[str]
    card: ModelCard
    source: Path
    dataset: DataSet | None
    layers: Sequence[Layer]
    written: Callable[[], Recipe] = field(compare=False)
    choice: Choice

    @property
    def key(self) -> str:
        """The short name of the data set in ids of runs: `mnist`, or `my-photos-3f2a1c`."""
        return self.dataset.key if self.dataset else data_key(self.data.name)


def resolve(
    what: str,
    *,
    data: str | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    gpus: int = 0,
    start: Weights | None = None,
) -> Resolved:
    """The recipe of a model, or of a file, for a data set (None: the recipe's own). `sets` are texts `a.b=v`
    of `--set`, `flags` values of other options by dotted key. If no scale is requested, the number of `gpus`
    decides it. Raises UsageError that lists all mistakes, each with its position. With `start`, it is the
    recipe of those weights for another set, trained as long as few images need."""
    flags, (chain, problems) = flags or {}, read_chain(what)
    if start:
        flags = _without_scale(flags, start)
        chain = _tuned(chain[-1], data, gpus, start)
    recipe, problems = _resolve(chain, problems, data, sets, flags, gpus=gpus)
    if recipe is None or problems:
        raise refusal(problems)
    return recipe


def check(path: str | Path) -> list[str]:
    """All errors of a recipe, for its own data set and for each set under `for`."""
    try:
        chain, mistakes = read_chain(str(path))
    except UsageError as e:
        return [e.message]
    problems = _resolve(chain, [*mistakes], None, (), {})[1]
    for at in dict.fromkeys(at for file in chain for at in file.sections):
        forced = Choice(at[0] if at[0] in SCALES else None, "", (tuple(map(canonical, at)),))
        data = at[-1] if at[-1] not in GENERAL else None
        problems += _resolve(chain, [*mistakes], data, (), {}, forced=forced)[1]
        if problem := misspelt(at, names()):
            layer = next(file.sections[at] for file in chain if at in file.sections)
            problems.append(layer.problem((), *problem))
    return [str(problem) for problem in in_order(problems)]


def recipe_for(word: str, data: str | None = None) -> Recipe | None:
    """The recipe of a run, a file, or a model on a data set; None if the word refers to none of them. torch
    does not look for GPUs, because nobody waits for that at a TAB."""
    try:
        run = runs.by_name(word)
        return recipe_of(run.tree()) if run else resolve(word, data=data, gpus=count_gpus())
    except (GzError, OSError, KeyError, TypeError):
        return None


def card_for(word: str) -> ModelCard | None:
    """The model that `gz sample` and `gz ood` use for a word, which is the model of the recipe's last
    stage."""
    if canonical(word) not in map(canonical, recipe_names()) and runs.by_name(word) is None:
        return None
    recipe = recipe_for(word)
    return catalog.card(recipe.parts[-1].model) if recipe else None


def _resolve(
    chain: list[RecipeFile],
    problems: list[Problem],
    data: str | None,
    sets: Iterable[str],
    flags: Mapping[str, Any],
    *,
    gpus: int = 0,
    forced: Choice | None = None,
) -> tuple[Resolved | None, list[Problem]]:
    typed = layers_typed({"data.name": data, **flags}, sets, problems)
    bases = [*(file.base for file in chain), *typed]
    usual = _usual_set(chain, bases)
    name = usual or _data_name(bases)
    dataset = _located(name, bases, {at[-1] for file in chain for at in file.sections}, problems)
    choice = forced or choice_of(chain, bases, dataset, name, gpus, problems)
    layers = [*_of_import(dataset), *_layers(chain, choice, problems), *typed]
    stages, reused = _stage_cards(layers, problems), _reused_runs(layers)
    if stages is None:
        card = _card(chain, problems)
        rules = schema.schema(card)
    else:
        card = _called_after(stages)
        rules = schema.staged(stages)
        layers = [*_fitting(layers, rules, stages)]
    # `check` reads the other sections of a shipped recipe
    read = (layer for layer in layers if layer.applies or layer.source != "shipped")
    applied = [layer for layer in [_checked(layer, rules, problems) for layer in read] if layer.applies]
    if card is None:
        return None, problems
    cards = stages or {"": card}
    tree, origin = _composed(applied, rules, cards, reused)
    if not stages:
        named, tree["model"]["name"] = tree["model"]["name"], card.name
        if canonical(named) != canonical(card.name):
            where = f"`{origin['model.name']}`"
            problems.append(Problem(where, f"this recipe is for `{card.name}`", f"gz train {named}"))
    tree["data"]["name"] = dataset.name if isinstance(dataset, DataSpec) else name
    if usual:
        origin["data.name"] = DATA_VARIABLE
    ours = _chosen_by_gz(origin, chain)
    if choice.scale:
        tree["scale"], origin["scale"] = choice.scale, choice.why
    if choice.facts:
        _lower_batches(tree, origin, choice.facts.n, ours)
        if choice.facts.multilabel:
            _without_clusters(tree, origin, ours)
    if not problems:
        label = chain[-1].base.label
        problems += [Problem(label, f"`{key}` is required") for key in schema.missing(tree, rules)]
    recipe = recipe_of(tree)
    problems += _needs(recipe, dataset, choice.facts)
    of_files = [layer for layer in applied if layer.source != "typed"]
    about: dict[str, Any] = {"origin": origin, "ours": ours, "card": card, "source": chain[-1].path}
    about |= {"written": lambda: recipe_of(_composed(of_files, rules, cards, reused)[0])}
    return Resolved(**vars(recipe), **about, dataset=dataset, layers=applied, choice=choice), problems


def _of_import(dataset: DataSet | None) -> Iterator[Layer]:
    """How the images of an imported set are resized, if its import specifies it."""
    if isinstance(dataset, OwnSet) and dataset.form.fit != "crop":
        yield Layer({"data": {"fit": dataset.form.fit}}, "gz data import --fit", "file")


def _layers(chain: Iterable[RecipeFile], choice: Choice, problems: list[Problem]) -> Iterator[Layer]:
    """The layers of each file: its own values, the sections of `for` that apply, in their order, and the
    other sections. A layer that is not a map is emptied and reported in `problems`."""
    for file in chain:
        yield file.base
        last = len(choice.order)  # the rank of sections that do not apply
        ranks = {at: last if (rank := choice.rank(at)) is None else rank for at in file.sections}
        applying = sorted((at for at in ranks if ranks[at] < last), key=lambda at: (ranks[at], at))
        for at in (*applying, *(at for at in ranks if ranks[at] == last)):
            layer = replace(file.sections[at], applies=ranks[at] < last)
            if not isinstance(layer.tree, Mapping):
                message = "a section of `for` must contain the keys that change, such as `{train: {…}}`"
                problems.append(layer.problem((), message, value=True))
                layer = replace(layer, tree={})
            yield layer


# ---------------------------------------------------------------------------- trained weights to start from


@dataclass(frozen=True)
class Weights:
    """The weights that a training starts from.

    name: name on the command line.
    tree: recipe of their training.
    changes: changes to that recipe: the initial weights of each stage, and values that depend on the new data
      set.
    """

    name: str
    tree: Mapping[str, Any]
    changes: Mapping[str, Any]

    @property
    def models(self) -> dict[str, str]:
        """The model of each stage; "" is the stage of a recipe without stages."""
        parts = self.tree.get("stages") or {"": self.tree}
        return {stage: str(part["model"]["name"]) for stage, part in parts.items()}

    @property
    def recipe(self) -> str | None:
        """The shipped recipe of the models; None for an outside model."""
        shipped = {canonical(name): name for name in recipe_names()}
        if named := [shipped[canonical(m)] for m in self.models.values() if canonical(m) in shipped]:
            return named[-1]
        place = trained_in(next(iter(self.models.values())))
        return place and place[0]


def _tuned(recipe: RecipeFile, data: str | None, gpus: int, start: Weights) -> list[RecipeFile]:
    """The recipe of the weights, with the training of the shipped recipe for few images at their scale."""
    layers = [Layer(dict(start.tree), start.name, "file", start.name)]
    if start.recipe:
        layers.append(
            Layer(_for_few(start, data, gpus), f"few images: recipes/{start.recipe}.yaml", "shipped")
        )
    layers.append(Layer(dict(start.changes), start.name, "file", start.name))
    return [replace(recipe, base=layer, sections={}) for layer in layers]


def _for_few(start: Weights, data: str | None, gpus: int) -> dict[str, Any]:
    """The sections `train` and `optim` of the shipped recipe for few images, with a short warm-up; if there
    are stages, one for each. If the set has no labels and the model can do without, labels are disabled.
    Settings for a set that the recipe names are ignored, because they are for training from scratch."""
    chain, problems = read_chain(str(start.recipe))
    scale = "full" if start.tree.get("scale") == "paper" else start.tree.get("scale")
    form = {"data.name": data, "scale": scale, "data.size": start.tree["data"].get("size")}
    layers = [*(file.base for file in chain), *layers_typed(form, (), problems)]
    dataset = _located(str(data), layers, (), problems)
    choice = choice_of(chain, layers, dataset, str(data), gpus, problems)
    sections = {tuple(map(canonical, at)) for file in chain for at in file.sections}
    few = choice.facts and replace(choice.facts, n=1)
    order = _order(choice.scale, sections, "" if few else FEW_IMAGES, few)
    recipe, _ = _resolve(chain, [], data, (), form, forced=replace(choice, order=tuple(order)))
    if recipe is None:
        return {}
    values: dict[str, Any] = {}
    for stage, model in start.models.items():
        same = [part for part in recipe.parts if part.stage == stage] if stage else []
        same = same or [part for part in recipe.parts if canonical(part.model) == canonical(model)]
        if same:
            optim = plain_values(same[0].optim)
            optim["warmup"] = min(optim["warmup"], MAX_INIT_WARMUP)
            values[stage] = {"train": plain_values(same[0].train), "optim": optim}
            if _lacks_labels(dataset, choice.facts) and "conditional" in same[0].options:
                guidance = {"guidance": None} if "guidance" in same[0].sample else {}  # that of labels
                values[stage] |= {"model": {"conditional": False}, "sample": guidance}
    return values.get("", {}) if "" in start.models else {"stages": values}


def _lacks_labels(dataset: DataSet | None, facts: Facts | None) -> bool:
    """Whether a set is known to have no labels."""
    described = dataset if isinstance(dataset, DataSpec) else facts
    return described is not None and described.classes in (0, ())


def _without_scale(flags: Mapping[str, Any], start: Weights) -> dict[str, Any]:
    """The flags without `scale`. Raises UsageError for a scale other than that of the weights."""
    scale, trained_scale = flags.get("scale"), start.tree.get("scale")
    if scale not in (None, trained_scale):
        whose = f"has the scale `{trained_scale}`" if trained_scale else "has no scale"
        hint = advice("omit it, and set the length with {} or {}", Option("steps"), Option("minutes"))
        raise UsageError(
            f"`--scale {scale}` does not apply: the network comes from `{start.name}`, which {whose}",
            hint=hint,
        )
    return {key: value for key, value in flags.items() if key != "scale"}


# ---------------------------------------------------------------------------- which sections of `for` apply


def choice_of(
    chain: Iterable[RecipeFile],
    layers: Collection[Layer],
    dataset: DataSet | None,
    name: str,
    gpus: int,
    problems: list[Problem],
) -> Choice:
    """The scale and the sections that apply for a data set (None: it does not exist yet). Adds a problem if
    the recipe lacks the scale."""
    written = [(tuple(map(canonical, at)), x.tree) for file in chain for at, x in file.sections.items()]
    sections, of_set = dict(written), canonical(name)
    scaled = any(at[0] in SCALES for at in sections)
    layer = next((layer for layer in reversed([*layers]) if layer.tree.get("scale") in SCALES), None)
    if layer:
        scale, why = layer.tree["scale"], layer.origin(("scale",))
    else:
        scale, why = _usual_scale(layers, sections, of_set, name, gpus) if scaled else (None, "")
    facts = None
    if dataset:
        data = _merged(layer.section("data") for layer in layers)
        of_name = [tree for at, tree in written if at in ((of_set,), (scale, of_set))]
        sized = _merged(tree.get("data") for tree in of_name if isinstance(tree, Mapping))
        form = {"size": data.get("size") or sized.get("size")}
        form |= {"channels": data.get("channels"), "n": data.get("n")}
        try:
            facts = facts_of(dataset, **form, patch=patch_of(data.get("augment") or ()))
        except (UsageError, TypeError, ValueError):  # the error for a wrong size names its place
            facts_of(dataset)  # raises if the files are wrong
            return Choice(scale, "", ((of_set,),))
    choice = Choice(scale, why, tuple(_order(scale if scaled else None, sections, of_set, facts)), facts)
    if layer and (problem := _lack(choice, sections, of_set, facts.words if facts else f"`{name}`")):
        problems.append(layer.problem(("scale",), *problem, value=True))
    return choice


def _usual_scale(
    layers: Iterable[Layer], sections: Collection[Keys], of_set: str, name: str, gpus: int
) -> tuple[str, str]:
    """The default scale, and the reason for it."""
    layers = list(layers)
    launch = _merged(layer.section("launch") for layer in layers)
    minutes = _merged(layer.section("train") for layer in layers).get("minutes")
    if ("tiny", of_set) in sections:
        return "tiny", f"set by the recipe for {name}"
    if not launch.get("cpu") and launch.get("gpus") != 0 and (launch.get("gpus") or gpus):
        return "full", "on GPUs"
    if isinstance(minutes, int | float) and minutes <= MAX_TINY_MINUTES:
        return "tiny", f"up to {MAX_TINY_MINUTES:g} minutes"
    return "small", "no GPU is used"


def _order(scale: str | None, sections: Collection[Keys], of_set: str, facts: Facts | None) -> Iterator[Keys]:
    """The sections in the order in which they apply."""
    if scale == "tiny" and ("tiny", of_set) in sections:
        yield from ((of_set,), ("tiny", of_set))
        return
    names = [*((facts.shape_class, *facts.traits) if facts else ()), of_set]
    first = "small" if scale == "tiny" else scale
    if first:
        yield (first,)
    for name in names:
        yield (name,)
        if first:
            yield (first, name)
    if scale == "tiny":
        yield (scale,)
        yield from ((scale, name) for name in names)


def _lack(
    choice: Choice, sections: Collection[Keys], of_set: str, words: str
) -> tuple[str, str | None] | None:
    """The error, with a hint, for a recipe that lacks the requested scale; `words` name the set."""
    scale = str(choice.scale)
    if not any(at[0] in SCALES for at in sections):
        hint = "a repeated run keeps its scale; only the recipe of a model has scales"
        typed = choice.why.startswith("--")
        return (f"{choice.why} {scale}: this recipe has no scales", hint) if typed else None

    def serves(scale: str) -> bool:
        """Whether a scale has values for the shape class, for the set or (except for `paper`) for all
        sets."""
        order = _order(scale, sections, of_set, choice.facts)
        if any(at in sections for at in order if at[-1] not in (FEW_IMAGES, *SCALES)):
            return True
        return scale != "paper" and ("small" if scale == "tiny" else scale,) in sections

    if serves(scale):
        return None
    able = next((option for option in ("small", "full", "paper") if serves(option)), None)
    named = ", ".join(at[1] for at in sections if at[0] == scale and at[1:])
    hint = f"use `--scale {able}`" + (f"; `{scale}` has settings for: {named}" if named else "")
    return f"the recipe has no `{scale}` settings for {words}", hint if able else None


def _merged(parts: Iterable[Any]) -> dict[str, Any]:
    """The merged values of all maps among the parts; later maps override earlier ones."""
    return {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


def misspelt(path: Keys, sets: Iterable[str]) -> tuple[str, str] | None:
    """The error, with a hint, for a section that would never apply, because its name is almost that of a set,
    a shape class or a scale. Other unknown names may belong to sets that are imported later."""
    names = [*map(canonical, (*sets, *GENERAL))]
    if canonical(path[-1]) in names:
        return None
    near = difflib.get_close_matches(canonical(path[-1]), names, n=1, cutoff=0.75)
    return (f"there is no data set `{path[-1]}`", f"did you mean `{near[0]}`?") if near else None


# ---------------------------------------------------------------------------- data sets


def _data_name(layers: Iterable[Layer]) -> str:
    """The name of the data set: the last one that the layers set. It decides which sections of `for`
    apply."""
    named = [layer.section("data").get("name") for layer in layers]
    return next((name for name in reversed(named) if isinstance(name, str)), DataSection().name)


def _usual_set(chain: Iterable[RecipeFile], bases: Iterable[Layer]) -> str | None:
    """The set with which `GZ_DATA` replaces a shipped recipe's own. None if it does not: the recipe lacks
    settings for one of the two, or the user names a set."""
    usual = os.environ.get(DATA_VARIABLE)
    if not usual or any("name" in layer.section("data") for layer in bases if layer.source != "shipped"):
        return None
    shipped = [file for file in chain if file.shipped]
    tiny = {canonical(at[-1]) for file in shipped for at in file.sections if at[0] == "tiny"}
    name = _data_name([file.base for file in shipped])
    return usual if {canonical(usual), canonical(name)} <= tiny else None


def _located(
    name: str, layers: Iterable[Layer], sections: Collection[str], problems: list[Problem]
) -> DataSet | None:
    """The data set with that name or path. If there is none, or a recipe cannot name it, adds it to
    `problems` with the position of the name. A path, or a name under `for`, may exist by the time it is
    needed; the result is then None."""
    try:
        dataset = locate(name)
        check_text(dataset.reference)
        return dataset
    except UsageError as e:
        if canonical(name) not in map(canonical, sections):
            naming = [layer for layer in layers if _data_name([layer]) == name]
            where = naming[-1].where(("data", "name"), value=True) if naming else ""
            problems.append(Problem(where, e.message, e.hint))
    except MissingError:
        pass
    return None


def _needs(recipe: Recipe, dataset: DataSet | None, facts: Facts | None) -> Iterator[Problem]:
    """The problems of a set, or of processes, that do not meet the models' needs."""
    described = dataset if isinstance(dataset, DataSpec) else facts
    for part in recipe.parts:
        try:
            check_strategy(part, model := catalog.card(part.model))
            if described is not None and described.classes is not None:
                check_data(part, model, described)
        except UsageError as e:
            yield Problem("", e.message, e.hint)


# ---------------------------------------------------------------------------- models


def _card(chain: list[RecipeFile], problems: list[Problem]) -> ModelCard | None:
    """The model that the files name. At least one of them must name it, and none may name another."""
    card = None
    for file in chain:
        model = file.tree.get("model") or {}
        name = model.get("name") if isinstance(model, dict) else None
        where = file.document.where(("model", "name"), value=True)
        if not isinstance(name, str):
            continue
        if card and canonical(name) != canonical(card.name):
            problems.append(Problem(where, f"the extended recipe is for `{card.name}`, not for `{name}`"))
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


def _stage_cards(layers: Iterable[Layer], problems: list[Problem]) -> dict[str, ModelCard] | None:
    """The model of each stage, in order; None for a recipe without stages."""
    named: dict[str, tuple[str, str]] = {}  # stage → its model's name, and its place in the file
    staged = False
    for layer in layers:
        stages = layer.tree.get("stages")
        staged |= stages is not None
        if stages is not None and not isinstance(stages, Mapping):
            message = "`stages` must contain stages, such as `stages: {prior: {model: …}}`"
            problems.append(layer.problem(("stages",), message, value=True))
        for stage, part in layer.section("stages").items():
            if not is_name(stage):  # the stage is a folder of the run
                hint = "use lower-case letters, digits, `-` and `_`"
                problems.append(
                    layer.problem(("stages", stage), f"`{stage}` is not a valid name for a stage", hint)
                )
                continue
            named.setdefault(stage, ("", layer.where(("stages", stage))))
            if layer.applies and (name := _named(part, stage, layer, problems)):
                named[stage] = name, layer.where(("stages", stage), value=True)
    if not staged:
        return None
    cards: dict[str, ModelCard] = {}
    for stage, (name, where) in named.items():
        try:
            card = catalog.card(name) if name else None
        except GzError as e:
            problems.append(Problem(where, e.message, e.hint))
            continue
        if card is None:
            problems.append(Problem(where, f"`stages.{stage}.model.name` is missing"))
            continue
        for needed in card.stages:
            if needed not in cards:
                problems.append(Problem(where, f"`{card.name}` needs a stage `{needed}` before it"))
        cards[stage] = card
    return cards


def _named(part: Any, stage: str, layer: Layer, problems: list[Problem]) -> str | None:
    """The name of the model that a layer gives a stage, either directly or as the model of a run."""
    if isinstance(part, str):
        try:
            return part_of(runs.find_stage(part, stage).tree()).model
        except GzError as e:
            problems.append(layer.problem(("stages", stage), e.message, e.hint, value=True))
            return None
    model = part.get("model") if isinstance(part, Mapping) else None
    name = model.get("name") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) else None


def _called_after(cards: Mapping[str, ModelCard]) -> ModelCard | None:
    """The model after which a run in stages is named: the last model with its own recipe, otherwise the first
    model."""
    shipped = {canonical(name) for name in recipe_names()}
    named = [card for card in cards.values() if card.name in shipped]
    return named[-1] if named else next(iter(cards.values()), None)


def _reused_runs(layers: Iterable[Layer]) -> dict[str, tuple[str, str]]:
    """The runs that replace stages, each with the origin of its name."""
    applied = ((layer, item) for layer in layers if layer.applies for item in layer.section("stages").items())
    return {s: (run, layer.origin(("stages", s))) for layer, (s, run) in applied if isinstance(run, str)}


# ---------------------------------------------------------------------------- values


def _fitting(layers: Iterable[Layer], rules: schema.Rules, cards: Mapping[str, ModelCard]) -> Iterator[Layer]:
    """The layers in the form that the final models of the stages accept. Runs that replace stages are
    removed, and so are keys of an earlier model that the final one lacks."""
    now: dict[str, str] = {}
    for layer in layers:
        stages = layer.section("stages")
        parts = {stage: part for stage, part in stages.items() if not isinstance(part, str)}
        for stage, part in parts.items():
            if not isinstance(part, Mapping) or stage not in cards:
                continue
            name = (part.get("model") or {}).get("name") or now.get(stage, cards[stage].name)
            if layer.applies:
                now[stage] = name
            if canonical(str(name)) != canonical(cards[stage].name):
                rules_of_stage = schema.below(schema.below(rules, "stages"), stage)
                parts[stage] = fitting = dict(part)
                for section in OF_MODEL:
                    if isinstance(values := part.get(section), Mapping):
                        names = schema.below(rules_of_stage, section)
                        fitting[section] = {key: v for key, v in values.items() if key in names}
        yield replace(layer, tree={**layer.tree, "stages": parts}) if "stages" in layer.tree else layer


def _checked(layer: Layer, rules: schema.Rules, problems: list[Problem]) -> Layer:
    """The layer with its values converted. Mistakes are removed and reported in `problems`."""
    tree, wrong = schema.check(_without_meeting(layer, problems), rules, layer.where)
    problems += wrong
    if layer.case and tree.get("data", {}).pop("name", None) is not None:
        message = "`data.name` is not allowed here: a section of `for` is named by its data set"
        problems.append(layer.problem(("data", "name"), message))
    return replace(layer, tree=tree)


def _without_meeting(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without the keys of `launch` that only the command line may set; adds a mistake for
    each of them. Someone else's recipe or run must not decide which program is started, as `launch.extra` of
    earlier versions could. Nor may it decide which machine is trusted, because processes that meet at an
    address accept everything sent from there."""
    launch = layer.section("launch")
    banned = ("extra",) if layer.source == "typed" else ("extra", *MEETING_KEYS)
    if not set(banned) & set(launch):
        return layer.tree
    for key in banned:
        if launch.get(key):
            message = f"`launch.{key}` is accepted on the command line only"
            problems.append(layer.problem(("launch", key), message, f"use {_TYPED[key]}"))
    return {**layer.tree, "launch": {key: value for key, value in launch.items() if key not in banned}}


def _composed(
    layers: Collection[Layer],
    rules: schema.Rules,
    cards: Mapping[str, ModelCard],
    reused: Mapping[str, tuple[str, str]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of defaults and layers, and the origin of each value by dotted key. `cards` are the models by
    stage ("" for a recipe without stages). `reused` are the runs that replace stages, with their origins."""
    tree: dict[str, Any] = schema.defaults({key: rules[key] for key in SHARED_KEYS})
    origin = dict.fromkeys(dotted(tree), "default")
    for layer in layers:
        _lay(
            tree,
            {key: layer.tree[key] for key in SHARED_KEYS if key in layer.tree},
            layer,
            origin,
            to=(),
            at=(),
        )
    tree.pop("params", None)
    parts: dict[str, Any] = {}
    for stage, card in cards.items():
        if stage in reused:
            parts[stage], origin[f"stages.{stage}"] = reused[stage]
            continue
        rules, at = schema.schema(card), ("stages", stage) if stage else ()
        part = schema.defaults({key: rules[key] for key in OF_STAGE if key != "data"})
        part["model"] = {"name": card.name, **part["model"]}
        if stage:
            part["data"] = {}
        origin |= dict.fromkeys(dotted(part, "".join(f"{key}." for key in at)), "default")
        for layer in layers:
            if changes_model(layer.tree):  # a different size of the images
                part["params"] = None
            shared = {key: layer.tree[key] for key in INHERITED if key in layer.tree}
            _lay(part, shared, layer, origin, to=at, at=())
            tree_of_part = layer.section("stages").get(stage) if stage else layer.tree
            values = {k: v for k, v in (tree_of_part or {}).items() if stage or k not in SHARED_KEYS}
            _lay(part, values, layer, origin, to=at, at=at)
        parts[stage] = part
    return {**tree, **(parts.get("") or {"stages": parts})}, origin


def _lay(
    tree: dict[str, Any], part: Mapping[str, Any], layer: Layer, origin: dict[str, str], *, to: Key, at: Key
) -> None:
    """Replaces values of the tree, at the recipe's key `to`, by those of a part, at the layer's key `at`, and
    records their origins. A part that may change the number of parameters sets `params` to null."""
    if changes_model(part):
        tree["params"] = None

    def put(tree: dict[str, Any], part: Mapping[str, Any], path: Key) -> None:
        for key, value in part.items():
            if isinstance(value, Mapping):
                put(tree.setdefault(key, {}), value, (*path, key))
            else:
                tree[key] = value
                origin[".".join((*to, *path, key))] = layer.origin((*at, *path, key))

    put(tree, part, ())


def dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values that are not maps."""
    return [key for key, value in leaves(tree, prefix) if not isinstance(value, Mapping)]


def changes_model(part: Mapping[str, Any]) -> bool:
    """Whether a layer may change how many parameters the model has."""
    return bool(set(part.get("model", {})) - {"name"} or {"size", "channels"} & set(part.get("data", {})))


def _chosen_by_gz(origin: Mapping[str, str], chain: Iterable[RecipeFile]) -> frozenset[str]:
    """The dotted keys whose values gz alone chose: defaults, and values of its own recipes."""
    shipped = {file.base.label.split()[-1] for file in chain if file.shipped}
    places = ((key, place.split()[-1]) for key, place in origin.items() if place)
    files = ((key, place.rpartition(":")[0] or place) for key, place in places)
    return frozenset(key for key, file in files if file in shipped or origin[key] == "default")


def _lower_batches(tree: dict[str, Any], origin: dict[str, str], n: int, ours: Collection[str]) -> None:
    """Reduces each batch size that gz chose and that exceeds the set's n images to the largest power of two
    up to n. Its micro-batches do not grow. A batch size that the user chose is unchanged and rejected
    later."""
    for prefix, part in _parts(tree):
        key = f"{prefix}train.batch_size"
        if key in ours and part["train"]["batch_size"] > n:
            train, fits = part["train"], 1 << (n.bit_length() - 1)
            train["accumulate"] = max(1, train["accumulate"] * fits // train["batch_size"])
            train["batch_size"] = fits
            origin[key] = f"{n} images"


def _without_clusters(tree: dict[str, Any], origin: dict[str, str], ours: Collection[str]) -> None:
    """Removes the clusters that gz chose for a conditional model, because images with several labels cannot
    have clusters within classes. Clusters that the user chose are unchanged and rejected later."""
    for prefix, part in _parts(tree):
        key, model = f"{prefix}model.clusters", part["model"]
        if key in ours and model["clusters"] and model.get("conditional"):
            model["clusters"], part["params"] = 0, None
            origin[key] = "images with several labels"


def _parts(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each trained part of a recipe, with the prefix of its dotted keys."""
    stages = {f"stages.{name}.": part for name, part in tree.get("stages", {}).items()} or {"": tree}
    yield from ((prefix, part) for prefix, part in stages.items() if isinstance(part, dict))


def large_limits(recipe: Resolved) -> list[str]:
    """A line for each of the user's gradient limits that is too large for a loss per dimension, with its
    value in the current unit. Recipes before format 3 had such limits."""
    lines = list[str]()
    facts, marked = recipe.choice.facts, recipe.origin.get("format", "default") != "default"
    if facts is None or marked:
        return lines
    for part in recipe.parts:
        summed = part.format >= PER_DIMENSION and catalog.card(part.model).sums and not part.data.latent
        for name in ("clip", "skip") if summed else ():
            limit, key = getattr(part.train, name), f"{part.in_recipe}train.{name}"
            if limit is not None and limit > LARGE_LIMIT and key not in recipe.ours:
                each, where = f"{key}: {limit / math.prod(facts.shape):.3g}", recipe.origin[key]
                lines.append(
                    f"note: `{key}` {limit:g} ({where}) is for a loss per dimension; for a loss per image, "
                    f"write `{each}`, or add `format: 2`"
                )
    return lines


def changes_loss(layer: Layer) -> bool:
    """Whether a layer has keys that affect the loss: keys of models and images except the name of the set,
    and runs that replace stages. The length, speed and batches of the training do not matter."""
    stages = layer.section("stages").values()
    keys = {*layer.section("model"), *layer.section("data")} - {"name"}
    return bool(keys) or any(isinstance(p, str) or p.get("model") or p.get("data") for p in stages)
