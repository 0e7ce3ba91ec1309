"""How many steps and which image size a recipe plans, whatever was typed.

By these a run that was cut short (`--steps 10`, `--minutes 1`) is told from a complete one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gzcli.recipe.layers import Layer
from gzcli.recipe.recipe import Recipe
from gzcli.sizes import Size


@dataclass(frozen=True)
class Whole:
    """A complete run of a recipe, as its files plan it.

    steps: of each stage, "" of a recipe without stages; None where the recipe gives a time.
    size: of the images in the recipe that gz ships; None where it leaves it to the set.
    """

    steps: Mapping[str, int | None] = field(default_factory=dict)
    size: Size | None = None


def whole(layers: Iterable[Layer], compose: Callable[[list[Layer]], Recipe]) -> Whole:
    """The complete run that the files among the layers plan.

    A size that the user's own file gives does not count: a run of the set's own size is preferred to it.

    layers: those that apply.
    compose: makes a recipe of layers.
    """
    written = [layer for layer in layers if layer.source != "typed"]
    steps = {p.stage: None if p.train.minutes else p.train.steps for p in compose(written).parts}
    shipped = [layer.tree.get("data", {}) for layer in written if layer.source == "shipped"]
    sizes = [data["size"] for data in shipped if data.get("size")]
    return Whole(steps, sizes[-1] if sizes else None)
