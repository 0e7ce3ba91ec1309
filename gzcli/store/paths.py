"""Where things are kept: `GZ_HOME` holds everything if set, else the user's cache (data, weights) and data (runs) folders."""

from __future__ import annotations

import os
from pathlib import Path


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


def _home(kind: str) -> Path:
    if home := os.environ.get("GZ_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs

    return getattr(platformdirs, kind)("gzcli", appauthor=False)
