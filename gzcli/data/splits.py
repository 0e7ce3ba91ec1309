"""The plan of a pack: the split of each image, and its row there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gzcli.core.errors import MissingError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # what arrays call them
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# For each official split, of each of its images: the number of its packed split in SPLITS (int8 [N], −1: left
# out), and the row there (int64 [N]).
Plan = dict[str, tuple[np.ndarray, np.ndarray]]


def split_plan(title: str, counts: Mapping[str, int]) -> Plan:
    """The plan of a set to train on. Where the publisher has no validation split, min(2000, 10 %) of train
    become it, and where there is no test split, 10 %: by a fixed seed, in their order. RandomState's stream
    is frozen, so that this choice never changes.

    title: what messages call the set.
    counts: images of its official splits.

    Raises MissingError for too few images.
    """
    n = counts.get("train", 0)
    target = np.zeros(n, np.int8)
    order = np.random.RandomState(0).permutation(n)
    tenth = max(1, n // 10)
    if not counts.get("test"):
        target[order[:tenth]], order = 2, order[tenth:]
    if not counts.get("val"):
        target[order[: min(2000, tenth)]] = 1
    targets = {"train": target}
    targets |= {
        s: np.full(counts[s], code, np.int8) for code, s in ((1, "val"), (2, "test")) if counts.get(s)
    }
    return trainable(title, targets)


def foreign_plan(counts: Mapping[str, int]) -> Plan:
    """The plan of a set that is scored only: its official test images, or all where it has none, become the
    split `test`."""
    chosen = ("test",) if counts.get("test") else [split for split in SPLITS if counts.get(split)]
    return _in_rows({split: np.full(counts[split], SPLITS.index("test"), np.int8) for split in chosen})


def trainable(title: str, targets: dict[str, np.ndarray]) -> Plan:
    """The plan by the number of each image's packed split. Raises MissingError where none is left to train
    on."""
    if not (targets["train"] == 0).any():
        n = len(targets["train"])
        raise MissingError(f"`{title}` holds too few images: {n} to train on", hint="give at least 3 images")
    return _in_rows(targets)


def without(title: str, plan: Plan, bad: Iterable[tuple[str, int]]) -> Plan:
    """The plan without some images, which are given as (official split, number in it). Raises MissingError
    for too few left."""
    targets = {split: target.copy() for split, (target, _) in plan.items()}
    for split, i in bad:
        targets[split][i] = -1
    if rows_of(plan)["train"]:
        return trainable(title, targets)
    if not any((target >= 0).any() for target in targets.values()):
        raise MissingError(f"`{title}` holds no picture that decodes")
    return _in_rows(targets)


def _in_rows(targets: dict[str, np.ndarray]) -> Plan:
    """The plan by the number of each image's packed split, where images lie in their order."""
    plan, start = {}, [0, 0, 0]
    for split, target in targets.items():
        row = np.zeros(len(target), np.int64)
        for code in range(3):
            inside = target == code
            row[inside] = start[code] + np.arange(inside.sum())
            start[code] += int(inside.sum())
        plan[split] = target, row
    return plan


def rows_of(plan: Plan) -> dict[str, int]:
    """Images in each packed split."""
    return {
        split: sum(int((target == code).sum()) for target, _ in plan.values())
        for code, split in enumerate(SPLITS)
    }
