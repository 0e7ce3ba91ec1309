"""What one model is trained by, as typed values: what is resolved from YAML, and what a run's `run.yaml` is
read back as. A recipe without stages has one part, one in stages a part for each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gzcli.core.sections import (
    RENAMED,
    SECTIONS,
    BenchSection,
    DataSection,
    LaunchSection,
    OodSection,
    OptimSection,
    TrainSection,
    keys_of,
    plain,
    ranged,
    tuples,
    without_fixed,
)


@dataclass(frozen=True)
class Part:
    """What one model is trained by, and then sampled and scored by.

    model: name of the model.
    options: hyperparameters of the model, flat, as `Model.of` takes them.
    stage: name of the stage; "" of a recipe without stages.
    about: the recipe in one line.
    scale: the size that the recipe was chosen in, one of `SCALES`; null: the recipe has no scales.
    seed: seed of the first weights, of the order of the images and of all noise.
    data: which images.
    train: how long, and in which batches.
    optim: the optimizer.
    sample: options of the model's `sample`.
    ood: how images are scored.
    bench: what is measured.
    launch: which processes.
    params: number of parameters of the model, as `44M`; null: not stated.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
    about: str = ""
    scale: Literal["tiny", "small", "full", "paper"] | None = None
    seed: int = ranged(0, "0 … 9,007,199,254,740,991")
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    sample: Mapping[str, Any] = field(default_factory=dict)
    ood: OodSection = field(default_factory=OodSection)
    bench: BenchSection = field(default_factory=BenchSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    params: int | str | None = ranged(None, "1 or more")

    @property
    def in_recipe(self) -> str:
        """What its keys begin with in a recipe: `stages.prior.`, or nothing."""
        return f"stages.{self.stage}." if self.stage else ""

    def tree(self) -> dict[str, Any]:
        """The part as YAML and JSON have it; `part_of` reads it back."""
        optim, ood = plain(self.optim), plain(self.ood)
        phases, options = optim.pop("phases"), ood.pop("options")
        return {
            "about": self.about,
            "scale": self.scale,
            "seed": self.seed,
            "model": {"name": self.model, **self.options},
            "data": plain(self.data),
            "train": plain(self.train),
            "optim": {**optim, **phases},
            "sample": dict(self.sample),
            "ood": {**ood, **options},
            "bench": plain(self.bench),
            "launch": plain(self.launch),
            "params": self.params,
        }


def part_of(tree: Mapping[str, Any], stage: str = "") -> Part:
    """The part that the tree of a run or of a stage describes; a key that is not there has its default.

    Raises UsageError for a value of an option that is a constant now.
    """
    model = without_fixed(tree["model"])
    values, more = {}, {}
    for name, section in SECTIONS.items():
        values[name], more[name] = _split(section, tree.get(name) or {})
    values["optim"]["phases"], values["ood"]["options"] = more["optim"], more["ood"]
    return Part(
        model=model.pop("name"),
        options=model,
        stage=stage,
        about=tree.get("about", ""),
        scale=tree.get("scale"),
        seed=tree.get("seed", 0),
        sample=_renamed("sample", tree.get("sample") or {}),
        params=tree.get("params"),
        **{name: section(**values[name]) for name, section in SECTIONS.items()},
    )


def _renamed(section: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The section with new names of keys in place of old ones. A key stays where the new one is there too:
    then the model has both."""
    names = {old: new for old, new in RENAMED[section].items() if new not in tree}
    return {names.get(key, key): value for key, value in tree.items()}


def _split(section: type, tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys that the section declares, lists as tuples, and all others."""
    keys = {f.name for f in keys_of(section)}
    return tuples({k: tree[k] for k in tree if k in keys}), {k: tree[k] for k in tree if k not in keys}
