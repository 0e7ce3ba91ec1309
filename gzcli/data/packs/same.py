"""Checks that a data set is still the one that a run was trained on: the user's files may have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError
from gzcli.core.units import by_sides
from gzcli.data.packs.pack import PackMeta
from gzcli.store.files import read_object, write_json
from gzcli.store.run_folder import Run

FILE = Run.environment_file  # of a run, which holds the record, under the key `data`
NAMED = 5  # classes that a message names at most


def record(meta: PackMeta) -> dict[str, Any]:
    """The record of a run's data: a hash of the content, and facts for a message where it has changed."""
    return {
        "name": meta.name,
        "digest": meta.digest,
        "shape": list(meta.shape),
        "classes": list(meta.classes),
        "counts": dict(meta.counts),
        "extras": list(meta.extras),
    }


def remember(folder: Path, meta: PackMeta) -> None:
    """Records the data of the run in `folder`, once."""
    env = read_object(folder / FILE)
    if not env.get("data"):
        write_json(folder / FILE, env | {"data": record(meta)})


def check(folder: Path, meta: PackMeta) -> None:
    """Compares a set with the record of the run in `folder`, if both have the same name.

    Raises MissingError that says what has changed.
    """
    then, now = read_object(folder / FILE).get("data"), record(meta)
    if then is None or then["name"] != now["name"] or then["digest"] == now["digest"]:
        return
    raise MissingError(
        f"`{meta.title}` is not what `{folder.name}` was trained on: {', '.join(changes(then, now))}",
        hint="put the images back as they were, or train anew on what is there now, without `--resume`",
    )


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records, for people."""
    found = []
    for what, names in (
        ("no class", [name for name in then["classes"] if name not in now["classes"]]),
        ("a new class", [name for name in now["classes"] if name not in then["classes"]]),
    ):
        if names:
            shown = " ".join(f"`{name}`" for name in names[:NAMED])
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(f"{what} {shown}{more}" + (" any more" if what == "no class" else ""))
    for split in ("train", "val", "test"):
        if then["counts"][split] != now["counts"][split]:
            found.append(f"{now['counts'][split]:,} {split} images instead of {then['counts'][split]:,}")
    if then["shape"] != now["shape"]:
        old, new = (by_sides(shape[::-1]) for shape in (then["shape"], now["shape"]))
        found.append(f"images of {new} instead of {old}")
    if then["extras"] != now["extras"]:
        old, new = (", ".join(extras) or "nothing" for extras in (then["extras"], now["extras"]))
        found.append(f"with {new} to each instead of {old}")
    return found or ["other pixels, labels or texts"]
