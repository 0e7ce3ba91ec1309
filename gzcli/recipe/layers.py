"""A part of a recipe with the places of its keys, and how parts are laid one over the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.recipe.load import Key, Problem
from gzcli.recipe.parts import MEETING

_TYPED = {
    "extra": "options of `accelerate launch` after `--`",
    "machines": "`--num-machines N`",
    "machine_rank": "`--machine-rank R`",
    "main_ip": "`--main-process-ip HOST`",
    "main_port": "`--main-process-port P`",
}


@dataclass
class Layer:
    """A part of a recipe: of a file, of its section for a data set (`inside`), or of the command line.

    `where(path, value)` is the place of a key or its value for messages, `origin(path)` that which is shown;
    a layer that does not apply is for another data set. `source`: "shipped" (a recipe of gz's own), "file" or
    "typed".
    """

    tree: dict[str, Any]
    where: Callable[[Key, bool], str]
    origin: Callable[[Key], str]
    inside: bool = False
    applies: bool = True
    source: str = "typed"


def lay(
    tree: dict[str, Any],
    part: Mapping[str, Any],
    origin: dict[str, str],
    of: Callable[[Key], str],
    at: Key = (),
) -> None:
    """Lays a part over the tree, key by key, noting the origins. What may change the model takes its
    parameter count away."""
    if not at and changes_model(part):
        tree["params"] = None
    _lay(tree, part, origin, of, at)


def without_meeting(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without what only the command line may say, as it decides what is started and whom it
    trusts.

    A recipe or a run from elsewhere must start nothing: `launch.extra`, once a key, could name another
    program, and processes that meet at an address take whatever is sent from there. Adds what is given
    nevertheless to `problems`.
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
    """The keys of all leaves."""
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
