"""A recipe: what is trained, model by model, and what the models share. `run.yaml` holds it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gzcli.core.parts import Part, part_of
from gzcli.core.sections import BenchSection, DataSection, LaunchSection, lists, plain, tuples

if TYPE_CHECKING:
    from typing_extensions import Self

SHARED = ("about", "scale", "seed", "data", "bench", "launch")  # keys that all parts share
OF_STAGE = ("model", "data", "train", "optim", "sample", "ood", "params")  # keys of a stage


@dataclass(frozen=True)
class Recipe:
    """A recipe with a value for every key.

    parts: one for each model that is trained, in order of training.
    about: what the recipe is for, in one line.
    scale: of all parts; None: the recipe has no scales.
    seed: seed of all parts.
    data: data of all parts; a stage replaces the keys of its `own_data`.
    bench: what is measured of all parts.
    launch: processes of all parts.
    stages: names of all stages in order, trained or not; () of a recipe without stages.
    reused: the run that is used in the place of a stage, by the stage's name.
    own_data: keys of `data` that a stage has for itself, by the stage's name.
    """

    parts: tuple[Part, ...]
    about: str
    scale: str | None
    seed: int
    data: DataSection
    bench: BenchSection
    launch: LaunchSection
    stages: tuple[str, ...] = ()
    reused: Mapping[str, str] = field(default_factory=dict)
    own_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def on(self, data: DataSection) -> Self:
        """The recipe for other data; a stage keeps its `own_data`."""
        own = self.own_data
        parts = [replace(part, data=replace(data, **own.get(part.stage, {}))) for part in self.parts]
        return replace(self, data=data, parts=tuple(parts))

    def launched(self, launch: LaunchSection) -> Self:
        """The recipe with other processes."""
        parts = [replace(part, launch=launch) for part in self.parts]
        return replace(self, launch=launch, parts=tuple(parts))

    def lengthened(self, steps: int, stages: Collection[str]) -> Self:
        """The recipe with another number of steps for these stages, "" of a recipe without stages."""

        def longer(part: Part) -> Part:
            return replace(part, train=replace(part.train, steps=steps, minutes=None))

        parts = (longer(part) if part.stage in stages else part for part in self.parts)
        return replace(self, parts=tuple(parts))

    def value(self, key: str) -> Any:
        """The value of a dotted key, such as `stages.prior.train.steps`; {} of one that is not there."""
        value: Any = self.tree()
        for name in key.split("."):
            value = value[name] if isinstance(value, dict) and name in value else {}
        return value

    def tree(self) -> dict[str, Any]:
        """The recipe as YAML and JSON have it; `recipe_of` reads it back."""
        if not self.stages:
            return self.parts[0].tree()
        stages: dict[str, Any] = dict(self.reused)
        for part in self.parts:
            tree = part.tree() | {"data": lists(self.own_data.get(part.stage, {}))}
            stages[part.stage] = {key: tree[key] for key in OF_STAGE}
        return {
            "about": self.about,
            "scale": self.scale,
            "seed": self.seed,
            "data": plain(self.data),
            "stages": {name: stages[name] for name in self.stages},
            "bench": plain(self.bench),
            "launch": plain(self.launch),
        }


def recipe_of(tree: Mapping[str, Any]) -> Recipe:
    """The recipe of a resolved tree, or of what a `run.yaml` holds."""
    if "stages" not in tree:
        part = part_of(tree)
        return Recipe((part,), **_shared(part))
    top = {key: tree[key] for key in SHARED if key in tree}
    trained = {name: part for name, part in tree["stages"].items() if isinstance(part, Mapping)}
    own_data = {name: tuples(part.get("data") or {}) for name, part in trained.items()}
    parts = [
        part_of({**top, **part, "data": {**top.get("data", {}), **own_data[name]}}, name)
        for name, part in trained.items()
    ]
    return Recipe(
        tuple(parts),
        stages=tuple(tree["stages"]),
        reused={name: part for name, part in tree["stages"].items() if name not in trained},
        own_data=own_data,
        **_shared(part_of({**top, "model": {"name": ""}})),
    )


def _shared(part: Part) -> dict[str, Any]:
    return {key: getattr(part, key) for key in SHARED}
