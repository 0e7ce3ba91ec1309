"""A recipe: the models to train, and what they share. It is stored in `run.yaml`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, gz, setting
from gzcli.core.sections import (
    BenchSection,
    DataSection,
    LaunchSection,
    Part,
    leaves,
    lists,
    part_of,
    plain_values,
    tuples,
)
from gzcli.data.packs.augment import AUGMENTS, parse_augment
from gzcli.data.sets.registry import EXTRAS, SPECS, DataSet, DataSpec, extras_in_words
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe.suggest import suggest
from gzcli.recipe.yaml import dump
from gzcli.store import files
from gzcli.store.paths import spelling
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from typing_extensions import Self

    from gzcli.data.packs.facts import Facts
    from gzcli.data.packs.pack import PackMeta

R = TypeVar("R", bound="Recipe")

# Files that distinguish a folder of a run, or of a diffusers model, from one that only has the same name.
FOLDER_MARKS = ("status.json", "config.json", "model_index.json")
# section and key of values that are a file or a run
REFERENCES = (("model", "base"), ("data", "latent"), ("train", "init"), ("ood", "background"))
SHARED_KEYS = ("about", "scale", "seed", "format", "data", "bench", "launch")  # keys that all parts share
OF_STAGE = ("model", "data", "train", "optim", "sample", "ood", "params")  # keys of a stage


@dataclass(frozen=True)
class Recipe:
    """A recipe with a value for every key.

    parts: one part for each model to train, in order of training.
    stages: names of all stages in order, including reused ones; () for a recipe without stages.
    reused: runs that replace stages, by the name of the stage.
    own_data: keys of `data` that a stage sets itself, by the name of the stage.
    """

    parts: tuple[Part, ...]
    about: str
    scale: str | None
    seed: int
    format: int
    data: DataSection
    bench: BenchSection
    launch: LaunchSection
    stages: tuple[str, ...] = ()
    reused: Mapping[str, str] = field(default_factory=dict)
    own_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def on(self, data: DataSection) -> Self:
        """The recipe for other data; a stage keeps its `own_data`."""
        parts = [replace(p, data=replace(data, **self.own_data.get(p.stage, {}))) for p in self.parts]
        return replace(self, data=data, parts=tuple(parts))

    def launched(self, launch: LaunchSection) -> Self:
        """The recipe with other processes."""
        parts = [replace(part, launch=launch) for part in self.parts]
        return replace(self, launch=launch, parts=tuple(parts))

    def lengthened(self, lengths: Mapping[str, int]) -> Self:
        """The recipe with other numbers of steps, by stage; for "" in a recipe without stages."""
        parts = list(self.parts)
        for i, part in enumerate(parts):
            if part.stage in lengths:
                train = replace(part.train, steps=lengths[part.stage], minutes=None)
                parts[i] = replace(part, train=train)
        return replace(self, parts=tuple(parts))

    def value(self, key: str) -> Any:
        """The value of a dotted key, such as `stages.prior.train.steps`; {} if it is missing."""
        value: Any = self.tree()
        for name in key.split("."):
            value = value[name] if isinstance(value, dict) and name in value else {}
        return value

    def tree(self) -> dict[str, Any]:
        """The recipe as a tree for YAML and JSON; `recipe_of` reads it back."""
        if not self.stages:
            return self.parts[0].tree()
        stages: dict[str, Any] = dict(self.reused)
        for part in self.parts:
            tree = part.tree() | {"data": lists(self.own_data.get(part.stage, {}))}
            stages[part.stage] = {key: tree[key] for key in OF_STAGE}
        first = {key: getattr(self, key) for key in ("about", "scale", "seed", "format")}
        first["data"] = plain_values(self.data)
        last = {"bench": plain_values(self.bench), "launch": plain_values(self.launch)}
        return {**first, "stages": {name: stages[name] for name in self.stages}, **last}


def recipe_of(tree: Mapping[str, Any]) -> Recipe:
    """The recipe from a resolved tree, such as the content of `run.yaml`."""
    if "stages" not in tree:
        part = part_of(tree)
        return Recipe((part,), **_shared(part))
    top = {key: tree[key] for key in SHARED_KEYS if key in tree}
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


def write_recipe(run: Run, tree: Mapping[str, Any]) -> None:
    """Writes the resolved recipe of a run or of a stage, with the number of its keys in the first line."""
    files.write_atomic(run.recipe_file, f"# {len(leaves(tree))} keys\n{dump(tree)}")


def write_chosen(run: Run, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes keys of sections that gz chose into `run.yaml`; for a stage, also into that of the run."""

    def changed(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {**tree, **{name: {**tree[name], **keys} for name, keys in changes.items()}}

    write_recipe(run, changed(run.tree()))
    if run.owner is not run:
        whole = run.owner.tree()
        whole["stages"][run.path.name] = changed(whole["stages"][run.path.name])
        write_recipe(run.owner, whole)


def _shared(part: Part) -> dict[str, Any]:
    return {key: getattr(part, key) for key in SHARED_KEYS}


# --- paths ---


def anchored(recipe: R, dataset: DataSet | None) -> R:
    """The recipe with absolute paths, because `run.yaml` is also read from other folders. Names are
    unchanged."""
    tree = recipe.tree()
    stages = tree.get("stages", {})
    stages |= {stage: _absolute(run) for stage, run in recipe.reused.items()}
    for part in (tree, *(part for part in stages.values() if isinstance(part, dict))):
        for section, key in REFERENCES:
            name = part.get(section, {}).get(key)
            if name and isinstance(name, str):
                part[section][key] = _absolute(name)
    if dataset:
        tree["data"]["name"] = dataset.reference
    return replace(recipe, **vars(recipe_of(tree)))


def _absolute(name: str) -> str:
    """The absolute path of a file, a run or a model of diffusers; any other text unchanged."""
    path = Path(name).expanduser()
    is_path = path.is_file() or any((path / mark).is_file() for mark in FOLDER_MARKS)
    return str(path.absolute()) if is_path else name


# --- what the parts need ---


def check_batch_of(part: Part, data: PackMeta) -> None:
    """Raises UsageError if a batch has more images than the training set."""
    n = min(data.counts["train"], part.data.n or data.counts["train"])
    if part.train.batch_size > n:
        fits = 1 << (n.bit_length() - 1)
        raise UsageError(
            f"`train.batch_size` is {part.train.batch_size}, but `{data.name}` has {n} training images",
            hint=advice("use {}", setting("train.batch_size", fits)),
        )


def check_strategy(part: Part, card: ModelCard) -> None:
    """Raises UsageError if the model's weights cannot be sharded by `launch.strategy`."""
    if part.launch.strategy != "fsdp":
        return
    if not card.shares:
        able = ", ".join(f"`{model.name}`" for model in catalog.cards().values() if model.shares)
        message = f"`launch.strategy: fsdp` cannot shard the weights of `{card.name}`"
        raise UsageError(message, hint=f"use it with {able}; `ddp` works with every model")
    for key, value, refused, why, instead in (
        ("optim.name", part.optim.name, "muon", "needs whole matrices", "adamw"),
        ("optim.name", part.optim.name, "adamw8bit", "keeps blocks of whole tensors", "adamw"),
        ("train.precision", part.train.precision, "fp16", "needs one loss scale for all processes", "bf16"),
        ("train.compile", part.train.compile, True, "compiles whole weights", "auto"),
    ):
        if value == refused:
            what = f"`{key}: {str(value).lower()}` {why}"
            hint = advice("use {}", setting(key, instead))
            raise UsageError(f"{what}, which `launch.strategy: fsdp` does not support", hint=hint)


def check_values(part: Part, card: ModelCard, data: DataSpec | PackMeta | Facts) -> None:
    """Raises UsageError if the model does not support images of more than 8 bits, or if the recipe uses
    options that do not work with such images."""
    facts = getattr(data, "values", None)  # of a pack; its facts say it themselves
    if getattr(data, "valued", False):
        facts = {"channels": data.shape[0], "levels": getattr(data, "levels", None)}
    levels = part.data.levels
    if facts is None or (facts["channels"] in (1, 3) and levels is not None and levels <= 256):
        return
    name, spelt = data.name, spelling(card.name)
    kind = "real numbers" if facts["levels"] is None else f"{facts['levels']:,} levels"
    what = f"`{name}` has images with {facts['channels']} channels of {kind}"
    as_pictures = "; `--set data.levels=256` trains on 8 bits" if facts["channels"] in (1, 3) else ""
    most, kinds = {
        "values": (math.inf, ""),
        "levels": (65536, "grey levels"),
        "bytes": (256, "up to 256 grey levels"),
        "pictures": (0, "8-bit images"),
    }[card.takes]
    if (facts["levels"] or math.inf) > most:
        hint = f"use fm, ddpm, vae or vqvae{as_pictures}"
        raise UsageError(f"`{spelt}` models {kinds}, but {what}", hint=hint)
    if part.data.latent:
        raise UsageError(f"`data.latent` needs 8-bit images, but {what}", hint="omit `data.latent`")
    if changed := [key for key, _ in parse_augment(part.data.augment) if not AUGMENTS[key].moves]:
        message = f"`data.augment: {changed[0]}` works on the colours of 8-bit images, but {what}"
        raise UsageError(message, hint="use one that only moves pixels: `hflip`, `crop` or `patch`")


def check_data(part: Part, card: ModelCard, data: DataSpec | PackMeta | Facts) -> None:
    """Raises UsageError if a set lacks what a part's model needs. The hint names suitable sets."""
    check_values(part, card, data)
    name, (_, height, width) = data.name, data.shape
    if card.square and height != width:
        message = f"`{card.name}` needs square images, but those of `{name}` are {width}×{height}"
        hint = advice(
            "use {} to crop them; add {} to pad them",
            setting("data.size", min(height, width)),
            setting("data.fit", "pad"),
        )
        raise UsageError(message, hint=hint)
    if part.data.fit == "aspect" and not card.aspects:
        able = ", ".join(f"`{spelling(model.name)}`" for model in catalog.cards().values() if model.aspects)
        message = (
            f"`{spelling(card.name)}` trains on images of one shape, so `data.fit: aspect` does not apply"
        )
        raise UsageError(
            message,
            hint=advice(f"use {{}} or `pad`; several shapes work with {able}", setting("data.fit", "crop")),
        )
    needed = [extra for extra in EXTRAS if extra in card.needs]
    if lacking := [extra for extra in needed if extra not in data.extras]:
        able = ", ".join(spec.name for spec in SPECS.values() if set(needed) <= set(spec.extras))
        hint = advice(f"data sets that have them: {able or 'none'}; or use a folder with a `metadata.jsonl`")
        raise UsageError(f"`{card.name}` needs {extras_in_words(lacking)}, but `{name}` has none", hint=hint)
    count = data.classes if isinstance(data.classes, int) else len(data.classes or ())
    if "second_domain" in card.needs and count != 2:
        paired = [spec.name for spec in SPECS.values() if spec.n_classes == 2]
        hint = advice(
            f"data sets of two classes: {', '.join(paired)}; or use a folder with `trainA` and `trainB`"
        )
        message = f"`{card.name}` needs images of two domains, but `{name}` has {count or 'no'} classes"
        raise UsageError(message, hint=hint)
    if part.data.latent and not card.latents:
        able = ", ".join(f"`{model.name}`" for model in catalog.cards().values() if model.latents)
        message = f"`{card.name}` models grey levels, so it cannot use latents"
        raise UsageError(message, hint=f"`data.latent` works with {able}")
    conditional = part.options.get("conditional") is True
    if count or not (conditional or "labels" in card.needs):
        return
    hint = advice(
        "{}, or sort the images into class folders", gz("train", suggest(0), data=part.data.name or name)
    )
    if conditional and "labels" not in card.needs:
        hint = advice("{}; or {}", hint, setting("model.conditional", False))
    raise UsageError(f"`{card.name}` needs labels, but `{name}` has none", hint=hint)
