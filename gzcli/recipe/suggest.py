"""The model to begin with, for hints, the end of an import, and `gz train --data SET`."""

from __future__ import annotations

# need of `gz which` → what `gz list --can` calls it; None: the shipped leagues count calls of the network
NEEDS = {"likelihood": "log_prob", "labels": "conditional", "ood": "ood", "one-call": None}


def suggest(classes: int | None) -> str:
    """The model to begin with on a set with this number of classes. 0: no labels. None: unknown."""
    return "cfm" if classes else "fm"
