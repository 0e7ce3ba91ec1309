"""What a training needs: its data set, which is not opened, and the weights and runs from which it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import GzError, UsageError
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, as_size, sides
from gzcli.data.packs.open import is_here, pack_options, peek, size_of
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import DataSpec, HubSet, locate
from gzcli.launch.from_file import find_run
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe, check_batch_of, check_data
from gzcli.recipe.resolve import Resolved
from gzcli.store import runs
from gzcli.store.hub import is_id, is_local

ASSUMED_CLASSES = 10  # assumed number of classes if a conditional model's set is not packed yet


@dataclass(frozen=True)
class DataFacts:
    """The facts of a data set that is not opened. None means unknown."""

    name: str  # in the recipe
    key: str  # in ids of runs
    title: str
    cached: bool = False  # whether its files are on this machine
    packed: bool = False  # whether its pack is
    download: int = 0  # bytes
    size: Size | None = None  # shape of the images that a model reads
    channels: int | None = None
    levels: int | None = None
    classes: tuple[str, ...] = ()  # placeholders if they are unknown; () without labels
    multilabel: bool = False
    n: int = 0  # training images; 0: not known
    valued: bool = False  # whether they are not 8-bit images

    def info(self) -> dict[str, Any] | None:
        """The description for which models are planned; None if size or channels are unknown."""
        if self.size is None or self.channels is None:
            return None
        # in this order, on which cache keys of costs depend
        info = {"shape": [self.channels, *sides(self.size)], "classes": list(self.classes)}
        levels = self.levels if self.packed or self.valued else self.levels or 256
        return {**info, "levels": levels, "multilabel": self.multilabel, "n": self.n}


def check_set(recipe: Recipe, meta: PackMeta, *, batch: bool = True) -> None:
    """Raises UsageError if a set lacks what a model needs or, with `batch`, has fewer images than a
    batch."""
    for part in recipe.parts:
        check_data(part, catalog.card(part.model), meta)
        if batch:
            check_batch_of(part, meta)


def of_data(recipe: Resolved) -> tuple[DataFacts, list[str]]:
    """The facts of the recipe's data set, and the steps needed before it can be used."""
    data, measured = recipe.data, recipe.choice.facts
    facts = DataFacts(
        data.name, recipe.key, data.name, size=size_of(data), channels=data.channels, levels=data.levels
    )
    try:
        dataset = recipe.dataset or locate(data.name)
        meta = peek(dataset, **pack_options(data))
    except GzError as error:
        return facts, [error.message]
    values: dict[str, Any] = {}
    if meta:
        check_set(recipe, meta)
        channels, height, width = meta.shape
        source = meta.values if data.levels in (None, (meta.values or {}).get("levels")) else None
        source = source or {"channels": channels, "levels": meta.levels}
        values = {
            "packed": True,
            "size": as_size(height, width),
            **{key: source[key] for key in ("channels", "levels")},
        }
        values |= {"classes": meta.classes, "multilabel": meta.multilabel, "n": meta.counts["train"]}
    elif isinstance(dataset, DataSpec):
        values = {"size": facts.size or dataset.sized(data.size).size, "levels": dataset.levels}
        values |= {"channels": data.channels or dataset.channels, "classes": dataset.class_names}
        values |= {"multilabel": dataset.multilabel, "n": dataset.trained_on}
    elif measured:
        classes = ASSUMED_CLASSES if any(part.options.get("conditional") for part in recipe.parts) else 0
        values = {"size": data.size or as_size(measured.height, measured.width)}
        values |= {"levels": measured.levels, "valued": measured.valued, "n": measured.n}
        values |= {"multilabel": measured.multilabel}
        channels = measured.channels if measured.valued else data.channels or measured.channels
        values |= {"channels": channels}
        values |= {"classes": tuple(map(str, range(classes)))}  # made up
    facts = replace(facts, **values | ({"levels": data.levels} if data.levels else {}))
    here, title = is_here(dataset), f"{dataset.name}: {dataset.title}" if dataset.name else dataset.title
    download = dataset.sized(data.size).download_size if isinstance(dataset, DataSpec) else 0
    facts = replace(facts, title=title, cached=here, download=download)
    fetch = f"`gz data download {dataset.name}`"
    if isinstance(dataset, HubSet):
        fetch = f"`hf download {dataset.address} --repo-type dataset`, done automatically by the training"
    return facts, [] if here else [fetch]


def in_steps(recipe: Resolved, epochs: float, say: Say = silent) -> dict[str, int]:
    """The steps for a number of passes over the training images (epochs), by the dotted key of each part of a
    recipe."""
    facts, flags = of_data(recipe)[0], {}
    for part in recipe.parts:
        images, batch = min(facts.n, part.data.n or facts.n), part.train.batch_size
        if not images:
            message = f"`--epochs`: the number of images in `{recipe.data.name}` is not known yet"
            raise UsageError(message, hint=f"use `--steps N`; each step uses {batch} images")
        flags[f"{part.in_recipe}train.steps"] = steps = max(1, math.ceil(epochs * images / batch))
        of = f"`{part.stage}`: " if part.stage else ""
        say(f"{of}{epochs:g} epochs of {images:,} images in batches of {batch}: --steps {steps}")
    return flags


def absent_weights(recipe: Recipe) -> list[str]:
    """The commands that download the hub models from which a recipe starts, if they are missing."""
    bases = (name for part in recipe.parts for name in (part.options.get("base"), part.data.latent))
    ids = {name for name in bases if isinstance(name, str) and is_id(name)}
    return [f"`hf download {name}`" for name in sorted(ids) if not is_local(name) and not runs.by_name(name)]


def absent_runs(recipe: Recipe) -> list[str]:
    """Messages about missing runs and files on which a recipe is built, with their keys."""
    absent = []
    for part in recipe.parts:
        latent = None if part.data.latent and is_id(part.data.latent) else part.data.latent
        keys = {"data.latent": latent, "train.init": part.train.init, "ood.background": part.ood.background}
        for key, name in keys.items():
            if not name or name in recipe.stages or Path(name).exists():
                continue
            try:
                find_run(name)
            except GzError as error:
                absent.append(f"`{key}`: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return list(dict.fromkeys(absent))
