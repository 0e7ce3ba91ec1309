"""Where things are kept: `GZ_HOME` holds everything if set, else the user's cache (data, weights) and data
(runs) folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gzcli.errors import UsageError, canonical

_NAME = re.compile(r"[a-z0-9_-]+")


def cache_dir(*parts: str) -> Path:
    """Files that can be made or fetched again: `raw`, `packs`, `features`, `weights`."""
    return _home("user_cache_path").joinpath(*parts)


def user_dir(*parts: str) -> Path:
    """Files that cost work: `runs`, `bench`."""
    return _home("user_data_path").joinpath(*parts)


def recipes_dir() -> Path:
    """The shipped recipes: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes, which are the models that a user can type; file names alone, no YAML is read."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def spelling(model: str) -> str:
    """A model's name as it is typed, which is its recipe's: `sd-lora` for `sd_lora`; as given without a
    recipe."""
    return next((name for name in recipe_names() if canonical(name) == canonical(model)), model)


def trained_in(model: str) -> tuple[str, str] | None:
    """The first shipped recipe, and its stage, that trains a model which has no recipe of its own; None
    without."""
    import yaml

    def stages(part: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(part, dict):
            yield from (part.get("stages") or {}).items()
            for section in (part.get("for") or {}).values():
                yield from stages(section)

    for name in recipe_names():
        text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
        for stage, part in stages(yaml.safe_load(text)) if "stages:" in text else ():
            if canonical(str((part.get("model") or {}).get("name", ""))) == canonical(model):
                return name, stage
    return None


def is_name(text: str) -> bool:
    """Whether the text may name a folder of the store: `[a-z0-9_-]+`, so never a path, never `..`."""
    return _NAME.fullmatch(text) is not None


def inside(path: Path, root: Path) -> Path:
    """`path`, once it is known to lie below `root`, links followed: what the store makes or removes passes
    here first.

    Raises UsageError where it is `root` itself or lies outside.
    """
    if root.resolve() not in path.resolve().parents:
        hint = "gz makes and removes files in folders of its own only"
        raise UsageError(f"`{path}` does not lie inside `{root}`", hint=hint)
    return path


def _home(kind: str) -> Path:
    if home := os.environ.get("GZ_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs

    return getattr(platformdirs, kind)("gzcli", appauthor=False)
