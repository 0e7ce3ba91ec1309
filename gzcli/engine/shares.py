"""What the processes of a verb share out: each does its part, and all of them get the whole.

A rank that fails tells the others, so that none waits for a partner that has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gzcli.errors import GzError


def ranks() -> tuple[int, int]:
    """(rank, number of processes)."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def everyone(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    world = ranks()[1]
    parts: list[Any] = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, value)
    return parts


def agreed(value: Any) -> Any:
    """Rank 0's value on every rank: what a clock or a look at the disk told it."""
    return everyone(value)[0]


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all ranks in the order of the ranks, on every rank."""
    return joined(everyone(rows))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts [n, …] as one; an empty one may be of another shape."""
    return np.concatenate([part for part in parts if len(part)] or parts[:1])


def over(batches: Sequence[Any], work: Callable[[Any], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `work` makes of the batches, arrays [N, …] by name, on every rank, of which each did its share.

    work: batch of n → arrays [n, …]. `batches` can be sliced. Raises on every rank the error of the first
    rank that has one.
    """
    rank, world = ranks()
    start, end = (len(batches) * r // world for r in (rank, rank + 1))
    made, problem = [], None
    try:
        made = [work(batch) for batch in batches[start:end]]
    except GzError as e:
        problem = e
    found = everyone((made, problem))
    if first := next((e for _, e in found if e is not None), None):
        raise first
    parts = [part for made, _ in found for part in made]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
