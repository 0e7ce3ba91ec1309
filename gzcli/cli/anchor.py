"""Paths of a recipe, made absolute: `run.yaml` is read again from other folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# section → keys that may name a run, a file or a folder instead of something by its name
PLACES = {"data": ("latent",), "train": ("init",), "ood": ("background",), "model": ("base",)}
# of the folders that those keys take: a run, a model repository
MARKS = ("status.json", "config.json", "model_index.json")


def anchor(tree: dict[str, Any]) -> None:
    """Makes the paths of a recipe and of its stages absolute. The names of sets, runs and stages stay."""
    tree["data"]["name"] = data_reference(tree["data"]["name"])
    stages = tree.get("stages", {})
    for name, part in stages.items():
        if isinstance(part, str):
            stages[name] = absolute(part)
    for part in [tree, *(part for part in stages.values() if not isinstance(part, str))]:
        for section, keys in PLACES.items():
            for key in keys:
                if isinstance(value := (part.get(section) or {}).get(key), str):
                    part[section][key] = absolute(value)


def data_reference(name: str) -> str:
    """A data set by its proper name or its absolute path; what is not there as it was given."""
    from gzcli.data.names import locate
    from gzcli.errors import GzError

    try:
        found = locate(name)
    except GzError:  # whoever opens it tells of it
        return name
    return found.name or str(found.path)


def absolute(name: str) -> str:
    path = Path(name).expanduser()
    is_path = path.is_file() or any((path / mark).is_file() for mark in MARKS)
    return str(path.absolute()) if is_path else name
