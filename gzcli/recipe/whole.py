"""What a recipe calls done: it tells a run that was cut short (`--steps 10`, `--minutes 1`) from a whole
one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gzcli.recipe.layers import Layer
from gzcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Whole:
    """How much the files of a recipe ask for, whatever was typed.

    steps: of each stage, "" of a recipe without stages; None where the recipe gives a time.
    size: side of the images in pixels in the recipe that gz ships; None where it leaves it to the set.
    """

    steps: Mapping[str, int | None] = field(default_factory=dict)
    size: int | None = None


def whole(layers: Iterable[Layer], compose: Callable[[list[Layer]], Recipe]) -> Whole:
    """What the files among the layers call done.

    A size that the user's own file gives does not count: runs of that size stand back behind those of the
    size that the set has.

    layers: those that apply.
    compose: makes a recipe of layers.
    """
    written = [layer for layer in layers if layer.source != "typed"]
    steps = {p.stage: None if p.train.minutes else p.train.steps for p in compose(written).parts}
    shipped = [layer.tree.get("data", {}) for layer in written if layer.source == "shipped"]
    sizes = [data["size"] for data in shipped if data.get("size")]
    return Whole(steps, sizes[-1] if sizes else None)
