"""A recipe as it will run: every key of every section, and where each value comes from.

Order, the later wins: defaults of the signatures and sections < the recipe < its `for.<data>` < the user's own recipe
that `extends` it < its own `for.<data>` < flags < `--set`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.errors import UsageError, canonical
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe import schema
from gzcli.recipe.files import RecipeFile, read_chain, recipes, show
from gzcli.recipe.load import Key, Problem, in_order, refuse
from gzcli.recipe.load import load as read
from gzcli.recipe.override import Override, flags_of, parse_set
from gzcli.recipe.write import dump

if TYPE_CHECKING:
    from gzcli.data.specs import DataSpec

__all__ = ["Recipe", "check", "check_data", "dump", "read", "recipes", "resolve", "show"]


@dataclass
class Recipe:
    """A resolved recipe. `tree` has every key of every section; `origin` says where the value of a dotted key is from:

    "default" | "recipes/glow.yaml:9" | "for.mnist recipes/glow.yaml:14" | "my.yaml:3" | "--steps" | "--set"
    """

    tree: dict[str, Any]
    origin: dict[str, str]
    card: ModelCard
    source: Path


def resolve(
    what: str,
    *,
    data: str | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a model by its name, or of a .yaml file, for a data set.

    `data` is a name, compared with `for` as all names are, or a path. `flags` are typed values by dotted key.
    Raises UsageError that lists everything that is wrong, each with its place.
    """
    recipe, problems = _resolve(what, data, sets, flags or {})
    refuse(problems)
    assert recipe is not None
    return recipe


def check(path: str | Path) -> list[str]:
    """Everything that is wrong with a recipe, for its own data set and for each that it names under `for`."""
    try:
        chain, problems = read_chain(str(path))
    except UsageError as e:
        return [e.message]
    sets = dict.fromkeys(name for file in chain for name in file.sections)
    problems += [p for name in (None, *sets) for p in _resolve(str(path), name, (), {})[1]]
    for name in sets:
        if problem := _misspelt_set(name):
            file = next(file for file in chain if name in file.sections)
            problems.append(Problem(file.document.where(("for", name)), *problem))
    return [str(problem) for problem in in_order(problems)]


def check_data(tree: Mapping[str, Any], card: ModelCard, classes: tuple[str, ...], name: str) -> None:
    """Raises UsageError where the model needs labels and the set has none (`classes` is ()), naming sets that have."""
    from gzcli.data.sets import SPECS

    conditional = tree["model"].get("conditional") is True
    if classes or not (conditional or "labels" in card.needs):
        return
    labelled = [spec.name for spec in SPECS.values() if spec.classes]
    hint = f"sets with labels: {', '.join(labelled)}"
    if conditional and "labels" not in card.needs:
        hint += "; or `--set model.conditional=false`"
    raise UsageError(f"`{card.name}` needs labels, and `{name}` has none", hint=hint)


# ---------------------------------------------------------------------------- layers


@dataclass
class _Layer:
    """A part of a recipe with the places of its keys, for messages and as they are shown."""

    tree: dict[str, Any]
    where: Callable[[Key, bool], str]
    origin: Callable[[Key], str]


def _layer(file: RecipeFile, name: str | None = None) -> _Layer:
    """A file's own values, or those for one data set."""
    at: Key = () if name is None else ("for", name)
    tree = file.own if name is None else (file.sections[name] or {})
    prefix = "" if name is None else f"for.{name} "

    def where(path: Key, value: bool) -> str:
        return file.document.where((*at, *path), value=value)

    def origin(path: Key) -> str:
        return f"{prefix}{file.label}:{file.document.mark((*at, *path)).line}"

    return _Layer(tree, where, origin)


def _given(override: Override) -> _Layer:
    return _Layer(override.tree, lambda path, value: override.where, lambda path: override.origin)


def _resolve(what: str, data: str | None, sets: Iterable[str], flags: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    chain, problems = read_chain(what)
    card = _card(chain, problems)
    rules = schema.schema(card)

    typed = [_given(override) for override in flags_of({"data.name": data, **flags})]
    for text in sets:
        override, wrong = parse_set(text)
        problems += wrong
        if override:
            typed.append(_given(override))

    layers: list[_Layer] = []
    name = _data_name([*(file.own for file in chain), *(layer.tree for layer in typed)])
    for file in chain:
        layers.append(_checked(_layer(file), rules, problems))
        for section in file.sections:
            layer = _checked(_layer(file, section), rules, problems, inside=True)
            if canonical(section) == canonical(name):
                layers.append(layer)
    layers += [_checked(layer, rules, problems) for layer in typed]

    if card is None:
        return None, problems
    tree = schema.defaults(rules)
    tree["model"] = {"name": card.name, **tree["model"]}
    origin = dict.fromkeys(_dotted(tree), "default")
    for layer in layers:
        if _changes_model(layer.tree):
            tree["params"] = None  # the count was of the layers before
        _lay(tree, layer.tree, origin, layer.origin)
    if canonical(tree["model"]["name"]) != canonical(card.name):
        other = tree["model"]["name"]
        problems.append(Problem(f"`{origin['model.name']}`", f"this is a recipe of `{card.name}`", f"gz train {other}"))
    tree["model"]["name"], tree["data"]["name"] = card.name, _spelling(name)
    if not problems:
        problems += [Problem(chain[-1].label, f"`{key}` must be given") for key in schema.missing(tree, rules)]
    if spec := _spec(name):
        try:
            check_data(tree, card, spec.classes, spec.name)
        except UsageError as e:
            problems.append(Problem("", e.message, e.hint))
    return Recipe(tree, origin, card, chain[-1].path), problems


def _card(chain: list[RecipeFile], problems: list[Problem]) -> ModelCard | None:
    """The model that the files are for: all of the same, named by one at least."""
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
    """The data set, which decides on the `for` sections: the last one named."""
    name = schema.DATA["name"].default
    for tree in trees:
        section = tree.get("data")
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            name = section["name"]
    return name


def _checked(layer: _Layer, rules: schema.Rules, problems: list[Problem], *, inside: bool = False) -> _Layer:
    """The layer with its values converted and what is wrong with it left out and told; `inside` a `for` section."""
    if not isinstance(layer.tree, Mapping):
        problems.append(Problem(layer.where((), True), "a section of `for` must hold what changes, as `{train: {…}}`"))
        return replace(layer, tree={})
    tree, wrong = schema.check(layer.tree, rules, layer.where)
    problems += wrong
    if inside and tree.get("data", {}).pop("name", None) is not None:
        message = "`data.name` has no place here: a section of `for` is named by its data set"
        problems.append(Problem(layer.where(("data", "name"), False), message))
    return replace(layer, tree=tree)


def _lay(tree: dict[str, Any], part: Mapping[str, Any], origin: dict[str, str], of: Callable[[Key], str], at: Key = ()):
    """Lays a part over the tree, key by key, noting the origins."""
    for key, value in part.items():
        here = (*at, key)
        if isinstance(value, Mapping):
            _lay(tree.setdefault(key, {}), value, origin, of, here)
        else:
            tree[key] = value
            origin[".".join(here)] = of(here)


def _changes_model(part: Mapping[str, Any]) -> bool:
    """Whether a layer may change how many parameters the model has."""
    return bool(set(part.get("model", {})) - {"name"} or {"size", "channels"} & set(part.get("data", {})))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


# ---------------------------------------------------------------------------- data sets


def _spec(name: str) -> DataSpec | None:
    from gzcli.data.specs import find

    try:
        return find(name)
    except UsageError:
        return None  # a path, or a name of the user's own


def _spelling(name: str) -> str:
    """A known name as it is spelt, anything else as given."""
    spec = _spec(name)
    return spec.name if spec else name


def _misspelt_set(name: str) -> tuple[str, str] | None:
    """A name that is all but that of a data set: its section would never apply. Names of sets yet to come may stand."""
    import difflib

    from gzcli.data.library import names

    known = {canonical(known): known for known in names()}
    near = [] if canonical(name) in known else difflib.get_close_matches(canonical(name), known, n=1, cutoff=0.75)
    return (f"there is no data set `{name}`", f"did you mean `{known[near[0]]}`?") if near else None
