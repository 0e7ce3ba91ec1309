"""How many steps and which image size a recipe plans, whatever was typed, and whose its loss is.

By these a run that was cut short (`--steps 10`, `--minutes 1`) is told from a complete one, and one that can
be compared with the reference from one of another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gzcli.core.units import Size
from gzcli.recipe.layers import Layer
from gzcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Whole:
    """A complete run of a recipe, as its files plan it.

    steps: of each stage, "" of a recipe without stages; None where the recipe gives a time.
    size: of the images in the recipe that gz ships; None where it leaves it to the set.
    loss: who changed what the loss depends on, beside the recipe that gz ships: "file", "typed".
    """

    steps: Mapping[str, int | None] = field(default_factory=dict)
    size: Size | None = None
    loss: frozenset[str] = frozenset()


def whole(layers: Iterable[Layer], compose: Callable[[list[Layer]], Recipe]) -> Whole:
    """The complete run that the files among the layers plan.

    A size that the user's own file gives does not count: a run of the set's own size is preferred to it.

    layers: those that apply.
    compose: makes a recipe of layers.
    """
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
