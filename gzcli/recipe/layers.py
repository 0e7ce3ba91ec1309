"""The layers of a recipe, and how one is laid over another: later values replace earlier ones, key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.core.sections import MEETING
from gzcli.recipe.files import RecipeFile
from gzcli.recipe.load import Key, Problem
from gzcli.recipe.override import Override

_TYPED = {
    "extra": "options of `accelerate launch` after `--`",
    "machines": "`--num-machines N`",
    "machine_rank": "`--machine-rank R`",
    "main_ip": "`--main-process-ip HOST`",
    "main_port": "`--main-process-port P`",
}


@dataclass
class Layer:
    """Values of a recipe from one place: a file, a file's section for a data set, or the command line.

    tree: the values.
    where: the place of a key or, if the second argument is true, of its value; for messages.
    origin: the place of a key as it is shown beside its value.
    inside: whether it is a section for a data set.
    applies: whether it is for the data set that was asked for; else it is only checked.
    source: "shipped" (a recipe of gz's own), "file" or "typed".
    """

    tree: dict[str, Any]
    where: Callable[[Key, bool], str]
    origin: Callable[[Key], str]
    inside: bool = False
    applies: bool = True
    source: str = "typed"


def layer_of(file: RecipeFile, section: Key = (), *, applies: bool = True) -> Layer:
    """A file's own values, or those of a section of `for`."""
    at: Key = ("for", *section) if section else ()
    tree = (file.sections[section] or {}) if section else file.own
    prefix = f"{'.'.join(at)} " if section else ""

    def where(path: Key, value: bool) -> str:
        return file.document.where((*at, *path), value=value)

    def origin(path: Key) -> str:
        return f"{prefix}{file.label}:{file.document.mark((*at, *path)).line}"

    source = "shipped" if file.shipped else "file"
    return Layer(tree, where, origin, inside=bool(section), applies=applies, source=source)


def layer_given(override: Override) -> Layer:
    """What was typed."""
    return Layer(override.tree, lambda path, value: override.where, lambda path: override.origin)


def lay(
    tree: dict[str, Any],
    part: Mapping[str, Any],
    origin: dict[str, str],
    of: Callable[[Key], str],
    at: Key = (),
) -> None:
    """Replaces values of the tree by those of a layer. A layer that may change the number of parameters sets
    `params` to null.

    tree: is changed.
    part: the values of the layer.
    origin: gets the origin of each value, by dotted key.
    of: the origin of a key.
    at: the keys that lead to the tree.
    """
    if not at and changes_model(part):
        tree["params"] = None
    _lay(tree, part, origin, of, at)


def without_meeting(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without the keys of `launch` that only the command line may give.

    A recipe or run of a stranger must not decide which program is started: `launch.extra`, a key of earlier
    versions, could name one. Nor must it decide which machine is trusted: processes that meet at an address
    accept whatever is sent from there.

    layer: of a file or of the command line.
    problems: gets a mistake for each such key that is given.
    """
    launch = layer.tree.get("launch")
    banned = ("extra",) if layer.source == "typed" else ("extra", *MEETING)
    if not isinstance(launch, Mapping) or not set(banned) & set(launch):
        return layer.tree
    for key in banned:
        if launch.get(key):
            message = f"`launch.{key}` is for the command line alone, where it is yours"
            problems.append(Problem(layer.where(("launch", key), False), message, f"type {_TYPED[key]}"))
    return {**layer.tree, "launch": {key: value for key, value in launch.items() if key not in banned}}


def dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values that are not maps."""
    keys = []
    for key, value in tree.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


def changes_model(part: Mapping[str, Any]) -> bool:
    """Whether a layer may change how many parameters the model has."""
    return bool(set(part.get("model", {})) - {"name"} or {"size", "channels"} & set(part.get("data", {})))


def _lay(
    tree: dict[str, Any], part: Mapping[str, Any], origin: dict[str, str], of: Callable[[Key], str], at: Key
) -> None:
    for key, value in part.items():
        here = (*at, key)
        if isinstance(value, Mapping):
            _lay(tree.setdefault(key, {}), value, origin, of, here)
        else:
            tree[key] = value
            origin[".".join(here)] = of(here)
