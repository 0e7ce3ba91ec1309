"""`--track`: which trackers there are, and whether their packages are installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from gzcli.cli.options import choose, names, split
from gzcli.core.errors import MissingError
from gzcli.core.sections import TRACKERS


def complete_trackers(incomplete: str) -> list[str]:
    return names(incomplete, TRACKERS)


def check_trackers(given: Sequence[str] | None, *, wandb: bool) -> list[str] | None:
    """The values of `--track`, each of which may be a list as `wandb,mlflow`; None where it is not given.

    wandb: whether `--wandb` was given.

    Raises UsageError for an unknown tracker, MissingError for one whose package is not installed.
    """
    found = [choose("tracker", word, TRACKERS) for text in given or () for word in split(text)]
    for name in dict.fromkeys([*found, *(["wandb"] if wandb else [])]):
        if find_spec(name) is None:
            typed = f"--track {name}" if name in found else "--wandb"
            raise MissingError(f"`{typed}` needs the package `{name}`", hint=f"pip install {name}")
    return found or None
