"""The folders of gz: below `GZ_HOME`, otherwise in the user's cache folder (data, weights) and data folder
(runs). Also the shipped recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError, canonical, matching

_NAME = re.compile(r"[a-z0-9_-]+")


def cache_dir(*parts: str) -> Path:
    """A folder for files that gz can recreate or download again, such as `raw`, `packs`, `weights`,
    `kernels`."""
    return _home("user_cache_path").joinpath(*parts)


def user_dir(*parts: str) -> Path:
    """A folder for results: `runs`, `bench`."""
    return _home("user_data_path").joinpath(*parts)


def recipes_dir() -> Path:
    """The folder of the shipped recipes: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """The names of the shipped recipes, which users can type as models. No YAML is read."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def spelling(model: str) -> str:
    """A model's name in the spelling of its recipe: `sd-lora` for `sd_lora`; unchanged without a recipe."""
    return matching(model, recipe_names()) or model


def about_of(recipe: str) -> str:
    """The line `about` of a shipped recipe; "" without one. No YAML is read, which would take far longer."""
    path = recipes_dir() / f"{recipe}.yaml"
    line = re.search(r"(?m)^about: (.+)$", path.read_text(encoding="utf-8")) if path.is_file() else None
    return line[1] if line else ""


def trained_in(model: str) -> tuple[str, str] | None:
    """(recipe, stage) of the first shipped recipe that trains this model as a stage; None without one."""
    return _stages(recipes_dir()).get(canonical(model))


@cache
def _stages(folder: Path) -> dict[str, tuple[str, str]]:
    """(recipe, stage) of each model that a recipe in the folder trains as a stage."""
    import yaml

    def stages(part: Any) -> Iterator[tuple[str, Any]]:
        for key, below in part.items() if isinstance(part, dict) else ():
            yield from below.items() if key == "stages" and isinstance(below, dict) else stages(below)

    # the loader in C, because this runs for every name that is not a recipe's
    loader, places = getattr(yaml, "CSafeLoader", yaml.SafeLoader), dict[str, tuple[str, str]]()
    for name in recipe_names():
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        for stage, part in stages(yaml.load(text, loader)) if "stages:" in text else ():
            places.setdefault(canonical(str((part.get("model") or {}).get("name", ""))), (name, stage))
    return places


def is_name(text: str) -> bool:
    """Whether the text is a valid name of a folder in the store: `[a-z0-9_-]+`, so no path and not `..`."""
    return _NAME.fullmatch(text) is not None


def inside(path: Path, root: Path) -> Path:
    """`path`, if it is below `root` with symbolic links resolved; otherwise raises UsageError."""
    if root.resolve() not in path.resolve().parents:
        hint = "gz creates and removes files only in its own folders"
        raise UsageError(f"`{path}` is not inside `{root}`", hint=hint)
    return path


def _home(kind: str) -> Path:
    """`GZ_HOME`, otherwise what platformdirs returns for `user_cache_path` or `user_data_path`."""
    if home := os.environ.get("GZ_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs

    return getattr(platformdirs, kind)("gzcli", appauthor=False)
