"""What a run needs before it starts: its data, memory, weights and earlier runs.

No data set is opened and no torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gzcli.core.devices import gpu_memory, host_memory
from gzcli.core.errors import GzError, UsageError
from gzcli.core.sections import Part
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, as_size, sides, size
from gzcli.data.packs.open import pack_options, peek, size_of
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.library import listing
from gzcli.data.sets.names import locate
from gzcli.data.sets.registry import DataSpec
from gzcli.launch.forecast import Forecast
from gzcli.launch.launcher import Plan
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe, check_batch_of, check_data
from gzcli.recipe.resolve import Resolved
from gzcli.store import runs
from gzcli.store.hub import at_hand, is_id

UNKNOWN = 10  # classes that are planned for where a conditional model's set is not packed yet


@dataclass(frozen=True)
class DataFacts:
    """A data set as far as it is known without opening it; None where something is not."""

    name: str  # in the recipe
    key: str  # in ids of runs
    title: str
    cached: bool = False  # whether its files are on this machine
    packed: bool = False  # whether its pack is
    download: int = 0  # bytes
    size: Size | None = None  # of the images that a model sees
    channels: int | None = None
    levels: int | None = None
    classes: tuple[str, ...] = ()  # made up where they are not known; () without labels
    multilabel: bool = False
    n: int = 0  # training images; 0: not known

    def info(self) -> dict[str, Any] | None:
        """The description for which models are planned; None where size or channels are not known."""
        if self.size is None or self.channels is None:
            return None
        return {
            "shape": [self.channels, *sides(self.size)],
            "classes": list(self.classes),
            "levels": self.levels or 256,
            "multilabel": self.multilabel,
            "n": self.n,
        }


def check_set(recipe: Recipe, meta: PackMeta, *, batch: bool = True) -> None:
    """Raises UsageError where a set lacks what a model needs or, with `batch`, has fewer images than a
    batch."""
    for part in recipe.parts:
        check_data(part, catalog.card(part.model), meta.classes, meta.name, meta.extras, meta.shape)
        if batch:
            check_batch_of(part, meta.counts["train"], meta.name)


def of_data(recipe: Resolved) -> tuple[DataFacts, list[str]]:
    """What is known of the recipe's data set, and what has to be done before it can be used."""
    data, found = recipe.data, recipe.choice.facts
    facts = DataFacts(
        data.name, recipe.key, data.name, size=size_of(data), channels=data.channels, levels=data.levels
    )
    try:
        dataset = recipe.found or locate(data.name)
        meta = peek(dataset, **pack_options(data))
    except GzError as error:
        return facts, [error.message]
    known: dict[str, Any] = {}
    if meta:
        check_set(recipe, meta)
        channels, height, width = meta.shape
        known = {"packed": True, "size": as_size(height, width), "channels": channels, "levels": meta.levels}
        known |= {"classes": meta.classes, "multilabel": meta.multilabel, "n": meta.counts["train"]}
    elif isinstance(dataset, DataSpec):
        classes = dataset.classes if isinstance(dataset.classes, tuple) else made_up(dataset.classes)
        known = {"size": size_of(data) or dataset.sized(data.size).size, "classes": classes}
        known |= {"channels": data.channels or dataset.channels, "levels": dataset.levels}
        known |= {"multilabel": dataset.multilabel, "n": dataset.trained_on}
    elif found:
        labelled = any(part.options.get("conditional") for part in recipe.parts)
        known = {"size": data.size or as_size(found.height, found.width), "levels": 256, "n": found.n}
        known |= {"channels": data.channels or found.channels, "classes": made_up(labelled * UNKNOWN)}
    known |= {"levels": data.levels} if data.levels else {}
    facts = replace(facts, **known)
    row = next((row for row in listing() if row["name"] == dataset.name), None)
    if row is None:
        return replace(facts, title=dataset.title, cached=True), []
    here = row["cached"] or (row["path"] is not None and Path(row["path"]).exists())
    download = dataset.sized(data.size).download_size if isinstance(dataset, DataSpec) else 0
    facts = replace(facts, title=f"{row['name']}: {row['title']}", cached=here, download=download)
    return facts, [] if here else [f"`gz data download {row['name']}`"]


def in_steps(recipe: Resolved, epochs: float, say: Say = silent) -> dict[str, int]:
    """The steps of so many passes over the training images, by the dotted key of each part of a recipe."""
    facts, flags = of_data(recipe)[0], {}
    for part in recipe.parts:
        images, batch = min(facts.n, part.data.n or facts.n), part.train.batch_size
        if not images:
            raise UsageError(
                f"`--epochs`: how many images `{recipe.data.name}` has is not known yet",
                hint=f"`--steps N` says how long: a step takes {batch} images",
            )
        flags[f"{part.in_recipe}train.steps"] = steps = max(1, math.ceil(epochs * images / batch))
        of = f"`{part.stage}`: " if part.stage else ""
        say(f"{of}{epochs:g} epochs of {images:,} images in batches of {batch}: --steps {steps}")
    return flags


def made_up(count: int) -> tuple[str, ...]:
    """Names of so many classes."""
    return tuple(map(str, range(count)))


def memory_of(plan: Plan) -> int | None:
    """Bytes that a process may take: of the smallest GPU, or its share of this machine; None: not known."""
    return gpu_memory() if plan.gpus else host_memory() // (plan.processes // plan.machines)


def memory_hint(forecasts: Sequence[Forecast], plan: Plan, there: int | None) -> str | None:
    """What to do where a model needs more memory than there is for a process; on a GPU its batch is split as
    it is trained."""
    for forecast in forecasts:
        if there and not plan.gpus and forecast.bytes and forecast.bytes > there:
            ways = ", ".join(ways_to_save(forecast.part, plan)) or "a smaller `train.batch_size`"
            return (
                f"`{forecast.part.model}` may not fit: this machine has {size(there)} for each process; what "
                f"saves memory: {ways}"
            )
    return None


def ways_to_save(part: Part, plan: Plan) -> list[str]:
    """The options that make a training step of this recipe take less memory, the cheapest first."""
    cheaper = {"cache": (False, "true"), "checkpointing": (False, "true"), "dtype": ("fp32", "bf16")}
    ways = [f"`--set model.{key}={to}`" for key, (now, to) in cheaper.items() if part.options.get(key) == now]
    if plan.gpus and part.optim.name in ("adam", "adamw"):
        ways.append("`--set optim.name=adamw8bit`")
    each = part.train.batch_size // plan.processes
    if pieces := next((k for k in range(part.train.accumulate + 1, each + 1) if each % k == 0), None):
        ways.append(f"`--set train.accumulate={pieces}`")
    return ways


def absent_weights(recipe: Recipe) -> list[str]:
    """The commands that download the models of the hub that a recipe begins with and that are not here."""
    bases = (name for part in recipe.parts for name in (part.options.get("base"), part.data.latent))
    ids = {name for name in bases if isinstance(name, str) and is_id(name)}
    return [f"`hf download {name}`" for name in sorted(ids) if not at_hand(name) and not runs.by_name(name)]


def absent_runs(recipe: Recipe) -> list[str]:
    """Messages about the runs and files that a recipe is built on and that are not there, with their keys."""
    absent = []
    for part in recipe.parts:
        latent = None if part.data.latent and is_id(part.data.latent) else part.data.latent
        keys = {"data.latent": latent, "train.init": part.train.init, "ood.background": part.ood.background}
        for key, name in keys.items():
            if not name or name in recipe.stages or Path(name).exists():
                continue
            try:
                runs.find(name)
            except GzError as error:
                absent.append(f"`{key}`: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return list(dict.fromkeys(absent))
