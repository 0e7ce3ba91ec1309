"""What a recipe calls done: it tells a run that was cut short (`--steps 10`, `--minutes 1`) from a whole
one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gzcli.recipe import stages
from gzcli.recipe.layers import Layer


@dataclass(frozen=True)
class Whole:
    """`steps` of each stage ("" of a recipe without), None where the recipe gives a time; `size`, the side of
    the images in the recipe that gz ships, None where it leaves it to the set."""

    steps: Mapping[str, int | None] = field(default_factory=dict)
    size: int | None = None


def whole(layers: Iterable[Layer], compose: Callable[[list[Layer]], dict[str, Any]]) -> Whole:
    """What the files among the layers that apply call done, whatever was typed; `compose` makes a tree of
    layers.

    A size that the user's own file gives is another than the set's: such runs stand back behind those at its
    own.
    """
    written = [layer for layer in layers if layer.source != "typed"]
    tree = compose(written)
    parts = stages.trees(tree) if "stages" in tree else {"": tree}
    trains = {name: part["train"] for name, part in parts.items()}
    steps = {name: None if train["minutes"] else train["steps"] for name, train in trains.items()}
    shipped = [layer.tree.get("data", {}) for layer in written if layer.source == "shipped"]
    sizes = [data["size"] for data in shipped if data.get("size")]
    return Whole(steps, sizes[-1] if sizes else None)
