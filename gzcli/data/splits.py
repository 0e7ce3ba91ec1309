"""Which image goes to which split of a pack, and to which row there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gzcli.errors import MissingError

SPLITS = ("train", "val", "test")

Plan = dict[str, tuple[np.ndarray, np.ndarray]]


def split_plan(title: str, counts: Mapping[str, int]) -> Plan:
    """For each official split, of each of its images: the number of the packed split, and the row there.

    `counts`: images of the official splits of the set `title`. Validation is carved from train by a fixed seed
    (min(2000, 10 %)), and so is test (10 %) where there is none. Carved images keep their order. RandomState's stream is
    frozen, so that the carving never changes. Raises MissingError for too few images.
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
    targets |= {s: np.full(counts[s], code, np.int8) for code, s in ((1, "val"), (2, "test")) if counts.get(s)}
    return placed(title, targets)


def placed(title: str, targets: dict[str, np.ndarray]) -> Plan:
    """The rows in the packed splits of images with these targets (−1: left out), in order. Each packed split has images
    of one official split only."""
    if not (targets["train"] == 0).any():
        n = len(targets["train"])
        raise MissingError(f"`{title}` holds too few images: {n} to train on", hint="give at least 3 images")
    plan = {}
    for split, target in targets.items():
        row = np.zeros(len(target), np.int64)
        for code in range(3):
            row[target == code] = np.arange((target == code).sum())
        plan[split] = target, row
    return plan


def rows_of(plan: Plan) -> dict[str, int]:
    """Images in each packed split."""
    return {split: sum(int((target == code).sum()) for target, _ in plan.values()) for code, split in enumerate(SPLITS)}
