"""A part of a recipe with the places of its keys, and how parts are laid one over the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.recipe.load import Key, Problem


@dataclass
class Layer:
    """A part of a recipe: of a file, of its section for a data set (`inside`), or of the command line.

    `where(path, value)` is the place of a key or its value for messages, `origin(path)` that which is shown; a layer
    that does not apply is for another data set. `source` is "shipped" (a recipe of gz's own), "file" or "typed".
    """

    tree: dict[str, Any]
    where: Callable[[Key, bool], str]
    origin: Callable[[Key], str]
    inside: bool = False
    applies: bool = True
    source: str = "typed"


def lay(tree: dict[str, Any], part: Mapping[str, Any], origin: dict[str, str], of: Callable[[Key], str], at: Key = ()) -> None:
    """Lays a part over the tree, key by key, noting the origins. What may change the model takes its parameter count away."""
    if not at and changes_model(part):
        tree["params"] = None
    _lay(tree, part, origin, of, at)


def without_extra(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without `launch.extra`, which was a key once. Arguments of `accelerate launch` decide what is
    started: whoever starts it types them, and no recipe or run from elsewhere can. A filled one is a problem."""
    launch = layer.tree.get("launch")
    if not isinstance(launch, Mapping) or "extra" not in launch:
        return layer.tree
    if launch["extra"]:
        message = "`launch.extra` is no key of a recipe"
        hint = "type arguments for `accelerate launch` after `--` on the command line"
        problems.append(Problem(layer.where(("launch", "extra"), False), message, hint))
    return {**layer.tree, "launch": {key: value for key, value in launch.items() if key != "extra"}}


def dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of all leaves."""
    keys = []
    for key, value in tree.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


def changes_model(part: Mapping[str, Any]) -> bool:
    """Whether a layer may change how many parameters the model has."""
    return bool(set(part.get("model", {})) - {"name"} or {"size", "channels"} & set(part.get("data", {})))


def _lay(tree: dict[str, Any], part: Mapping[str, Any], origin: dict[str, str], of: Callable[[Key], str], at: Key) -> None:
    for key, value in part.items():
        here = (*at, key)
        if isinstance(value, Mapping):
            _lay(tree.setdefault(key, {}), value, origin, of, here)
        else:
            tree[key] = value
            origin[".".join(here)] = of(here)
