"""Recipes with absolute paths, as `run.yaml` is read from other folders too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gzcli.core.parts import Part
from gzcli.data.sets.names import DataSet
from gzcli.recipe.recipe import Recipe
from gzcli.store.run_folder import Run

R = TypeVar("R", bound=Recipe)

# Files that tell a folder of a run, or of a model of diffusers, from one that only has the same name.
MARKS = (Run.status_file.name, "config.json", "model_index.json")


def anchored(recipe: R, found: DataSet | None) -> R:
    """The recipe with absolute paths, as `run.yaml` is read from other folders too. Names of sets, runs and
    stages stay.

    found: the data set, if it is known.
    """
    name = found.reference if found else recipe.data.name
    latent = recipe.data.latent and _absolute(recipe.data.latent)
    data = replace(recipe.data, name=name, latent=latent)
    own_data = {
        stage: {key: _absolute(v) if key == "latent" and v else v for key, v in own.items()}
        for stage, own in recipe.own_data.items()
    }
    reused = {stage: _absolute(run) for stage, run in recipe.reused.items()}
    parts = tuple(_anchored(part) for part in recipe.parts)
    return replace(recipe, parts=parts, own_data=own_data, reused=reused).on(data)


def _anchored(part: Part) -> Part:
    base = part.options.get("base")
    if isinstance(base, str):
        part = replace(part, options={**part.options, "base": _absolute(base)})
    if part.train.init:
        part = replace(part, train=replace(part.train, init=_absolute(part.train.init)))
    if part.ood.background:
        part = replace(part, ood=replace(part.ood, background=_absolute(part.ood.background)))
    return part


def _absolute(name: str) -> str:
    """The absolute path of a file, a run or a model of diffusers; any other text unchanged."""
    path = Path(name).expanduser()
    is_path = path.is_file() or any((path / mark).is_file() for mark in MARKS)
    return str(path.absolute()) if is_path else name
