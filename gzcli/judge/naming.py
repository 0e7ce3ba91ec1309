"""Paths as tables name them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def short_names(names: Iterable[str]) -> dict[str, str]:
    """A short name for each path or set: of a path its last parts, as many as no other path ends in."""
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, own in parts.items():
        others, depth = [other for key, other in parts.items() if key != name], 1
        while depth < len(own) and any(own[-depth:] == other[-depth:] for other in others):
            depth += 1
        short[name] = str(Path(*own[-depth:])) if own else name
    return short
