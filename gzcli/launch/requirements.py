"""What a run needs before it starts: its data, memory, weights and earlier runs.

No data set is opened and no torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gzcli.core.devices import gpu_memory, host_memory
from gzcli.core.errors import GzError, UsageError
from gzcli.core.parts import Part
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, as_size, sides, size
from gzcli.data.packs.open import pack_options, peek, size_of
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
    """A data set as far as it is known without opening it.

    name: its name in the recipe.
    key: its name in ids of runs.
    title: its name and what it shows.
    cached: whether its files are on this machine.
    packed: whether its pack is on this machine.
    download: bytes to download.
    size: of the images that a model sees, as `data.size` has it; None: not known.
    channels: 1 or 3; None: not known.
    levels: number of grey levels; None: not known.
    classes: names of the classes, made up where they are not known; () without labels.
    multilabel: whether an image may have any number of the classes.
    n: number of training images; 0: not known.
    """

    name: str
    key: str
    title: str
    cached: bool = False
    packed: bool = False
    download: int = 0
    size: Size | None = None
    channels: int | None = None
    levels: int | None = None
    classes: tuple[str, ...] = ()
    multilabel: bool = False
    n: int = 0

    def info(self) -> dict[str, Any] | None:
        """The description for which models are planned, as `TrialJob.info` has it; None where size or
        channels are not known."""
        if self.size is None or self.channels is None:
            return None
        known = {"levels": self.levels or 256, "multilabel": self.multilabel, "n": self.n}
        return {"shape": [self.channels, *sides(self.size)], "classes": list(self.classes), **known}


def of_data(recipe: Resolved) -> tuple[DataFacts, list[str]]:
    """What is known of the recipe's data set, and what has to be done before it can be used.

    Raises UsageError where its pack shows that it lacks something that a model needs.
    """
    data = recipe.data
    facts = DataFacts(
        data.name, recipe.key, data.name, size=size_of(data), channels=data.channels, levels=data.levels
    )
    try:
        found = recipe.found or locate(data.name)
        meta = peek(found, **pack_options(data))
    except GzError as error:
        return facts, [error.message]
    if meta:
        for part in recipe.parts:
            check_data(part, catalog.card(part.model), meta.classes, meta.name, meta.extras, meta.shape)
            check_batch_of(part, meta.counts["train"], meta.name)
        channels, height, width = meta.shape
        levels = data.levels or meta.levels
        facts = replace(
            facts,
            packed=True,
            channels=channels,
            size=as_size(height, width),
            levels=levels,
            classes=meta.classes,
            multilabel=meta.multilabel,
            n=meta.counts["train"],
        )
    elif isinstance(found, DataSpec):
        facts = replace(
            facts,
            size=size_of(data) or found.sized(data.size).size,
            channels=data.channels or found.channels,
            levels=data.levels or found.levels,
            classes=found.classes if isinstance(found.classes, tuple) else made_up(found.classes),
            multilabel=found.multilabel,
            n=found.trained_on,
        )
    elif known := recipe.choice.facts:
        labelled = any(part.options.get("conditional") for part in recipe.parts)
        facts = replace(
            facts,
            size=data.size or as_size(known.height, known.width),
            channels=data.channels or known.channels,
            levels=data.levels or 256,
            classes=made_up(UNKNOWN if labelled else 0),
            n=known.n,
        )
    row = next((row for row in listing() if row["name"] == found.name), None)
    if row is None:
        return replace(facts, title=found.title, cached=True), []
    here = row["cached"] or (row["path"] is not None and Path(row["path"]).exists())
    download = found.sized(data.size).download_size if isinstance(found, DataSpec) else 0
    facts = replace(facts, title=f"{row['name']}: {row['title']}", cached=here, download=download)
    return facts, [] if here else [f"`gz data download {row['name']}`"]


def in_steps(recipe: Resolved, epochs: float, say: Say = silent) -> dict[str, int]:
    """The steps of so many passes over the training images, by the dotted key of each part of a recipe.

    say: takes a line about each.

    Raises UsageError where it is not known how many images the set has.
    """
    facts, found = of_data(recipe)[0], {}
    for part in recipe.parts:
        images, batch = min(facts.n, part.data.n or facts.n), part.train.batch_size
        if not images:
            raise UsageError(
                f"`--epochs`: how many images `{recipe.data.name}` has is not known yet",
                hint=f"`--steps N` says how long: a step takes {batch} images",
            )
        key = f"stages.{part.stage}.train.steps" if part.stage else "train.steps"
        found[key] = steps = max(1, math.ceil(epochs * images / batch))
        of = f"`{part.stage}`: " if part.stage else ""
        say(f"{of}{epochs:g} epochs of {images:,} images in batches of {batch}: --steps {steps}")
    return found


def made_up(count: int) -> tuple[str, ...]:
    """Names of so many classes."""
    return tuple(map(str, range(count)))


def memory_of(plan: Plan) -> int | None:
    """Bytes that a process may take: of the smallest GPU, or its share of this machine; None: not known."""
    return gpu_memory() if plan.gpus else host_memory() // (plan.processes // plan.machines)


def memory_hint(forecasts: Sequence[Forecast], plan: Plan, there: int | None) -> str | None:
    """What to do where a model needs more memory than this machine has for a process; None where all fit. On
    a GPU a batch that does not fit is split as it is trained.

    there: bytes that a process may take.
    """
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
    """The commands that download the models of the hub that a recipe begins with (`model.base`,
    `data.latent`) and that are not on this machine."""
    bases = (name for part in recipe.parts for name in (part.options.get("base"), part.data.latent))
    ids = {name for name in bases if isinstance(name, str) and is_id(name)}
    return [f"`hf download {name}`" for name in sorted(ids) if not at_hand(name) and not runs.by_name(name)]


def absent_runs(recipe: Recipe) -> list[str]:
    """Messages about the runs and files that a recipe is built on and that are not there, with their keys."""
    found = []
    for key, name in _built_on(recipe):
        if name in recipe.stages or Path(name).exists():
            continue
        try:
            runs.find(name)
        except GzError as error:
            found.append(f"`{key}`: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return list(dict.fromkeys(found))


def _built_on(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, name) of each run or file that a recipe is built on, but for ids of the hub."""
    for part in recipe.parts:
        if part.data.latent and not is_id(part.data.latent):
            yield "data.latent", part.data.latent
        if part.train.init:
            yield "train.init", part.train.init
        if part.ood.background:
            yield "ood.background", part.ood.background
